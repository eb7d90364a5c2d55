"""What lies between the four big passes: the algebra on (N, C)-sized moments, one function forward and one backward.

Notation: S pixels a map; the forward pass is ``y = a*(x - mean_in) + s`` and the backward pass
``dx = a*dy + b1*(x - mean_in) + b0``, with coefficients of shape (N, C). Means enter by their distance from the mean of
the map and variances by the law of total variance, so that nothing cancels where the mean is large. There are few
operations, since for small layers it is their number that costs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def forward(
    mean_in, var_in, mean_bn, var_bn, mean_weight, var_weight, weight, bias, normalizers, eps, size, group
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...], Tensor | int | None]:
    """Coefficients of the forward pass from IN moments.

    Args:
        mean_in: IN means, (N, C).
        var_in: Biased IN variances, (N, C).
        mean_bn: Frozen BN means (C,); None to take the batch's own.
        var_bn: Frozen BN variances (C,), likewise.
        mean_weight: Logits (K,) of the means' importance ratios.
        var_weight: Logits (K,) of the variances' importance ratios.
        weight: Scale (C,) or None.
        bias: Shift (C,) or None.
        normalizers: K names out of 'in', 'ln', 'bn'.
        eps: Added to the variance.
        size: S.
        group: Process group that the batch's moments are taken over, or None.

    Returns:
        a and s, (N, C); what :func:`backward` needs, which begins with mean_in, var_in and the BN moments that were
        used, (C,) or (1, C); and the number of pixels behind these, None where they are frozen or take no part.
    """
    distances, variances, count = [], [], None
    mean_ln = var_ln = None
    for name in normalizers:
        if name == 'in':
            distance, var = None, var_in
        elif name == 'ln':
            distance, mean_ln, var_ln = _pool(mean_in, var_in, 1)
            var = var_ln
        else:
            if mean_bn is not None:
                distance = mean_in - mean_bn
            elif group is None:
                count = len(mean_in) * size
                distance, mean_bn, var_bn = _pool(mean_in, var_in, 0)
            else:
                mean_bn, var_bn, count = _group_moments(mean_in, var_in, size, group)
                distance = mean_in - mean_bn
            var = var_bn.to(mean_in.dtype)
        distances.append(distance)
        variances.append(var)

    mean_ratios, var_ratios = (logits.softmax(0, mean_in.dtype) for logits in (mean_weight, var_weight))
    shift = _weighted(mean_ratios, distances)  # distance of the IN mean from the blended one
    if shift is None:
        shift = torch.zeros_like(mean_in)
    rstd = (_weighted(var_ratios, variances) + eps).rsqrt_()
    a = rstd if weight is None else weight * rstd
    s = shift * a if bias is None else torch.addcmul(bias, shift, a)
    a, s = (t.to(mean_in.dtype).expand_as(mean_in) for t in (a, s))  # BN alone gives one row for all samples
    return a, s, (mean_in, var_in, mean_bn, var_bn, mean_ln, var_ln, mean_ratios, var_ratios, shift, rstd), count


def backward(
    sum_dy, sum_dyx, saved, mean_weight, var_weight, weight, normalizers, eps, size, count, group
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Coefficients of the backward pass, and the gradients of everything small.

    Args:
        sum_dy: Sum of dy over each map, (N, C).
        sum_dyx: Sum of dy * (x - mean_in) over each map, (N, C).
        saved: What forward returned for it.
        mean_weight: As in :func:`forward`, and so are all others not named here.
        count: What forward returned: None where the BN moments are constants.

    Returns:
        a, b1, b0 (N, C), and the gradients of mean_weight and var_weight (K,), of weight and bias (C,).
    """
    mean_in, var_in, mean_bn, var_bn, mean_ln, var_ln, mean_ratios, var_ratios, shift, rstd = saved
    n, c = mean_in.shape
    a = rstd if weight is None else weight * rstd

    # Gradient w.r.t. weight and bias
    normed = rstd * torch.addcmul(sum_dyx, shift, sum_dy)  # sum of dy * (x - blended mean) / std
    dweight, dbias = normed.sum(0), sum_dy.sum(0)

    # -1 times the gradient w.r.t. the blended mean, and -2 times the one w.r.t. the blended variance
    dmean, dvar = a * sum_dy, a * rstd * normed

    # Gradient w.r.t. the logits, which a constant added to all moments does not change, and w.r.t. the IN moments
    dmean_ratios, dvar_ratios = [], []
    b1 = b0 = None
    for name, mean_ratio, var_ratio in zip(normalizers, mean_ratios.unbind(), var_ratios.unbind()):
        if name == 'in':
            dmean_k, dvar_k, var_k, joined = dmean, dvar, var_in, size
            dmean_ratios.append(mean_ratio.new_zeros(()))
        else:
            axis, mean_k, var_k = (1, mean_ln, var_ln) if name == 'ln' else (0, mean_bn, var_bn.to(mean_in.dtype))
            distance = mean_in - mean_k
            dmean_ratios.append(_dot(dmean, distance))
            dmean_k, dvar_k = dmean.sum(axis, keepdim=True), dvar.sum(axis, keepdim=True)
            joined = size * mean_in.shape[axis]
        dvar_ratios.append(_dot(dvar_k, var_k))
        if name == 'bn':
            if count is None:
                continue
            if group is not None:
                both, joined = torch.cat([dmean_k, dvar_k]), count
                dist.all_reduce(both, group=group)
                dmean_k, dvar_k = both.split(1)
        scale = -1 / max(joined, 1) if isinstance(joined, int) else joined.clamp(min=1).reciprocal().neg()
        dvar_k = dvar_k * (var_ratio * scale)
        dmean_k = dmean_k * (mean_ratio * scale)
        if name != 'in':  # the variance also holds the spread of the IN means
            dmean_k = torch.addcmul(dmean_k, dvar_k, distance)
        b1, b0 = (dvar_k, dmean_k) if b1 is None else (b1 + dvar_k, b0 + dmean_k)
    if b1 is None:
        b1 = b0 = torch.zeros_like(mean_in)

    dmean_weight = _softmax_backward(mean_ratios, dmean_ratios)
    dvar_weight = _softmax_backward(var_ratios, dvar_ratios) * -0.5
    a, b1, b0 = (t.to(mean_in.dtype).expand_as(mean_in) for t in (a, b1, b0))
    return a, b1, b0, dmean_weight, dvar_weight, dweight, dbias


