"""Batch averages: what they are, and that nothing else is touched."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.model import BaseModel
from torch import nn

from sn_openmmlab import SwitchNorm, SyncSN, average_statistics

EXACT = dict(rtol=1e-12, atol=1e-12)


class OneLayer(BaseModel):
    """A norm, and another behind it."""

    def __init__(self, norm, second=None):
        super().__init__()
        self.norm, self.second = norm, second or nn.Identity()
        self.double()

    def forward(self, *xs, mode):
        assert mode == 'loss' and not torch.is_grad_enabled()
        return [self.second(self.norm(x).relu()) for x in xs]


def pictures(seed=0):
    """Twelve images of one size and six of another, of large and unequal means and variances."""
    g = torch.Generator().manual_seed(seed)
    sizes = [(3, 4, 5)] * 12 + [(3, 2, 2)] * 6
    return [torch.randn(s, generator=g, dtype=torch.float64) * (i + 1) + 50 * i for i, s in enumerate(sizes)]


def split(images, *sizes):
    """Batches of as many images as ``sizes`` say; those of one shape stand together."""
    images = iter(images)
    return [[torch.stack([next(images) for _ in range(n)])] for n in sizes]


def pixel_moments(maps):
    pixels = torch.cat([m.movedim(1, 0).flatten(1) for m in maps], 1)
    return pixels.mean(1), pixels.var(1)


@pytest.mark.parametrize('norm', [SwitchNorm, nn.BatchNorm2d, lambda c: SwitchNorm(c, momentum=None)])
@pytest.mark.parametrize('sizes', [(12, 6), (1,) * 18, (5, 4, 3, 1, 5), (2, 10, 6)])
def test_a_layer_gets_the_moments_of_all_pixels_however_they_are_split(norm, sizes):
    model = OneLayer(norm(3))
    assert average_statistics(model, split(pictures(), *sizes)) == ['norm.bn' if hasattr(model.norm, 'bn') else 'norm']
    stats = getattr(model.norm, 'bn', model.norm)
    mean, var = pixel_moments([x[None] for x in pictures()])
    torch.testing.assert_close(stats.running_mean, mean, **EXACT)
    torch.testing.assert_close(stats.running_var, var, **EXACT)


def test_a_layer_that_is_called_several_times_gets_the_pixels_of_all_calls():
    model = OneLayer(SwitchNorm(3))
    average_statistics(model, [[x[None] for x in pictures()] + [torch.empty(0, 3, 7, 7, dtype=torch.float64)]])
    torch.testing.assert_close(model.norm.bn.running_var, pixel_moments([x[None] for x in pictures()])[1], **EXACT)


def test_deeper_layers_get_the_pixels_that_the_batches_moments_make_of_them():
    model = OneLayer(SwitchNorm(3), SwitchNorm(3))
    seen = []
    model.second.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batches = split(pictures(), 3, 9, 6)
    average_statistics(model, batches, 3)
    expected = pixel_moments(seen)
    own = copy.deepcopy(model.norm).train()
    assert torch.equal(seen[0], own(batches[0][0]).relu())  # with the batch's moments, not the running ones
    torch.testing.assert_close((model.second.bn.running_mean, model.second.bn.running_var), expected, **EXACT)
    average_statistics(model, batches[::-1])
    torch.testing.assert_close((model.second.bn.running_mean, model.second.bn.running_var), expected, **EXACT)


def on_two_ranks():
    rank = dist.get_rank()
    alone = OneLayer(SwitchNorm(3))
    average_statistics(alone, split(pictures(), 3, 5, 4)[:: 1 if rank else -1])  # the same on both, in another order
    sets = pictures(), pictures(1)
    model = OneLayer(SwitchNorm(3))
    # unequal shares: 2 and 12 images of the first set, one of them in an empty batch
    mine = split(sets[rank], 2) + [[torch.empty(0, 3, 4, 5, dtype=torch.float64)]] if rank else split(sets[0], 8, 4)
    average_statistics(model, mine)
    mean, var = pixel_moments([torch.stack(sets[0][:12]), torch.stack(sets[1][:2])])
    torch.testing.assert_close(model.norm.bn.running_mean, mean, **EXACT)
    torch.testing.assert_close(model.norm.bn.running_var, var, **EXACT)

    deep = OneLayer(SyncSN(3), SyncSN(3))
    batches = split(sets[0], 4, 8)
    average_statistics(deep, [[b[0][rank::2]] for b in batches])
    whole = OneLayer(SwitchNorm(3), SwitchNorm(3))
    average_statistics(whole, batches)  # twice the same on two ranks: all but the unbiased variance stays
    biased = 239 / 240, 479 / 480
    for name in 'norm', 'second':
        one, both = getattr(whole, name).bn, getattr(deep, name).bn
        torch.testing.assert_close(both.running_mean, one.running_mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(both.running_var * biased[0], one.running_var * biased[1], rtol=1e-10, atol=1e-10)


def test_ranks_do_not_matter_and_neither_do_they_in_depth_with_synchronised_statistics(two):
    two(on_two_ranks)


class Mixed(OneLayer):
    """SN, frozen SN, SN without BN, BatchNorm and dropout; ``train`` freezes as OpenMMLab's backbones do."""

    def __init__(self):
        super().__init__(SwitchNorm(3))
        self.frozen, self.rest = SwitchNorm(3), SwitchNorm(3, normalizers=('in', 'ln'))
        self.plain, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.double()

    def forward(self, x, mode):
        if x.isnan().any():
            raise FloatingPointError('a broken image')
        return self.dropout(self.plain(self.rest(self.frozen(self.norm(x))))) * np.random.rand() * random.random()

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self


