"""The four big passes on torch's own kernels: for the CPU, and for any other device that has BatchNorm.

To torch each map is the one channel of a norm of its own: the input is seen as a single sample with N*C channels, or,
where it is stored channels last, sample by sample. Its batch-norm kernels are then the passes wanted, vectorised, for
every dtype. Where they are slow, plain arithmetic takes their place. Below the four passes, maps are (N, C, S), and
moments and coefficients (N, C).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..formula import moments_dtype
from ..torch_versions import VERSION
from . import algebra

pool, coefficients = algebra.pool, algebra.coefficients
pool_gradients, gradients = algebra.pool_gradients, algebra.gradients
_aten = torch.ops.aten
_SMALL = 64  # pixels of a map below which calling a kernel for it costs more than its work
_CHUNK = 2**19  # elements that stay in the cache from one operation to the next


def moments(x: Tensor) -> Tensor:
    """Pass 1: means and biased variances of the maps."""
    return torch.stack(_moments(_maps(x)))


def affine(x: Tensor, moments: Tensor, coefficients: Tensor) -> Tensor:
    """Pass 2: ``a*(x - mean) + s``."""
    return _alone(_affine(_maps(x), moments[0], *coefficients), x)


def reduce(dy: Tensor, x: Tensor, moments: Tensor) -> Tensor:
    """Pass 3: sums of dy and of dy * (x - mean) over the maps."""
    return torch.stack(_reduce(_maps(dy), _maps(x), moments[0]))


def combine(dy: Tensor, x: Tensor, moments: Tensor, coefficients: Tensor) -> Tensor:
    """Pass 4: ``b1*(x - mean) + b0 + a*dy``."""
    return _alone(_combine(_maps(dy), _maps(x), moments[0], *coefficients), x)


def prepare(*_) -> None:
    """There is no one operation that does it all."""


def _maps(x: Tensor) -> Tensor:
    """Any rank as (N, C, S)."""
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


def _alone(y: Tensor, x: Tensor) -> Tensor:
    """Maps in the shape of ``x``, yet no view of anything, since ReLU(inplace=True) follows."""
    alone: Any = x.new_empty(0)  # torch's annotations know no set_ of a tensor
    return alone.set_(y.view(x.shape))


def _where_torch_cannot(function: Callable) -> Callable:
    """Decorate a pass: half precision on the CPU, for which older torch lacks kernels, goes through float32."""

    @functools.wraps(function)
    def wrapper(x: Tensor, *others: Tensor):
        if x.dtype not in lacking or x.device.type != 'cpu':
            return function(x, *others)
        result = function(*(t.float() for t in (x, *others)))
        return result.to(x.dtype) if isinstance(result, Tensor) else result  # moments and sums stay float32

    lacking = [torch.float16] * (VERSION < (2, 4)) + [torch.bfloat16] * (VERSION < (2, 0))
    return wrapper if lacking else function


@_where_torch_cannot
def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each map."""
    if x.device.type == 'cpu' and (x.is_contiguous() or _many(x)):
        # The fastest way first: exact enough for maps that lie near zero, as those of a convolution do.
        for way, limit in (_moments_by_sums, 16), (_moments_by_group_norm, 1e4):
            mean, var = way(x)
            if torch.addcmul(var, mean, mean, value=-1 / limit).amin() >= 0:  # mean^2 up to limit * var everywhere
                return mean, var
        x = x.contiguous()
    parts = []  # batch norm sums in float64
    for sample in _samples(x):
        # the running statistics that are passed select float32 moments of half-precision input; momentum 0 keeps them
        zeros, ones = _constants(sample)
        parts.append(_aten.batch_norm_update_stats(sample, zeros.clone(), ones.clone(), 0.0))
    return _join(parts, x)


