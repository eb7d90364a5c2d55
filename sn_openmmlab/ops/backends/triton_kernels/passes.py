"""The four big passes in Triton: for CUDA.

Maps are (N, C, S), stored as such or, channels last, as (N, S, C); coefficients and moments are (N, C). A program takes
tiles of ROWS maps x PIXELS: of many maps where they are small, of a part of one where they are large. Sums over parts
are joined by a second launch in a fixed order, so that results repeat bit for bit.
"""

# no `from __future__ import annotations`: Triton 3.0 takes tl.constexpr for what it is only where it is evaluated

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formula import moments_dtype
from .algebra import pool_moments
from .launch import INTERPRETED, VERSION, Plan, launch


def lacks(device: torch.device, dtype: torch.dtype) -> 'str | None':
    """What the kernels miss there, if anything; under TRITON_INTERPRET=1 they run on any device."""
    if dtype == torch.float64 and VERSION < (3, 2):
        return f'for float64 they need Triton 3.2 or newer, which comes with torch 2.6; this is {triton.__version__}'
    if INTERPRETED:
        return None
    if device.type != 'cuda':
        return f'they need a CUDA device, or TRITON_INTERPRET=1 from the start, which interprets them; this is {device}'
    if torch.cuda.get_device_capability(device) < (7, 0):
        return f'they need compute capability 7 or newer, which {torch.cuda.get_device_name(device)} has not'
    return None


def moments(x: Tensor) -> Tensor:
    """Pass 1: means and biased variances of the maps."""
    plan = reduction_plan(*sizes(x))
    n, c, parts = x.shape[0], x.shape[1], plan.arguments['parts']
    out = torch.empty((2, n, c), dtype=moments_dtype(x.dtype), device=x.device)
    if parts == 1:
        launch(_moments_kernel, plan, (x, out, out))
    else:
        # of parts in float64: rounding their means would be felt in the variance that is between them
        of_parts = torch.empty((2, n, c, parts), dtype=torch.float64, device=x.device)
        launch(_moments_kernel, plan, (x, of_parts, out))
        launch(_join_kernel, plan.joining, (of_parts, out))
    return out


def affine(x: Tensor, moments: Tensor, coefficients: Tensor) -> Tensor:
    """Pass 2: ``a*(x - mean) + s``."""
    y = torch.empty_like(x)
    launch(_combine_kernel, map_plan(*sizes(x)), (x, moments, coefficients, None, y))
    return y


def reduce(dy: Tensor, x: Tensor, moments: Tensor) -> Tensor:
    """Pass 3: sums of dy and of dy * (x - mean) over the maps."""
    plan = reduction_plan(*sizes(x))
    parts = plan.arguments['parts']
    shape = moments.shape if parts == 1 else (*moments.shape, parts)
    sums = torch.empty(shape, dtype=moments.dtype, device=x.device)
    launch(_reduce_kernel, plan, (dy, x, moments, sums))
    if parts == 1:
        return sums
    joint = torch.empty_like(moments)
    launch(_add_kernel, plan.adding, (sums, joint))
    return joint


def combine(dy: Tensor, x: Tensor, moments: Tensor, coefficients: Tensor) -> Tensor:
    """Pass 4: ``b1*(x - mean) + b0 + a*dy``."""
    dx = torch.empty_like(x)
    launch(_combine_kernel, map_plan(*sizes(x)), (x, moments, coefficients, dy, dx))
    return dx


# What runs how wide. Sizes alone decide, without trials, so that the same input is always summed in the same order.


def sizes(x: Tensor) -> tuple:
    """What a plan is made of."""
    n, c = x.shape[:2]
    return n, c, x.numel() // (n * c), not x.is_contiguous(), x.element_size(), _processors(x.device)


@functools.lru_cache(None)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 132


