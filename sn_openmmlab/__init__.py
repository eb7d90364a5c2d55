"""Switchable Normalization for OpenMMLab.

Importing this package registers the layers SN, SN1d, SN2d, SN3d, SyncSN and SSN, three hooks, and checkpoint addresses
that begin with ``switchnorm://``.
"""

import importlib.util
import sys

import torch

if sys.version_info < (3, 8):  # noqa: UP036  (pip refuses; a checkout does not)
    raise ImportError('sn_openmmlab needs Python 3.8 or newer; this is {}.{}.{}'.format(*sys.version_info))
if [int(number) for number in torch.__version__.split('.')[:2]] < [1, 13]:
    raise ImportError(f'sn_openmmlab needs torch 1.13 or newer; this is {torch.__version__}')
if importlib.util.find_spec('mmengine') is None:
    raise ImportError(
        'sn_openmmlab needs mmengine, which comes with mmdetection and mmsegmentation: '
        "pip install 'sn-openmmlab[onedl]' for the maintained distributions, "
        "or 'sn-openmmlab[openmmlab]' for upstream's"
    )

from .analysis import read_ratios
from .convert import convert_switch_norm, fold_batch_norm
from .hooks import SNBatchAverageHook, SNRatioHook, SSNRadiusHook
from .layers import SparseSwitchNorm, SwitchNorm, SwitchNorm1d, SwitchNorm2d, SwitchNorm3d, SyncSN
from .ops import switch_norm
from .register import register
from .running_statistics import average_statistics
from .swap import swap_norm
from .version import __version__

register()

__all__ = [
    'SNBatchAverageHook',
    'SNRatioHook',
    'SSNRadiusHook',
    'SparseSwitchNorm',
    'SwitchNorm',
    'SwitchNorm1d',
    'SwitchNorm2d',
    'SwitchNorm3d',
    'SyncSN',
    '__version__',
    'average_statistics',
    'convert_switch_norm',
    'fold_batch_norm',
    'read_ratios',
    'swap_norm',
    'switch_norm',
]