def everything(model):
    modes = [m.training for m in model.modules()]
    momenta = [m.momentum for m in model.modules() if hasattr(m, 'momentum')]
    generators = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    return modes, momenta, generators, [len(m._forward_pre_hooks) for m in model.modules()]


def test_nothing_else_changes():
    model = Mixed().eval()
    model.plain.train()
    before, state = everything(model), copy.deepcopy(model.state_dict())
    assert average_statistics(model, split(pictures(), 4, 4), 1) == ['norm.bn', 'plain']
    assert everything(model) == before
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
    assert moved == {f'{m}.{s}' for m in ('norm.bn', 'plain') for s in ('running_mean', 'running_var')}
    assert all(p.grad is None for p in model.parameters())


def test_after_a_failure_not_even_the_statistics_have_changed():
    model = Mixed()
    batches = split(pictures(), 4, 4)
    batches[1][0][0] = float('nan')
    before, state = everything(model), copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match='a broken image'):
        average_statistics(model, batches)
    assert everything(model) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    'norm, batches, number, message',
    [
        (nn.GroupNorm(1, 3), [], 1, 'no SN layer with BN, and no BatchNorm'),
        (SwitchNorm(3, normalizers=('in', 'ln')), [], 1, 'no SN layer with BN'),
        (SwitchNorm(3), [0] * 4, 0, 'num_batches must be from 1 to 4, the batches of an epoch, got 0'),
        (SwitchNorm(3), [0] * 4, 5, 'from 1 to 4, .* got 5'),
        (SwitchNorm(3), iter(split(pictures(), 2, 2)), 3, 'num_batches=3, but there are 2 batches'),
        (SwitchNorm(3), (b for b in split(pictures(), 2, 2)), None, 'a generator has no length: say in num_batches'),
    ],
)
def test_errors(norm, batches, number, message):
    if isinstance(batches, list) and number == 1:
        batches = split(pictures(), 2)
    with pytest.raises(ValueError, match=message):
        average_statistics(OneLayer(norm), batches, number)


def test_a_frozen_model_and_one_that_hides_its_layers():
    model = OneLayer(SwitchNorm(3))
    model.train = lambda mode=True: model.norm.bn.eval()
    with pytest.raises(ValueError, match='frozen .norm_eval, frozen_stages.: none to average'):
        average_statistics(model, split(pictures(), 2))
    hidden = OneLayer(SwitchNorm(3))
    hidden.forward = lambda *xs, mode: None
    with pytest.raises(RuntimeError, match='came to none of the SN and BN layers'):
        average_statistics(hidden, split(pictures(), 2))