@_where_torch_cannot
def _affine(x: Tensor, mean: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """``a*(x - mean) + s``."""
    if _is_half(x):
        if _many(x):
            return _chunkwise(_affine, x, mean, a, s)
    elif not x.is_contiguous() or x.shape[2] < _SMALL:
        a, s = a[..., None], torch.addcmul(s, mean, a, value=-1)[..., None]
        return torch.mul(x, a).add_(s) if x.is_contiguous() else torch.addcmul(s, x, a)
    y = torch.empty_like(x)
    for sample, out, *small in zip(_samples(x), _samples(y), *(_split(x, t) for t in (a, s, mean))):
        weight, bias, means = small
        _evaluate(sample, weight, bias, means, _constants(sample)[1], out)
    return y


@_where_torch_cannot
def _reduce(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of dy and sum of dy * (x - mean) over each map."""
    if _many(x):
        return _join([(d.sum(2), torch.sub(h, m[..., None]).mul_(d).sum(2)) for d, h, m in _chunks(dy, x, mean)], x)
    samples = zip(_samples(_for_sums(dy)), _samples(_for_sums(x)), _split(x, mean))
    return _join([_sums(*sample) for sample in samples], x)


@_where_torch_cannot
def _combine(dy: Tensor, x: Tensor, mean: Tensor, b1: Tensor, b0: Tensor, a: Tensor) -> Tensor:
    """``b1*(x - mean) + b0 + a*dy``."""
    if not _is_half(x):
        return _affine(x, mean, b1, b0).addcmul_(dy, a[..., None])
    if _many(x):
        return _chunkwise(_combine, dy, x, mean, b1, b0, a)
    # Coefficients are not to be rounded, but the sum is, three times: the error of dx is 1.4 times that of one
    # rounding, which would take float32 maps and up to 2.6 times as long.
    zeros = torch.zeros_like(a)
    return _affine(x, mean, b1, b0).add_(_affine(dy, zeros, a, zeros))


def _moments_by_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """From the sums of x and x^2."""
    size = x.shape[2]
    if _many(x):
        sums, squares = _join([(h.sum(2), h.square().sum(2)) for (h,) in _chunks(x)], x)
    else:
        h = _for_sums(x, 8 * _SMALL)
        parts = _parts(size, 2**14 if _is_half(h) else 2**10)
        rows = h.view(1, -1, size // parts)
        sums, squares = (t if parts == 1 else t.view(-1, parts).sum(1) for t in _sums(rows, rows, _constants(rows)[0]))
    mean = (sums / size).view(x.shape[:2])
    return mean, torch.addcmul((squares / size).view_as(mean), mean, mean, value=-1).clamp_(min=0)


def _moments_by_group_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """From a group norm of one channel a group, by Welford's algorithm."""
    rows = _rows(x.contiguous())
    channels, size = rows.shape[1:]
    # float32 weights give half-precision input float32 moments
    zeros, ones = _constants(rows) if _is_half(x) else (None, None)
    _, mean, rstd = _aten.native_group_norm(rows, ones, zeros, 1, channels, size, channels, 0.0)
    return mean.view(x.shape[:2]), rstd.view(x.shape[:2]).reciprocal_().square_()  # 0 where 1/std is inf


def _sums(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of dy and of dy * (x - mean) over each channel, as a batch norm's gradients of bias and weight."""
    ones = _constants(x)[1]
    _, sum_dyx, sum_dy = _aten.native_batch_norm_backward(
        dy, x, ones, mean, ones, mean, ones, False, 0.0, [False, True, True]
    )
    return sum_dy, sum_dyx


def _evaluate(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, out: Tensor) -> None:
    """The evaluation of a batch norm, of eps 0."""
    arguments = x, weight, bias, mean, var, False, 0.0, 0.0
    if VERSION >= (2, 0):  # before, the CPU has no such operation
        # one tensor each: CUDA's kernel writes mean and 1/std there, and then normalises with what it reads there
        saved = dict(save_mean=mean.new_empty(0), save_invstd=mean.new_empty(0))
        _aten.native_batch_norm.out(*arguments, out=out, **saved)
    else:
        out.copy_(_aten.native_batch_norm(*arguments)[0])


def _is_half(x: Tensor) -> bool:
    return x.dtype != moments_dtype(x.dtype)


def _for_sums(x: Tensor, small: int = _SMALL) -> Tensor:
    """Maps of less than ``small`` pixels are summed faster in float32; CUDA would round sums as the maps are."""
    coarse = x.device.type != 'cpu' or (x.is_contiguous() and x.shape[2] < small)
    return x.float() if _is_half(x) and coarse else x


@functools.lru_cache(1024)
def _parts(size: int, longest: int) -> int:
    """How many parts a map is summed in, so that no float32 sum runs over more than ``longest`` pixels.

    A thousand for float32 input; half precision is coarser than the error of longer sums. One part where sizes do not
    allow more.
    """
    return next((k for k in range(-(-size // longest), size // 128 + 1) if size % k == 0), 1)


def _rows(x: Tensor) -> Tensor:
    return x.view(1, -1, x.shape[2])


def _samples(x: Tensor) -> list[Tensor]:
    """What torch's kernels are called on: all maps at once, or one channels-last sample after the other."""
    return [_rows(x)] if x.is_contiguous() else list(x.unsqueeze(3).split(1))


def _split(x: Tensor, t: Tensor) -> list[Tensor]:
    """(N, C) moments or coefficients in the parts of :func:`_samples`."""
    return [t.reshape(-1)] if x.is_contiguous() else list(t.contiguous().unbind())


def _join(parts: list[tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of results for parts of the samples as two of shape (N, C)."""
    first, second = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts))
    return first.view(x.shape[:2]), second.view(x.shape[:2])


def _many(x: Tensor) -> bool:
    """Whether the samples are stored channels last and too many for a kernel call each."""
    return len(x) > 8 and not x.is_contiguous()


def _at_once(x: Tensor) -> int:
    return max(1, _CHUNK // x[0].numel())


def _chunks(x: Tensor, *others: Tensor) -> Iterator[list[Tensor]]:
    """As many samples at a time as stay in the cache, in float32 if they were in half precision."""
    for parts in zip(*(t.split(_at_once(x)) for t in (x, *others))):
        yield [t.float() if _is_half(t) else t for t in parts]


def _chunkwise(function: Callable, x: Tensor, *others: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for part, chunk in zip(out.split(_at_once(x)), _chunks(x, *others)):
        part.copy_(function(*chunk))
    return out


def _constants(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros and ones, one for each channel of a sample; not to be written to."""
    return _zeros_and_ones(sample.shape[1], moments_dtype(sample.dtype), sample.device)


@functools.lru_cache(64)
def _zeros_and_ones(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return torch.zeros(channels, dtype=dtype, device=device), torch.ones(channels, dtype=dtype, device=device)
