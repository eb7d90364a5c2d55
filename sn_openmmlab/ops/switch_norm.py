"""``switch_norm``: the functional form of the layer, as ``F.batch_norm`` is of BatchNorm.

One autograd Function runs the four passes of a backend and the algebra between them (:mod:`.run`), under torch.compile
two operators (:mod:`.compiled`). Only the input and (N, C)-sized tensors are kept for backward.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .backends import algebra
from .backends.interface import Parameters, Setting, Statistics
from .formula import NORMALIZERS, moments_dtype, switch_norm_graph, switch_norm_reference
from .run import backward, forward, split_gradients
from .torch_versions import VERSION, count_dispatch_modes, is_compiling, is_exporting

if VERSION >= (2, 7):
    from . import compiled
else:
    compiled = None  # an export, which is to have no operators but torch's, looks like a compilation there

_PLAIN = {Tensor, torch.nn.Parameter}


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
        ValueError: If a shape does not fit.
        TypeError: If x is not floating point, or a parameter is neither of its dtype nor of its moments' dtype.
        RuntimeError: If the environment variable ``SN_BACKEND`` names a backend that cannot run this call.

    Examples:
        >>> import torch
        >>> from sn_openmmlab import switch_norm
        >>> logits = torch.ones(3)
        >>> switch_norm(torch.randn(2, 8, 5, 5), logits, logits, training=True).shape
        torch.Size([2, 8, 5, 5])
    """
    _check(
        x, mean_weight, var_weight, weight, bias, running_mean, running_var, num_batches_tracked, momentum, normalizers
    )
    batch = 'bn' in normalizers and (training or running_mean is None)
    group = group if batch else None
    parameters = Parameters(mean_weight, var_weight, weight, bias)
    statistics = None
    if 'bn' in normalizers and running_mean is not None:
        statistics = Statistics(running_mean, running_var, num_batches_tracked, momentum)
    setting = Setting(normalizers, eps, not batch)

    backend = _choose_backend(x, *parameters, running_mean, running_var)
    if backend is not None:
        args = x, *parameters, statistics, setting, group, backend
        return _SwitchNorm.apply(*args) if torch.is_grad_enabled() else forward(x, parameters, *args[5:])[0]
    mean_bn, var_bn = (None, None) if batch else (running_mean, running_var)
    if is_compiling() and not is_exporting() and compiled is not None and compiled.takes(x.device, x.dtype):
        y, joint = compiled.switch_norm_compiled(x, parameters, mean_bn, var_bn, setting, group)
        used = joint, joint[-1]
    elif not batch and (torch.jit.is_tracing() or is_exporting()):
        return switch_norm_graph(x, *parameters, mean_bn, var_bn, normalizers, eps)
    elif group is not None:
        raise RuntimeError(
            'the reference formula, which SN_BACKEND=reference, tracing, torch.func and torch.compile before torch 2.7 '
            'take, does not synchronise statistics; use SN in place of SyncSN there, or evaluation mode'
        )
    else:
        y, mean, var = switch_norm_reference(x, *parameters, mean_bn, var_bn, normalizers, eps)
        used = None if mean is None else torch.cat([mean, var, mean.new_zeros(1)]), x.numel() // max(x.shape[1], 1)
    if batch and statistics is not None:
        with torch.no_grad():
            algebra.update(statistics, *used)
    return y


class _SwitchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mean_weight, var_weight, weight, bias, statistics, setting, group, backend):
        parameters = Parameters(mean_weight, var_weight, weight, bias)
        y, moments, joint = forward(x, parameters, statistics, setting, group, backend)
        ctx.save_for_backward(x, *parameters, moments, joint)
        ctx.setting, ctx.group, ctx.backend = setting, group, backend
        return y

    @staticmethod
    def backward(ctx, dy):
        # zeros where the output took no part: the other ranks of a group wait for this one
        dy = _materialized(dy)
        seen_through = torch.is_grad_enabled() or _is_transformed() or not _have_memory(dy)
        grads = _differentiable_backward(ctx, dy) if seen_through else _backward(ctx, dy)
        return *grads, None, None, None, None


def _backward(ctx, dy):
    x, *parameters, moments, joint = ctx.saved_tensors
    parameters = Parameters(*parameters)
    dx, small = backward(dy, x, moments, joint, parameters, ctx.setting, ctx.group, ctx.backend)
    return dx, *split_gradients(small, parameters)


