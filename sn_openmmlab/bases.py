"""Configs that inherit from another package: ``_base_ = 'sn_openmmlab::mmdet/...'`` and ``_base_ = 'mmseg::...'``.

mmengine looks such a package up by the name of its distribution, in a table that lacks ours and knows mmsegmentation,
but not the onedl-mmsegmentation that has the same modules. Where there is no such distribution, the module's own name
does.
"""

import importlib.util

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.utils import is_installed

NEED_HELP = {'sn_openmmlab'} | {module for module, distribution in MODULE2PACKAGE.items() if module != distribution}


def register() -> None:
    """Enter this package and all importable libraries into mmengine's table."""
    MODULE2PACKAGE['sn_openmmlab'] = 'sn_openmmlab'
    for module, distribution in MODULE2PACKAGE.items():
        if module != distribution and not is_installed(distribution) and importlib.util.find_spec(module):
            MODULE2PACKAGE[module] = module
