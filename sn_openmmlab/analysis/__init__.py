"""Importance ratios of trained networks, read without building these. ``draw`` and ``page`` need matplotlib."""

from .read import Run, mean_ratios, read_ratios

__all__ = ['Run', 'mean_ratios', 'read_ratios']
