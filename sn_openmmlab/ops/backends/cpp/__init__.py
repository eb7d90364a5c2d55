"""The four big passes in C++: for the CPU, in float32 and bfloat16, where the install could compile them.

``passes.cpp`` and ``algebra.cpp`` get pointers and sizes, and know nothing of torch: compiled once, they serve every
version of torch. Maps, moments and coefficients are those of :mod:`..native`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import algebra  # noqa: F401  (part of a backend's interface)
from .algebra import library, pointer


def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a library, for such tensors."""
    return device.type == 'cpu' and dtype in (torch.float32, torch.bfloat16) and library() is not None


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Pass 1: mean and biased variance of each map."""
    return _sums(x)


def affine(x: Tensor, mean: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Pass 2: ``a*(x - mean) + s``."""
    return _combine(x, mean, a, s)


def reduce(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Pass 3: sum of dy and sum of dy * (x - mean) over each map."""
    return _sums(x, dy, mean)


def combine(dy: Tensor, x: Tensor, mean: Tensor, a: Tensor, b1: Tensor, b0: Tensor) -> Tensor:
    """Pass 4: ``a*dy + b1*(x - mean) + b0``."""
    return _combine(x, mean, b1, b0, dy, a)


def _sums(x: Tensor, dy: Tensor | None = None, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    first, second = x.new_empty((2, *x.shape[:2]), dtype=torch.float32).unbind()
    _call(library().sn_sums, x, dy, mean, first, second)
    return first, second


def _combine(x, mean, b1, b0, dy=None, a=None) -> Tensor:
    out = torch.empty_like(x)
    small = [None if t is None else t.contiguous() for t in (mean, a, b1, b0)]
    _call(library().sn_combine, x, dy, out, *small)
    return out


def _call(function, x: Tensor, *others: Tensor | None) -> None:
    """Call with the tensors, and with what says how ``x`` is stored."""
    storage = *x.shape, not x.is_contiguous(), x.dtype == torch.bfloat16
    function(*map(pointer, (x, *others)), *storage, torch.get_num_threads())
