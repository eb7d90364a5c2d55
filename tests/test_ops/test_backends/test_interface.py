"""What every backend has to offer, and the room between its forward and backward."""

import inspect

import pytest
import torch

from sn_openmmlab.ops import backends
from sn_openmmlab.ops.backends import interface
from sn_openmmlab.ops.formula import moments_dtype

PARTS = [name for name, part in vars(interface.Backend).items() if inspect.isfunction(part) and name[0] != '_']


@pytest.mark.parametrize('name', ['native', 'cpp', 'triton_kernels'])
def test_every_backend_has_every_part(name):
    """With the same arguments in the same order, since they are given by position."""
    if name == 'triton_kernels':
        from test_ops.test_backends.test_triton_kernels import cases  # noqa: F401  (skips where there is no Triton)
    assert len(PARTS) == 9
    for part in PARTS:
        _, *expected = inspect.signature(getattr(interface.Backend, part)).parameters
        parameters = inspect.signature(getattr(getattr(backends, name), part)).parameters.values()
        if all(p.kind is p.VAR_POSITIONAL for p in parameters):  # takes whatever comes
            continue
        assert [p.name for p in parameters] == expected, part


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('n, c', [(2, 4), (3, 5), (1, 1), (0, 4)])
def test_there_is_room_for_what_backward_needs(n, c, dtype):
    """For means and variances of all maps, and behind them, at a multiple of 16 bytes, those of LN and BN."""
    moments, joint = interface.kept_sizes(n, c, dtype)
    assert moments % 2 == 0 and joint == 2 * n + 2 * c + 1
    needed = 2 * n * c * torch.finfo(moments_dtype(dtype)).bits // 8
    assert needed <= 8 * moments < needed + 16
