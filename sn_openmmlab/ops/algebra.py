"""What lies between the four big passes: the algebra on (N, C)-sized moments, one function forward and one backward.

Notation: S pixels a map; the forward pass is ``y = a*(x - mean_in) + s`` and the backward pass
``dx = a*dy + b1*(x - mean_in) + b0``, with coefficients of shape (N, C). Taking x by its distance from the mean of its
map keeps both exact where the mean is large. The algebra is done in float64, where ``E[x^2] - E[x]^2`` does not cancel,
and in few operations, since for small layers it is their number that costs.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def forward(
    mean_in, var_in, mean_bn, var_bn, mean_weight, var_weight, weight, bias, normalizers, eps, size, group
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | int | None]:
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
        a and s, (N, C); the BN moments that were used, (C,); and the number of pixels behind them, None where they are
        frozen or take no part.
    """
    mean, var, square = _moments(mean_in, var_in)
    count = None
    if 'bn' in normalizers and mean_bn is None:
        mean_bn, var_bn, count = _batch_moments(mean, square, size, group)
    *_, shift, rstd = _blend(mean, var, square, mean_bn, var_bn, mean_weight, var_weight, normalizers, eps)
    a = rstd if weight is None else weight * rstd
    s = -shift * a if bias is None else torch.addcmul(bias.double(), shift, a, value=-1)
    a, s = (t.to(mean_in.dtype).expand_as(mean_in) for t in (a, s))  # BN alone gives one row for all samples
    return a, s, mean_bn, var_bn, count


def backward(
    sum_dy,
    sum_dyx,
    mean_in,
    var_in,
    mean_bn,
    var_bn,
    mean_weight,
    var_weight,
    weight,
    normalizers,
    eps,
    size,
    count,
    group,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Coefficients of the backward pass, and the gradients of everything small.

    Args:
        sum_dy: Sum of dy over each map, (N, C).
        sum_dyx: Sum of dy * (x - mean_in) over each map, (N, C).
        mean_in: As in :func:`forward`, and so are all others not named here.
        mean_bn: The BN means that forward used, (C,), or None.
        var_bn: The BN variances that forward used, likewise.
        count: What forward returned: None where the BN moments are constants.

    Returns:
        a, b1, b0 (N, C), and the gradients of mean_weight and var_weight (K,), of weight and bias (C,).
    """
    n, c = mean_in.shape
    mean, var, square = _moments(mean_in, var_in)
    means, variances, mean_ratios, var_ratios, shift, rstd = _blend(
        mean, var, square, mean_bn, var_bn, mean_weight, var_weight, normalizers, eps
    )
    a = rstd if weight is None else weight * rstd
    sum_dy = sum_dy.double()
    sum_dyc = torch.addcmul(sum_dyx.double(), shift, sum_dy, value=-1)  # sum of dy * (x - blended mean)

    # Gradient w.r.t. weight and bias
    normed = rstd * sum_dyc
    dweight, dbias = normed.sum(0), sum_dy.sum(0)

    # Gradient w.r.t. the blended mean and -2 times the one w.r.t. the blended variance
    dmean, dvar = -a * sum_dy, a * rstd * normed

    # Gradient w.r.t. the logits through the softmax, and w.r.t. the IN moments, from which those of LN and BN follow
    dmean_ratios, dvar_ratios = [], []
    dmean_in, dvar_in = 0, 0
    for k, name in enumerate(normalizers):
        dmean_k, dvar_k = (t if name == 'in' else t.sum(int(name == 'ln'), keepdim=True) for t in (dmean, dvar))
        dmean_ratios.append((dmean_k * means[k]).sum())
        dvar_ratios.append((dvar_k * variances[k]).sum())
        if name == 'bn' and count is None:
            continue
        dmean_k, dvar_k = dmean_k * mean_ratios[k], dvar_k * var_ratios[k]
        if name == 'bn' and group is not None:
            both = torch.cat([dmean_k, dvar_k])
            dist.all_reduce(both, group=group)
            dmean_k, dvar_k = (both * (size / count.clamp(min=1))).split(1)
        elif name != 'in':
            joined = c if name == 'ln' else max(n, 1)
            dmean_k, dvar_k = dmean_k / joined, dvar_k / joined
        if name != 'in':  # the variance also holds the spread of the IN means
            dmean_k = torch.addcmul(dmean_k, dvar_k, means[k] - mean)
        dmean_in, dvar_in = dmean_in + dmean_k, dvar_in + dvar_k

    dmean_weight = _softmax_backward(mean_ratios, dmean_ratios)
    dvar_weight = _softmax_backward(var_ratios, dvar_ratios) * -0.5
    b1, b0 = dvar_in * (-1 / max(size, 1)), dmean_in / max(size, 1)
    a, b1, b0 = (t.to(mean_in.dtype).expand(n, c) for t in (a, b1, b0))
    return a, b1, b0, dmean_weight, dvar_weight, dweight, dbias


def _moments(mean_in, var_in):
    """Mean, variance and E[x^2] of each map, in float64."""
    mean, var = mean_in.double(), var_in.double()
    return mean, var, torch.addcmul(var, mean, mean)


def _batch_moments(mean, square, size, group):
    """BN moments (C,) from the E[x] and E[x^2] of the maps, and the number of pixels behind them.

    With a process group they are those of the joined batch: one all-reduce of 2C + 1 numbers, so that every pixel of
    every rank weighs the same.
    """
    n = len(mean)
    mean, square = mean.sum(0), square.sum(0)
    if group is None:
        count, divisor = n * size, max(n, 1)
    else:
        sums = torch.cat([mean * size, square * size, mean.new_full((1,), n * size)])
        dist.all_reduce(sums, group=group)
        mean, square, count = sums.split([len(mean), len(mean), 1])
        count = count[0]
        divisor = count.clamp(min=1)
    mean = mean / divisor
    return mean, _variance(mean, square / divisor), count


def _variance(mean: Tensor, square: Tensor) -> Tensor:
    return torch.addcmul(square, mean, mean, value=-1).clamp_(min=0)


def _blend(mean, var, square, mean_bn, var_bn, mean_weight, var_weight, normalizers, eps):
    """The moments of each normalizer, and their blend by the softmax of the logits.

    Returns:
        Means and variances, K of each, broadcastable to (N, C); their ratios, K numbers each; the distance of the
        blended mean from the IN mean, and ``1 / sqrt(var + eps)``, both (N, C).
    """
    means, variances = [], []
    for name in normalizers:
        if name == 'in':
            mean_k, var_k = mean, var
        elif name == 'ln':
            mean_k = mean.mean(1, keepdim=True)
            var_k = _variance(mean_k, square.mean(1, keepdim=True))
        else:
            mean_k, var_k = mean_bn.double()[None], var_bn.double()[None]
        means.append(mean_k)
        variances.append(var_k)
    mean_ratios, var_ratios = (logits.double().softmax(0).unbind() for logits in (mean_weight, var_weight))
    shift = _weighted(mean_ratios, means) - mean
    return means, variances, mean_ratios, var_ratios, shift, (_weighted(var_ratios, variances) + eps).rsqrt_()


def _weighted(ratios, moments) -> Tensor:
    """``sum_k ratio_k * moment_k``; from the last to the first, since the first is the only one of full size."""
    total = ratios[-1] * moments[-1]
    for ratio, moment in zip(ratios[-2::-1], moments[-2::-1]):
        total = torch.addcmul(total, moment, ratio)
    return total


def _softmax_backward(ratios, dratios) -> Tensor:
    ratios, dratios = torch.stack(ratios), torch.stack(dratios)
    return ratios * (dratios - ratios.dot(dratios))
