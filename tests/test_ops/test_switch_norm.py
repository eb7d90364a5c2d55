"""The functional form: torch's own norms -> reference -> every backend, with every gradient."""

import copy
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from sn_openmmlab.ops import NORMALIZERS, switch_norm, switch_norm_reference
from sn_openmmlab.ops.torch_versions import VERSION
from test_ops.cases import CPP, arguments, each_set, laid_out, rand, run

NATIVE = {
    'native': (),
    'native as on CUDA': pytest.mark.skipif(VERSION < (2, 0), reason='torch 1.13 uses no native_batch_norm.out'),
    'native on CUDA': pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'),
}
SHAPES = [
    (4, 6),  # 2-D: re-id heads
    (3, 6, 5),  # 3-D: EncHead
    (2, 6, 5, 7),  # odd sizes
    (2, 6, 2, 3, 4),  # 5-D
    (1, 6, 4, 4),  # one image per GPU
    (2, 1, 4, 4),  # one channel: LN equals IN
    (2, 6, 1, 1),  # pooled maps
    (20, 6, 3, 3),  # RoIs: many small maps
    (2, 6, 8, 9),  # maps of 64 pixels and more
    (1, 6, 1, 1),  # BN and IN of torch raise here
]
LAYOUTS = ['contiguous', 'transposed', 'channels_last']


ONE_HOT = {'in': (50.0, 0.0, 0.0), 'ln': (0.0, 50.0, 0.0), 'bn': (0.0, 0.0, 50.0)}


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', NORMALIZERS)
def test_one_hot_ratios_are_torchs_own_norms(backend, name, training):
    x = rand(3, 6, 5, 7, scale=2, shift=3)
    logits = torch.tensor(ONE_HOT[name]).double()
    _, _, weight, bias, mean, var = arguments(6, stats=True)
    y = switch_norm(x, logits, logits, weight, bias, mean.clone(), var.clone(), training=training)
    expected = {
        'in': lambda: F.instance_norm(x, weight=weight, bias=bias),
        'ln': lambda: F.layer_norm(x, x.shape[1:]) * weight[:, None, None] + bias[:, None, None],
        'bn': lambda: F.batch_norm(x, mean.clone(), var.clone(), weight, bias, training=training),
    }[name]()
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@each_set([NORMALIZERS, ('in', 'ln'), ('ln', 'bn'), ('in',)])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', [(4, 3), (2, 3, 4), (2, 3, 2, 3), (2, 3, 2, 1, 2)], ids=str)
def test_gradcheck(backend, shape, layout, names, frozen):
    x = laid_out(rand(*shape), layout).requires_grad_()
    args = [a.requires_grad_() for a in arguments(3, names)]
    running = arguments(3, names, stats=True)[4:] if frozen else []
    assert gradcheck(lambda *a: switch_norm(*a, *running, training=not frozen, normalizers=names, eps=0.1), (x, *args))


def test_double_backward(backend):
    x = rand(2, 3, 2, 2).requires_grad_()
    args = [a.requires_grad_() for a in arguments(3)]
    assert gradgradcheck(lambda *a: switch_norm(*a, training=True, eps=0.1), (x, *args))


def test_double_backward_where_input_depends_on_the_parameters(backend):
    """The gradient through the input and the direct one must not be mixed up."""
    x, args = rand(2, 3, 2, 2), [a.requires_grad_() for a in arguments(3)]
    assert gradgradcheck(lambda *a: switch_norm(x * a[2][:, None, None] + a[0].sum(), *a, training=True, eps=0.1), args)


@pytest.mark.skipif(VERSION < (2, 0), reason='torch.func came with torch 2')
def test_torch_func_takes_the_reference():
    x, args = rand(2, 3, 4, 4), arguments(3)
    grad = torch.func.grad(lambda t: switch_norm(t, *args, training=True).pow(3).sum())(x)
    leaf = x.clone().requires_grad_()
    switch_norm(leaf, *args, training=True).pow(3).sum().backward()
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(
    'backend, dtype',
    [
        *[
            pytest.param(name, dtype, marks=marks)
            for name, marks in NATIVE.items()
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ],
        *[pytest.param('cpp', dtype, marks=CPP.marks) for dtype in (torch.float32, torch.bfloat16)],
    ],
    indirect=['backend'],
    ids=str,
)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_equals_the_float64_reference(shape, dtype, backend, layout, training, monkeypatch):
    """Output and every gradient, parameters in float32 as under AMP."""
    x, dy = (laid_out(rand(*shape, seed=s).to(dtype), layout) for s in (7, 8))
    args, stats = arguments(shape[1], dtype=torch.float32), arguments(shape[1], stats=True, dtype=torch.float32)[4:]
    there = [[t.to(backend) for t in ts] for ts in ([x, dy], args, stats)]
    got = run(there[0][0], *there[1:], there[0][1], training=training, eps=1e-2)
    got = [t.cpu() for t in got]
    monkeypatch.setenv('SN_BACKEND', 'reference')
    doubled = [[t.double() for t in ts] for ts in (args, stats)]
    expected = run(x.double(), *doubled, dy.double(), training=training, eps=1e-2)
    assert got[0].dtype == dtype and got[1].dtype == dtype
    if layout != 'transposed':
        assert [s for s, n in zip(got[0].stride(), shape) if n > 1] == [s for s, n in zip(x.stride(), shape) if n > 1]
    # y and dx are rounded to dtype (twice at most); sums are float32 of values that are exact in both
    for name, a, b in zip(('y', 'dx', 'mean_weight', 'var_weight', 'weight', 'bias'), got, expected):
        tolerance = 3 * torch.finfo(a.dtype).eps if name in ('y', 'dx') else 2e-5
        scale = b.abs().max().clamp(min=1)
        assert (a.double() - b).abs().max() <= tolerance * scale * (10 if dtype == torch.float32 else 1), name


