"""The C++ passes one by one: at the edges of their blocks, against float64."""

import itertools
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sn_openmmlab.ops import switch_norm
from sn_openmmlab.ops.backends import cpp
from sn_openmmlab.ops.torch_versions import VERSION
from test_ops.cases import needs_library

CPU = torch.device('cpu')
DTYPES = [torch.float32, torch.bfloat16]


def maps(n, c, size, dtype, channels_last, seed=0):
    """Far from zero, as sums of squares dislike it."""
    x = torch.randn(n, c, size, generator=torch.Generator().manual_seed(seed)).mul(3).add(50).to(dtype)
    return x.mT.contiguous().mT if channels_last else x


def small(n, c, seed):
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed))


def assert_close(got, exact, tolerance):
    assert got.shape == exact.shape
    assert (got.double() - exact).abs().max() <= tolerance * exact.abs().max().clamp(min=1)


@needs_library
@pytest.mark.parametrize('channels_last', [False, True], ids=['contiguous', 'channels last'])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('size', [1, 2, 15, 16, 17, 31, 32, 33, 49, 127, 128, 129, 257, 1023, 1024, 1025, 2100])
@pytest.mark.parametrize('channels', [1, 15, 16, 17, 40])
def test_passes_equal_float64(channels, size, dtype, channels_last):
    x, dy = (maps(3, channels, size, dtype, channels_last, seed) for seed in (0, 1))
    mean, a, b1, b0 = (small(3, channels, seed) for seed in range(2, 6))
    wide = [t.double() for t in (x, dy, mean[..., None], a[..., None], b1[..., None], b0[..., None])]
    rounding = 2 * torch.finfo(dtype).eps  # CPUs differ in whether they add without rounding the product

    got_mean, got_var = cpp.moments(x)
    assert_close(got_mean, wide[0].mean(2), 1e-6)
    assert_close(got_var, wide[0].var(2, correction=0), 1e-5)
    h, dh, m, a_, b1_, b0_ = wide
    moments = torch.stack([mean, a])  # of which the means count
    y = cpp.affine(x, moments, torch.stack([b1, b0]))
    assert y.dtype == dtype and (channels == 1 or y.stride() == x.stride())
    assert_close(y, b1_ * (h - m) + b0_, rounding)
    sum_dy, sum_dyx = cpp.reduce(dy, x, moments)
    assert_close(sum_dy, dh.sum(2), 3e-6)
    assert_close(sum_dyx, (dh * (h - m)).sum(2), 3e-6)
    assert_close(cpp.combine(dy, x, moments, torch.stack([b1, b0, a])), a_ * dh + b1_ * (h - m) + b0_, rounding)


@needs_library
@pytest.mark.parametrize('channels_last', [False, True], ids=['contiguous', 'channels last'])
def test_variance_where_the_first_pixel_or_the_mean_is_far_off(channels_last):
    """Distances are taken from the first pixel of a block, or, where that lies far from the others, from the mean."""
    x = maps(2, 20, 3000, torch.float32, channels_last)
    for change in (lambda t: t[..., :1].add_(1e3), lambda t: t[..., 1500:].sub_(200), lambda t: t.add_(1e4)):
        x = x.clone()
        change(x)
        mean, var = cpp.moments(x)
        exact = x.double().var(2, correction=0)
        assert ((var - exact).abs() / exact).max() < 2e-6
        assert ((mean - x.double().mean(2)).abs() / x.double().mean(2)).max() < 1e-7


