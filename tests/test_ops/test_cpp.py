"""The C++ passes one by one: at the edges of their blocks, against float64; and when they are taken."""

import _ctypes
import ctypes
import importlib.machinery
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from sn_openmmlab.ops import backends, switch_norm
from sn_openmmlab.ops.backends import cpp, native
from sn_openmmlab.ops.torch_versions import VERSION

CPU = torch.device('cpu')
DTYPES = [torch.float32, torch.bfloat16]
LIBRARY = next(Path(cpp.__file__).parent.glob('_cpp.abi3.so'), None)
# those of the checkout, which the library was compiled from also where it was installed from a wheel, without them
SOURCES = [Path(__file__).parents[2] / 'sn_openmmlab/ops/backends/cpp' / path.name for path in cpp.load._SOURCES]
needs_library = pytest.mark.skipif(not cpp.runs_on(CPU, torch.float32), reason='the installation found no C++ compiler')


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
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('channels_last', [False, True], ids=['contiguous', 'channels last'])
def test_large_outputs_ask_for_huge_pages(dtype, channels_last):
    """In a process of its own: elsewhere small tensors may lie where larger ones have asked before."""
    code = f'import test_cpp; test_cpp.ask_for_huge_pages({str(dtype)!r}, {channels_last})'
    # in this folder, where Python finds the installed package, and not the checkout, which may have no library
    subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parent, check=True)


def ask_for_huge_pages(dtype, channels_last):
    dtype = getattr(torch, dtype.split('.')[1])
    for mebibytes, asks in (4, False), (36, True):
        x = torch.zeros(1, 64, mebibytes * 2**14 // torch.finfo(dtype).bits * 8, dtype=dtype)
        x = x.mT.contiguous().mT if channels_last else x
        moments, coefficients = torch.zeros(2, 1, 64), torch.ones(3, 1, 64)
        assert ('hg' in flags_of(cpp.affine(x, moments, coefficients))) == asks
        assert ('hg' in flags_of(cpp.combine(x, x, moments, coefficients))) == asks


def step(shared):
    """Output and gradients for some images, or for this process's half of them."""
    x, logits = torch.randn(4, 4, 5, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, -0.2, 0.5])
    if shared:
        x = x.chunk(2)[dist.get_rank()]
    leaves = [t.clone().requires_grad_() for t in (x, logits, logits)]
    with mock.patch.dict(os.environ, SN_BACKEND='cpp'):
        y = switch_norm(*leaves, training=True, group=dist.group.WORLD if shared else None)
        return [y.detach(), *torch.autograd.grad(y.pow(3).sum(), leaves)]


@needs_library
def test_synchronised_statistics(two):
    """Two processes, and their sums between the parts of the C++ algebra."""
    y, dx, *dlogits = zip(*two(step, True))
    for got, expected in zip([torch.cat(y), torch.cat(dx), *map(sum, dlogits)], step(False)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@needs_library
@pytest.mark.skipif(VERSION < (2, 0), reason='default devices came with torch 2')
def test_other_default_devices_do_not_matter():
    x, logits = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last), torch.ones(3)
    expected = switch_norm(x, logits, logits)
    with torch.device('meta'):
        torch.testing.assert_close(switch_norm(x, logits, logits), expected, rtol=0, atol=0)


# Which backend is chosen


@needs_library
def test_cpp_is_the_backend_on_the_cpu(monkeypatch):
    monkeypatch.delenv('SN_BACKEND', raising=False)
    assert all(backends.choose(CPU, dtype) is cpp for dtype in DTYPES)
    assert all(backends.choose(CPU, dtype) is native for dtype in (torch.float16, torch.float64))
    monkeypatch.setenv('SN_BACKEND', 'native')
    assert backends.choose(CPU, torch.float32) is native


def test_an_impossible_choice_is_an_error(monkeypatch):
    monkeypatch.setenv('SN_BACKEND', 'cpp')
    with pytest.raises(RuntimeError, match="'cpp'.*float64 on cpu.*float32 and bfloat16.*compiler"):
        switch_norm(torch.zeros(2, 6).double(), torch.ones(3).double(), torch.ones(3).double())


@pytest.fixture
def fresh():
    """The library is looked for anew, and again after the test."""
    cpp.library.cache_clear()
    yield
    cpp.library.cache_clear()


