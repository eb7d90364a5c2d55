"""The algebra of :mod:`..algebra` in Triton: one launch each way, so that small layers do not wait for launches.

Notation and arguments are those of :mod:`..algebra`; distances between means are formed in float64, all else in the
dtype of the moments. A program holds a tile of (N, C) in registers. If one can hold everything it runs alone; else a
first launch takes the sums over rows, all channels of a sample, and a second one those over columns, all samples of a
channel. Sums over a process group, and tensors too large, go to :mod:`..algebra`.
"""

# no `from __future__ import annotations`: Triton 3.0 takes tl.constexpr for what it is only where it is evaluated

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formula import NORMALIZERS
from .. import algebra

VERSION = tuple(map(int, triton.__version__.split('.')[:2]))
if VERSION < (3, 0):
    raise ImportError(f'Triton is {triton.__version__}')

_ALONE = 4096  # elements of (N, C) up to which one program does everything
_LONGEST = 8192  # the most rows or columns that fit into registers


def forward(
    mean_in, var_in, mean_bn, var_bn, mean_weight, var_weight, weight, bias, normalizers, eps, size, group
) -> 'tuple[Tensor, Tensor, tuple[Tensor | None, ...], Tensor | int | None]':
    """Coefficients of the forward pass from IN moments: see :func:`..algebra.forward`."""
    if not _fits(mean_in, size, group):
        return algebra.forward(
            mean_in, var_in, mean_bn, var_bn, mean_weight, var_weight, weight, bias, normalizers, eps, size, group
        )
    (n, c), dtype, device = mean_in.shape, mean_in.dtype, mean_in.device
    count = None
    if 'bn' in normalizers and mean_bn is None:
        mean_bn, var_bn = torch.empty(c, dtype=torch.float64, device=device), torch.empty(c, dtype=dtype, device=device)
        count = n * size
    a, s = torch.empty((2, n, c), dtype=dtype, device=device).unbind()
    plans = _plans(n, c)
    rows = None if len(plans) == 1 else torch.empty((2, n), dtype=torch.float64, device=device)
    given = _dense(mean_in, var_in, mean_bn, var_bn, mean_weight, var_weight, weight, bias)
    for plan in plans:
        launch(_forward, plan, *given, a, s, rows, EPS=eps, FROZEN=count is None, **_places(normalizers))
    return a, s, (mean_in, var_in, mean_bn, var_bn), count


def backward(
    sum_dy, sum_dyx, saved, mean_weight, var_weight, weight, normalizers, eps, size, count, group
) -> 'tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]':
    """Coefficients of the backward pass, and the gradients of everything small: see :func:`..algebra.backward`."""
    mean_in = saved[0]
    if not _fits(mean_in, size, group):
        return algebra.backward(
            sum_dy, sum_dyx, saved, mean_weight, var_weight, weight, normalizers, eps, size, count, group
        )
    (n, c), k, dtype, device = mean_in.shape, len(normalizers), mean_in.dtype, mean_in.device
    a, b1, b0 = torch.empty((3, n, c), dtype=dtype, device=device).unbind()
    dweight, dbias, *dlogits = torch.empty(2 * (c + k), dtype=dtype, device=device).split([c, c, k, k])
    plans = _plans(n, c)
    rows = None if len(plans) == 1 else torch.empty((8, n), dtype=torch.float64, device=device)
    given = _dense(sum_dy, sum_dyx, *saved, mean_weight, var_weight, weight)
    for plan in plans:
        launch(
            _backward, plan, *given, a, b1, b0, *dlogits, dweight, dbias, rows, S=size,
            EPS=eps, FROZEN=count is None, **_places(normalizers),
        )  # fmt: skip
    return a, b1, b0, *dlogits, dweight, dbias


class Plan(NamedTuple):
    """How many programs of a kernel to start, and those of its arguments that follow from sizes."""

    programs: int
    arguments: dict


def launch(kernel, plan: Plan, *args, **kwargs) -> None:
    """Run a kernel on the device of its first argument, which need not be the current one.

    Multiplications and additions may be fused, whatever Triton's default: the passes are bound by memory, and repeat
    bit for bit either way.
    """
    device = args[0].device
    if device.type == 'cuda' and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(plan.programs,)](*args, **kwargs, **plan.arguments, enable_fp_fusion=True)
    else:
        kernel[(plan.programs,)](*args, **kwargs, **plan.arguments, enable_fp_fusion=True)


