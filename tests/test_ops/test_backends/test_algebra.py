"""The algebra of every backend against one differentiable forward in float64, and its vector-Jacobian product.

``y = a*(x - mean) + s``: the gradients with respect to a and s are the sums of dy * (x - mean) and of dy.
"""

import itertools

import pytest
import torch

from sn_openmmlab.ops import NORMALIZERS
from sn_openmmlab.ops.backends import algebra, cpp
from sn_openmmlab.ops.backends.interface import Parameters, Setting, Statistics
from sn_openmmlab.ops.torch_versions import VERSION
from test_ops.cases import CPP, each_set, needs_library

SIZE, EPS = 7, 1e-3
SUBSETS = [names for k in (1, 2, 3) for names in itertools.combinations(NORMALIZERS, k)] + [('bn', 'in', 'ln')]


def triton_kernels():
    module = pytest.importorskip(
        'sn_openmmlab.ops.backends.triton_kernels', reason='needs Triton', exc_type=ImportError
    )
    if module.lacks(torch.device('cpu'), torch.float32):
        pytest.skip('a GPU is here, whose tests are others')
    return module


BACKENDS = {  # C++ sums in float64, the others in the dtype of the moments
    'python': (lambda: algebra, torch.float64, 1e-12),
    'python in float32': (lambda: algebra, torch.float32, 1e-5),
    'cpp': (lambda: cpp, torch.float32, 4e-6),
    'triton': (triton_kernels, torch.float32, 1e-5),
}


def formula(mean_in, var_in, mean_weight, var_weight, weight, bias, names, bn=None):
    """a and s; BN moments are ``bn``, or those of the samples."""
    w, v = (dict(zip(names, logits.softmax(0))) for logits in (mean_weight, var_weight))
    shift, var = 0 * mean_in, EPS + 0 * var_in
    for name in names:
        mean_k, var_k = mean_in, var_in
        if name == 'bn' and bn is not None:
            mean_k, var_k = bn
        elif name != 'in':
            axis = ('bn', 'ln').index(name)
            mean_k = mean_in.mean(axis, keepdim=True)
            var_k = (var_in + (mean_in - mean_k).square()).mean(axis, keepdim=True)
        shift, var = shift + w[name] * (mean_k - mean_in), var + v[name] * var_k
    a = var.rsqrt() if weight is None else weight * var.rsqrt()
    return a, -shift * a if bias is None else bias - shift * a


