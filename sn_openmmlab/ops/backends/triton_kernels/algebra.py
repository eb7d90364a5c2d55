"""The algebra of :mod:`..algebra` in Triton: one launch each way, so that small layers do not wait for launches.

Names are those of :mod:`..algebra`. Distances between means are formed in float64, all else as the moments are stored.
A program holds a tile of (N, C) in registers. If one can hold everything it runs alone; else a first launch takes the
sums over rows, all channels of a sample, and a second one those over columns, all samples of a channel. Tensors too
large go to :mod:`..algebra`.
"""

# no `from __future__ import annotations`: Triton 3.0 takes tl.constexpr for what it is only where it is evaluated

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formula import NORMALIZERS
from .. import algebra
from ..interface import Parameters, Setting, Statistics
from .launch import Plan, launch

_ALONE = 4096  # elements of (N, C) up to which one program does everything
_LONGEST = 8192  # the most rows or columns that fit into registers


def pool(moments: Tensor, size: int) -> Tensor:
    """See :func:`..algebra.pool`."""
    _, n, c = moments.shape
    if max(n, c) > _LONGEST:
        return algebra.pool(moments, size)
    shared = torch.empty(2 * c + 1, dtype=torch.float64, device=moments.device)
    launch(_pool_kernel, _column_plan(n, c), (moments, shared), size)
    return shared


def coefficients(
    moments: Tensor,
    size: int,
    shared: 'Tensor | None',
    parameters: Parameters,
    statistics: 'Statistics | None',
    setting: Setting,
) -> 'tuple[Tensor, Tensor]':
    """See :func:`..algebra.coefficients`."""
    _, n, c = moments.shape
    if max(n, c) > _LONGEST:
        return algebra.coefficients(moments, size, shared, parameters, statistics, setting)
    out = torch.empty_like(moments)
    joint = torch.empty(2 * (n + c) + 1, dtype=torch.float64, device=moments.device)
    running: tuple = (None, None, None)
    momentum: float = 0.0
    moved_here = False
    if statistics is not None and not setting.frozen and can_move(statistics, moments.dtype):
        moved_here = True
        running, momentum = statistics[:3], statistics.momentum or 0.0
    elif setting.frozen and statistics is not None:
        running = (*statistics[:2], None)
    tensors = moments, shared, *_dense(*parameters), *_dense(*running), out, joint
    for plan in plans(n, c, setting):
        launch(_coefficients_kernel, plan, tensors, float(momentum), size)
    if not (setting.frozen or moved_here or statistics is None):
        algebra.update(statistics, joint, joint[-1])
    return out, joint


def pool_gradients(sums: Tensor, moments: Tensor, joint: Tensor, parameters: Parameters, setting: Setting) -> Tensor:
    """See :func:`..algebra.pool_gradients`."""
    _, n, c = moments.shape
    if max(n, c) > _LONGEST:
        return algebra.pool_gradients(sums, moments, joint, parameters, setting)
    shared = torch.empty(2 * c, dtype=torch.float64, device=moments.device)
    plan = plans(n, c, setting, by_column=True)[0]
    launch(_pool_gradients_kernel, plan, (sums, moments, joint, *_dense(*parameters[:3]), shared))
    return shared


def gradients(
    sums: Tensor,
    moments: Tensor,
    joint: Tensor,
    size: int,
    shared: 'Tensor | None',
    parameters: Parameters,
    setting: Setting,
) -> 'tuple[Tensor, Tensor]':
    """See :func:`..algebra.gradients`."""
    _, n, c = moments.shape
    if max(n, c) > _LONGEST:
        return algebra.gradients(sums, moments, joint, size, shared, parameters, setting)
    dtype, device = moments.dtype, moments.device
    out = torch.empty((3, n, c), dtype=dtype, device=device)
    small = torch.empty(2 * (c + len(setting.normalizers)), dtype=dtype, device=device)
    found = plans(n, c, setting)
    rows = None if len(found) == 1 else torch.empty((6, n), dtype=torch.float64, device=device)
    tensors = sums, moments, joint, shared, *_dense(*parameters[:3]), out, small, rows
    for plan in found:
        launch(_gradients_kernel, plan, tensors, size)
    return out, small


