"""``switch_norm``: the functional form of the layer, as ``F.batch_norm`` is of BatchNorm.

One autograd Function runs the four passes of a backend and the algebra between them (:mod:`.run`), under torch.compile
operators of torch.library (:mod:`.compiled`). Only the input and (N, C)-sized tensors are kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import algebra
from .backends.interface import Parameters, Setting
from .formula import NORMALIZERS, switch_norm_graph, switch_norm_reference
from .plan import ARGUMENTS, GRADIENT, check, look_up, refuse_freed, statistics_of
from .run import backward, forward, split_gradients
from .torch_versions import VERSION, count_dispatch_modes, is_compiling, is_exporting

compiled: Any
if VERSION >= (2, 7):
    from . import compiled
else:
    compiled = None  # an export, which is to have no operators but torch's, looks like a compilation there

_is_tracing, _are_transforms_active = torch._C._is_tracing, torch._C._are_functorch_transforms_active


def switch_norm(
    x: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    normalizers: tuple[str, ...] = NORMALIZERS,
    group=None,
) -> Tensor:
    r"""Normalize by a learned blend of instance, layer and batch statistics.

    .. math::
        y = \gamma_c \frac{x - \sum_k w_k \mu_k}{\sqrt{\sum_k w'_k \sigma^2_k + \epsilon}} + \beta_c,
        \quad w = \mathrm{softmax}(\text{mean\_weight}), \; w' = \mathrm{softmax}(\text{var\_weight})

    from *Differentiable Learning-to-Normalize via Switchable Normalization* (Luo et al., ICLR 2019).

    Args:
        x: Input of any rank from 2 up. It is normalised with the biased variance.
        mean_weight: Logits of the means' importance ratios, in the order of ``normalizers``.
        var_weight: Logits of the variances' importance ratios, likewise.
        weight: Scale, one a channel, or None for 1. Given together with ``bias``.
        bias: Shift, one a channel, or None for 0.
        running_mean: Running batch means, updated in place where ``training``. Without them the batch's own serve.
        running_var: Running batch variances. They store the *unbiased* variance, as BatchNorm's do.
        num_batches_tracked: Number of batches in the running statistics, incremented in place where ``training``.
        training: Whether BN takes the batch's moments (and updates the running ones) or the running ones.
            IN and LN always take the sample's. Defaults to False.
        momentum: Weight of the *new* value in the running statistics, as everywhere in PyTorch; None
            averages all batches equally, by ``num_batches_tracked``. Defaults to 0.1.
        eps: Added to the variance. Defaults to 1e-5.
        normalizers: Which of 'in', 'ln' and 'bn' take part, in this order. Defaults to all.
        group: Process group to take the batch moments over, or None for this process alone. Every rank of the group
            must call, also one whose batch is empty.

    Shape:
        - x: (N, C, \*); mean_weight, var_weight: (K,), K the number of normalizers; the others: (C,).
        - Output: as x, in its dtype. An empty input gives an empty output and leaves the running statistics alone.

    Raises:
        ValueError: If a shape does not fit, or ``normalizers``, ``eps`` or ``momentum`` are none.
        TypeError: If x is not floating point, or a parameter is neither of its dtype nor of its moments' dtype.
        RuntimeError: If the environment variable ``SN_BACKEND`` names a backend that cannot run this call, or the
            memory of a tensor was freed.

    Examples:
        >>> import torch
        >>> from sn_openmmlab import switch_norm
        >>> logits = torch.ones(3)
        >>> switch_norm(torch.randn(2, 8, 5, 5), logits, logits, training=True).shape
        torch.Size([2, 8, 5, 5])
    """
    arguments = x, mean_weight, var_weight, weight, bias, running_mean, running_var, num_batches_tracked
    batch = 'bn' in normalizers and (training or running_mean is None)
    if not batch:
        group = None
    if not (is_compiling() or _is_tracing() or _is_transformed()):
        plan, addresses = look_up(arguments, normalizers, eps, batch, momentum, group is None)
        if plan.backend is not None:
            if torch.is_grad_enabled():
                call = plan, arguments[5:], addresses, momentum, group
                return _apply(x, mean_weight, var_weight, weight, bias, call)
            return forward(plan, arguments, addresses, momentum, group, False)[0]
    else:
        check(arguments, momentum, normalizers)
    return _switch_norm(arguments, momentum, Setting(normalizers, eps, not batch), group)


def _switch_norm(arguments: tuple, momentum: float | None, setting: Setting, group) -> Tensor:
    """Where there are no kernels, or others than these have to see what is computed."""
    x, parameters = arguments[0], Parameters(*arguments[1:5])
    names, eps, frozen = setting
    statistics = statistics_of(arguments, momentum, setting)
    mean_bn, var_bn = arguments[5:7] if frozen else (None, None)
    if is_compiling() and not is_exporting() and compiled is not None and compiled.takes(x.device, x.dtype):
        y, kept = compiled.switch_norm_compiled(x, parameters, mean_bn, var_bn, setting, group)
        used: Any = kept, kept[-1]
    elif frozen and (torch.jit.is_tracing() or is_exporting()):
        return switch_norm_graph(x, *parameters, mean_bn, var_bn, names, eps)
    elif group is not None:
        raise RuntimeError(
            'the reference formula, which SN_BACKEND=reference, tracing, torch.func and torch.compile before torch 2.7 '
            'take, does not synchronise statistics; use SN in place of SyncSN there, or evaluation mode'
        )
    else:
        y, mean, var = switch_norm_reference(x, *parameters, mean_bn, var_bn, names, eps)
        if mean is not None and var is not None:
            used = torch.cat([mean, var, mean.new_zeros(1)]), x.numel() // max(x.shape[1], 1)
    if statistics is not None and not frozen:
        with torch.no_grad():
            algebra.update(statistics, *used)
    return y


class _SwitchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mean_weight, var_weight, weight, bias, call):
        plan, statistics, addresses, momentum, group = call
        arguments = x, mean_weight, var_weight, weight, bias, *statistics
        y, kept = forward(plan, arguments, addresses, momentum, group)
        ctx.save_for_backward(x, mean_weight, var_weight, weight, bias, kept)
        ctx.plan, ctx.group = plan, group
        return y

    @staticmethod
    def backward(ctx, dy):
        # zeros where the output took no part: the other ranks of a group wait for this one
        dy = _materialized(dy)
        if torch.is_grad_enabled() or _is_transformed() or not _has_memory(dy):
            return *_differentiable_backward(ctx, dy), None
        x, *parameters, kept = ctx.saved_tensors
        dx, small = backward(ctx.plan, dy, x, parameters, kept, ctx.group)
        return dx, *split_gradients(small, parameters), None


# torch's own, without what it does for transforms, which do not come here
_apply = super(torch.autograd.Function, _SwitchNorm).apply


def _differentiable_backward(ctx, dy):
    """The reference's backward, which autograd and its transforms see through: double backward, vmap and the like."""
    if ctx.group is not None:
        raise RuntimeError(
            'switch_norm has no double backward, and no transform of its backward, with synchronised statistics; use '
            'SN in place of SyncSN'
        )
    *inputs, kept = ctx.saved_tensors
    refuse_freed((GRADIENT, *ARGUMENTS), (dy, *inputs))
    mean_bn, var_bn = None, None
    normalizers, eps, frozen = ctx.plan.setting
    if frozen:
        mean_bn, var_bn = kept[-2 * inputs[0].shape[1] - 1 : -1].view(2, -1)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # views, so that the gradients end here and do not follow what the inputs were computed from
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad) if needed]
        y = switch_norm_reference(*inputs, mean_bn, var_bn, normalizers, eps)[0]
        grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph))
    return [next(grads) if needed else None for needed in ctx.needs_input_grad[:5]]


def _is_transformed() -> bool:
    """Whether somebody has to see each operation: torch.func, forward-mode AD, modes as make_fx's or fake tensors'."""
    return _are_transforms_active() or forward_ad._current_level >= 0 or count_dispatch_modes() > 0


def _has_memory(t: Tensor) -> bool:
    """Whether its elements are what lies at an address; not so of fake, batched and distributed tensors."""
    try:
        return type(t) in (Tensor, torch.nn.Parameter) and (t.data_ptr() != 0 or t.numel() == 0)
    except RuntimeError:  # a wrapper without an address
        return False


def _materialized(t: Tensor) -> Tensor:
    """A tensor of zeros, or of another's negated elements, written out."""
    if t.is_neg() or t._is_zerotensor():
        return torch.zeros(t.shape, dtype=t.dtype, device=t.device).add_(t)
    return t