def test_without_a_library_native_serves_silently(monkeypatch, fresh):
    monkeypatch.delenv('SN_BACKEND', raising=False)
    monkeypatch.setattr(cpp.load, '_FOLDER', Path('an installation without it'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert backends.choose(CPU, torch.float32) is native


def test_a_library_that_cannot_be_loaded_is_said_once(monkeypatch, fresh, tmp_path):
    monkeypatch.delenv('SN_BACKEND', raising=False)
    broken = tmp_path / '_cpp.so'
    broken.write_bytes(b'not a library')
    monkeypatch.setattr(cpp.load, '_FOLDER', tmp_path)
    with pytest.raises(OSError):
        ctypes.CDLL(str(broken))
    with pytest.warns(UserWarning, match='cannot be loaded: .*_cpp.so.*Install sn_openmmlab anew'):
        assert backends.choose(CPU, torch.float32) is native
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert backends.choose(CPU, torch.float32) is native


@needs_library
def test_an_older_library_beside_the_new_one_does_not_matter(monkeypatch, fresh, tmp_path):
    """Before there was one for all Pythons it had the name of one, which Python finds first."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    assert suffixes[-2:] == ['.abi3.so', '.so']
    shutil.copy(_ctypes.__file__, tmp_path / f'_cpp{suffixes[0]}')  # some library without the functions
    monkeypatch.delenv('SN_BACKEND', raising=False)
    monkeypatch.setattr(cpp.load, '_FOLDER', tmp_path)
    with pytest.warns(UserWarning, match='cannot be loaded: .*undefined symbol: sn_stamp'):
        assert backends.choose(CPU, torch.float32) is native
    cpp.library.cache_clear()
    shutil.copy(LIBRARY, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert backends.choose(CPU, torch.float32) is cpp


@needs_library
def test_a_library_of_other_code_is_not_taken(monkeypatch, fresh, tmp_path):
    """After ``git pull`` in an editable install its functions may want other arguments, whatever the times of files."""
    changed = tmp_path / 'passes.cpp'
    changed.write_bytes(SOURCES[0].read_bytes() + b'\n')
    os.utime(changed, (0, 0))
    monkeypatch.delenv('SN_BACKEND', raising=False)
    monkeypatch.setattr(cpp.load, '_SOURCES', [changed, *SOURCES[1:]])
    with pytest.warns(UserWarning, match='has changed since it was compiled. Install sn_openmmlab anew'):
        assert backends.choose(CPU, torch.float32) is native


@needs_library
def test_a_library_whose_code_was_only_touched_is_taken(monkeypatch, fresh, tmp_path):
    copies = [tmp_path / source.name for source in SOURCES]
    for copy, source in zip(copies, SOURCES):
        copy.write_bytes(source.read_bytes())
    monkeypatch.delenv('SN_BACKEND', raising=False)
    monkeypatch.setattr(cpp.load, '_SOURCES', copies)
    assert backends.choose(CPU, torch.float32) is cpp


@needs_library
def test_a_library_of_another_version_is_not_taken(monkeypatch, fresh):
    """In a wheel there is no code to compare."""
    monkeypatch.delenv('SN_BACKEND', raising=False)
    monkeypatch.setattr(cpp.load, '_SOURCES', [Path('not in a wheel.cpp')])
    monkeypatch.setattr(cpp.load, '__version__', '99.0')
    with pytest.warns(UserWarning, match=r'compiled for version .* and this is 99\.0'):
        assert backends.choose(CPU, torch.float32) is native


@needs_library
@pytest.mark.parametrize('part', [0.0, 0.02, 0.5, 0.92, 0.999])
def test_a_library_that_is_cut_off_does_not_end_the_process(part, tmp_path):
    """As by a full disk; loading it is what did."""
    whole = LIBRARY.read_bytes()
    cut = tmp_path / '_cpp.so'
    cut.write_bytes(whole[: int(len(whole) * part)])
    code = (
        'import pathlib, torch; from sn_openmmlab import SwitchNorm; from sn_openmmlab.ops.backends.cpp import load;'
        f'load._FOLDER = pathlib.Path({str(tmp_path)!r});'
        'print(SwitchNorm(3)(torch.randn(2, 3, 4, 4)).isfinite().all())'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and 'tensor(True)' in done.stdout, done.stderr
    assert 'its own cannot be loaded' in done.stderr