def drawn(n, c, names, affine, seed=0):
    """Moments, far from zero; parameters; sums of a gradient; all float64 that float32 can hold."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    moments = torch.stack([randn(n, c) + 20, randn(n, c).square() + 0.1]).double()
    parameters = [randn(len(names)), randn(len(names)), *((randn(c), randn(c)) if affine else (None, None))]
    running = torch.stack([randn(c) + 20, randn(c).square() + 0.5]).double()
    return moments, [p if p is None else p.double() for p in parameters], running, (randn(2, n, c) * 7).double()


def expected(moments, parameters, sums, names, bn):
    """a, s, b1, b0, a, and the gradients of parameters, by autograd."""
    leaves = [t.clone().requires_grad_() for t in (*moments, *(p for p in parameters if p is not None))]
    given = leaves[2:] + [None] * (6 - len(leaves))
    a, s = formula(*leaves[:2], *given, names, bn)
    dmean, dvar, *small = torch.autograd.grad((a, s), leaves, (sums[1], sums[0]))
    if len(small) == 2:  # without weight and bias, as they were 1 and 0
        small += [(sums[1] * a + sums[0] * s).sum(0).detach(), sums[0].sum(0)]
    a = a.detach()
    return [a, s.detach(), 2 * dvar / SIZE, (dmean - a * sums[0]) / SIZE, a, small[2], small[3], *small[:2]]


def parts(forward, backward, small, c, k):
    return [*forward, *backward, *small.split([c, c, k, k])]


def assert_close(got, exact, tolerance):
    for i, (a, b) in enumerate(zip(got, exact)):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clamp(min=1), i


@pytest.mark.parametrize('affine', [True, False], ids=['affine', 'plain'])
@each_set(SUBSETS)
@pytest.mark.parametrize('n, c', [(1, 1), (3, 5), (2, 63), (1, 64), (5, 65), (300, 130)])
@pytest.mark.parametrize('backend', ['python', 'python in float32', CPP, 'triton'])
def test_coefficients_and_gradients(backend, n, c, names, frozen, affine):
    """Also where threads share the work, with 39,000 maps."""
    if backend == 'triton' and n * c > 4096:
        pytest.skip('the interpreter takes minutes; test_triton_kernels splits smaller ones')
    load, dtype, tolerance = BACKENDS[backend]
    module = load()
    moments, parameters, running, sums = drawn(n, c, names, affine)
    setting = Setting(names, EPS, frozen or 'bn' not in names)
    statistics = Statistics(*(t.to(dtype) for t in running)) if frozen else None

    narrow = Parameters(*(None if p is None else p.to(dtype) for p in parameters))
    forward, joint = module.coefficients(moments.to(dtype), SIZE, None, narrow, statistics, setting)
    backward, small = module.gradients(sums.to(dtype), moments.to(dtype), joint, SIZE, None, narrow, setting)
    got = parts(forward, backward, small, c, len(names))
    assert_close(got, expected(moments, parameters, sums, names, running if frozen else None), tolerance)
    if 'bn' in names and not frozen:
        mean, var = joint[-2 * c - 1 : -1].view(2, c)
        torch.testing.assert_close(mean, moments[0].mean(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            var, (moments[1] + (moments[0] - moments[0].mean(0)).square()).mean(0), rtol=1e-6, atol=0
        )
        assert joint[-1] == n * SIZE


@pytest.mark.parametrize('names', [NORMALIZERS, ('bn', 'ln'), ('bn',)], ids='-'.join)
@pytest.mark.parametrize('backend', ['python', 'python in float32', CPP, 'triton'])
def test_sums_over_processes_make_one_batch(backend, names):
    """Two processes with 2 and 5 samples of one batch, and what each adds to the sums."""
    load, dtype, tolerance = BACKENDS[backend]
    module, (n, c) = load(), (7, 11)
    moments, parameters, _, sums = drawn(n, c, names, True)
    setting, narrow = Setting(names, EPS, False), Parameters(*(p.to(dtype) for p in parameters))
    exact = expected(moments, parameters, sums, names, None)
    ranks = [[t.to(dtype).contiguous() for t in pair] for pair in zip(moments.split([2, 5], 1), sums.split([2, 5], 1))]

    shared = sum(module.pool(m, SIZE) for m, _ in ranks)
    running = [Statistics(torch.zeros(c, dtype=dtype), torch.ones(c, dtype=dtype), torch.tensor(0), 1.0) for _ in ranks]
    forward = [module.coefficients(m, SIZE, shared, narrow, s, setting) for (m, _), s in zip(ranks, running)]
    both = sum(module.pool_gradients(d, m, joint, narrow, setting) for (m, d), (_, joint) in zip(ranks, forward))
    backward = [
        module.gradients(d, m, joint, SIZE, both, narrow, setting) for (m, d), (_, joint) in zip(ranks, forward)
    ]

    got = parts(
        torch.cat([f for f, _ in forward], 1), torch.cat([b for b, _ in backward], 1), sum(s for _, s in backward),
        c, len(names),
    )  # fmt: skip
    assert_close(got, exact, 10 * tolerance)  # the spread of means of 20 is a difference of squares of sums
    for statistics in running:
        var = (moments[1] + (moments[0] - moments[0].mean(0)).square()).mean(0) * n * SIZE / (n * SIZE - 1)
        assert statistics.num_batches_tracked == 1
        assert_close(statistics[:2], (moments[0].mean(0), var), 10 * tolerance)


@pytest.mark.parametrize('momentum', [0.1, 0.7, 1.0, None])
@pytest.mark.parametrize('backend', ['python', 'python in float32', CPP, 'triton'])
def test_running_statistics_move_as_batch_norms(backend, momentum):
    load, dtype, tolerance = BACKENDS[backend]
    module = load()
    bn = torch.nn.BatchNorm2d(5, momentum=momentum, affine=False).to(dtype)
    statistics = Statistics(torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype), torch.tensor(0), momentum)
    logits, setting = torch.zeros(3, dtype=dtype), Setting(NORMALIZERS, EPS, False)
    for seed in range(4):
        x = torch.randn(3, 5, 2, 4, generator=torch.Generator().manual_seed(seed)).to(dtype) * (seed + 1) + seed
        bn(x)
        moments = torch.stack([x.mean((2, 3)), x.var((2, 3), unbiased=False)])
        module.coefficients(moments, 8, None, Parameters(logits, logits, None, None), statistics, setting)
    assert statistics.num_batches_tracked == bn.num_batches_tracked == 4
    assert_close(statistics[:2], (bn.running_mean.double(), bn.running_var.double()), tolerance)


@needs_library
@pytest.mark.skipif(VERSION < (2, 1), reason='torch before 2.1 has no bfloat16 lerp on the CPU')
def test_statistics_that_cpp_does_not_take_move_all_the_same():
    """In half precision, or as every other column."""
    moments, parameters, running, _ = drawn(3, 5, NORMALIZERS, True)
    moments, parameters = moments.float(), Parameters(*(p.float() for p in parameters))
    results = []
    for change in (lambda t: t, lambda t: torch.stack([t, t], 1)[:, 0], lambda t: t.bfloat16()):
        statistics = Statistics(*map(change, running.float()), torch.tensor(0), 0.5)
        cpp.coefficients(moments, SIZE, None, parameters, statistics, Setting(NORMALIZERS, EPS, False))
        assert statistics.num_batches_tracked == 1
        results.append([t.float() for t in statistics[:2]])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0], rtol=2e-2, atol=0)


@pytest.mark.parametrize('backend', ['python', CPP, 'triton'])
def test_statistics_stay_where_the_batches_of_all_processes_are_empty(backend):
    load, dtype, _ = BACKENDS[backend]
    statistics = Statistics(torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype), torch.tensor(3), 0.1)
    logits, nothing = torch.zeros(3, dtype=dtype), torch.zeros(2, 1, 5, dtype=dtype)
    parameters, shared = Parameters(logits, logits, None, None), torch.zeros(11, dtype=torch.float64)
    load().coefficients(nothing, 1, shared, parameters, statistics, Setting(NORMALIZERS, EPS, False))
    assert not statistics.mean.any() and (statistics.var == 1).all() and statistics.num_batches_tracked == 3
