"""The Triton kernels against the reference in float64: on a GPU if there is one, else in Triton's interpreter."""

import functools
import itertools
import json
import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from sn_openmmlab.ops import NORMALIZERS, backends, plan, switch_norm
from sn_openmmlab.ops.backends import native
from sn_openmmlab.ops.backends.interface import Setting

triton = pytest.importorskip('triton', reason='Triton is not installed')
tl = triton.language
passes = pytest.importorskip(
    'sn_openmmlab.ops.backends.triton_kernels.passes', reason='Triton is older than 3.0', exc_type=ImportError
)

from sn_openmmlab.ops.backends import triton_kernels  # noqa: E402  (needs Triton)
from sn_openmmlab.ops.backends.triton_kernels import algebra as triton_algebra  # noqa: E402
from sn_openmmlab.ops.backends.triton_kernels.launch import Plan, launch  # noqa: E402

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
if passes.lacks(torch.device(DEVICE), torch.float32):
    pytest.skip('no GPU, and Triton was imported before TRITON_INTERPRET=1 was set', allow_module_level=True)
needs_cuda = pytest.mark.skipif(DEVICE == 'cpu', reason='needs a CUDA device')

SHAPES = [
    (4, 6),  # 2-D: re-id heads
    (3, 5, 5),  # 3-D: EncHead
    (2, 3, 5, 7),  # odd sizes
    (2, 4, 2, 3, 4),  # 5-D
    (1, 6, 4, 4),  # one image per GPU
    (3, 1, 4, 3),  # one channel
    (2, 6, 1, 1),  # pooled maps
    (1, 1, 1, 1),
]
WAYS = ['default', 'packed', 'split', 'by row and column', 'torch algebra']
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    take(request.param, monkeypatch)
    yield
    triton_algebra.plans.cache_clear()


def take(way, monkeypatch):
    """Bring about what the shapes of real networks do, on small ones."""
    plan._plans.clear()
    if way == 'packed':  # many maps to a program, as where there are far more maps than processors
        monkeypatch.setattr(passes, '_processors', lambda device: 1)
    elif way == 'split':  # the tiles of a map shared out to several programs
        monkeypatch.setattr(passes, 'reduction_plan', functools.partial(passes.reduction_plan, tile=2))
        assert passes.reduction_plan(2, 3, 35, False, 4, 132).arguments['parts'] > 1
    elif way == 'by row and column':  # algebra too large for one program
        monkeypatch.setattr(triton_algebra, '_ALONE', 1)
        triton_algebra.plans.cache_clear()
    elif way == 'torch algebra':  # too large for that as well
        monkeypatch.setattr(triton_algebra, '_LONGEST', 0)


def rand(*shape, seed=0, dtype=torch.float64, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift
    return x.to(DEVICE, dtype)


def laid_out(x, channels_last):
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def arguments(channels, names=NORMALIZERS, dtype=torch.float64):
    """Parameters and BN statistics, away from their identity values."""
    k = len(names)
    args = rand(k, seed=1), rand(k, seed=2), rand(channels, seed=3, shift=1), rand(channels, seed=4)
    stats = (rand(channels, seed=5), rand(channels, seed=6).square() + 0.5) if 'bn' in names else ()
    return [a.to(dtype) for a in args], [s.to(dtype) for s in stats]


def run(backend, x, args, stats, dy, **kwargs):
    """The output, the gradients w.r.t. x and args, and the running statistics after the step."""
    if backend == 'triton' and x.dtype == torch.float64 and passes.VERSION < (3, 2):
        pytest.skip('Triton before 3.2 rounds float64')
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, *args)]
    stats = [s.clone() for s in stats]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SN_BACKEND', backend)
        y = switch_norm(*leaves, *stats, **kwargs)
        return [y, *torch.autograd.grad(y, leaves, dy), *stats]


