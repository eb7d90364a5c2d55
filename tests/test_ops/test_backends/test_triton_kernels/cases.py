"""What tests of the Triton kernels share: on a GPU if there is one, else in Triton's interpreter."""

import functools

import pytest
import torch

import test_ops.cases
from sn_openmmlab.ops import NORMALIZERS, plan, switch_norm

triton = pytest.importorskip('triton', reason='Triton is not installed')
passes = pytest.importorskip(
    'sn_openmmlab.ops.backends.triton_kernels.passes', reason='Triton is older than 3.0', exc_type=ImportError
)

from sn_openmmlab.ops.backends.triton_kernels import algebra  # noqa: E402  (needs Triton)

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
needs_cuda = pytest.mark.skipif(DEVICE == 'cpu', reason='needs a CUDA device')
if passes.lacks(torch.device(DEVICE), torch.float32):
    pytest.skip('no GPU, and Triton was imported before TRITON_INTERPRET=1 was set', allow_module_level=True)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def take(way, monkeypatch):
    """Bring about what the shapes of real networks do, on small ones."""
    plan._plans.clear()
    if way == 'packed':  # many maps to a program, as where there are far more maps than processors
        monkeypatch.setattr(passes, '_processors', lambda device: 1)
    elif way == 'split':  # the tiles of a map shared out to several programs
        monkeypatch.setattr(passes, 'reduction_plan', functools.partial(passes.reduction_plan, tile=2))
        assert passes.reduction_plan(2, 3, 35, False, 4, 132).arguments['parts'] > 1
    elif way == 'by row and column':  # algebra too large for one program
        monkeypatch.setattr(algebra, '_ALONE', 1)
        algebra.plans.cache_clear()
    elif way == 'torch algebra':  # too large for that as well
        monkeypatch.setattr(algebra, '_LONGEST', 0)


def rand(*shape, dtype=torch.float64, **kwargs):
    return test_ops.cases.rand(*shape, dtype=dtype, **kwargs).to(DEVICE)


def laid_out(x, channels_last):
    return test_ops.cases.laid_out(x, 'channels_last' if channels_last else 'contiguous')


def arguments(channels, names=NORMALIZERS, dtype=torch.float64):
    """Parameters and BN statistics, away from their identity values."""
    args = [a.to(DEVICE) for a in test_ops.cases.arguments(channels, names, dtype, stats=True)]
    return args[:4], args[4:]


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