def _fits(mean_in: Tensor, size: int, group) -> bool:
    return group is None and size > 0 and 0 < mean_in.numel() and max(mean_in.shape) <= _LONGEST


def _dense(*tensors: 'Tensor | None') -> 'list[Tensor | None]':
    return [None if t is None else t.contiguous() for t in tensors]


@functools.lru_cache(4096)
def _plans(n: int, c: int) -> 'list[Plan]':
    rows, columns = triton.next_power_of_2(n), triton.next_power_of_2(c)
    if rows * columns <= _ALONE:
        return [_plan('all', n, c, 1, rows, columns)]
    few_rows = max(1, 1024 // columns)
    few_columns = min(max(8, 1024 // rows), max(1, 4096 // rows))  # 8 floats are read at once
    return [
        _plan('by row', n, c, triton.cdiv(n, few_rows), few_rows, columns),
        _plan('by column', n, c, triton.cdiv(c, few_columns), rows, few_columns),
    ]


def _plan(part, n: int, c: int, programs: int, rows: int, columns: int) -> Plan:
    warps = min(max(rows * columns // 256, 1), 16)
    return Plan(programs, dict(N=n, C=c, PART=part, ROWS=rows, COLUMNS=columns, num_warps=warps))


@functools.lru_cache(None)
def _places(normalizers: 'tuple[str, ...]') -> dict:
    """Where the logits of each normalizer stand, -1 for those that take no part."""
    return {name.upper(): normalizers.index(name) if name in normalizers else -1 for name in NORMALIZERS}


# Below, what is one a row or one a column of a tile keeps the other axis, at size 1.


@triton.jit(do_not_specialize=['N', 'C'])
def _forward(
    mean_ptr,  # (N, C)
    var_ptr,  # (N, C)
    mean_bn_ptr,  # (C,), read where FROZEN and else written; None without BN
    var_bn_ptr,  # (C,), likewise
    mean_weight_ptr,  # (K,)
    var_weight_ptr,  # (K,)
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    a_ptr,  # (N, C), written
    s_ptr,  # (N, C), written
    rows_ptr,  # (2, N), written by row and read by column; None where one launch does all
    N,
    C,
    EPS: tl.constexpr,
    FROZEN: tl.constexpr,
    IN: tl.constexpr,
    LN: tl.constexpr,
    BN: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    n, c, at, inside = _tile(N, C, PART, ROWS, COLUMNS)
    mean, var = _load(mean_ptr, at, inside), _load(var_ptr, at, inside)
    mean_ln, var_ln = _ln_moments(mean, var, inside, rows_ptr, n, N, LN, PART)
    if PART != 'by row':
        if FROZEN:
            mean_bn, var_bn = _bn_moments(mean, var, mean_bn_ptr, var_bn_ptr, c, C)
        else:
            mean_bn, var_bn = pool(mean, var, inside, 0)
            tl.store(mean_bn_ptr + c, mean_bn, mask=c < C)
            tl.store(var_bn_ptr + c, var_bn, mask=c < C)
        w, v = _ratios(mean_weight_ptr, var.dtype, IN, LN, BN), _ratios(var_weight_ptr, var.dtype, IN, LN, BN)
        _, _, shift, rstd = _blend(mean, var, mean_ln, var_ln, mean_bn, var_bn, w, v, EPS, IN, LN, BN)
        a, s = rstd, -shift * rstd
        if weight_ptr is not None:
            a = _load(weight_ptr, c, c < C).to(var.dtype) * rstd
            s = _load(bias_ptr, c, c < C).to(var.dtype) - shift * a
        tl.store(a_ptr + at, a, mask=inside)
        tl.store(s_ptr + at, s, mask=inside)


@triton.jit(do_not_specialize=['N', 'C', 'S'])
def _backward(
    sum_dy_ptr,  # (N, C)
    sum_dyx_ptr,  # (N, C)
    mean_ptr,  # (N, C)
    var_ptr,  # (N, C)
    mean_bn_ptr,  # (C,), or None without BN
    var_bn_ptr,  # (C,), likewise
    mean_weight_ptr,  # (K,)
    var_weight_ptr,  # (K,)
    weight_ptr,  # (C,) or None
    a_ptr,  # (N, C), written
    b1_ptr,  # (N, C), written
    b0_ptr,  # (N, C), written
    dmean_weight_ptr,  # (K,), written
    dvar_weight_ptr,  # (K,), written
    dweight_ptr,  # (C,), written
    dbias_ptr,  # (C,), written
    rows_ptr,  # (8, N), written by row and read by column; None where one launch does all
    N,
    C,
    S,
    EPS: tl.constexpr,
    FROZEN: tl.constexpr,
    IN: tl.constexpr,
    LN: tl.constexpr,
    BN: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    n, c, at, inside = _tile(N, C, PART, ROWS, COLUMNS)
    mean, var = _load(mean_ptr, at, inside), _load(var_ptr, at, inside)
    sum_dy, sum_dyx = _load(sum_dy_ptr, at, inside), _load(sum_dyx_ptr, at, inside)
    mean_ln, var_ln = _ln_moments(mean, var, inside, rows_ptr, n, N, LN, PART)
    mean_bn, var_bn = _bn_moments(mean, var, mean_bn_ptr, var_bn_ptr, c, C)
    w, v = _ratios(mean_weight_ptr, var.dtype, IN, LN, BN), _ratios(var_weight_ptr, var.dtype, IN, LN, BN)
    shift_ln, shift_bn, shift, rstd = _blend(mean, var, mean_ln, var_ln, mean_bn, var_bn, w, v, EPS, IN, LN, BN)
    a = rstd if weight_ptr is None else _load(weight_ptr, c, c < C).to(var.dtype) * rstd

    # Gradient w.r.t. the blended moments, 0 outside the tensor
    sum_dyxhat = (sum_dyx - shift * sum_dy) * rstd
    dmean = tl.where(inside, -a * sum_dy, 0.0)
    dvar = tl.where(inside, -0.5 * a * rstd * sum_dyxhat, 0.0)

    # Sums over rows: for the gradients w.r.t. the LN moments, and w.r.t. the ratios
    dmean_ln = _entry(w, LN) * _row_sum(dmean, rows_ptr, 2, n, N, PART) / C
    sum_dvar = _row_sum(dvar, rows_ptr, 3, n, N, PART)
    dvar_ln = _entry(v, LN) * sum_dvar / C
    dw_ln = _row_sum(dmean * shift_ln, rows_ptr, 4, n, N, PART)
    dw_bn = _row_sum(dmean * shift_bn, rows_ptr, 5, n, N, PART)
    dv_in = _row_sum(dvar * var, rows_ptr, 6, n, N, PART)
    dv_ln = var_ln * sum_dvar
    dv_bn = _row_sum(dvar * var_bn, rows_ptr, 7, n, N, PART)

    if PART != 'by row':
        dmean_in = _entry(w, IN) * dmean + dmean_ln - 2 * dvar_ln * shift_ln
        dvar_in = _entry(v, IN) * dvar + dvar_ln
        if not FROZEN:
            dmean_bn = _entry(w, BN) * tl.sum(dmean, 0, keep_dims=True) / N
            dvar_bn = _entry(v, BN) * tl.sum(dvar, 0, keep_dims=True) / N
            dmean_in += dmean_bn - 2 * dvar_bn * shift_bn
            dvar_in += dvar_bn
        tl.store(a_ptr + at, a, mask=inside)
        tl.store(b1_ptr + at, dvar_in * 2 / S, mask=inside)
        tl.store(b0_ptr + at, dmean_in / S, mask=inside)

        # Gradient w.r.t. weight and bias, and w.r.t. the logits
        tl.store(dweight_ptr + c, tl.sum(tl.where(inside, sum_dyxhat, 0.0), 0, keep_dims=True), mask=c < C)
        tl.store(dbias_ptr + c, tl.sum(sum_dy, 0, keep_dims=True), mask=c < C)
        if tl.program_id(0) == 0:
            _softmax_backward(dmean_weight_ptr, w, 0.0, tl.sum(dw_ln), tl.sum(dw_bn), IN, LN, BN)
            _softmax_backward(dvar_weight_ptr, v, tl.sum(dv_in), tl.sum(dv_ln), tl.sum(dv_bn), IN, LN, BN)


@triton.jit
def _tile(N, C, PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The samples and channels of this program, where they lie in (N, C), and whether they lie inside it."""
    n, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    if PART == 'by row':
        n += tl.program_id(0) * ROWS
    else:
        c += tl.program_id(0) * COLUMNS
    return n, c, n * C + c, (n < N) & (c < C)


@triton.jit
def _load(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0)


@triton.jit
def pool(mean, var, weight, axis: tl.constexpr):
    """Joint mean (float64) and variance of sets that weigh ``weight``, by the law of total variance.

    Summing in float64 keeps the distances from the joint mean exact where the means are large.
    """
    weight = weight.to(tl.float64)
    total = tl.sum(weight, axis, keep_dims=True)
    total = tl.where(total > 0, total, 1.0)
    joint = tl.sum(weight * mean, axis, keep_dims=True) / total
    distance = (mean - joint).to(var.dtype)
    return joint, (tl.sum(weight * (var + distance * distance), axis, keep_dims=True) / total).to(var.dtype)


@triton.jit
def _ln_moments(mean, var, inside, rows_ptr, n, N, LN: tl.constexpr, PART: tl.constexpr):
    """LN moments, from here or from the launch by row. Without LN, whose ratio is 0, the IN moments stand in."""
    if LN < 0:
        mean_ln, var_ln = mean, var
    elif PART == 'by column':
        mean_ln, var_ln = _load(rows_ptr, n, n < N), _load(rows_ptr + N, n, n < N).to(var.dtype)
    else:
        mean_ln, var_ln = pool(mean, var, inside, 1)
        if PART == 'by row':
            tl.store(rows_ptr + n, mean_ln, mask=n < N)
            tl.store(rows_ptr + N + n, var_ln, mask=n < N)
    return mean_ln, var_ln


@triton.jit
def _row_sum(x, rows_ptr, i: tl.constexpr, n, N, PART: tl.constexpr):
    """Sum over channels, here or in the launch by row, which keeps it in row i of ``rows``."""
    if PART == 'by column':
        total = _load(rows_ptr + i * N, n, n < N).to(x.dtype)
    else:
        total = tl.sum(x, 1, keep_dims=True)
        if PART == 'by row':
            tl.store(rows_ptr + i * N + n, total, mask=n < N)
    return total


@triton.jit
def _bn_moments(mean, var, mean_bn_ptr, var_bn_ptr, c, C):
    """Known BN moments. Without BN the IN moments stand in."""
    if mean_bn_ptr is not None:
        mean = _load(mean_bn_ptr, c, c < C).to(tl.float64)
        var = _load(var_bn_ptr, c, c < C).to(var.dtype)
    return mean, var


@triton.jit
def _ratios(logits_ptr, dtype: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr):
    """softmax(logits), padded with 0 to 4."""
    k = tl.arange(0, 4)
    logits = tl.load(logits_ptr + k, mask=(k == IN) | (k == LN) | (k == BN), other=float('-inf')).to(dtype)
    e = tl.exp(logits - tl.max(logits, 0))
    return e / tl.sum(e, 0)


@triton.jit
def _entry(ratios, k: tl.constexpr):
    """Entry k; 0 for k = -1, a normalizer that takes no part."""
    return tl.sum(tl.where(tl.arange(0, 4) == k, ratios, 0.0), 0)


@triton.jit
def _blend(
    mean,
    var,
    mean_ln,
    var_ln,
    mean_bn,
    var_bn,
    w,
    v,
    EPS: tl.constexpr,
    IN: tl.constexpr,
    LN: tl.constexpr,
    BN: tl.constexpr,
):
    """Distances of the LN, the BN and the blended mean from the IN mean, and 1 / sqrt(blended variance + eps)."""
    shift_ln, shift_bn = (mean_ln - mean).to(var.dtype), (mean_bn - mean).to(var.dtype)
    shift = _entry(w, LN) * shift_ln + _entry(w, BN) * shift_bn
    blended = _entry(v, IN) * var + _entry(v, LN) * var_ln + _entry(v, BN) * var_bn
    return shift_ln, shift_bn, shift, tl.rsqrt(blended + EPS)


@triton.jit
def _softmax_backward(grad_ptr, ratios, d_in, d_ln, d_bn, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr):
    k = tl.arange(0, 4)
    dratios = tl.where(k == IN, d_in, 0.0) + tl.where(k == LN, d_ln, 0.0) + tl.where(k == BN, d_bn, 0.0)
    grad = ratios * (dratios - tl.sum(ratios * dratios, 0))
    tl.store(grad_ptr + k, grad, mask=(k == IN) | (k == LN) | (k == BN))
