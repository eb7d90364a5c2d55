"""Configs: the norms of a model found, swapped, and written as a config that inherits."""

from .build import Norm
from .rewrite import PARTS, STATISTICS, TARGETS, Swap, plan_swap, swap_norm

__all__ = ['PARTS', 'STATISTICS', 'TARGETS', 'Norm', 'Swap', 'plan_swap', 'swap_norm']
