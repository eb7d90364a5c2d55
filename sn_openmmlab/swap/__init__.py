"""Swap the norm layers of a config, and write the result as a config that inherits from it."""

from .build import Norm
from .rewrite import PARTS, STATISTICS, TARGETS, Swap, plan_swap, swap_norm

__all__ = ['PARTS', 'STATISTICS', 'TARGETS', 'Norm', 'Swap', 'plan_swap', 'swap_norm']
