"""Forward and backward of the op by a plan: a backend's program, or its parts one after the other.

The two sums over processes that synchronised statistics need stand here, between the parts.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from .backends.interface import Backend, Parameters, Setting, Statistics, kept_sizes
from .formula import moments_dtype
from .plan import ARGUMENTS, GRADIENT, Plan, describe, refuse_freed, statistics_of


def forward(
    plan: Plan, arguments: tuple, addresses: list[int], momentum: float | None, group, keep: bool = True
) -> tuple[Tensor, Tensor]:
    """The output; and what backward, if it is to follow, needs besides the arguments: see :func:`.kept_sizes`."""
    if plan.program is not None:
        return plan.program.forward(arguments, addresses, momentum, keep)
    assert plan.backend is not None
    statistics = statistics_of(arguments, momentum, plan.setting)
    return _forward(arguments[0], Parameters(*arguments[1:5]), statistics, plan.setting, group, plan.backend)


def backward(plan: Plan, dy: Tensor, x: Tensor, parameters: tuple, kept: Tensor, group) -> tuple[Tensor, Tensor]:
    """The gradient of the input; and in one tensor, in the dtype of the moments, those of weight, bias and logits."""
    if plan.program is not None:
        dy = _like(dy, x)
        mean_weight, var_weight, weight, _ = parameters
        tensors = dy, x, kept, mean_weight, var_weight, weight
        present = tensors[:5] if weight is None else tensors
        addresses = [t.data_ptr() for t in present]
        # what was true of them in the forward pass need not be any more
        if describe(*present) == plan.backward and 0 not in addresses:
            return plan.program.backward(tensors, [*addresses, 0] if weight is None else addresses)
    refuse_freed((GRADIENT, *ARGUMENTS), (dy, x, *parameters))
    assert plan.backend is not None
    moments, joint = _separate(kept, x)
    return _backward(dy, x, moments, joint, Parameters(*parameters), plan.setting, group, plan.backend)


def split_gradients(small: Tensor, parameters: tuple) -> list[Tensor | None]:
    """The gradients of ``parameters``, in their dtypes, of those that :func:`backward` returns in one tensor."""
    k = parameters[0].shape[0]
    c = small.shape[0] // 2 - k
    dweight, dbias, dmean_weight, dvar_weight = small.split_with_sizes([c, c, k, k])
    grads = zip(parameters, (dmean_weight, dvar_weight, dweight, dbias))
    dtype = small.dtype
    return [None if p is None else grad if p.dtype == dtype else grad.to(p.dtype) for p, grad in grads]


def _forward(
    x: Tensor, parameters: Parameters, statistics: Statistics | None, setting: Setting, group, backend: Backend
) -> tuple[Tensor, Tensor]:
    x, size = dense(x), _size(x)
    if not x.numel():
        return _empty_forward(x, parameters, statistics, setting, group, backend)
    moments = backend.moments(x)
    shared = None
    if group is not None:
        shared = backend.pool(moments, size)
        dist.all_reduce(shared, group=group)
    coefficients, joint = backend.coefficients(moments, size, shared, parameters, statistics, setting)
    return backend.affine(x, moments, coefficients), _keep(moments, joint)


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
    return torch.empty_like(x), _keep(moments, joint)


def _backward(
    dy: Tensor,
    x: Tensor,
    moments: Tensor,
    joint: Tensor,
    parameters: Parameters,
    setting: Setting,
    group,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
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


def _keep(moments: Tensor, joint: Tensor) -> Tensor:
    """Both in one tensor."""
    doubles = moments.flatten().view(torch.float64)
    return torch.cat([doubles, doubles.new_zeros(len(doubles) % 2), joint])


def _separate(kept: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both of one tensor."""
    n, c = x.shape[:2]
    joint = kept[kept_sizes(n, c, x.dtype)[0] :]
    moments = kept.view(moments_dtype(x.dtype))[: 2 * n * c]
    return moments.view(2, n, c), joint


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