def can_move(statistics: Statistics, dtype: torch.dtype) -> bool:
    """Whether the kernel does; its numbers are float32, and a program may not read what another one counts."""
    mean, var, tracked, momentum = statistics
    return (
        momentum is not None
        and dtype == torch.float32
        and mean.is_contiguous()
        and var.is_contiguous()
        and (tracked is None or (tracked.dtype == torch.int64 and tracked.device == mean.device))
    )


def _dense(*tensors: 'Tensor | None') -> 'list[Tensor | None]':
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]


@functools.lru_cache(4096)
def plans(n: int, c: int, setting: Setting, by_column: bool = False) -> 'list[Plan]':
    rows, columns = triton.next_power_of_2(n), triton.next_power_of_2(c)
    if rows in (128, 512, 2048) and not rows * columns <= _ALONE < 2 * rows * columns:
        rows *= 2  # numbers of RoIs change from step to step: few kernels do
    few_rows = max(1, 1024 // columns)
    few_columns = min(max(8, 1024 // rows), max(1, 4096 // rows))  # 8 floats are read at once
    column = _plan('by column', n, c, triton.cdiv(c, few_columns), rows, few_columns, setting)
    if by_column:
        return [column]
    if rows * columns <= _ALONE:
        return [_plan('all', n, c, 1, rows, columns, setting)]
    return [_plan('by row', n, c, triton.cdiv(n, few_rows), few_rows, columns, setting), column]


def _plan(part, n: int, c: int, programs: int, rows: int, columns: int, setting: Setting) -> Plan:
    names = setting.normalizers
    places = {name.upper(): names.index(name) if name in names else -1 for name in NORMALIZERS}
    warps = _warps(rows * columns * (2 if part == 'by column' else 1))  # else backward runs out of registers
    return Plan(
        programs, warps, N=n, C=c, EPS=float(setting.eps), FROZEN=bool(setting.frozen), **places,
        PART=part, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip


@functools.lru_cache(4096)
def _column_plan(n: int, c: int) -> Plan:
    plan = plans(n, c, Setting(NORMALIZERS, 0.0, False), by_column=True)[0]
    sizes = {name: plan.arguments[name] for name in ('N', 'C', 'ROWS', 'COLUMNS')}
    return Plan(plan.programs, plan.num_warps, **sizes)


def _warps(elements: int) -> int:
    return min(max(elements // 256, 1), 16)


# Below, what is one a row or one a column of a tile keeps the other axis, at size 1.


@triton.jit(do_not_specialize=['S', 'N', 'C'])
def _pool_kernel(
    moments_ptr,  # (2, N, C)
    shared_ptr,  # (2C + 1,), written: S times the sums of means and of mean squares, and the number of pixels
    S,
    N,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    n, c, at, inside = _tile(N, C, 'by column', ROWS, COLUMNS)
    mean, var = _load(moments_ptr, at, inside).to(tl.float64), _load(moments_ptr + N * C, at, inside).to(tl.float64)
    tl.store(shared_ptr + c, tl.sum(mean, 0, keep_dims=True) * S, mask=c < C)
    tl.store(shared_ptr + C + c, tl.sum(var + mean * mean, 0, keep_dims=True) * S, mask=c < C)
    if tl.program_id(0) == 0:
        tl.store(shared_ptr + 2 * C, N.to(tl.float64) * S)


@triton.jit(do_not_specialize=['momentum', 'S', 'N', 'C'])
def _coefficients_kernel(
    moments_ptr,  # (2, N, C)
    shared_ptr,  # (2C + 1,), or None
    mean_weight_ptr,  # (K,)
    var_weight_ptr,  # (K,)
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    running_mean_ptr,  # (C,), or None; read where FROZEN, else moved
    running_var_ptr,  # (C,), likewise
    tracked_ptr,  # (), likewise
    out_ptr,  # (2, N, C), written: a and s
    joint_ptr,  # (2N + 2C + 1,), written; LN's part by row, and then read by column
    momentum,
    S,
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
    mean, var = _load(moments_ptr, at, inside), _load(moments_ptr + N * C, at, inside)
    if PART != 'by column':  # without LN the IN moments stand in, whose ratio is 0
        if LN >= 0:
            mean_ln, var_ln = pool_moments(mean, var, inside, 1)
            tl.store(joint_ptr + n, mean_ln, mask=n < N)
            tl.store(joint_ptr + N + n, var_ln, mask=n < N)
    if PART != 'by row':
        count = N.to(tl.float64) * S
        bn_ptr = joint_ptr + 2 * N + c
        if BN >= 0:
            if FROZEN:
                mean_bn = _load(running_mean_ptr, c, c < C).to(tl.float64)
                var_bn = _load(running_var_ptr, c, c < C).to(tl.float64)
            elif shared_ptr is not None:
                count = tl.load(shared_ptr + 2 * C)  # 0 where the batches of all processes are empty
                mean_bn = _load(shared_ptr, c, c < C) / tl.where(count > 0, count, 1.0)
                var_bn = _load(shared_ptr + C, c, c < C) / tl.where(count > 0, count, 1.0) - mean_bn * mean_bn
                var_bn = tl.where(var_bn < 0, 0.0, var_bn)
            else:
                mean_bn, var_bn_ = pool_moments(mean, var, inside, 0)
                var_bn = var_bn_.to(tl.float64)
            tl.store(bn_ptr, mean_bn, mask=c < C)
            tl.store(bn_ptr + C, var_bn, mask=c < C)
            if not FROZEN:
                if running_mean_ptr is not None:
                    momentum = tl.where(count > 0, momentum, 0.0)
                    _move(running_mean_ptr, mean_bn, momentum, c, C)
                    _move(running_var_ptr, var_bn * (count / tl.where(count > 1, count - 1, 1.0)), momentum, c, C)
        if tl.program_id(0) == 0:
            tl.store(joint_ptr + 2 * N + 2 * C, count)
            if tracked_ptr is not None:
                tl.store(tracked_ptr, tl.load(tracked_ptr) + (count > 0))
        if LN < 0:
            mean_ln, var_ln = mean, var
        elif PART == 'by column':
            mean_ln, var_ln = _load(joint_ptr, n, n < N), _load(joint_ptr + N, n, n < N).to(var.dtype)
        if BN < 0:
            mean_bn, var_bn = mean, var
        w, v = _ratios(mean_weight_ptr, var.dtype, IN, LN, BN), _ratios(var_weight_ptr, var.dtype, IN, LN, BN)
        _, _, shift, rstd = _blend(mean, var, mean_ln, var_ln, mean_bn, var_bn, w, v, EPS, IN, LN, BN)
        a, s = rstd, -shift * rstd
        if weight_ptr is not None:
            a = _load(weight_ptr, c, c < C).to(var.dtype) * rstd
            s = _load(bias_ptr, c, c < C).to(var.dtype) - shift * a
        tl.store(out_ptr + at, a, mask=inside)
        tl.store(out_ptr + N * C + at, s, mask=inside)


@triton.jit
def _move(running_ptr, new, momentum, c, C):
    """As torch's lerp, which arrives where momentum is 1."""
    old, new = _load(running_ptr, c, c < C).to(tl.float32), new.to(tl.float32)
    moved = tl.where(momentum < 0.5, old + momentum * (new - old), new - (new - old) * (1 - momentum))
    tl.store(running_ptr + c, moved, mask=c < C)


@triton.jit(do_not_specialize=['N', 'C'])
def _pool_gradients_kernel(
    sums_ptr,  # (2, N, C)
    moments_ptr,  # (2, N, C)
    joint_ptr,  # (2N + 2C + 1,)
    mean_weight_ptr,  # (K,)
    var_weight_ptr,  # (K,)
    weight_ptr,  # (C,) or None
    shared_ptr,  # (2C,), written: sums of dmean and of dvar
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
    mean, var = _load(moments_ptr, at, inside), _load(moments_ptr + N * C, at, inside)
    mean_ln, var_ln, mean_bn, var_bn = _joint(mean, var, joint_ptr, n, c, N, C, LN, BN)
    w, v = _ratios(mean_weight_ptr, var.dtype, IN, LN, BN), _ratios(var_weight_ptr, var.dtype, IN, LN, BN)
    _, _, shift, rstd = _blend(mean, var, mean_ln, var_ln, mean_bn, var_bn, w, v, EPS, IN, LN, BN)
    _, _, _, dmean, dvar = _blend_backward(sums_ptr, weight_ptr, shift, rstd, at, inside, c, N, C)
    tl.store(shared_ptr + c, tl.sum(dmean.to(tl.float64), 0, keep_dims=True), mask=c < C)
    tl.store(shared_ptr + C + c, tl.sum(dvar.to(tl.float64), 0, keep_dims=True), mask=c < C)


@triton.jit(do_not_specialize=['S', 'N', 'C'])
def _gradients_kernel(
    sums_ptr,  # (2, N, C)
    moments_ptr,  # (2, N, C)
    joint_ptr,  # (2N + 2C + 1,)
    shared_ptr,  # (2C,), or None
    mean_weight_ptr,  # (K,)
    var_weight_ptr,  # (K,)
    weight_ptr,  # (C,) or None
    out_ptr,  # (3, N, C), written: b1, b0 and a
    small_ptr,  # (2C + 2K,), written: gradients of weight, bias, mean_weight and var_weight
    rows_ptr,  # (6, N), written by row and read by column; None where one launch does all
    S,
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
    mean, var = _load(moments_ptr, at, inside), _load(moments_ptr + N * C, at, inside)
    mean_ln, var_ln, mean_bn, var_bn = _joint(mean, var, joint_ptr, n, c, N, C, LN, BN)
    w, v = _ratios(mean_weight_ptr, var.dtype, IN, LN, BN), _ratios(var_weight_ptr, var.dtype, IN, LN, BN)
    shift_ln, shift_bn, shift, rstd = _blend(mean, var, mean_ln, var_ln, mean_bn, var_bn, w, v, EPS, IN, LN, BN)
    sum_dy, sum_dyxhat, a, dmean, dvar = _blend_backward(sums_ptr, weight_ptr, shift, rstd, at, inside, c, N, C)

    # Sums over rows: for the gradients w.r.t. the LN moments, and w.r.t. the ratios
    dmean_ln = _entry(w, LN) * _row_sum(dmean, rows_ptr, 0, n, N, PART) / C
    sum_dvar = _row_sum(dvar, rows_ptr, 1, n, N, PART)
    dvar_ln = _entry(v, LN) * sum_dvar / C
    dw_ln = _row_sum(dmean * shift_ln, rows_ptr, 2, n, N, PART)
    dw_bn = _row_sum(dmean * shift_bn, rows_ptr, 3, n, N, PART)
    dv_in = _row_sum(dvar * var, rows_ptr, 4, n, N, PART)
    dv_ln = var_ln * sum_dvar
    dv_bn = _row_sum(dvar * var_bn, rows_ptr, 5, n, N, PART)

    if PART != 'by row':
        dmean_in = _entry(w, IN) * dmean + dmean_ln - 2 * dvar_ln * shift_ln
        dvar_in = _entry(v, IN) * dvar + dvar_ln
        if BN >= 0 and not FROZEN:
            if shared_ptr is not None:
                dmean_bn = _load(shared_ptr, c, c < C).to(var.dtype)
                dvar_bn = _load(shared_ptr + C, c, c < C).to(var.dtype)
            else:
                dmean_bn, dvar_bn = tl.sum(dmean, 0, keep_dims=True), tl.sum(dvar, 0, keep_dims=True)
            share = (S / tl.load(joint_ptr + 2 * N + 2 * C)).to(var.dtype)  # of a map in the pixels of its channel
            dmean_bn, dvar_bn = _entry(w, BN) * share * dmean_bn, _entry(v, BN) * share * dvar_bn
            dmean_in += dmean_bn - 2 * dvar_bn * shift_bn
            dvar_in += dvar_bn
        tl.store(out_ptr + at, dvar_in * 2 / S, mask=inside)
        tl.store(out_ptr + N * C + at, dmean_in / S, mask=inside)
        tl.store(out_ptr + 2 * N * C + at, a, mask=inside)

        # Gradient w.r.t. weight and bias, and w.r.t. the logits
        tl.store(small_ptr + c, tl.sum(tl.where(inside, sum_dyxhat, 0.0), 0, keep_dims=True), mask=c < C)
        tl.store(small_ptr + C + c, tl.sum(sum_dy, 0, keep_dims=True), mask=c < C)
        if tl.program_id(0) == 0:
            logits_ptr = small_ptr + 2 * C
            _softmax_backward(logits_ptr, w, 0.0, tl.sum(dw_ln), tl.sum(dw_bn), IN, LN, BN)
            logits_ptr += (IN >= 0) + (LN >= 0) + (BN >= 0)
            _softmax_backward(logits_ptr, v, tl.sum(dv_in), tl.sum(dv_ln), tl.sum(dv_bn), IN, LN, BN)


@triton.jit
def _blend_backward(sums_ptr, weight_ptr, shift, rstd, at, inside, c, N, C):
    """Sums of dy and dy * xhat; a; and the gradients w.r.t. the blended moments, 0 outside the tensor."""
    sum_dy, sum_dyx = _load(sums_ptr, at, inside), _load(sums_ptr + N * C, at, inside)
    a = rstd if weight_ptr is None else _load(weight_ptr, c, c < C).to(rstd.dtype) * rstd
    sum_dyxhat = (sum_dyx - shift * sum_dy) * rstd
    dmean = tl.where(inside, -a * sum_dy, 0.0)
    dvar = tl.where(inside, -0.5 * a * rstd * sum_dyxhat, 0.0)
    return sum_dy, sum_dyxhat, a, dmean, dvar


@triton.jit
def _joint(mean, var, joint_ptr, n, c, N, C, LN: tl.constexpr, BN: tl.constexpr):
    """Moments of LN and BN; the IN moments stand in for what takes no part, whose ratio is 0."""
    mean_ln, var_ln, mean_bn, var_bn = mean, var, mean, var
    if LN >= 0:
        mean_ln, var_ln = _load(joint_ptr, n, n < N), _load(joint_ptr + N, n, n < N).to(var.dtype)
    if BN >= 0:
        bn_ptr = joint_ptr + 2 * N
        mean_bn, var_bn = _load(bn_ptr, c, c < C), _load(bn_ptr + C, c, c < C).to(var.dtype)
    return mean_ln, var_ln, mean_bn, var_bn


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
def pool_moments(mean, var, weight, axis: tl.constexpr):
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
    blended = _entry(v, IN) * var + _entry(v, LN) * var_ln + _entry(v, BN) * var_bn.to(var.dtype)
    return shift_ln, shift_bn, shift, tl.rsqrt(blended + EPS)


@triton.jit
def _softmax_backward(grad_ptr, ratios, d_in, d_ln, d_bn, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr):
    k = tl.arange(0, 4)
    dratios = tl.where(k == IN, d_in, 0.0) + tl.where(k == LN, d_ln, 0.0) + tl.where(k == BN, d_bn, 0.0)
    grad = ratios * (dratios - tl.sum(ratios * dratios, 0))
    tl.store(grad_ptr + k, grad, mask=(k == IN) | (k == LN) | (k == BN))
