"""Change mmengine, when this package is imported, in all but the registered layers and hooks."""

import functools
import importlib.util

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import elementwise_flop_counter
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.runner import CheckpointLoader
from mmengine.utils import is_installed

from .checkpoint import SCHEME, load_from_switchnorm

# libraries whose configs mmengine finds only once this package is imported
FOUND_AFTER_IMPORT = {'sn_openmmlab'} | {
    module for module, distribution in MODULE2PACKAGE.items() if module != distribution
}


def register() -> None:
    """Add ``switchnorm://``, the places of configs, and the FLOPs of SN."""
    CheckpointLoader.register_scheme(SCHEME, load_from_switchnorm, force=True)
    _find_bases()
    _count_flops()


def _find_bases() -> None:
    """Let configs inherit from another package: ``_base_ = 'sn_openmmlab::mmdet/...'`` and ``'mmseg::...'``.

    mmengine looks for such a package by the name of its distribution, which it takes from a table. The table lacks this
    package, and has mmsegmentation for mmseg, but not onedl-mmsegmentation. Where a distribution is not installed and
    the module is there, the module's own name serves.

    It also takes the package's name for the scope of the classes that the base names. Ours is no scope: it has configs
    for several libraries, each with its own ``default_scope``.
    """
    MODULE2PACKAGE['sn_openmmlab'] = 'sn_openmmlab'
    Config._get_cfg_path = staticmethod(_drop_our_scope(Config._get_cfg_path))
    for module, distribution in MODULE2PACKAGE.items():
        if module != distribution and not is_installed(distribution) and importlib.util.find_spec(module):
            MODULE2PACKAGE[module] = module


def _drop_our_scope(find):
    @functools.wraps(find)
    def get_cfg_path(*args):
        path, scope = find(*args)
        return path, None if scope == 'sn_openmmlab' else scope

    return get_cfg_path


def _count_flops() -> None:
    """Let mmengine's complexity analysis count SN as the other norms, 5 an element.

    It counts norm layers by torch's operators for them, and SN uses none of these. SN is counted by the operator that
    computes its variances: in a trace this is ``var_mean`` in training mode, and ``square`` in evaluation.
    """
    for operator in 'aten::var_mean', 'aten::square':
        complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.setdefault(operator, elementwise_flop_counter(5))
