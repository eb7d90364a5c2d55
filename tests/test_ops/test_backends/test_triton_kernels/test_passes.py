"""The passes of Triton: their numbers, and which program runs over which elements."""

import itertools

import pytest
import torch

from test_ops.test_backends.test_triton_kernels.cases import (
    DEVICE,
    arguments,
    needs_cuda,
    passes,
    rand,
    run,
    take,
    triton,
)

tl = triton.language


def test_large_mean(way):
    """Mean 1e4 and std 1; a corner of 0, as padding leaves it, is the worst anchor."""
    x, (args, _) = rand(2, 2, 8, 9, shift=1e4).float(), arguments(2, dtype=torch.float32)
    eps = torch.finfo(x.dtype).eps
    for corner in 0.0, 1e4:
        x[..., 0, 0] = corner
        mean, var = passes.moments(x)
        exact_var, exact_mean = torch.var_mean(x.double().flatten(2), 2, correction=0)
        assert (mean / exact_mean - 1).abs().max() <= eps
        assert (var / exact_var - 1).abs().max() <= 30 * eps
        y = run('triton', x, args, [], x, training=True)[0]
        exact = run('reference', x.double(), [a.double() for a in args], [], x.double(), training=True)[0]
        # the mean of a map is stored in float32; distances between means are not rounded
        assert (y - exact).abs().max() <= 1e4 * eps * exact.abs().max()


def test_constant_maps_have_no_negative_variance(way):
    x = torch.full((2, 3, 35), 0.1, device=DEVICE)
    mean, var = passes.moments(x)
    assert (var >= 0).all() and (var <= 1e-12).all()
    torch.testing.assert_close(mean, x[..., 0])


def test_nan_comes_out_where_it_went_in(monkeypatch):
    take('packed', monkeypatch)
    x = rand(2, 3, 35)
    x[0, 1, 20] = torch.nan
    mean, var = passes.moments(x)
    assert mean.isnan().tolist() == var.isnan().tolist() == [[False, True, False], [False] * 3]