@functools.lru_cache(4096)
def reduction_plan(
    n: int, c: int, size: int, channels_last: bool, itemsize: int, processors: int, tile: 'int | None' = None
) -> Plan:
    """Programs that sum over pixels: each takes up to ``tile`` elements at a time, tile after tile."""
    # of long maps, whose tiles are 1024 pixels and more, the kernels read three tiles ahead, so that smaller ones do
    tile = tile or (2048 if channels_last or size > 2048 else 4096)
    if channels_last:
        rows = min(triton.next_power_of_2(c), 128 // itemsize)  # a cache line of channels
        pixels = min(triton.next_power_of_2(size), max(1, tile // rows))
        blocks = n * triton.cdiv(c, rows)
    else:
        # a quarter of a small map: the narrower the tile, the fewer threads share a row and have to exchange its sums
        pixels = min(triton.next_power_of_2(size), max(8, triton.next_power_of_2(triton.cdiv(size, 4))), tile)
        rows = _power_of_2_up_to(n * c // (8 * processors))  # and no processor idle
        rows = rows // 2 if rows in (2, 8, 32) else rows  # numbers of RoIs change from step to step: few kernels do
        rows = min(rows, max(1, tile // 2 // pixels))
        blocks = triton.cdiv(n * c, rows)
    tiles = triton.cdiv(size, pixels)
    if blocks < 2 * processors:  # too few to fill the device: share out the tiles of a map, at least 6 to a program
        tiles = triton.cdiv(tiles, max(1, min(triton.cdiv(4 * processors, blocks), tiles // 6)))
    return _plan(n, c, size, channels_last, itemsize, rows, pixels, tiles)


@functools.lru_cache(4096)
def map_plan(n: int, c: int, size: int, channels_last: bool, itemsize: int, processors: int, tile: int = 2048) -> Plan:
    """Programs that map pixels to pixels: each takes one tile."""
    if channels_last:
        rows = min(triton.next_power_of_2(c), 128 // itemsize)
        pixels = min(triton.next_power_of_2(size), max(1, tile // rows))
    else:
        # the widest tile that wastes no more than a quarter
        widths = [w for w in (2048, 1024, 512, 256, 128, 64) if w <= tile and -(-size // w) * w <= 1.25 * size]
        pixels = widths[0] if widths else min(triton.next_power_of_2(size), tile)
        # a single warp to narrow maps: several would each load the coefficients of all rows
        rows = min(triton.next_power_of_2(n * c), max(1, (tile // 4 if pixels < 256 else tile) // pixels))
    return _plan(n, c, size, channels_last, itemsize, rows, pixels, 1)


def _adding_plan(plan: Plan, maps: int) -> Plan:
    """Programs that add up two sums of the parts of ``maps`` maps."""
    parts = plan.arguments['parts']
    width = triton.next_power_of_2(parts)
    rows = min(triton.next_power_of_2(2 * maps), max(1, 512 // width))
    return Plan(triton.cdiv(2 * maps, rows), _warps(rows * width), sums=2 * maps, parts=parts, ROWS=rows, PARTS=width)


def _joining_plan(plan: Plan, maps: int) -> Plan:
    """Programs that join the moments of the parts of ``maps`` maps."""
    size, parts, pixels = (plan.arguments[name] for name in ('size', 'parts', 'PIXELS'))
    width = triton.next_power_of_2(parts)
    rows = min(triton.next_power_of_2(maps), max(1, 512 // width))
    pixels *= plan.arguments['tiles']
    sizes = dict(maps=maps, size=size, parts=parts, pixels=pixels, ROWS=rows, PARTS=width)
    return Plan(triton.cdiv(maps, rows), _warps(4 * rows * width), **sizes)  # numbers of float64 take more registers


def _plan(n: int, c: int, size: int, channels_last: bool, itemsize: int, rows: int, pixels: int, tiles: int) -> Plan:
    """A program for every ``rows`` maps and ``tiles`` tiles of ``pixels`` pixels."""
    groups, length, stride = (n, c, c) if channels_last else (1, n * c, size)
    parts = triton.cdiv(size, tiles * pixels)
    # elements that every row starts a multiple of: 16 bytes or, of half precision, 8; each width is a kernel of its own
    vector = next((width for width in (16 // itemsize, 4) if stride % width == 0), 1)
    plan = Plan(
        groups * triton.cdiv(length, rows) * parts, _warps(rows * pixels),
        maps=n * c, length=length, size=size, parts=parts, tiles=tiles,
        ROWS=rows, PIXELS=pixels, VECTOR=vector, CHANNELS_LAST=channels_last,
    )  # fmt: skip
    plan.joining, plan.adding = _joining_plan(plan, n * c), _adding_plan(plan, n * c)
    return plan


def _warps(elements: int) -> int:
    return min(max(elements // 512, 1), 8)  # 16 elements a thread


def _power_of_2_up_to(number: int) -> int:
    return 1 << max(number, 1).bit_length() - 1


# Kernels. A block is up to ROWS of ``length`` maps: of all N*C maps or, channels last, of the C maps of one sample.


@triton.jit(do_not_specialize=['maps', 'length', 'size', 'parts', 'tiles'])
def _moments_kernel(
    x_ptr,  # (N, C, S)
    out_ptr,  # (2, N, C, parts), written
    like_ptr,  # in whose dtype is computed
    maps,  # N * C
    length,
    size,
    parts,
    tiles,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Mean and variance of a part of each map.

    Sums are taken of x - anchor, the anchor being the mean of the part's first tile. As it lies among the data, the
    cancellation in E[(x - anchor)^2] - E[x - anchor]^2 loses a factor of the number of tiles at most.
    """
    start, place, exist, part = _block(length, size, parts, ROWS, VECTOR, CHANNELS_LAST)
    first, last, count = _part(part, size, tiles, PIXELS)
    at, inside = _tile(first, start, length, size, exist, ROWS, PIXELS, VECTOR, CHANNELS_LAST)
    x = _load(x_ptr, at, inside, like_ptr)
    anchor = tl.sum(x, 1) / tl.minimum(count, PIXELS)
    sums = tl.where(inside, x - anchor[:, None], 0.0)
    squares = sums * sums
    for i in tl.range(first + 1, last, num_stages=3 if VECTOR > 1 and (CHANNELS_LAST or PIXELS >= 1024) else 1):
        at, inside = _tile(i, start, length, size, exist, ROWS, PIXELS, VECTOR, CHANNELS_LAST)
        distance = tl.where(inside, _load(x_ptr, at, inside, like_ptr) - anchor[:, None], 0.0)
        sums += distance
        squares += distance * distance
    shift = tl.sum(sums, 1) / count
    var = tl.sum(squares, 1) / count - shift * shift
    mean_ptr = out_ptr + place * parts + part
    tl.store(mean_ptr, anchor.to(out_ptr.dtype.element_ty) + shift, mask=exist)
    tl.store(mean_ptr + maps.to(tl.int64) * parts, tl.where(var < 0, 0.0, var), mask=exist)  # maximum() swallows NaN


@triton.jit(do_not_specialize=['maps', 'size', 'parts', 'pixels'])
def _join_kernel(
    parts_ptr,  # (2, N, C, parts), float64
    out_ptr,  # (2, N, C), written
    maps,  # N * C
    size,
    parts,
    pixels,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Mean and variance of each map from those of its parts, of ``pixels`` pixels each, fewer in the last."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    part = tl.arange(0, PARTS)[None, :].to(tl.int64)
    inside = (row < maps) & (part < parts)
    mean = tl.load(parts_ptr + row * parts + part, mask=inside, other=0.0)
    var = tl.load(parts_ptr + (row + maps) * parts + part, mask=inside, other=0.0)
    mean, var = pool_moments(mean, var, tl.where(inside, tl.minimum(size - part * pixels, pixels), 0), 1)
    tl.store(out_ptr + row, mean, mask=row < maps)
    tl.store(out_ptr + maps + row, var, mask=row < maps)


@triton.jit(do_not_specialize=['maps', 'length', 'size', 'parts', 'tiles'])
def _reduce_kernel(
    dy_ptr,  # (N, C, S)
    x_ptr,  # (N, C, S)
    mean_ptr,  # (N, C)
    sums_ptr,  # (2, N, C, parts), written
    maps,  # N * C
    length,
    size,
    parts,
    tiles,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Sums of dy and of dy * (x - mean) over a part of each map."""
    start, place, exist, part = _block(length, size, parts, ROWS, VECTOR, CHANNELS_LAST)
    first, last, _ = _part(part, size, tiles, PIXELS)
    mean = tl.load(mean_ptr + place, mask=exist, other=0.0)[:, None]
    sum_dy = tl.zeros((ROWS, PIXELS), mean.dtype)
    sum_dyx = tl.zeros((ROWS, PIXELS), mean.dtype)
    for i in tl.range(first, last, num_stages=3 if VECTOR > 1 and (CHANNELS_LAST or PIXELS >= 1024) else 1):
        at, inside = _tile(i, start, length, size, exist, ROWS, PIXELS, VECTOR, CHANNELS_LAST)
        dy = _load(dy_ptr, at, inside, mean_ptr)
        sum_dy += dy
        sum_dyx += dy * (_load(x_ptr, at, inside, mean_ptr) - mean)
    sum_dy_ptr = sums_ptr + place * parts + part
    tl.store(sum_dy_ptr, tl.sum(sum_dy, 1), mask=exist)
    tl.store(sum_dy_ptr + maps.to(tl.int64) * parts, tl.sum(sum_dyx, 1), mask=exist)


@triton.jit(do_not_specialize=['sums', 'parts'])
def _add_kernel(
    parts_ptr,  # (2, N, C, parts)
    out_ptr,  # (2, N, C), written
    sums,  # 2 * N * C
    parts,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Sums of what the parts of each map sum up to."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    part = tl.arange(0, PARTS)[None, :]
    total = tl.sum(tl.load(parts_ptr + row * parts + part, mask=(row < sums) & (part < parts), other=0.0), 1)
    tl.store(out_ptr + row, total[:, None], mask=row < sums)


@triton.jit(do_not_specialize=['maps', 'length', 'size', 'parts', 'tiles'])
def _combine_kernel(
    x_ptr,  # (N, C, S)
    mean_ptr,  # (N, C)
    coefficients_ptr,  # (2, N, C): b1 and b0; or (3, N, C): and a
    dy_ptr,  # (N, C, S), or None
    out_ptr,  # (N, C, S), written
    maps,  # N * C
    length,
    size,
    parts,
    tiles,  # 1
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """out = b1*(x - mean) + b0, and + a*dy if there is a dy."""
    start, place, exist, part = _block(length, size, parts, ROWS, VECTOR, CHANNELS_LAST)
    # offsets of 32 bits take fewer registers, which the other kernels have no use for
    start, at, inside = _place(part, start, length, size, exist, ROWS, PIXELS, VECTOR, CHANNELS_LAST)
    x = _load(x_ptr + start, at, inside, mean_ptr)
    mean = tl.load(mean_ptr + place, mask=exist, other=0.0)[:, None]
    if CHANNELS_LAST:
        maps = tl.multiple_of(maps, VECTOR)
    b1_ptr = coefficients_ptr + place
    b0_ptr = b1_ptr + maps
    b1 = tl.load(b1_ptr, mask=exist, other=0.0)[:, None]
    out = b1 * (x - mean) + tl.load(b0_ptr, mask=exist, other=0.0)[:, None]
    if dy_ptr is not None:
        a = tl.load(b0_ptr + maps, mask=exist, other=0.0)[:, None]
        out += a * _load(dy_ptr + start, at, inside, mean_ptr)
    tl.store(out_ptr + start + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _block(length, size, parts, ROWS: tl.constexpr, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """What this program works on.

    Returns:
        Offset of the first pixel of its block; for each map of the block its place in (N, C), and whether it exists;
        and which part of their pixels. All that counts pixels takes 64 bits.
    """
    program = tl.program_id(0)
    if CHANNELS_LAST:  # programs that follow one another read the channels of the same pixels
        blocks = tl.cdiv(length, ROWS)
        first, part, sample = program % blocks * ROWS, program // blocks % parts, program // blocks // parts
        place = tl.multiple_of(sample.to(tl.int64) * length + first, VECTOR)
        start = sample.to(tl.int64) * length * size + first
        left = tl.multiple_of(length - first, VECTOR)
    else:  # or the parts of the same maps
        part = program % parts
        first = (program // parts).to(tl.int64) * ROWS
        place = first
        start = first * size
        left = length - first
    row = tl.arange(0, ROWS)
    return start, place + row, row < left, part.to(tl.int64)


@triton.jit
def _part(part, size, tiles, PIXELS: tl.constexpr):
    """The first tile of a part, the one after its last, and its number of pixels."""
    first = part * tiles
    last = tl.minimum(first + tiles, tl.cdiv(size, PIXELS))
    return first, last, tl.minimum(last * PIXELS, size) - first * PIXELS


@triton.jit
def _tile(
    i,
    start,
    length,
    size,
    exist,  # [ROWS]
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Offsets [ROWS, PIXELS] of tile i of a block, and which of them lie inside the tensor."""
    start, at, inside = _place(i, start, length, size, exist, ROWS, PIXELS, VECTOR, CHANNELS_LAST)
    return start + at, inside


@triton.jit
def _place(
    i,
    start,
    length,
    size,
    exist,  # [ROWS]
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Where tile i of a block starts, offsets [ROWS, PIXELS] from there, and which of them lie inside the tensor.

    Within a tile they take 32 bits, and where the strides allow it, the compiler is told to load 16 bytes at once.
    """
    row, pixel = tl.arange(0, ROWS)[:, None], tl.arange(0, PIXELS)[None, :]
    left = tl.minimum(size - i * PIXELS, PIXELS).to(tl.int32)
    if CHANNELS_LAST:
        start += length.to(tl.int64) * (i * PIXELS)
        at = tl.multiple_of(pixel * length, (VECTOR, VECTOR)) + row
    else:
        start += i * PIXELS
        at = tl.multiple_of(row * size, (VECTOR, VECTOR)) + pixel
        left = tl.multiple_of(left, VECTOR)
    return tl.multiple_of(start, VECTOR), at, exist[:, None] & (pixel < left)


@triton.jit
def _load(ptr, at, inside, like_ptr):
    return tl.load(ptr + at, mask=inside, other=0.0).to(like_ptr.dtype.element_ty)