@pytest.mark.skipif(
    VERSION < (2, 1), reason='torch before 2.1 has no float16 lerp on the CPU, which updates statistics'
)
def test_half_parameters_follow_model_half(backend):
    x, args = rand(2, 6, 5, 5, dtype=torch.float16), arguments(6, dtype=torch.float16, stats=True)
    grads = run(x, args[:4], args[4:], x, training=True)
    assert all(g.dtype == torch.float16 and g.isfinite().all() for g in grads)


@pytest.mark.parametrize('momentum', [0.1, 0.0, 1.0, None])
def test_running_statistics_equal_batch_norms(backend, momentum):
    bn = torch.nn.BatchNorm2d(6, momentum=momentum, affine=False).double()
    mean, var, tracked = (copy.deepcopy(b) for b in (bn.running_mean, bn.running_var, bn.num_batches_tracked))
    logits, *_ = arguments(6)
    for i in range(10):
        x = rand(3, 6, 4, 5, seed=i, scale=i + 1, shift=i)
        bn(x)
        switch_norm(x, logits, logits, None, None, mean, var, tracked, training=True, momentum=momentum)
    torch.testing.assert_close(mean, bn.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(var, bn.running_var, rtol=1e-12, atol=1e-12)
    assert tracked == bn.num_batches_tracked == 10


DEGENERATE = {
    'one image': rand(1, 4, 5, 5),
    'one pixel': rand(3, 4, 1, 1),
    'one image, one pixel': rand(1, 4, 1, 1),
    'one channel': rand(3, 1, 5, 5),
    'a single number': rand(1, 1, 1, 1),
    'constant maps': torch.ones(2, 4, 5, 5) * rand(2, 4, 1, 1),
    'zeros': torch.zeros(2, 4, 5, 5),
    'mean 1e4, std 1': rand(2, 4, 50, 50, shift=1e4),
}


@pytest.mark.parametrize('names', [NORMALIZERS, ('in', 'ln'), ('in',), ('bn',)], ids='-'.join)
@pytest.mark.parametrize('case', DEGENERATE)
def test_degenerate_input_stays_finite(float_backend, case, names):
    x = DEGENERATE[case].float()
    args = arguments(x.shape[1], names, torch.float32)
    stats = [torch.zeros(x.shape[1]), torch.ones(x.shape[1])] if 'bn' in names else [None, None]
    leaves = [t.clone().requires_grad_() for t in (x, *args)]
    y = switch_norm(*leaves, *stats, training=True, normalizers=names)
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(t.isfinite().all() for t in (y, *grads, *(s for s in stats if s is not None)))


@pytest.mark.parametrize('logits', [(0.0, 0.0, 0.0), *ONE_HOT.values()], ids=str)
def test_large_mean_is_as_accurate_as_torchs_norms(float_backend, logits):
    """Batch norm is the yardstick; instance norm where all importance is on IN, whose means are each rounded."""
    x = rand(2, 64, 50, 50, shift=1e4, dtype=torch.float32)
    norm = F.instance_norm if logits == ONE_HOT['in'] else lambda t: F.batch_norm(t, None, None, training=True)
    logits = torch.tensor(logits)
    exact, *_ = switch_norm_reference(x.double(), *[logits.double()] * 2, None, None, None, None, NORMALIZERS, 1e-5)
    error = (switch_norm(x, logits, logits, training=True) - exact).norm() / exact.norm()
    theirs = (norm(x) - norm(x.double())).norm() / norm(x.double()).norm()
    assert error <= 1.1 * theirs


def test_parameters_that_need_no_gradient_get_none(backend):
    x, args = rand(2, 6, 4, 4), arguments(6)
    leaves = [a.clone().requires_grad_() for a in args]
    for needed in itertools.product([False, True], repeat=5):
        if not any(needed):
            continue
        inputs = [t.detach().clone().requires_grad_(n) for t, n in zip((x, *leaves), needed)]
        switch_norm(*inputs, training=True).square().sum().backward()
        assert [t.grad is not None for t in inputs] == list(needed)


def test_autocast_changes_nothing(float_backend):
    """As for BatchNorm: the dtype that comes in goes out."""
    args = arguments(6, dtype=torch.float32)
    for dtype in torch.float32, torch.bfloat16:
        x = rand(2, 6, 4, 4, dtype=dtype)
        plain = switch_norm(x, *args, training=True)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            y = switch_norm(x, *args, training=True)
        assert y.dtype == dtype and torch.equal(y, plain)


def test_parameters_may_be_views(float_backend):
    """Not dense, and in half precision as after ``model.bfloat16()``."""
    x, dense = rand(2, 6, 4, 4, dtype=torch.bfloat16), arguments(6, stats=True, dtype=torch.bfloat16)
    views = [torch.stack([t, -t], 1)[:, 0] for t in dense]
    assert not views[2].is_contiguous()
    for a, b in zip(run(x, dense[:4], dense[4:], x), run(x, views[:4], views[4:], x)):
        assert torch.equal(a, b)


def test_the_output_feeds_views_and_in_place_relu(backend):
    """ReLU(inplace=True) follows in every ConvModule; the input, not the output, is what backward needs."""
    x, args = rand(2, 6, 4, 4).requires_grad_(), arguments(6)
    F.relu_(switch_norm(x, *args, training=True)).sum().backward()
    expected = torch.autograd.grad(F.relu(switch_norm(x, *args, training=True)).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize(
    'change, error, message',
    [
        (dict(x=torch.zeros(2, 6, dtype=torch.int64)), TypeError, r'torch\.int64.*x\.float\(\)'),
        (dict(x=torch.zeros(6)), ValueError, r'\(N, C, \*\).*\(6,\)'),
        (dict(weight=torch.ones(5)), ValueError, r'weight has shape \(5,\) where \(6,\)'),
        (dict(mean_weight=torch.ones(2)), ValueError, r'mean_weight has shape \(2,\) where \(3,\)'),
        (dict(bias=None), ValueError, 'weight and bias together'),
        (dict(running_mean=torch.zeros(6)), ValueError, 'running_mean and running_var together'),
        (dict(weight=torch.ones(6).double()), TypeError, r'weight is torch\.float64.*torch\.float32.*layer\.to'),
        (dict(x=torch.zeros(2, 6).double()), TypeError, r'mean_weight is torch\.float32.*torch\.float64'),
        (
            dict(running_mean=torch.zeros(6), running_var=torch.ones(6), momentum=None),
            ValueError,
            'num_batches_tracked',
        ),
        (
            dict(x=torch.quantize_per_tensor(torch.zeros(2, 6), 1.0, 0, torch.quint8)),
            TypeError,
            r'torch\.quint8.*x\.dequantize\(\)',
        ),
        (
            dict(
                running_mean=torch.zeros(6),
                running_var=torch.ones(6),
                num_batches_tracked=torch.tensor(0, device='meta'),
            ),
            ValueError,
            'num_batches_tracked is on meta',
        ),
        (dict(eps='a'), ValueError, "eps must be .* got 'a'"),
        (dict(eps=float('nan')), ValueError, 'eps must be .* got nan'),
        (dict(momentum='a'), ValueError, "momentum must be .* got 'a'"),
        *[
            (
                dict(normalizers=names),
                ValueError,
                re.escape(f"('in', 'ln', 'bn'), each once and in this order, got {names!r}"),
            )
            for names in [('in', 'in', 'in'), ('in', 'xx', 'bn'), ('bn', 'in', 'ln'), ['in', 'ln', 'bn'], (), 'in']
        ],
    ],
)
def test_wrong_input_says_what_and_how_to_mend_it(change, error, message):
    args = dict(x=torch.zeros(2, 6), mean_weight=torch.ones(3), var_weight=torch.ones(3))
    args.update(weight=torch.ones(6), bias=torch.zeros(6))
    switch_norm(**args)  # what is right before does not hide what is wrong after
    args.update(change)
    with pytest.raises(error, match=message):
        switch_norm(**args)


def test_no_channel_at_all(float_backend):
    x, logits = torch.empty(2, 0, 4, requires_grad=True), torch.ones(3, requires_grad=True)
    switch_norm(x, logits, logits, training=True).sum().backward()
    assert logits.grad.eq(0).all()


@pytest.mark.parametrize('size', [1e10, 1e18])
def test_large_input_stays_finite(float_backend, size):
    """Up to where the variance overflows float32, as BatchNorm's does."""
    leaves = [rand(2, 8, 5, 5, dtype=torch.float32) * size, *arguments(8, dtype=torch.float32)]
    leaves = [t.requires_grad_() for t in leaves]
    y = switch_norm(*leaves, training=True)
    assert all(t.isfinite().all() for t in (y, *torch.autograd.grad(y.sum(), leaves)))