# -- what runs how wide ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=['most', 'maps', 'length', 'size', 'parts', 'tiles'])
def _offsets_kernel(
    out_ptr,  # (programs, most, ROWS, PIXELS), written: the offset of each element, or -1 outside the tensor
    most,  # tiles of a part that are looked at
    maps,
    length,
    size,
    parts,
    tiles,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    start, places, exist, part = _block(length, size, parts, ROWS, VECTOR, CHANNELS_LAST)
    first, last, _ = _part(part, size, tiles, PIXELS)
    place = tl.arange(0, ROWS)[:, None] * PIXELS + tl.arange(0, PIXELS)[None, :]
    for i in range(first, tl.minimum(last, first + most)):
        at, inside = _tile(i, start, length, size, exist, ROWS, PIXELS, VECTOR, CHANNELS_LAST)
        tile = tl.program_id(0) * most + i - first
        tl.store(out_ptr + tile * ROWS * PIXELS + place, tl.where(inside, at, -1))


_block, _part, _tile = passes._block, passes._part, passes._tile


def offsets(made, most):
    out = torch.full((made.programs, most, made.arguments['ROWS'], made.arguments['PIXELS']), -1, device=DEVICE)
    passes.launch(_offsets_kernel, made, (out,), most)
    return out.cpu()


@pytest.mark.parametrize('make', [passes.reduction_plan, passes.map_plan])
@pytest.mark.parametrize('channels_last', [False, True], ids=['nchw', 'nhwc'])
def test_plans_cover_every_element_once(make, channels_last):
    for n, c, size in (2, 3, 35), (3, 5, 1), (1, 1, 100), (1, 9, 64):
        for processors, tile in (1, 64), (132, 16):
            made = make(n, c, size, channels_last, 4, processors, tile=tile)
            found = offsets(made, made.arguments['tiles'])
            assert found[found >= 0].sort().values.tolist() == list(range(n * c * size))


@pytest.mark.parametrize('channels_last', [False, True], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('n, c, size', [(2, 4, 2**30), (2, 2, 2**32 + 3)])
def test_offsets_beyond_32_bits(n, c, size, channels_last):
    """The tile that each program starts with, for programs of very many tiles."""
    tiles, pixels, rows = 2**21, 1024, 4 if channels_last else 1
    length, groups = (c, n) if channels_last else (n * c, 1)
    parts = -(-size // (tiles * pixels))
    sizes = dict(maps=n * c, length=length, size=size, parts=parts, tiles=tiles, ROWS=rows, PIXELS=pixels)
    made = passes.Plan(groups * -(-length // rows) * parts, **sizes, VECTOR=1, CHANNELS_LAST=channels_last)
    found = offsets(made, 1).view(groups, -1, parts, rows, pixels)

    pixel = torch.arange(parts)[:, None, None] * tiles * pixels + torch.arange(pixels)  # (parts, 1, pixels)
    if channels_last:
        sample, channel = torch.arange(n).view(-1, 1, 1, 1, 1), torch.arange(rows)[:, None]
        expected = torch.where(channel < c, (sample * size + pixel) * c + channel, -1)
    else:
        expected = torch.arange(n * c).view(1, -1, 1, 1, 1) * size + pixel
    assert torch.equal(found, torch.where(pixel < size, expected, -1)) and found.max() > 2**32


@pytest.mark.parametrize('channels_last', [False, True], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize(
    'n, c, size',
    [
        (2, 64, 268800),  # ResNet's first norm, 800 x 1344 images
        (2, 64, 67200),
        (2, 256, 16800),
        (2, 512, 4200),
        (2, 2048, 273),
        (1024, 256, 49),  # RoI heads
        (512, 256, 196),
        (2048, 1024, 1),
    ],
)
def test_plans_of_real_shapes(n, c, size, channels_last):
    for itemsize, make in itertools.product([2, 4, 8], [passes.reduction_plan, passes.map_plan]):
        made = make(n, c, size, channels_last, itemsize, 132)
        programs, p = made.programs, made.arguments
        length, groups = (c, n) if channels_last else (n * c, 1)
        blocks, pixels = -(-length // p['ROWS']), p['tiles'] * p['PIXELS']
        assert programs == groups * blocks * p['parts']
        assert (p['parts'] - 1) * pixels < size <= p['parts'] * pixels
        assert p['ROWS'] * p['PIXELS'] <= 4096
        assert programs >= 128 or n * c * size < 2**21  # a program for every processor
        assert (c if channels_last else size) % p['VECTOR'] == 0 and p['VECTOR'] * itemsize <= 16


def test_few_large_maps_are_split_and_many_small_ones_packed():
    for channels_last in False, True:
        assert passes.reduction_plan(2, 64, 268800, channels_last, 4, 132).arguments['parts'] > 1
        assert passes.reduction_plan(1024, 256, 49, channels_last, 4, 132).arguments['parts'] == 1
    assert passes.reduction_plan(1024, 256, 49, False, 4, 132).arguments['ROWS'] >= 32


@needs_cuda
@pytest.mark.parametrize('channels_last', [False, True], ids=['nchw', 'nhwc'])
def test_more_than_2_to_the_31_elements(channels_last):
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip('needs 40 GiB of free GPU memory')
    shape = (3, 64, 2**24)
    x, dy = (torch.empty(shape, dtype=torch.float16, device='cuda').normal_() for _ in range(2))
    if channels_last:
        x, dy = (t.view(3, 2**24, 64).mT for t in (x, dy))
    moments, coefficients = passes.moments(x), torch.randn(3, 3, 64, device='cuda')
    (mean, var), (b1, b0, a) = moments, coefficients
    y = passes.affine(x, moments, coefficients[:2])
    sums = passes.reduce(dy, x, moments)
    dx = passes.combine(dy, x, moments, coefficients)
    for i in (0, 0), (1, 31), (2, 63):
        h, dh = x[i].double(), dy[i].double()
        moments = h.mean(), h.var(correction=0)
        centred = h - mean[i]
        expected_sums = dh.sum(), (dh * centred).sum()
        torch.testing.assert_close([mean[i].double(), var[i].double()], list(moments), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close([s[i].double() for s in sums], list(expected_sums), rtol=1e-5, atol=0.1)
        torch.testing.assert_close(y[i].double(), b1[i] * centred + b0[i], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(dx[i].double(), a[i] * dh + b1[i] * centred + b0[i], rtol=1e-3, atol=1e-3)
