"""Switchable Normalization on tensors. Nothing here imports more than torch."""

from .function import switch_norm
from .reference import NORMALIZERS, switch_norm_reference

__all__ = ['NORMALIZERS', 'switch_norm', 'switch_norm_reference']
