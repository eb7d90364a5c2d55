"""All that importing this package changes in mmengine, besides the registered layers and hooks."""

import functools
import importlib.util

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import elementwise_flop_counter
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.runner import CheckpointLoader
from mmengine.utils import is_installed

from .checkpoint import SCHEME, load_from_switchnorm

# Libraries whose configs mmengine finds only after this package is imported.
FOUND_AFTER_IMPORT = {'sn_openmmlab'} | {
    module for module, distribution in MODULE2PACKAGE.items() if module != distribution
}


def register() -> None:
    """Register ``switchnorm://``, let configs of more packages be found, and count the FLOPs of SN."""
    CheckpointLoader.register_scheme(SCHEME, load_from_switchnorm, force=True)
    _find_bases()
    _count_flops()


def _find_bases() -> None:
    """Let configs inherit from another package: ``_base_ = 'sn_openmmlab::mmdet/...'`` and ``'mmseg::...'``.

    mmengine has a table from modules to distributions, and looks only for the distribution. The table lacks this
    package. It names mmsegmentation for mmseg, and so misses onedl-mmsegmentation. Where a distribution is missing but
    its module is there, the table gets the module's own name.

    mmengine also takes the package's name for the scope of the classes in the base. This package is no scope: its
    configs are for several libraries, and each sets its own ``default_scope``.
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
    """Let mmengine's complexity analysis count 5 FLOPs an element for SN, as for other norms.

    It counts torch's norm operators, which SN does not use. So the operator that computes SN's variances is counted: in
    a trace this is ``var_mean`` in training mode and ``square`` in evaluation mode.
    """
    for operator in 'aten::var_mean', 'aten::square':
        complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.setdefault(operator, elementwise_flop_counter(5))
