"""All that importing this package changes in mmengine, beside the registered layers and hooks."""

import functools
import importlib.util

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import elementwise_flop_counter
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.runner import CheckpointLoader
from mmengine.utils import is_installed

from .checkpoint import SCHEME, load_from_switchnorm

NEED_HELP = {'sn_openmmlab'} | {module for module, distribution in MODULE2PACKAGE.items() if module != distribution}


def register() -> None:
    """Do it."""
    CheckpointLoader.register_scheme(SCHEME, load_from_switchnorm, force=True)
    _find_bases()
    _count_flops()


def _find_bases() -> None:
    """Let configs inherit from another package: ``_base_ = 'sn_openmmlab::mmdet/...'`` and ``'mmseg::...'``.

    mmengine looks such a package up by the name of its distribution, in a table that lacks ours and knows
    mmsegmentation, but not the onedl-mmsegmentation that has the same modules. Where there is no such distribution, the
    module's own name does.

    It also takes the package's name for the scope of the classes that the base names. Ours is no scope: it has configs
    for several libraries, each with its own ``default_scope``.
    """
    MODULE2PACKAGE['sn_openmmlab'] = 'sn_openmmlab'
    Config._get_cfg_path = staticmethod(_without_our_scope(Config._get_cfg_path))
    for module, distribution in MODULE2PACKAGE.items():
        if module != distribution and not is_installed(distribution) and importlib.util.find_spec(module):
            MODULE2PACKAGE[module] = module


def _without_our_scope(find):
    @functools.wraps(find)
    def get_cfg_path(*args):
        path, scope = find(*args)
        return path, None if scope == 'sn_openmmlab' else scope

    return get_cfg_path


def _count_flops() -> None:
    """Let mmengine's complexity analysis count SN as the other norms, 5 an element.

    It counts norm layers by the operators that torch has for them. SN is counted by what takes its variances: in a
    trace this is ``var_mean`` in training mode, and ``square`` in evaluation.
    """
    for operator in 'aten::var_mean', 'aten::square':
        complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.setdefault(operator, elementwise_flop_counter(5))
