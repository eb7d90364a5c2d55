"""C++ for the CPU, in float32 and bfloat16, where the install could compile it.

``passes.cpp`` and ``algebra.cpp`` get pointers and sizes, and know nothing of torch: compiled once, they serve every
version of torch. The algebra is one call each way, so that small layers do not wait for many operations.
"""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from .. import algebra
from ..interface import Parameters, Setting, Statistics, kept_sizes
from .load import library


def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a library, for such tensors."""
    return device.type == 'cpu' and dtype in (torch.float32, torch.bfloat16) and library() is not None


def moments(x: Tensor) -> Tensor:
    """Pass 1: means and biased variances of the maps."""
    return _sums(x)


def affine(x: Tensor, moments: Tensor, coefficients: Tensor) -> Tensor:
    """Pass 2: ``a*(x - mean) + s``."""
    return _combine(x, None, moments, coefficients)


def reduce(dy: Tensor, x: Tensor, moments: Tensor) -> Tensor:
    """Pass 3: sums of dy and of dy * (x - mean) over the maps."""
    return _sums(x, dy, moments)


def combine(dy: Tensor, x: Tensor, moments: Tensor, coefficients: Tensor) -> Tensor:
    """Pass 4: ``b1*(x - mean) + b0 + a*dy``."""
    return _combine(x, dy, moments, coefficients)


def _sums(x: Tensor, dy: Tensor | None = None, moments: Tensor | None = None) -> Tensor:
    n, c = x.shape[:2]
    sums = x.new_empty((2, n, c), dtype=torch.float32)
    first = sums.data_ptr()
    library().sn_sums(x.data_ptr(), _pointer(dy), _pointer(moments), first, first + 4 * n * c, *_storage(x))
    return sums


def _combine(x: Tensor, dy: Tensor | None, moments: Tensor, coefficients: Tensor) -> Tensor:
    out, first, step = torch.empty_like(x), coefficients.data_ptr(), 4 * moments[0].numel()
    pointers = x.data_ptr(), _pointer(dy), out.data_ptr(), moments.data_ptr(), first + 2 * step, first, first + step
    library().sn_combine(*pointers, *_storage(x))
    return out


def _storage(x: Tensor) -> tuple:
    n, c = x.shape[:2]
    return n, c, x.numel() // (n * c), not x.is_contiguous(), x.dtype == torch.bfloat16, torch.get_num_threads()


def pool(moments: Tensor, size: int) -> Tensor:
    """See :func:`..algebra.pool`."""
    shared = moments.new_empty(2 * moments.shape[2] + 1, dtype=torch.float64)
    _run('sn_pool', moments, size, shared=shared)
    return shared


def coefficients(
    moments: Tensor,
    size: int,
    shared: Tensor | None,
    parameters: Parameters,
    statistics: Statistics | None,
    setting: Setting,
) -> tuple[Tensor, Tensor]:
    """See :func:`..algebra.coefficients`."""
    _, n, c = moments.shape
    out, joint = torch.empty_like(moments), moments.new_empty(2 * (n + c) + 1, dtype=torch.float64)
    taken = statistics
    if statistics is not None and not _is_plain(statistics):
        taken = Statistics(_dense(statistics.mean), _dense(statistics.var)) if setting.frozen else None
    _run('sn_coefficients', moments, size, parameters, setting, joint, shared, out, statistics=taken)
    if taken is None and statistics is not None:
        algebra.update(statistics, joint, joint[-1])
    return out, joint


def pool_gradients(sums: Tensor, moments: Tensor, joint: Tensor, parameters: Parameters, setting: Setting) -> Tensor:
    """See :func:`..algebra.pool_gradients`."""
    shared = moments.new_empty(2 * moments.shape[2], dtype=torch.float64)
    _run('sn_pool_gradients', moments, 1, parameters, setting, joint, shared, sums=sums)
    return shared


def gradients(
    sums: Tensor,
    moments: Tensor,
    joint: Tensor,
    size: int,
    shared: Tensor | None,
    parameters: Parameters,
    setting: Setting,
) -> tuple[Tensor, Tensor]:
    """See :func:`..algebra.gradients`."""
    _, n, c = moments.shape
    out, small = moments.new_empty((3, n, c)), moments.new_empty(2 * (c + len(setting.normalizers)))
    _run('sn_gradients', moments, size, parameters, setting, joint, shared, out, sums, small)
    return out, small


# Arguments in algebra.cpp: what does not change from call to call, and what does
_constants = struct.Struct('9qd').pack
_others = struct.Struct('qd16q').pack


def _run(
    name, moments, size, parameters=(None,) * 4, setting=None, joint=None, shared=None, out=None, sums=None, small=None,
    statistics=None,
) -> None:  # fmt: skip
    names, eps, frozen = setting or Setting((), 0.0, False)
    parameters = [None if t is None else _dense(t) for t in parameters]  # kept until the call is over
    mean, var, tracked, momentum = statistics or (None, None, None, None)
    constants = _constants(*moments.shape[1:], size, *_places(names), frozen, False, False, eps)
    tensors = None, *parameters, mean, var, tracked, None, None, moments, joint, shared, out, sums, small
    others = _others(torch.get_num_threads(), -1 if momentum is None else momentum, *map(_address, tensors))
    getattr(library(), name)(constants + others)


class _Program:
    """The whole op in one call each way."""

    def __init__(self, x: Tensor, logits: int, setting: Setting) -> None:
        n, c = x.shape[:2]
        names, eps, frozen = setting
        layout = not x.is_contiguous(), x.dtype == torch.bfloat16
        self._constants = _constants(n, c, x.numel() // (n * c), *_places(names), frozen, *layout, eps)
        moments, joint = kept_sizes(n, c, x.dtype)
        self._joint, self._kept, self._small = 8 * moments, moments + joint, 2 * (c + logits)
        self._forward, self._backward = library().sn_forward, library().sn_backward

    def forward(
        self, arguments: tuple, addresses: list[int], momentum: float | None, keep: bool
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(arguments[0])
        kept = torch.empty(self._kept, dtype=torch.float64, device='cpu')
        moments = kept.data_ptr()
        out = y.data_ptr(), moments, moments + self._joint
        numbers = torch.get_num_threads(), -1 if momentum is None else momentum
        self._forward(self._constants + _others(*numbers, *addresses, 0, *out, 0, 0, 0, 0))
        return y, kept

    def backward(self, tensors: tuple, addresses: list[int]) -> tuple[Tensor, Tensor]:
        dx, small = torch.empty_like(tensors[1]), torch.empty(self._small, dtype=torch.float32, device='cpu')
        dy, x, moments, mean_weight, var_weight, weight = addresses
        others = _others(
            torch.get_num_threads(), 0, x, mean_weight, var_weight, weight, 0, 0, 0, 0, dy, dx.data_ptr(),
            moments, moments + self._joint, 0, 0, 0, small.data_ptr(),
        )  # fmt: skip
        self._backward(self._constants + others)
        return dx, small


def prepare(x: Tensor, parameters: Parameters, statistics: Statistics | None, setting: Setting) -> _Program | None:
    """The whole op in one call each way, where nothing has to be converted."""
    if statistics is not None and not _is_plain(statistics):
        return None
    if not all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in parameters):
        return None
    if not (x.is_contiguous() or x.movedim(1, -1).is_contiguous()):
        return None
    return _Program(x, len(setting.normalizers), setting)


def _is_plain(statistics: Statistics) -> bool:
    """Whether C++ can move them."""
    mean, var, tracked, _ = statistics
    return (
        mean.dtype == var.dtype == torch.float32
        and mean.is_contiguous()
        and var.is_contiguous()
        and (
            tracked is None or (tracked.dtype == torch.int64 and tracked.device == mean.device and tracked.numel() == 1)
        )
    )


def _dense(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float32 and t.is_contiguous() else t.float().contiguous()


@functools.lru_cache(None)
def _places(normalizers: tuple[str, ...]) -> list[int]:
    return [normalizers.index(name) if name in normalizers else -1 for name in ('in', 'ln', 'bn')]


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
