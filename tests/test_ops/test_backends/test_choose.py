"""Which backend is taken, and what is said where one is wanted that does not run."""

import sys
import warnings

import pytest
import torch

from sn_openmmlab.ops import backends, switch_norm
from sn_openmmlab.ops.backends import cpp, native
from test_ops.cases import alone, needs_library

CPU = torch.device('cpu')


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv('SN_BACKEND', 'cudnn')
    with pytest.raises(RuntimeError, match="'cudnn'.*reference.*native"):
        switch_norm(torch.zeros(2, 6), torch.ones(3), torch.ones(3))


@needs_library
def test_cpp_is_the_backend_on_the_cpu(monkeypatch):
    monkeypatch.delenv('SN_BACKEND', raising=False)
    assert all(backends.choose(CPU, dtype) is cpp for dtype in (torch.float32, torch.bfloat16))
    assert all(backends.choose(CPU, dtype) is native for dtype in (torch.float16, torch.float64))
    monkeypatch.setenv('SN_BACKEND', 'native')
    assert backends.choose(CPU, torch.float32) is native


def test_an_impossible_choice_is_an_error(monkeypatch):
    monkeypatch.setenv('SN_BACKEND', 'cpp')
    with pytest.raises(RuntimeError, match="'cpp'.*float64 on cpu.*float32 and bfloat16.*compiler"):
        switch_norm(torch.zeros(2, 6).double(), torch.ones(3).double(), torch.ones(3).double())


@pytest.fixture
def triton():
    """What tests of the Triton kernels share, where these can be imported."""
    from test_ops.test_backends.test_triton_kernels import cases

    return cases


def test_triton_is_the_backend_on_cuda(triton, monkeypatch):
    triton_kernels = backends.triton_kernels
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


def import_old(monkeypatch, triton):
    monkeypatch.setattr(triton.triton, '__version__', '2.1.0')
    for name in [name for name in sys.modules if name.startswith('sn_openmmlab.ops.backends.triton_kernels')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(backends, 'triton_kernels')


def import_none(monkeypatch, triton):
    import_old(monkeypatch, triton)
    monkeypatch.setitem(sys.modules, 'triton', None)


@pytest.mark.parametrize(
    'without, dtype, reason',
    [
        (
            lambda patch, t: patch.setattr(t.passes, 'launch', launch_without_compiler),
            torch.float32,
            'find C compiler',
        ),
        (import_old, torch.float32, r'Triton 3\.0 or newer.*torch 2\.4 and newer \(Triton is 2\.1\.0\)'),
        (import_none, torch.float32, r'Triton 3\.0 or newer.*torch 2\.4 and newer \(.*triton'),
        (
            lambda patch, t: patch.setattr(t.passes, 'VERSION', (3, 1)),
            torch.float64,
            'float64 they need Triton 3.2',
        ),
        (
            lambda patch, t: patch.setattr(t.passes, 'INTERPRETED', False),
            torch.float32,
            'CUDA device.*is cpu',
        ),
    ],
    ids=['no compiler', 'old Triton', 'no Triton', 'float64', 'no GPU'],
)
def test_native_stands_in_and_says_why_once(monkeypatch, asked_anew, triton, without, dtype, reason):
    device = torch.device('cpu' if 'cpu' in reason else triton.DEVICE)
    without(monkeypatch, triton)
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


def test_triton_is_imported_only_when_wanted():
    code = (
        'import sys, torch; from sn_openmmlab.ops import switch_norm;'
        'switch_norm(torch.zeros(2, 6), torch.ones(3), torch.ones(3));'
        "print('sn_openmmlab.ops.backends.triton_kernels' in sys.modules)"
    )
    assert alone('-c', code).split()[-1] == 'False'
