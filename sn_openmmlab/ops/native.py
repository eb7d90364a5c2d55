"""The four big passes on torch's own kernels: for the CPU, and for any other device that has BatchNorm.

To torch each map is the one channel of a norm of its own: the input is seen as a single sample with N*C channels, or,
where it is stored channels last, sample by sample. Its batch-norm kernels are then the passes wanted, vectorised, for
every dtype. Maps are (N, C, S), moments and coefficients (N, C).
"""

import torch
from torch import Tensor

from . import algebra  # noqa: F401  (part of a backend's interface)
from .reference import moments_dtype

_aten = torch.ops.aten


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pass 1: mean and biased variance of each map, and a tensor stored as ``x`` to take the output."""
    dense, out = _dense(x), None
    if dense is not x:
        return *moments(dense)[:2], torch.empty_like(x)
    if x.is_contiguous() and x.device.type == 'cpu':
        # Torch's fastest moments here are its group norm's; the output that comes with them will take ours.
        rows = _rows(x)
        channels, size = rows.shape[1:]
        zeros, ones = None, None
        if x.dtype != moments_dtype(x.dtype):
            zeros, ones = _constants(rows)  # float32 weights give half-precision input float32 moments
        out, mean, rstd = _aten.native_group_norm(rows, ones, zeros, 1, channels, size, channels, 0.0)
        var = rstd.reciprocal().square()  # 0 for constant maps, where 1/std is inf
        if x.dtype == torch.float64 or not (mean.square() > 1e4 * var).any():
            return mean.view(x.shape[:2]), var.view(x.shape[:2]), out.view(x.shape)
        # Its float32 sums are too coarse for maps far from zero; batch norm sums in float64.
    parts = []
    for sample in _samples(x):
        # the running statistics that are passed select float32 moments of half-precision input; momentum 0 keeps them
        parts.append(_aten.batch_norm_update_stats(sample, *_constants(sample), 0.0))
    mean, var = (torch.cat(part).view(x.shape[:2]) for part in zip(*parts))
    return mean, var, torch.empty_like(x) if out is None else out.view(x.shape)


def affine(x: Tensor, mean: Tensor, a: Tensor, s: Tensor, out: Tensor) -> None:
    """Pass 2: ``out = a*(x - mean) + s``, as the evaluation of a batch norm of variance 1."""
    dense = _dense(x)
    if dense is not x:
        y = torch.empty_like(dense)
        affine(dense, mean, a, s, y)
        out.copy_(y)
        return
    none = mean.new_empty(0)
    for sample, y, *coefficients in zip(_samples(x), _samples(out), *(_split(x, t) for t in (a, s, mean))):
        _aten.native_batch_norm.out(
            sample, *coefficients, _constants(sample)[1], False, 0.0, 0.0, out=y, save_mean=none, save_invstd=none
        )


def reduce(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Pass 3: sum of dy and sum of dy * (x - mean) over each map, as a batch norm's gradients of bias and weight."""
    dy, x = _dense(dy), _dense(x)
    parts = []
    for grad, sample, m in zip(_samples(dy), _samples(x), _split(x, mean)):
        ones = _constants(sample)[1]
        parts.append(
            _aten.native_batch_norm_backward(grad, sample, ones, m, ones, m, ones, False, 0.0, [False, True, True])[1:]
        )
    sum_dyx, sum_dy = (torch.cat(part).view(x.shape[:2]) for part in zip(*parts))
    return sum_dy, sum_dyx


def combine(dy: Tensor, x: Tensor, mean: Tensor, a: Tensor, b1: Tensor, b0: Tensor) -> Tensor:
    """Pass 4: ``a*dy + b1*(x - mean) + b0``."""
    dx = torch.empty_like(x)
    affine(x, mean, b1, b0, dx)
    if x.dtype == moments_dtype(x.dtype):
        return dx.addcmul_(dy, a[..., None])
    rest, zeros = torch.empty_like(x), torch.zeros_like(a)  # coefficients are not to be rounded to half precision
    affine(dy, zeros, a, zeros, rest)
    return dx.add_(rest)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(1, -1, x.shape[2])


def _dense(x: Tensor) -> Tensor:
    """``x``; or a contiguous copy where it is channels last and a call for each of many samples would cost more."""
    return x if x.is_contiguous() or len(x) <= 8 else x.contiguous()


def _samples(x: Tensor) -> list[Tensor]:
    """What torch's kernels are called on: all maps at once, or one channels-last sample after the other."""
    return [_rows(x)] if x.is_contiguous() else list(x.unsqueeze(3).split(1))


def _split(x: Tensor, t: Tensor) -> list[Tensor]:
    """(N, C) moments or coefficients in the parts of :func:`_samples`."""
    return [t.reshape(-1)] if x.is_contiguous() else list(t.contiguous().unbind())


def _constants(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros and ones, one for each channel of a sample."""
    zeros = sample.new_zeros(sample.shape[1], dtype=moments_dtype(sample.dtype))
    return zeros, torch.ones_like(zeros)
