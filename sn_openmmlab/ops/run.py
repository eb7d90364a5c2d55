"""Forward and backward of the op on a backend.

The two sums over processes that synchronised statistics need stand here, between the parts of a backend.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from .backends.interface import Backend, Parameters, Setting, Statistics
from .formula import moments_dtype


def forward(
    x: Tensor, parameters: Parameters, statistics: Statistics | None, setting: Setting, group, backend: Backend
) -> tuple[Tensor, Tensor, Tensor]:
    """The output; and the moments of IN, and those of LN and BN, which backward needs."""
    x, size = dense(x), _size(x)
    if not x.numel():
        return _empty_forward(x, parameters, statistics, setting, group, backend)
    moments = backend.moments(x)
    shared = None
    if group is not None:
        shared = backend.pool(moments, size)
        dist.all_reduce(shared, group=group)
    coefficients, joint = backend.coefficients(moments, size, shared, parameters, statistics, setting)
    return backend.affine(x, moments, coefficients), moments, joint


def _empty_forward(x, parameters, statistics, setting, group, backend):
    """Of an empty input, which still takes part in the sums of its group."""
    n, c = x.shape[:2]
    moments = x.new_zeros((2, n, c), dtype=moments_dtype(x.dtype))
    joint = x.new_zeros(2 * (n + c) + 1, dtype=torch.float64)
    if group is not None:
        shared = x.new_zeros(2 * c + 1, dtype=torch.float64)
        dist.all_reduce(shared, group=group)
        # the kernels of the other processes, so that running statistics stay equal to the bit; for one sample or more
        stand_in = moments.new_zeros((2, max(n, 1), c))
        joint = backend.coefficients(stand_in, 1, shared, parameters, statistics, setting)[1][-len(joint) :]
    return torch.empty_like(x), moments, joint


def backward(
    dy: Tensor,
    x: Tensor,
    moments: Tensor,
    joint: Tensor,
    parameters: Parameters,
    setting: Setting,
    group,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """The gradient of the input; and in one tensor, in the dtype of the moments, those of weight, bias and logits."""
    x, size = dense(x), _size(x)
    if not x.numel():
        if group is not None:
            dist.all_reduce(x.new_zeros(2 * x.shape[1], dtype=torch.float64), group=group)
        return torch.empty_like(x), moments.new_zeros(2 * (x.shape[1] + len(setting.normalizers)))
    dy = _like(dy, x)
    sums = backend.reduce(dy, x, moments)
    shared = None
    if group is not None:
        shared = backend.pool_gradients(sums, moments, joint, parameters, setting)
        dist.all_reduce(shared, group=group)
    coefficients, small = backend.gradients(sums, moments, joint, size, shared, parameters, setting)
    return backend.combine(dy, x, moments, coefficients), small


def split_gradients(small: Tensor, parameters: Parameters) -> list[Tensor | None]:
    """The gradients of ``parameters``, in their dtypes, of those that :func:`backward` returns in one tensor."""
    k = parameters.mean_weight.shape[0]
    c = small.shape[0] // 2 - k
    dweight, dbias, dmean_weight, dvar_weight = small.split([c, c, k, k])
    grads = zip(parameters, (dmean_weight, dvar_weight, dweight, dbias))
    return [None if p is None else grad.to(p.dtype) for p, grad in grads]


def dense(x: Tensor) -> Tensor:
    """Stored with samples first and channels second, or channels last; copied only where it is neither."""
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        return x
    return x.contiguous()


def _size(x: Tensor) -> int:
    """The number of pixels of a map."""
    return math.prod(x.shape[2:])


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """``dy`` stored as ``x`` is."""
    return dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
