"""The ratios of SparsestMax: by hand, against the definition, and their gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from sn_openmmlab.ops import sparsestmax
from test_ops.cases import POINTS, double


@pytest.mark.parametrize('point', POINTS)
def test_sparsestmax_by_hand(point):
    z, rho, expected = POINTS[point]
    for k in range(3):  # in any order, unless that decides a tie
        if point != 'tie_at_the_end' or k == 0:
            p = sparsestmax(double(z).roll(k), rho)
            torch.testing.assert_close(p, double(expected).roll(k), rtol=1e-12, atol=1e-12)
    assert torch.equal(sparsestmax(double([z, z]), rho)[1], sparsestmax(double(z), rho))


def test_sparsestmax_is_the_closest_point_that_the_circle_allows():
    torch.manual_seed(0)
    z = torch.randn(60, 3, dtype=torch.float64) * double([0.1, 0.3, 1]).repeat(20)[:, None]
    rho = torch.rand(60, 1, dtype=torch.float64) * 0.99
    p, r = sparsestmax(z, rho), rho * (2 / 3) ** 0.5
    torch.testing.assert_close(p.sum(1), torch.ones(60, dtype=torch.float64))
    assert (p >= 0).all() and ((p - 1 / 3).norm(dim=1) >= r[:, 0] - 1e-9).all()
    a, b = torch.meshgrid(*[torch.linspace(0, 1, 101, dtype=torch.float64)] * 2, indexing='ij')
    grid = torch.stack([a, b, 1 - a - b], -1)[a + b <= 1]
    allowed = (grid - 1 / 3).norm(dim=1) >= r
    best = torch.cdist(z, grid).masked_fill(~allowed, torch.inf).amin(1)
    assert allowed.any(1).all() and ((p - z).norm(dim=1) <= best + 1e-9).all()


@pytest.mark.parametrize('k', [1, 2, 5])
def test_sparsestmax_of_other_sizes(k):
    torch.manual_seed(k)
    z = torch.randn(50, k, dtype=torch.float64) / 3
    for rho in 0.0, 0.3, 0.7, 0.95, 0.999999, 1.0:
        p = sparsestmax(z, rho)
        assert (p >= 0).all() and torch.allclose(p.sum(1), torch.ones_like(p[:, 0]))
        assert ((p - 1 / k).square().sum(1) >= rho**2 * (k - 1) / k - 1e-9).all()
    assert torch.equal(p, F.one_hot(z.argmax(1), k).double())


@pytest.mark.parametrize('point', POINTS)
def test_gradients_of_sparsestmax(point):
    z, rho, _ = POINTS[point]
    if point in ('centre', 'tie_at_the_end'):  # not differentiable; finite all the same, for a training to leave it
        z = double(z, requires_grad=True)
        (grad,) = torch.autograd.grad(sparsestmax(z, rho)[0], z)
        assert grad.isfinite().all()
    else:
        assert gradcheck(lambda z: sparsestmax(z, rho), double(z, requires_grad=True))
