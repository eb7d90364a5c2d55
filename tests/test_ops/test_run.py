"""Forward and backward by a plan: what is kept between them, what may change there, and the sums over processes."""

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sn_openmmlab.ops import NORMALIZERS, switch_norm
from sn_openmmlab.ops.backends.interface import kept_sizes
from sn_openmmlab.ops.formula import moments_dtype
from sn_openmmlab.ops.run import _keep, _separate
from test_ops.cases import CPP, arguments, rand


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('backend', ['native', CPP], indirect=True)
def test_only_the_input_is_kept_for_backward(backend, training):
    x = rand(2, 8, 32, 32, dtype=torch.float32).requires_grad_()
    args = [a.requires_grad_() for a in arguments(8, dtype=torch.float32)]
    stats = arguments(8, dtype=torch.float32, stats=True)[4:]
    kept = []

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        switch_norm(x, *args, *stats, training=training)
    large = {t.data_ptr() for t in kept if t.numel() > 2 * 2 * (8 + 8)}
    assert large == {x.data_ptr()}
    assert len(kept) <= 6  # the parameters, and in one tensor all moments


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('n, c', [(2, 4), (3, 5), (1, 1)])
def test_what_is_kept_in_one_tensor_comes_apart_again(n, c, dtype):
    moments, joint = rand(2, n, c, dtype=moments_dtype(dtype)), rand(2 * (n + c) + 1)
    kept = _keep(moments, joint)
    assert len(kept) == sum(kept_sizes(n, c, dtype))
    assert all(map(torch.equal, _separate(kept, torch.empty(n, c, 3, 3, dtype=dtype)), (moments, joint)))


@pytest.mark.parametrize('names', [NORMALIZERS, ('in', 'ln')], ids='-'.join)
@pytest.mark.parametrize('shape', [(0, 4, 7, 7), (0, 4), (2, 4, 0, 3)], ids=str)
def test_empty_input(float_backend, shape, names):
    x = torch.empty(shape).requires_grad_()
    args = [a.requires_grad_() for a in arguments(4, names, torch.float32)]
    before = arguments(4, stats=True, dtype=torch.float32)[4:]
    stats = [s.clone() for s in before] if 'bn' in names else [None, None]
    tracked = torch.tensor(3)
    y = switch_norm(x, *args, *stats, tracked, training=True, normalizers=names)
    assert y.shape == shape and y.requires_grad
    y.sum().backward()
    assert x.grad.shape == shape
    assert all(a.grad is not None and not a.grad.any() for a in args)
    if 'bn' in names:
        assert tracked == 3 and all(torch.equal(a, b) for a, b in zip(stats, before))


@pytest.mark.parametrize('shape', [(0, 4, 7, 7), (2, 4, 0, 3)], ids=str)
@pytest.mark.parametrize('backend', ['native', CPP], indirect=True)
def test_empty_channels_last_input_stays_channels_last(backend, shape):
    """As PyTorch's own test of norms wants it (test_memory_format)."""
    x = torch.empty(shape).to(memory_format=torch.channels_last).requires_grad_()
    y = switch_norm(x, *arguments(4, dtype=torch.float32), training=True)
    assert y.stride() == x.stride()
    assert torch.autograd.grad(y.sum(), x)[0].stride() == x.stride()


@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    'change',
    {
        'views': lambda t: torch.stack([t, t], -1)[..., 0],
        'half precision': lambda t: t.bfloat16(),
        'moved': lambda t: t.clone(),
    }.items(),
    ids=lambda item: item[0],
)
def test_parameters_may_change_between_forward_and_backward(change, memory):
    """In place of others with the same values, as some wrappers do; autograd does not see that."""
    x = torch.randn(3, 6, 5, 4).to(memory_format=memory).requires_grad_()
    results = []
    for changed in False, True:
        learned = [torch.full((k,), 0.5).requires_grad_() for k in (3, 3, 6, 6)]
        y = switch_norm(x, *learned, training=True)
        if changed:
            for t in learned[:3]:
                t.data = change[1](t.data)
        results.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_gradients_stored_otherwise(monkeypatch):
    x, logits = torch.randn(3, 6, 5, 4).requires_grad_(), torch.ones(3)
    dy = torch.randn(3, 6, 5, 4)
    expected = torch.autograd.grad(switch_norm(x, logits, logits, training=True), x, dy)[0]
    others = dy.to(memory_format=torch.channels_last), dy.mT.contiguous().mT, torch._neg_view(-dy), nn.Parameter(dy)
    for other in others:
        got = torch.autograd.grad(switch_norm(x, logits, logits, training=True), x, other)[0]
        torch.testing.assert_close(got, expected)


def step(shared, backend):
    """Output and gradients for some images, or for this process's half of them."""
    x, logits = torch.randn(4, 4, 5, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, -0.2, 0.5])
    if shared:
        x = x.chunk(2)[dist.get_rank()]
    leaves = [t.clone().requires_grad_() for t in (x, logits, logits)]
    with mock.patch.dict(os.environ, SN_BACKEND=backend):
        y = switch_norm(*leaves, training=True, group=dist.group.WORLD if shared else None)
        return [y.detach(), *torch.autograd.grad(y.pow(3).sum(), leaves)]


@pytest.mark.parametrize('backend', ['native', CPP])
def test_synchronised_statistics(two, backend):
    """Two processes, and their sums between the parts of the algebra."""
    y, dx, *dlogits = zip(*two(step, True, backend))
    for got, expected in zip([torch.cat(y), torch.cat(dx), *map(sum, dlogits)], step(False, backend)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
