"""The op as ``torch.compile`` sees it: operators with a schema each, which it leaves whole.

So a compiled model runs the same kernels as an uncompiled one, synchronised statistics included. Eager execution takes
the autograd Function of :mod:`.switch_norm` instead: dispatching to an operator in Python costs it far more.
"""

# ruff: noqa: FA100  (no `from __future__ import annotations`: torch reads the types of arguments, for the schemas)

from typing import Any, Callable, Optional, Tuple

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
    return _switch_norm(x, *parameters, mean_bn, var_bn, ' '.join(names), eps, frozen, name)


@constant
def takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for such tensors, and no transform of torch.func that has to see each operation."""
    if device.type not in ('cpu', 'cuda') or torch._C._are_functorch_transforms_active():
        return False
    return backends.choose(device, dtype) is not None


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


# torch.library.custom_op and register_autograd do the same with several more calls of Python in each of the operators
_library = torch.library.Library('sn_openmmlab', 'FRAGMENT')


def _define(name: str, function: Callable, fake: Callable) -> Callable:
    """An operator for tensors on the CPU and on CUDA; ``fake`` has its outputs' shapes."""
    _library.define(name + torch.library.infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    for device in 'CPU', 'CUDA':
        _library.impl(name, function, device)
    operator = getattr(torch.ops.sn_openmmlab, name).default
    torch.library.register_fake(operator, fake, lib=_library)
    return operator


def _forward_fake(x, mean_weight, var_weight, weight, bias, mean_bn, var_bn, normalizers, eps, frozen, group):
    kept = sum(kept_sizes(*x.shape[:2], x.dtype))
    return torch.empty_like(dense(x)), x.new_empty(kept, dtype=torch.float64)


def _backward_fake(dy, x, mean_weight, var_weight, weight, bias, kept, normalizers, eps, frozen, group):
    small = 2 * (x.shape[1] + mean_weight.shape[0])
    return torch.empty_like(dense(x)), x.new_empty(small, dtype=moments_dtype(x.dtype))


_switch_norm = _define('switch_norm', _forward_real, _forward_fake)  # what dynamo records
_forward = _define('switch_norm_forward', _forward_real, _forward_fake)  # and what is left of it without autograd
_backward = _define('switch_norm_backward', _backward_real, _backward_fake)


class _SwitchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        y, kept = _forward(*arguments)
        *tensors, _, _, ctx.normalizers, ctx.eps, ctx.frozen, ctx.group = arguments
        ctx.save_for_backward(*tensors, kept)
        ctx.mark_non_differentiable(kept)
        return y, kept

    @staticmethod
    def backward(ctx, dy, _):
        if torch.is_grad_enabled():  # what the backends that compile backward refuse, too
            raise RuntimeError(
                'a compiled switch_norm has no double backward; leave out create_graph, or do not compile'
            )
        x, *parameters, kept = ctx.saved_tensors
        setting = ctx.normalizers, ctx.eps, ctx.frozen, ctx.group
        dx, small = _backward(dy, x, *parameters, kept, *setting)
        return dx, *split_gradients(small, parameters), *[None] * 6


_library.impl('switch_norm', _SwitchNorm.apply, 'Autograd')
