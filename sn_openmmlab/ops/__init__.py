"""Switchable Normalization on tensors. Nothing here imports more than torch."""

from .function import switch_norm
from .reference import NORMALIZERS, switch_norm_reference
from .sparsestmax import sparsestmax

__all__ = ['NORMALIZERS', 'sparsestmax', 'switch_norm', 'switch_norm_reference']