@needs_library
@pytest.mark.parametrize('channels_last', [False, True], ids=['contiguous', 'channels last'])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(dtype, channels_last):
    x, dy = (maps(5, 33, 2000, dtype, channels_last, seed) for seed in (0, 1))
    moments, coefficients = (torch.stack([small(5, 33, seed) for seed in range(k)]) for k in (2, 3))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in 1, 2, 7:
            torch.set_num_threads(threads)
            results.append([cpp.moments(x), cpp.reduce(dy, x, moments), cpp.combine(dy, x, moments, coefficients)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@needs_library
@pytest.mark.parametrize('threads', [1, 3])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(
    'n, c, size, channels_last',
    [(2, 16, 2**17, False), (3, 7, 200003, False), (2, 16, 2**17, True), (3, 7, 200003, True)],
)
def test_large_maps_are_written_as_small_ones(n, c, size, channels_last, dtype, threads):
    """Past the cache, to the bit the same, also where the lines of the cache do not begin with the maps."""
    x, dy = (maps(n, c, size, dtype, channels_last, seed) for seed in (0, 1))
    moments, coefficients = (torch.stack([small(n, c, seed) for seed in range(k)]) for k in (2, 3))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        whole = cpp.affine(x, moments, coefficients), cpp.combine(dy, x, moments, coefficients)
    finally:
        torch.set_num_threads(before)
    for i in range(n):
        part = [t[i : i + 1, :, : size // 2] for t in (dy, x)]
        part = [t.mT.contiguous().mT if channels_last else t.contiguous() for t in part]
        one = moments[:, i : i + 1].contiguous(), coefficients[:, i : i + 1].contiguous()
        parts = cpp.affine(part[1], *one), cpp.combine(*part, *one)
        assert all(torch.equal(a[i : i + 1, :, : size // 2], b) for a, b in zip(whole, parts))


@needs_library
@pytest.mark.parametrize('channels_last', [False, True], ids=['contiguous', 'channels last'])
def test_bfloat16_is_rounded_as_torch_rounds(channels_last):
    """To the nearest, ties to even, up to infinity, with NaN kept: all that float32 can be, in steps of 2^12."""
    bits = torch.arange(-(2**31), 2**31, 2**12).to(torch.int32)
    s = bits.view(torch.float32).view(1, -1)
    zero = torch.zeros(1, s.shape[1], 1, dtype=torch.bfloat16)
    x = zero.expand(-1, -1, 17).contiguous()
    x = x.mT.contiguous().mT if channels_last else x
    y = cpp.affine(x, torch.stack([torch.zeros_like(s)] * 2), torch.stack([torch.ones_like(s), s]))
    torch.testing.assert_close(y, s.to(torch.bfloat16)[..., None].expand_as(y), rtol=0, atol=0, equal_nan=True)


@needs_library
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_nan_stays_in_its_map(dtype):
    x = maps(2, 3, 40, dtype, False)
    x[1, 2, 7] = float('nan')
    x[0, 1, 39] = float('inf')
    for moment in cpp.moments(x):
        assert moment.isfinite().equal(torch.tensor([[True, False, True], [True, True, False]]))


HUGE = Path('/sys/kernel/mm/transparent_hugepage/enabled')  # what Linux has, but not in every container


def flags_of(tensor):
    """What Linux notes of the memory in the middle of a tensor."""
    middle, inside = tensor.data_ptr() + tensor.numel() * tensor.element_size() // 2, False
    for line in Path('/proc/self/smaps').read_text().splitlines():
        first, *rest = line.split()
        if '-' in first and not first.endswith(':'):
            begin, end = (int(address, 16) for address in first.split('-'))
            inside = begin <= middle < end
        elif first == 'VmFlags:' and inside:
            return rest
    raise LookupError(middle)


@needs_library
@pytest.mark.skipif(not HUGE.exists(), reason='this system has no transparent huge pages')
def test_large_outputs_ask_for_huge_pages():
    """Each in a process of its own: elsewhere small tensors may lie where larger ones have asked before."""
    code = f'from {__name__} import ask_each_in_a_fork; ask_each_in_a_fork()'
    # in the folder of tests, where Python finds the installed package, and not the checkout, which may have no library
    subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parents[3], check=True)


def ask_each_in_a_fork():
    for case in itertools.product(DTYPES, (False, True)):
        process = multiprocessing.get_context('fork').Process(target=ask_for_huge_pages, args=case)
        process.start()
        process.join()
        assert process.exitcode == 0, case


def ask_for_huge_pages(dtype, channels_last):
    for mebibytes, asks in (4, False), (36, True):
        x = torch.zeros(1, 64, mebibytes * 2**14 // torch.finfo(dtype).bits * 8, dtype=dtype)
        x = x.mT.contiguous().mT if channels_last else x
        moments, coefficients = torch.zeros(2, 1, 64), torch.ones(3, 1, 64)
        assert ('hg' in flags_of(cpp.affine(x, moments, coefficients))) == asks
        assert ('hg' in flags_of(cpp.combine(x, x, moments, coefficients))) == asks


@needs_library
@pytest.mark.skipif(VERSION < (2, 0), reason='default devices came with torch 2')
def test_other_default_devices_do_not_matter():
    x, logits = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last), torch.ones(3)
    expected = switch_norm(x, logits, logits)
    with torch.device('meta'):
        torch.testing.assert_close(switch_norm(x, logits, logits), expected, rtol=0, atol=0)
