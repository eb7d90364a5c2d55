"""Switchable Normalization on tensors. Nothing here imports more than torch."""

from .formula import NORMALIZERS, switch_norm_reference
from .sparsestmax import sparsestmax
from .switch_norm import switch_norm

__all__ = ['NORMALIZERS', 'sparsestmax', 'switch_norm', 'switch_norm_reference']
