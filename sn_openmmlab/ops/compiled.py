"""The op as ``torch.compile`` sees it: two operators with a schema each, which it leaves whole.

So a compiled model runs the same kernels as an uncompiled one, synchronised statistics included. Eager execution takes
the autograd Function of :mod:`.switch_norm` instead: dispatching to an operator in Python costs it far more.
"""

# ruff: noqa: FA100  (no `from __future__ import annotations`: torch reads the types of arguments, for the schemas)

from typing import Any, Optional, Tuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends
from .backends.interface import Parameters, Setting, kept_sizes
from .formula import moments_dtype
from .plan import look_up
from .run import backward, dense, forward, split_gradients
from .torch_versions import constant


def switch_norm_compiled(
    x: Tensor,
    parameters: Parameters,
    mean_bn: Optional[Tensor],
    var_bn: Optional[Tensor],
    setting: Setting,
    group,
) -> Tuple[Tensor, Tensor]:
    """The output, and the moments, at whose end are BN's and the number of pixels behind them."""
    names, eps, frozen = setting
    name = None if group is None else _name(group)
    return _forward(x, *parameters, mean_bn, var_bn, ' '.join(names), eps, frozen, name)


@constant
def takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for such tensors."""
    return device.type in ('cpu', 'cuda') and backends.choose(device, dtype) is not None


@constant
def _name(group) -> str:
    return group.group_name


def _group(name: Any):
    return None if name is None else dist.distributed_c10d._resolve_process_group(name)


def _plan(arguments: tuple, normalizers: str, eps: float, frozen: bool, group: Optional[str]):
    """The plan of a call whose running statistics are moved by others."""
    names = tuple(normalizers.split())
    plan, addresses = look_up(arguments, names, eps, not frozen, 0.0, group is None)
    if plan.backend is None:
        plan = plan._replace(backend=backends.choose(arguments[0].device, arguments[0].dtype))
    return plan, addresses


def _forward_real(
    x: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    mean_bn: Optional[Tensor],
    var_bn: Optional[Tensor],
    normalizers: str,
    eps: float,
    frozen: bool,
    group: Optional[str],
) -> Tuple[Tensor, Tensor]:
    arguments = x, mean_weight, var_weight, weight, bias, mean_bn, var_bn, None
    plan, addresses = _plan(arguments, normalizers, eps, frozen, group)
    return forward(plan, arguments, addresses, 0.0, _group(group))


def _backward_real(
    dy: Tensor,
    x: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    kept: Tensor,
    normalizers: str,
    eps: float,
    frozen: bool,
    group: Optional[str],
) -> Tuple[Tensor, Tensor]:
    parameters = mean_weight, var_weight, weight, bias
    plan, _ = _plan((x, *parameters, None, None, None), normalizers, eps, frozen, group)
    return backward(plan, dy, x, parameters, kept, _group(group))


_forward = torch.library.custom_op('sn_openmmlab::switch_norm', _forward_real, mutates_args=())
_backward = torch.library.custom_op('sn_openmmlab::switch_norm_backward', _backward_real, mutates_args=())


@_forward.register_fake
def _(x, mean_weight, var_weight, weight, bias, mean_bn, var_bn, normalizers, eps, frozen, group):
    kept = sum(kept_sizes(*x.shape[:2], x.dtype))
    return torch.empty_like(dense(x)), x.new_empty(kept, dtype=torch.float64)


@_backward.register_fake
def _(dy, x, mean_weight, var_weight, weight, bias, kept, normalizers, eps, frozen, group):
    small = 2 * (x.shape[1] + mean_weight.shape[0])
    return torch.empty_like(dense(x)), x.new_empty(small, dtype=moments_dtype(x.dtype))


def _keep(ctx, inputs, output) -> None:
    *tensors, _, _, ctx.normalizers, ctx.eps, ctx.frozen, ctx.group = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, _):
    x, *parameters, kept = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    setting = ctx.normalizers, ctx.eps, ctx.frozen, ctx.group
    dx, small = _backward(dy, x, *parameters, kept, *setting)
    return dx, *split_gradients(small, parameters), *[None] * 6


_forward.register_autograd(_differentiate, setup_context=_keep)
