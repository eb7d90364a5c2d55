"""What lies between the four big passes: the algebra on (N, C)-sized moments, on torch's operations.

The forward pass is ``y = a*(x - mean) + s`` and the backward pass ``dx = b1*(x - mean) + b0 + a*dy``, with coefficients
of shape (N, C) and the IN means as ``mean``. Means enter by their distance from the IN mean, ``shift``, and variances
by the law of total variance, so that nothing cancels where the mean is large. ``dmean`` and ``dvar`` are the gradients
with respect to the blended moments; names that end in a normalizer's are those with respect to its moments.

C++ and Triton have the same four functions, with the same names inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .interface import Parameters, Setting, Statistics


def pool(moments: Tensor, size: int) -> Tensor:
    """Sums over samples, for a sum over processes: ``size`` times means, times mean squares, and the number of maps."""
    mean, var = moments.double()
    sums = [mean.sum(0), torch.addcmul(var, mean, mean).sum(0), mean.new_full((1,), len(mean))]
    return torch.cat(sums) * size


def coefficients(
    moments: Tensor,
    size: int,
    shared: Tensor | None,
    parameters: Parameters,
    statistics: Statistics | None,
    setting: Setting,
) -> tuple[Tensor, Tensor]:
    """Coefficients of the forward pass; see :class:`.interface.Backend`."""
    joint = _join(moments, size, shared, statistics, setting)
    if statistics is not None and not setting.frozen:
        update(statistics, joint, len(moments[0]) * size if shared is None else joint[-1])
    blend, bias = _blend(moments, joint, parameters, setting), parameters.bias
    s = -blend.shift * blend.a
    return torch.stack([blend.a, s if bias is None else s + bias]), joint


def pool_gradients(sums: Tensor, moments: Tensor, joint: Tensor, parameters: Parameters, setting: Setting) -> Tensor:
    """Sums over samples of the gradients w.r.t. the blended moments, for a sum over processes."""
    blend = _blend(moments, joint, parameters, setting)
    return torch.cat([grad.double().sum(0) for grad in blend.gradients(sums)[1:]])


def gradients(
    sums: Tensor,
    moments: Tensor,
    joint: Tensor,
    size: int,
    shared: Tensor | None,
    parameters: Parameters,
    setting: Setting,
) -> tuple[Tensor, Tensor]:
    """Coefficients of the backward pass, and the gradients of everything small; see :class:`.interface.Backend`.

    It is the vector-Jacobian product of :func:`coefficients`: the gradients with respect to a and s are ``sum_dyx`` and
    ``sum_dy``. Those with respect to the IN moments then are ``size/2 * b1`` and ``size * b0 + a * sum_dy``.
    """
    n, c = moments.shape[1:]
    blend = _blend(moments, joint, parameters, setting)
    sum_dyxhat, dmean, dvar = blend.gradients(sums)

    dmean_in = dvar_in = torch.zeros_like(dmean)
    dmean_ratios, dvar_ratios = [], []
    share: Any
    for name, shift, var, mean_ratio, var_ratio in zip(setting.normalizers, *blend.terms):
        # a constant added to all moments does not change the gradients w.r.t. the logits
        dmean_ratios.append(mean_ratio.new_zeros(()) if shift is None else (dmean * shift).sum())
        dvar_ratios.append((dvar * var).sum())
        if name == 'in':
            dmean_in, dvar_in = dmean_in + mean_ratio * dmean, dvar_in + var_ratio * dvar
            continue
        if name == 'ln':
            dmean_k, dvar_k, share = dmean.sum(1, keepdim=True), dvar.sum(1, keepdim=True), 1 / c
        elif setting.frozen:
            continue
        elif shared is None:
            dmean_k, dvar_k, share = dmean.sum(0), dvar.sum(0), 1 / n
        else:
            dmean_k, dvar_k = shared.to(dmean.dtype).view(2, c)
            share = (size / joint[-1]).to(dmean.dtype)  # of a map in the pixels of its channel
        dmean_k, dvar_k = mean_ratio * share * dmean_k, var_ratio * share * dvar_k
        dvar_in = dvar_in + dvar_k
        dmean_in = dmean_in + dmean_k - 2 * dvar_k * shift  # the joint variance also holds the spread of the means

    dlogits = [_softmax_backward(*pair) for pair in zip(blend.ratios, (dmean_ratios, dvar_ratios))]
    small = torch.cat([sum_dyxhat.sum(0), sums[0].sum(0), *dlogits])
    return torch.stack([dvar_in * (2 / size), dmean_in / size, blend.a]), small


def update(statistics: Statistics, joint: Tensor, count: Any) -> None:
    """Move the running statistics towards the batch's, of ``count`` pixels (an int or a tensor); not at all
    where that is 0."""
    mean, var, tracked, _ = statistics
    momentum: Any = statistics.momentum
    new_mean, new_var = joint[-2 * len(mean) - 1 : -1].view(2, -1)
    if isinstance(count, Tensor):  # counted over a group: stays on the device
        seen: Any = count.clamp(max=1)
        unbiased = count / (count - 1).clamp(min=1)
    else:
        seen, unbiased = min(count, 1), count / max(count - 1, 1)
    if tracked is not None:
        tracked += seen.to(tracked) if isinstance(seen, Tensor) else seen
    if momentum is None and tracked is not None:
        momentum = 1 / tracked.clamp(min=1).to(mean)
    weight = momentum * seen
    for running, new in (mean, new_mean), (var, new_var * unbiased):
        running.lerp_(new.to(running.dtype), weight.to(running.dtype) if isinstance(weight, Tensor) else weight)


def _joined(shared: Tensor, samples: int) -> Tensor:
    """Moments of BN from sums over processes; zeros for LN's."""
    *sums, count = shared.split([(len(shared) - 1) // 2] * 2 + [1])
    mean, square = (t / count.clamp(min=1) for t in sums)
    var = torch.addcmul(square, mean, mean, value=-1).clamp_(min=0)
    return torch.cat([shared.new_zeros(2 * samples), mean, var, count])


class _Blend(NamedTuple):
    """The blended moments: their mean by its distance from the IN mean, their variance as 1 / sqrt(var + eps)."""

    terms: tuple  # for each normalizer: distance of its mean (None for IN), its variance, and its two ratios
    ratios: tuple[Tensor, ...]
    shift: Tensor
    rstd: Tensor
    a: Tensor

    def gradients(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of dy * (x - blended mean) / std, and the gradients w.r.t. the blended mean and variance."""
        sum_dy, sum_dyx = sums
        sum_dyxhat = self.rstd * torch.addcmul(sum_dyx, self.shift, sum_dy, value=-1)
        return sum_dyxhat, -self.a * sum_dy, -0.5 * self.a * self.rstd * sum_dyxhat


def _blend(moments: Tensor, joint: Tensor, parameters: Parameters, setting: Setting) -> _Blend:
    mean, var_in = moments
    n, c = mean.shape
    mean_ln, var_ln, mean_bn, var_bn, _ = joint.split([n, n, c, c, 1])
    of = {'in': (None, var_in), 'ln': (mean_ln[:, None], var_ln[:, None]), 'bn': (mean_bn, var_bn)}
    shifts, variances = [], []
    for joint_mean, var in (of[name] for name in setting.normalizers):
        shifts.append(None if joint_mean is None else (joint_mean - mean).to(mean.dtype))
        variances.append(var.to(mean.dtype))
    ratios = tuple(logits.softmax(0, mean.dtype) for logits in parameters[:2])
    terms = shifts, variances, *(ratio.unbind() for ratio in ratios)
    shift, var = torch.zeros_like(mean), torch.full_like(mean, setting.eps)
    for shift_k, var_k, mean_ratio, var_ratio in zip(*terms):
        shift = shift if shift_k is None else torch.addcmul(shift, mean_ratio, shift_k)
        var = torch.addcmul(var, var_ratio, var_k)
    rstd = var.rsqrt_()
    return _Blend(terms, ratios, shift, rstd, rstd if parameters.weight is None else parameters.weight * rstd)


def _join(moments: Tensor, size: int, shared: Tensor | None, statistics: Statistics | None, setting: Setting) -> Tensor:
    """Moments of LN and BN, and the number of pixels behind BN's."""
    # distances between large means need more than float32, which not every device has
    mean, var = moments.double() if moments.device.type in ('cpu', 'cuda') else moments
    n, c = mean.shape
    if shared is not None:
        joint = _joined(shared, n)
    elif 'bn' not in setting.normalizers:
        joint = mean.new_zeros(2 * (n + c) + 1)
    else:
        bn = statistics[:2] if setting.frozen and statistics is not None else _pool(mean, var, 0)
        joint = torch.cat([mean.new_zeros(2 * n), *(t.to(mean.dtype) for t in bn), mean.new_full((1,), n * size)])
    if 'ln' in setting.normalizers:
        torch.cat(_pool(mean, var, 1), out=joint[: 2 * n])
    return joint


def _pool(mean: Tensor, var: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Joint mean and variance along an axis of (N, C)."""
    joint = mean.mean(axis, keepdim=True)
    return joint.squeeze(axis), (var + (mean - joint).square()).mean(axis)


def _softmax_backward(ratios: Tensor, dratios: list[Tensor]) -> Tensor:
    joint = torch.stack(dratios)
    return ratios * (joint - ratios.dot(joint))
