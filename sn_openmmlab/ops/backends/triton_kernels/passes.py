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
from . import algebra  # noqa: F401  (part of a backend's interface)
from .algebra import VERSION, Plan, launch, pool


def lacks(device: torch.device, dtype: torch.dtype) -> 'str | None':
    """What the kernels miss there, if anything; under TRITON_INTERPRET=1 they run on any device."""
    if dtype == torch.float64 and VERSION < (3, 2):
        return f'for float64 they need Triton 3.2 or newer, which comes with torch 2.6; this is {triton.__version__}'
    if not isinstance(pool, triton.JITFunction):
        return None
    if device.type != 'cuda':
        return f'they need a CUDA device, or TRITON_INTERPRET=1 from the start, which interprets them; this is {device}'
    if torch.cuda.get_device_capability(device) < (7, 0):
        return f'they need compute capability 7 or newer, which {torch.cuda.get_device_name(device)} has not'
    return None


def moments(x: Tensor) -> 'tuple[Tensor, Tensor]':
    """Pass 1: mean and biased variance of each map."""
    plan = reduction_plan(*_sizes(x))
    n, c, parts = *x.shape[:2], plan.arguments['parts']
    mean, var = x.new_empty((2, n, c), dtype=moments_dtype(x.dtype)).unbind()
    if parts == 1:
        launch(_moments_kernel, plan, x, mean, var)
    else:
        # means of parts in float64: rounding them would be felt in the variance that is between them
        part_mean, part_var = (x.new_empty((n, c, parts), dtype=d) for d in (torch.float64, var.dtype))
        launch(_moments_kernel, plan, x, part_mean, part_var)
        launch(_join_kernel, joining_plan(plan, n * c), part_mean, part_var, mean, var)
    return mean, var