def _differentiable_backward(ctx, dy):
    """The reference's backward, which autograd and its transforms see through: double backward, vmap and the like."""
    if ctx.group is not None:
        raise RuntimeError(
            'switch_norm has no double backward, and no transform of its backward, with synchronised statistics; use '
            'SN in place of SyncSN'
        )
    inputs, joint, mean_bn, var_bn = ctx.saved_tensors[:5], ctx.saved_tensors[6], None, None
    if ctx.setting.frozen:
        mean_bn, var_bn = joint[-2 * inputs[0].shape[1] - 1 : -1].view(2, -1)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # views, so that the gradients end here and do not follow what the inputs were computed from
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad) if needed]
        y = switch_norm_reference(*inputs, mean_bn, var_bn, *ctx.setting[:2])[0]
        grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph))
    return [next(grads) if needed else None for needed in ctx.needs_input_grad[:5]]


def _choose_backend(x: Tensor, *others: Tensor | None):
    """The module whose passes to run, or None for the reference."""
    if (
        is_compiling()
        or torch.jit.is_tracing()
        or _is_transformed()
        or x.device.type in ('meta', 'mps')  # no values, no float64
        or not _have_memory(x, *others)
    ):
        return None
    return backends.choose(x.device, x.dtype)


def _is_transformed() -> bool:
    """Whether somebody has to see each operation: torch.func, forward-mode AD, modes as make_fx's or fake tensors'."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or count_dispatch_modes() > 0


def _have_memory(*tensors: Tensor | None) -> bool:
    """Whether all elements are what lies at an address; not so of meta tensors, fake, batched and distributed ones."""
    try:
        for t in tensors:
            if t is not None and (type(t) not in _PLAIN or t.is_neg() or (t.data_ptr() == 0 and t.numel() > 0)):
                return False
    except RuntimeError:  # a wrapper without an address
        return False
    return True


def _materialized(t: Tensor) -> Tensor:
    """A tensor of zeros, or of another's negated elements, written out."""
    if t.is_neg() or t._is_zerotensor():
        return torch.zeros(t.shape, dtype=t.dtype, device=t.device).add_(t)
    return t


def quiet_in_traces(check: Callable) -> Callable:
    """Decorate a check of shapes: TorchScript's tracer warns of what it does not record, and this it need not."""

    @functools.wraps(check)
    def wrapper(*args):
        if not torch.jit.is_tracing():
            return check(*args)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', torch.jit.TracerWarning)
            return check(*args)

    return wrapper


@quiet_in_traces
def _check(
    x, mean_weight, var_weight, weight, bias, running_mean, running_var, num_batches_tracked, momentum, normalizers
) -> None:
    if not x.is_floating_point():
        raise TypeError(f'switch_norm got {x.dtype} input; convert it to a floating-point dtype, e.g. by x.float()')
    if x.dim() < 2:
        raise ValueError(f'switch_norm expects input of shape (N, C, *), got {tuple(x.shape)}')
    if (weight is None) != (bias is None) or (running_mean is None) != (running_var is None):
        raise ValueError('switch_norm takes weight and bias together, and running_mean and running_var together')
    if momentum is None and running_mean is not None and num_batches_tracked is None:
        raise ValueError('switch_norm with momentum=None averages by num_batches_tracked; pass it, or a momentum')
    logits, channels, device = (len(normalizers),), (x.shape[1],), x.device
    for name, tensor, shape in (
        ('mean_weight', mean_weight, logits),
        ('var_weight', var_weight, logits),
        ('weight', weight, channels),
        ('bias', bias, channels),
        ('running_mean', running_mean, channels),
        ('running_var', running_var, channels),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f'{name} has shape {tuple(tensor.shape)} where {shape} was expected, '
                f'for input of shape {tuple(x.shape)} and normalizers {normalizers}'
            )
        if tensor.device != device:
            raise ValueError(
                f'{name} is on {tensor.device} and the input on {device}; move one, e.g. by layer.to(x.device)'
            )
        if tensor.dtype != x.dtype and tensor.dtype != moments_dtype(x.dtype):
            raise TypeError(
                f'{name} is {tensor.dtype} and the input is {x.dtype}; convert one, e.g. by layer.to(x.dtype)'
            )