def check(x, dy, names=NORMALIZERS, tolerance=1e-5, **kwargs):
    """Triton against the reference in float64, with the parameters in the dtype of the moments as under AMP."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    args, stats = arguments(x.shape[1], names, dtype)
    kwargs.update(normalizers=names, eps=1e-2)
    got = run('triton', x, args, stats, dy, **kwargs)
    doubled = [[t.double() for t in ts] for ts in (args, stats)]
    expected = run('reference', x.double(), *doubled, dy.double(), **kwargs)
    assert got[0].dtype == got[1].dtype == x.dtype
    for t in got[:2]:
        assert [s for s, n in zip(t.stride(), x.shape) if n > 1] == [s for s, n in zip(x.stride(), x.shape) if n > 1]
    # y and dx are rounded to their dtype once; the interpreter rounds bfloat16 towards zero
    for name, a, b in zip(('y', 'dx', 'mean_weight', 'var_weight', 'weight', 'bias', 'mean', 'var'), got, expected):
        rounding = torch.finfo(x.dtype).eps if name in ('y', 'dx') else 0
        allowed = rounding + tolerance * (1e-7 if dtype == torch.float64 else 1)
        assert (a.double() - b).abs().max() <= allowed * b.abs().max().clamp(min=1), name


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('channels_last', [False, True], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_every_shape(shape, channels_last, training, monkeypatch):
    take('packed', monkeypatch)
    x, dy = (laid_out(rand(*shape, seed=s, dtype=torch.float32), channels_last) for s in (7, 8))
    check(x, dy, training=training)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('channels_last', [False, True], ids=['nchw', 'nhwc'])
def test_every_way_and_dtype(way, channels_last, dtype):
    x, dy = (laid_out(rand(2, 3, 5, 9, seed=s, dtype=dtype), channels_last) for s in (7, 8))
    check(x, dy, training=True)


@pytest.mark.parametrize('training', [True, False], ids=['batch', 'frozen'])
@pytest.mark.parametrize('names', [('in', 'ln'), ('bn', 'in'), ('ln', 'bn', 'in'), ('bn',), ('in',)], ids='-'.join)
def test_every_choice_of_normalizers(names, training, monkeypatch):
    for way in 'packed', 'by row and column':
        take(way, monkeypatch)
        x, dy = (rand(3, 5, 3, 2, seed=s) for s in (7, 8))
        check(x, dy, names, training=training)
    triton_algebra.plans.cache_clear()


def test_without_weight_and_bias(monkeypatch):
    take('packed', monkeypatch)
    x, (args, _) = rand(3, 5, 4, 3), arguments(5)
    results = [run(backend, x, args[:2], [], x, training=True) for backend in ('triton', 'reference')]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_half_precision_model(monkeypatch):
    """model.half(): parameters and statistics are float16 too."""
    take('packed', monkeypatch)
    x, (args, stats) = rand(2, 3, 5, 5, dtype=torch.float16), arguments(3, dtype=torch.float16)
    for training in True, False:
        got = run('triton', x, args, stats, x, training=training)
        expected = run('native', x, args, stats, x, training=training)
        assert all(t.dtype == torch.float16 for t in got)
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


def test_parameters_need_not_be_dense(monkeypatch):
    take('packed', monkeypatch)
    x = rand(2, 6, 5, 5)
    args = [rand(k, 2, seed=k)[:, 0] for k in (3, 3, 6)] + [rand(1).expand(6)]
    y = [run(backend, x, args, [], x, training=True)[0] for backend in ('triton', 'reference')]
    torch.testing.assert_close(*y, rtol=1e-12, atol=1e-12)


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


def test_results_repeat_bit_for_bit(way):
    x, dy = (rand(2, 3, 5, 9, seed=s, dtype=torch.float32) for s in (7, 8))
    args, stats = arguments(3, dtype=torch.float32)
    first, second = (run('triton', x, args, stats, dy, training=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize('shape', [(0, 4, 7, 7), (0, 4), (2, 4, 0, 3)], ids=str)
def test_empty_input_launches_nothing(shape, monkeypatch):
    backends._triton(torch.device(DEVICE), torch.float64)  # which launches a kernel the first time
    for module in passes, triton_algebra:
        monkeypatch.setattr(module, 'launch', None)
    args, stats = arguments(4)
    y, dx, *_ = run('triton', rand(*shape), args, stats, rand(*shape), training=True)
    assert y.shape == dx.shape == shape


# What runs how wide


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
    launch(_offsets_kernel, made, (out,), most)
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
    made = Plan(groups * -(-length // rows) * parts, **sizes, VECTOR=1, CHANNELS_LAST=channels_last)
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


# On a GPU, at full size


@needs_cuda
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('channels_last', [False, True], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize(
    'shape',
    [(2, 64, 200, 336), (2, 256, 101, 167), (2, 2048, 13, 21), (64, 256, 14, 14), (1024, 256, 7, 7), (513, 1030)],
    ids=str,
)
def test_real_shapes(shape, channels_last, dtype, training):
    x, dy = (laid_out(rand(*shape, seed=s, dtype=dtype), channels_last) for s in (7, 8))
    check(x, dy, training=training, tolerance=1e-4)


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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA devices')
def test_a_device_that_is_not_the_current_one():
    x, (args, stats) = rand(2, 3, 5, 7), arguments(3)
    expected = run('triton', x, args, stats, x, training=True)
    x, args, stats = x.to('cuda:1'), [a.to('cuda:1') for a in args], [s.to('cuda:1') for s in stats]
    for a, b in zip(run('triton', x, args, stats, x, training=True), expected):
        assert a.device.index == 1 and torch.equal(a.to(b.device), b)


# Which backend is chosen


def test_triton_is_the_backend_on_cuda(monkeypatch):
    monkeypatch.delenv('SN_BACKEND', raising=False)
    monkeypatch.setattr(backends, '_triton', lambda device, dtype: (triton_kernels, None))
    assert backends.choose(torch.device('cuda'), torch.float32) is triton_kernels
    assert backends.choose(torch.device('cpu'), torch.float16) is native


@pytest.fixture
def asked_anew():
    """Whether Triton runs is found out once, and said once."""
    caches = backends._triton, backends._warn_once
    [each.cache_clear() for each in caches]
    yield
    [each.cache_clear() for each in caches]


def launch_without_compiler(*args, **kwargs):
    raise RuntimeError('Failed to find C compiler.')  # as Triton's runtime/build.py does


def import_old(monkeypatch):
    monkeypatch.setattr(triton, '__version__', '2.1.0')
    for name in [name for name in sys.modules if name.startswith('sn_openmmlab.ops.backends.triton_kernels')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(backends, 'triton_kernels')


def import_none(monkeypatch):
    import_old(monkeypatch)
    monkeypatch.setitem(sys.modules, 'triton', None)


@pytest.mark.parametrize(
    'without, dtype, reason',
    [
        (lambda patch: patch.setattr(passes, 'launch', launch_without_compiler), torch.float32, 'find C compiler'),
        (import_old, torch.float32, r'Triton 3\.0 or newer.*torch 2\.4 and newer \(Triton is 2\.1\.0\)'),
        (import_none, torch.float32, r'Triton 3\.0 or newer.*torch 2\.4 and newer \(.*triton'),
        (lambda patch: patch.setattr(passes, 'VERSION', (3, 1)), torch.float64, 'float64 they need Triton 3.2'),
        (
            lambda patch: patch.setattr(passes, 'INTERPRETED', False),
            torch.float32,
            'CUDA device.*is cpu',
        ),
    ],
    ids=['no compiler', 'old Triton', 'no Triton', 'float64', 'no GPU'],
)
def test_native_stands_in_and_says_why_once(monkeypatch, asked_anew, without, dtype, reason):
    device = torch.device('cpu' if 'cpu' in reason else DEVICE)
    without(monkeypatch)
    monkeypatch.setenv('SN_BACKEND', 'triton')
    with pytest.raises(RuntimeError, match=f"'triton'.*{reason}.*unset SN_BACKEND"):
        backends.choose(device, dtype)
    monkeypatch.delenv('SN_BACKEND')
    cuda, ask = torch.device('cuda'), backends._triton  # there is none here: what it says of the CPU is taken for it
    monkeypatch.setattr(backends, '_triton', lambda _, dtype: ask(device, dtype))
    with pytest.warns(UserWarning, match=f'slower kernels.*{reason}'):
        assert backends.choose(cuda, dtype) is native
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert backends.choose(cuda, dtype) is native


# Without the interpreter


def alone(*command):
    env = {k: v for k, v in os.environ.items() if k not in ('TRITON_INTERPRET', 'SN_BACKEND')}
    return subprocess.run([sys.executable, *command], env=env, check=True, capture_output=True, text=True).stdout


def test_triton_is_imported_only_when_wanted():
    code = (
        'import sys, torch; from sn_openmmlab.ops import switch_norm;'
        'switch_norm(torch.zeros(2, 6), torch.ones(3), torch.ones(3));'
        "print('sn_openmmlab.ops.backends.triton_kernels' in sys.modules)"
    )
    assert alone('-c', code).split()[-1] == 'False'


def test_kernels_compile_and_load_16_bytes_at_once():
    ptx = json.loads(alone('-W', 'ignore', str(Path(__file__).with_name('compile_kernels.py'))).splitlines()[-1])
    kernels = {k.__name__ for m in (passes, triton_algebra) for k in vars(m).values() if hasattr(k, 'arg_names')}
    assert set(ptx) == {k for k in kernels if k.endswith('_kernel')}
    wide = re.compile(r'ld\.global\S*\.v4\.b32|cp\.async\S+\.global \[[^]]*\], \[[^]]*\], 0x10')
    for name in '_moments_kernel', '_reduce_kernel', '_combine_kernel':
        assert all(map(wide.search, ptx[name][:2])), name


SMALL = '2x2048x13x21', '32x2048x7x7', '256x256x7x7', '1024x256x7x7', '1024x256x14x14'  # in lines that begin anywhere


@pytest.mark.slow
@pytest.mark.parametrize('architecture', [80, 90], ids='sm_{}'.format)
def test_kernels_of_real_shapes_keep_their_numbers_in_registers(architecture):
    """And load and store 16 bytes at once where maps allow it; prints the table (pytest -s)."""
    script = str(Path(__file__).with_name('compile_kernels.py'))
    rows = json.loads(alone('-W', 'ignore', script, str(architecture)).splitlines()[-1])
    print('| ' + ' | '.join(rows[0]) + ' |')
    for row in rows:
        print('| ' + ' | '.join(map(str, row.values())) + ' |')
    assert len({(row['shape'], row['dtype'], row['layout']) for row in rows}) == 11 * 3 * 2
    for row in rows:
        assert row['spilled'] == 0, row
        maps = row['kernel'] in ('_moments_kernel', '_reduce_kernel', '_combine_kernel')
        if maps and (row['layout'] == 'NHWC' or row['shape'] not in SMALL):
            assert row['load'] == 128, row
            assert row['store'] == 128 or row['kernel'] != '_combine_kernel', row


# How many there are


def list_kernels(n, c, size, channels_last, itemsize):
    """What distinguishes those of one layer: their names, and the arguments that they are compiled for."""
    sizes = n, c, size, channels_last, itemsize, 132
    reduction, mapping = passes.reduction_plan(*sizes), passes.map_plan(*sizes)
    split = reduction.arguments['parts'] > 1
    launches = [('moments', reduction, split), ('reduce', reduction), ('affine', mapping), ('combine', mapping)]
    launches += [('join', reduction.joining), ('add', reduction.adding)] * split
    for made in triton_algebra.plans(n, c, Setting(NORMALIZERS, 1e-5, False)):
        launches += [('coefficients', made), ('gradients', made)]
    for name, made, *more in launches:
        constants = (item for item in made.arguments.items() if item[0].isupper() and item[0] not in 'NC')
        yield name, made.num_warps, (*constants, *more)


@pytest.mark.parametrize(
    'itemsize, channels_last, most', [(4, False, 86), (4, True, 55), (2, False, 106), (2, True, 55)]
)
def test_a_training_compiles_few_kernels(itemsize, channels_last, most):
    """500 steps of Mask R-CNN R-50 FPN, whose images and RoIs have other sizes and numbers each time."""
    choose = random.Random(0)
    images = [
        (480, 640),
        (427, 640),
        (640, 480),
        (425, 640),
        (500, 375),
        (333, 500),
        (612, 612),
        (360, 640),
        (428, 640),
    ]
    kernels, first = set(), None
    for _ in range(500):
        height = width = 0
        for h, w in choose.choices(images, k=2):
            scale = min(1333 / max(h, w), choose.choice((640, 672, 704, 736, 768, 800)) / min(h, w))
            height, width = max(height, round(h * scale)), max(width, round(w * scale))
        height, width = (-(-side // 32) * 32 for side in (height, width))
        layers = [(64, 2)]  # channels, and the stride of the maps
        for channels, stride in (64, 4), (128, 8), (256, 16), (512, 32):
            layers += [(channels, max(stride // 2, 4)), (channels, stride), (4 * channels, stride), (256, stride)]
        layers = [(2, c, (height // stride) * (width // stride)) for c, stride in layers]
        masks = min(max(round(choose.lognormvariate(4, 1)), 1), 256)
        for layer in [*layers, (1024, 256, 49), (masks, 256, 196)]:
            kernels.update(list_kernels(*layer, channels_last, itemsize))
        first = first or len(kernels)
    print(f'{first} kernels in the first step, {len(kernels)} in 500')
    assert 20 < first < len(kernels) <= most
