"""The whole op by the Triton kernels against the reference in float64, on a GPU or in Triton's interpreter."""

import pytest
import torch

from sn_openmmlab.ops import backends
from test_ops.test_backends.test_triton_kernels.cases import (
    DEVICE,
    DTYPES,
    algebra,
    arguments,
    check,
    laid_out,
    needs_cuda,
    passes,
    rand,
    run,
    take,
)

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
@pytest.mark.parametrize('names', [('in', 'ln'), ('in', 'bn'), ('ln', 'bn'), ('bn',), ('in',)], ids='-'.join)
def test_every_choice_of_normalizers(names, training, monkeypatch):
    for way in 'packed', 'by row and column':
        take(way, monkeypatch)
        x, dy = (rand(3, 5, 3, 2, seed=s) for s in (7, 8))
        check(x, dy, names, training=training)
    algebra.plans.cache_clear()


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


def test_results_repeat_bit_for_bit(way):
    x, dy = (rand(2, 3, 5, 9, seed=s, dtype=torch.float32) for s in (7, 8))
    args, stats = arguments(3, dtype=torch.float32)
    first, second = (run('triton', x, args, stats, dy, training=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize('shape', [(0, 4, 7, 7), (0, 4), (2, 4, 0, 3)], ids=str)
def test_empty_input_launches_nothing(shape, monkeypatch):
    backends._triton(torch.device(DEVICE), torch.float64)  # which launches a kernel the first time
    for module in passes, algebra:
        monkeypatch.setattr(module, 'launch', None)
    args, stats = arguments(4)
    y, dx, *_ = run('triton', rand(*shape), args, stats, rand(*shape), training=True)
    assert y.shape == dx.shape == shape


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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA devices')
def test_a_device_that_is_not_the_current_one():
    x, (args, stats) = rand(2, 3, 5, 7), arguments(3)
    expected = run('triton', x, args, stats, x, training=True)
    x, args, stats = x.to('cuda:1'), [a.to('cuda:1') for a in args], [s.to('cuda:1') for s in stats]
    for a, b in zip(run('triton', x, args, stats, x, training=True), expected):
        assert a.device.index == 1 and torch.equal(a.to(b.device), b)