def _pool(mean: Tensor, var: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Distance of each mean from their joint one; joint mean and variance along an axis of (N, C), which stays."""
    average = torch.mean if mean.shape[axis] else torch.sum  # zeros where there is no sample
    joint = average(mean, axis, keepdim=True)
    distance = mean - joint
    distance -= average(distance, axis, keepdim=True)  # what rounding the joint mean has left
    return distance, joint, average(torch.addcmul(var, distance, distance), axis, keepdim=True)


def _group_moments(mean: Tensor, var: Tensor, size: int, group) -> tuple[Tensor, Tensor, Tensor]:
    """BN moments (1, C) of the joined batch of a process group, and the number of pixels behind them.

    One all-reduce of 2C + 1 numbers, so that every pixel of every rank weighs the same; in float64, where
    ``E[x^2] - E[x]^2`` does not cancel.
    """
    dtype, c = mean.dtype, mean.shape[1]
    mean, var = mean.double(), var.double()
    sums = torch.cat([mean.sum(0), torch.addcmul(var, mean, mean).sum(0), mean.new_full((1,), len(mean))]) * size
    dist.all_reduce(sums, group=group)
    *_, count = sums.split([c, c, 1])
    joint, square = (sums[:-1] / count.clamp(min=1)).view(2, 1, c)
    joint_var = torch.addcmul(square, joint, joint, value=-1).clamp_(min=0)
    return joint.to(dtype), joint_var.to(dtype), count[0]


def _weighted(ratios: Tensor, terms: list[Tensor | None]) -> Tensor | None:
    """``sum_k ratio_k * term_k``; from the last to the first, since the first is the only one of full size."""
    total = None
    for ratio, term in zip(ratios.unbind()[::-1], terms[::-1]):
        if term is not None:
            total = ratio * term if total is None else torch.addcmul(total, term, ratio)
    return total


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _softmax_backward(ratios: Tensor, dratios: list[Tensor]) -> Tensor:
    dratios = torch.stack(dratios)
    return ratios * (dratios - ratios.dot(dratios))
