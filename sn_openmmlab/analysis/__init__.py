"""Importance ratios of trained networks. Reading needs no more than the package; ``draw`` and ``page`` need matplotlib."""

from .read import Run, mean_ratios, read_ratios

__all__ = ['Run', 'mean_ratios', 'read_ratios']
