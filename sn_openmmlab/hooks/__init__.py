"""Hooks of mmengine's Runner."""

from .batch_average import SNBatchAverageHook
from .ratios import SNRatioHook
from .ssn_radius import SSNRadiusHook

__all__ = ['SNBatchAverageHook', 'SNRatioHook', 'SSNRadiusHook']