def affine(x: Tensor, mean: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Pass 2: ``a*(x - mean) + s``."""
    y = torch.empty_like(x)
    launch(_combine_kernel, map_plan(*_sizes(x)), x, mean.contiguous(), a.contiguous(), s.contiguous(), None, None, y)
    return y


def reduce(dy: Tensor, x: Tensor, mean: Tensor) -> 'tuple[Tensor, Tensor]':
    """Pass 3: sum of dy and sum of dy * (x - mean) over each map."""
    plan = reduction_plan(*_sizes(x))
    parts = plan.arguments['parts']
    sums = mean.new_empty((2, *mean.shape, parts))
    launch(_reduce_kernel, plan, dy, x, mean.contiguous(), *sums.unbind())
    return (sums.sum(-1) if parts > 1 else sums[..., 0]).unbind()


def combine(dy: Tensor, x: Tensor, mean: Tensor, a: Tensor, b1: Tensor, b0: Tensor) -> Tensor:
    """Pass 4: ``a*dy + b1*(x - mean) + b0``."""
    dx = torch.empty_like(x)
    mean, a, b1, b0 = mean.contiguous(), a.contiguous(), b1.contiguous(), b0.contiguous()
    launch(_combine_kernel, map_plan(*_sizes(x)), x, mean, b1, b0, dy, a, dx)
    return dx


# What runs how wide. Sizes alone decide, without trials, so that the same input is always summed in the same order.


def _sizes(x: Tensor) -> tuple:
    return *x.shape, not x.is_contiguous(), x.element_size(), _processors(x.device)


@functools.lru_cache(None)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 132


@functools.lru_cache(4096)
def reduction_plan(
    n: int, c: int, size: int, channels_last: bool, itemsize: int, processors: int, tile: int = 4096
) -> Plan:
    """Programs that sum over pixels: each takes up to ``tile`` elements at a time, tile after tile."""
    if channels_last:
        rows = min(triton.next_power_of_2(c), 128 // itemsize)  # a cache line of channels
        pixels = min(triton.next_power_of_2(size), max(1, tile // rows))
        blocks = n * triton.cdiv(c, rows)
    else:
        # a quarter of a small map: the narrower the tile, the fewer threads share a row and have to exchange its sums
        pixels = min(triton.next_power_of_2(size), max(8, triton.next_power_of_2(triton.cdiv(size, 4))), tile)
        rows = min(_power_of_2_up_to(n * c // (8 * processors)), max(1, tile // 2 // pixels))  # and no processor idle
        blocks = triton.cdiv(n * c, rows)
    tiles = triton.cdiv(size, pixels)
    if blocks < 2 * processors:  # too few to fill the device: share out the tiles of a map, at least 3 to a program
        tiles = triton.cdiv(tiles, max(1, min(triton.cdiv(8 * processors, blocks), tiles // 3)))
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


def joining_plan(plan: Plan, maps: int) -> Plan:
    """Programs that join the moments of the parts of ``maps`` maps."""
    parts = plan.arguments['parts']
    width = triton.next_power_of_2(parts)
    rows = min(triton.next_power_of_2(maps), max(1, 512 // width))
    pixels = plan.arguments['tiles'] * plan.arguments['PIXELS']
    sizes = dict(maps=maps, size=plan.arguments['size'], parts=parts, pixels=pixels)
    return Plan(triton.cdiv(maps, rows), dict(sizes, ROWS=rows, PARTS=width, num_warps=_warps(rows * width)))


def _plan(n: int, c: int, size: int, channels_last: bool, itemsize: int, rows: int, pixels: int, tiles: int) -> Plan:
    """A program for every ``rows`` maps and ``tiles`` tiles of ``pixels`` pixels."""
    groups, length, stride = (n, c, c) if channels_last else (1, n * c, size)
    parts = triton.cdiv(size, tiles * pixels)
    vector = min(stride & -stride, 16 // itemsize)  # elements that every row starts a multiple of
    return Plan(
        groups * triton.cdiv(length, rows) * parts,
        dict(
            length=length, size=size, parts=parts, tiles=tiles,
            ROWS=rows, PIXELS=pixels, VECTOR=vector, CHANNELS_LAST=channels_last,
            num_warps=_warps(rows * pixels),
        ),
    )  # fmt: skip


def _warps(elements: int) -> int:
    return min(max(elements // 512, 1), 8)  # 16 elements a thread


def _power_of_2_up_to(number: int) -> int:
    return 1 << max(number, 1).bit_length() - 1


# Kernels. A block is up to ROWS of ``length`` maps: of all N*C maps or, channels last, of the C maps of one sample.


@triton.jit(do_not_specialize=['length', 'size', 'parts', 'tiles'])
def _moments_kernel(
    x_ptr,  # (N, C, S)
    mean_ptr,  # (N, C, parts), written
    var_ptr,  # (N, C, parts), written
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
    start, maps, exist, part = _block(length, size, parts, ROWS, VECTOR, CHANNELS_LAST)
    first, last, count = _part(part, size, tiles, PIXELS)
    at, inside = _tile(first, start, length, size, exist, ROWS, PIXELS, VECTOR, CHANNELS_LAST)
    x = _load(x_ptr, at, inside, var_ptr)
    anchor = tl.sum(x, 1) / tl.minimum(count, PIXELS)
    sums = tl.where(inside, x - anchor[:, None], 0.0)
    squares = sums * sums
    for i in range(first + 1, last):
        at, inside = _tile(i, start, length, size, exist, ROWS, PIXELS, VECTOR, CHANNELS_LAST)
        distance = tl.where(inside, _load(x_ptr, at, inside, var_ptr) - anchor[:, None], 0.0)
        sums += distance
        squares += distance * distance
    shift = tl.sum(sums, 1) / count
    var = tl.sum(squares, 1) / count - shift * shift
    tl.store(mean_ptr + maps * parts + part, anchor.to(mean_ptr.dtype.element_ty) + shift, mask=exist)
    tl.store(var_ptr + maps * parts + part, tl.where(var < 0, 0.0, var), mask=exist)  # maximum() would swallow NaN


@triton.jit(do_not_specialize=['maps', 'size', 'parts', 'pixels'])
def _join_kernel(
    part_mean_ptr,  # (maps, parts), float64
    part_var_ptr,  # (maps, parts)
    mean_ptr,  # (maps,), written
    var_ptr,  # (maps,), written
    maps,
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
    mean = tl.load(part_mean_ptr + row * parts + part, mask=inside, other=0.0)
    var = tl.load(part_var_ptr + row * parts + part, mask=inside, other=0.0)
    mean, var = pool(mean, var, tl.where(inside, tl.minimum(size - part * pixels, pixels), 0), 1)
    tl.store(mean_ptr + row, mean, mask=row < maps)
    tl.store(var_ptr + row, var, mask=row < maps)


@triton.jit(do_not_specialize=['length', 'size', 'parts', 'tiles'])
def _reduce_kernel(
    dy_ptr,  # (N, C, S)
    x_ptr,  # (N, C, S)
    mean_ptr,  # (N, C)
    sum_dy_ptr,  # (N, C, parts), written
    sum_dyx_ptr,  # (N, C, parts), written
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
    start, maps, exist, part = _block(length, size, parts, ROWS, VECTOR, CHANNELS_LAST)
    first, last, _ = _part(part, size, tiles, PIXELS)
    mean = tl.load(mean_ptr + maps, mask=exist, other=0.0)[:, None]
    sum_dy = tl.zeros((ROWS, PIXELS), mean.dtype)
    sum_dyx = tl.zeros((ROWS, PIXELS), mean.dtype)
    for i in range(first, last):
        at, inside = _tile(i, start, length, size, exist, ROWS, PIXELS, VECTOR, CHANNELS_LAST)
        dy = _load(dy_ptr, at, inside, mean_ptr)
        sum_dy += dy
        sum_dyx += dy * (_load(x_ptr, at, inside, mean_ptr) - mean)
    tl.store(sum_dy_ptr + maps * parts + part, tl.sum(sum_dy, 1), mask=exist)
    tl.store(sum_dyx_ptr + maps * parts + part, tl.sum(sum_dyx, 1), mask=exist)


@triton.jit(do_not_specialize=['length', 'size', 'parts', 'tiles'])
def _combine_kernel(
    x_ptr,  # (N, C, S)
    mean_ptr,  # (N, C)
    b1_ptr,  # (N, C)
    b0_ptr,  # (N, C)
    dy_ptr,  # (N, C, S), or None
    a_ptr,  # (N, C), or None
    out_ptr,  # (N, C, S), written
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
    start, maps, exist, part = _block(length, size, parts, ROWS, VECTOR, CHANNELS_LAST)
    at, inside = _tile(part, start, length, size, exist, ROWS, PIXELS, VECTOR, CHANNELS_LAST)
    x = _load(x_ptr, at, inside, mean_ptr)
    mean = tl.load(mean_ptr + maps, mask=exist, other=0.0)[:, None]
    b1 = tl.load(b1_ptr + maps, mask=exist, other=0.0)[:, None]
    out = b1 * (x - mean) + tl.load(b0_ptr + maps, mask=exist, other=0.0)[:, None]
    if dy_ptr is not None:
        out += tl.load(a_ptr + maps, mask=exist, other=0.0)[:, None] * _load(dy_ptr, at, inside, mean_ptr)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


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
        maps = tl.multiple_of(sample.to(tl.int64) * length + first, VECTOR)
        start = sample.to(tl.int64) * length * size + first
        left = tl.multiple_of(length - first, VECTOR)
    else:  # or the parts of the same maps
        part = program % parts
        first = (program // parts).to(tl.int64) * ROWS
        maps = first
        start = first * size
        left = length - first
    row = tl.arange(0, ROWS)
    return start, maps + row, row < left, part.to(tl.int64)


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
    """Offsets [ROWS, PIXELS] of tile i of a block, and which of them lie inside the tensor.

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
    return tl.multiple_of(start, VECTOR) + at, exist[:, None] & (pixel < left)


@triton.jit
def _load(ptr, at, inside, like_ptr):
    return tl.load(ptr + at, mask=inside, other=0.0).to(like_ptr.dtype.element_ty)
