"""torch's own kernels: where they round, and where maps share coefficients."""

import itertools

import pytest
import torch

from sn_openmmlab.ops import NORMALIZERS
from sn_openmmlab.ops.backends import native
from test_ops.cases import BACKENDS, arguments, laid_out, rand, run


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_half_gradients_of_native_are_off_by_three_roundings_at_most(layout, dtype):
    """1.4 times what one rounding does; docs/troubleshooting.md says so. Channels last is rounded once."""
    dy, x = (laid_out(rand(16, 32, 20, 20, seed=s).to(dtype), layout).flatten(2) for s in (7, 8))
    mean, a, b1, b0 = (rand(16, 32, seed=s, dtype=torch.float32) for s in range(4))
    exact = a[..., None].double() * dy.double()
    exact = exact + b1[..., None].double() * (x.double() - mean[..., None].double()) + b0[..., None].double()
    once, got = (
        ((y.double() - exact).norm() / exact.norm()).item()
        for y in (exact.to(dtype), native.combine(dy, x, mean[None], torch.stack([b1, b0, a])))
    )
    print(f'{layout} {dtype}: {got:.1e} of the size of dx, {once:.1e} by one rounding')
    assert once < got < 1.5 * once if layout == 'contiguous' else got == pytest.approx(once, rel=0.01)


@pytest.mark.parametrize('affine', [True, False], ids=['affine', 'plain'])
@pytest.mark.parametrize('names', [n for k in (1, 2) for n in itertools.combinations(NORMALIZERS, k)], ids='-'.join)
def test_every_subset_of_normalizers(names, affine):
    """LN or BN alone give coefficients that samples or channels share, while the kernels take one for each map."""
    x, dy = rand(3, 8, 9, 9, seed=7), rand(3, 8, 9, 9, seed=8)
    args = arguments(8, names)
    results = []
    for backend in BACKENDS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('SN_BACKEND', backend)
            results.append(run(x, args[: 4 if affine else 2], [], dy, training=True, normalizers=names))
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
