"""Synchronised statistics over real processes (gloo), against one process on the joined batch, in float64."""

import pytest
import torch
import torch.distributed as dist
from mmengine.model import ExponentialMovingAverage, convert_sync_batchnorm, revert_sync_batchnorm
from processes import counting
from torch import nn

from sn_openmmlab import SwitchNorm, SyncSN

TOLERANCE = dict(rtol=1e-10, atol=1e-10)
# images of each rank as (N, C, H, W); the ranks of one case together make the joined batch
BATCHES = dict(
    even=[(2, 3, 4, 5), (2, 3, 4, 5), (2, 3, 4, 5), (2, 3, 4, 5)],
    uneven=[(1, 3, 4, 5), (3, 3, 6, 2), (2, 3, 1, 1), (1, 3, 7, 7)],
    empty_rank=[(2, 3, 4, 5), (0, 3, 4, 5), (1, 3, 3, 3), (0, 3, 4, 5)],
    all_empty=[(0, 3, 7, 7)] * 4,
)
LAYERS = dict(
    SyncSN=lambda group_size=None: SyncSN(3, group_size=group_size),
    torch=lambda: nn.SyncBatchNorm.convert_sync_batchnorm(SwitchNorm(3)),
    mmengine=lambda: convert_sync_batchnorm(SwitchNorm(3), 'torch'),
    mmcv=lambda: convert_sync_batchnorm(SwitchNorm(3), 'mmcv'),
    both=lambda group_size=None: convert_sync_batchnorm(SyncSN(3, group_size=group_size), 'torch'),
)
each_layer = pytest.mark.parametrize(
    'make', [pytest.param(name, marks=[pytest.mark.needs('mmcv')] * (name == 'mmcv')) for name in LAYERS]
)


def prepare(layer):
    """The same parameters and statistics, away from their start, on every rank."""
    layer.double()
    generator = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        p.data.normal_(generator=generator)
    layer.bn.running_mean.normal_(generator=generator)
    layer.bn.running_var.uniform_(0.5, 2, generator=generator)
    return layer


def batches(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) * (i + 1) + i for i, s in enumerate(shapes)]


def loss_of(y):
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() + y.pow(3).sum()


def joined(xs, frozen):
    """Outputs, gradients and statistics of one process; maps of several sizes are joined by the definition itself."""
    layer = prepare(SwitchNorm(3))
    mean, var = layer.bn.running_mean, layer.bn.running_var
    xs = [x.clone().requires_grad_() for x in xs]
    if not frozen:
        pixels = torch.cat([x.movedim(1, 0).reshape(3, -1) for x in xs], 1)
        count = pixels.shape[1]
        if count:
            mean, var = pixels.mean(1), pixels.var(1, correction=0)
            layer.bn.running_mean.lerp_(mean.detach(), 0.1)
            layer.bn.running_var.lerp_(var.detach() * count / (count - 1), 0.1)
            layer.bn.num_batches_tracked += 1
    w, v = layer.mean_weight.softmax(0), layer.var_weight.softmax(0)
    ys = []
    for x in xs:
        var_in, mean_in = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        var_ln, mean_ln = torch.var_mean(x, (1, 2, 3), correction=0, keepdim=True)
        blend_mean = w[0] * mean_in + w[1] * mean_ln + w[2] * mean.view(1, 3, 1, 1)
        blend_var = v[0] * var_in + v[1] * var_ln + v[2] * var.view(1, 3, 1, 1)
        y = (x - blend_mean) / (blend_var + layer.eps).sqrt()
        ys.append(y * layer.weight.view(1, 3, 1, 1) + layer.bias.view(1, 3, 1, 1))
    sum(map(loss_of, ys)).backward()
    return ys, [x.grad for x in xs], [p.grad for p in layer.parameters()], list(layer.buffers())


def one_layer(make, batch, frozen=False, group_size=None):
    rank, size = dist.get_rank(), group_size or dist.get_world_size()
    layer = prepare(LAYERS[make](**dict(group_size=group_size) if group_size else {}))
    if frozen:
        layer.bn.eval()
    everything = batches(BATCHES[batch][: dist.get_world_size()], seed=1)
    x = everything[rank].clone().requires_grad_()
    with counting() as sent:
        y = layer(x)
        sent.append('backward')
        loss_of(y).backward()
    alone = frozen or size == 1
    assert sent == (['backward'] if alone else [7, 'backward', 6])  # 2C + 1 numbers forward, 2C backward

    first = rank // size * size
    ys, dxs, dparams, buffers = joined(everything[first : first + size], frozen)
    torch.testing.assert_close(y, ys[rank - first], **TOLERANCE)
    torch.testing.assert_close(x.grad, dxs[rank - first], **TOLERANCE)
    for p, expected in zip(layer.parameters(), dparams):
        shares = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, p.grad)  # each rank holds its share of the joined batch's gradient
        torch.testing.assert_close(sum(shares[first : first + size]), expected, **TOLERANCE)
    for a, b in zip(layer.buffers(), buffers):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize('batch', BATCHES)
@each_layer
def test_two_ranks_equal_one_process_on_the_joined_batch(two, make, batch):
    two(one_layer, make, batch)


@pytest.mark.parametrize('batch', ['uneven', 'empty_rank'])
@pytest.mark.parametrize('make', ['SyncSN', 'torch'])
def test_four_ranks_equal_one_process_on_the_joined_batch(four, make, batch):
    four(one_layer, make, batch)


@each_layer
def test_frozen_statistics_are_not_synchronised(two, make):
    two(one_layer, make, 'uneven', True)


@pytest.mark.parametrize('make', ['SyncSN', 'both'])
@pytest.mark.parametrize('batch, group_size', [('uneven', 2), ('empty_rank', 2), ('uneven', 1)])
def test_groups(four, make, batch, group_size):
    four(one_layer, make, batch, False, group_size)


def wrong_group_size():
    with pytest.raises(ValueError, match=r'group_size=3 does not divide the world size 2'):
        SyncSN(3, group_size=3)


def test_a_group_size_that_does_not_divide(two):
    two(wrong_group_size)


def half_precision():
    layer, bn = SyncSN(3, momentum=1.0), SwitchNorm(3, momentum=1.0)
    everything = [x.bfloat16() for x in batches([(2, 3, 4, 5)] * dist.get_world_size(), seed=2)]
    assert layer(everything[dist.get_rank()]).dtype == torch.bfloat16
    bn(torch.cat(everything))
    torch.testing.assert_close(layer.bn.running_mean, bn.bn.running_mean)
    torch.testing.assert_close(layer.bn.running_var, bn.bn.running_var)


def test_half_precision(two):
    """Under AMP the layers are float32 and the maps half: statistics stay float32, and are those of all ranks."""
    two(half_precision)


def reverted():
    layer = SwitchNorm(3)
    x = batches([(2, 3, 4, 5)] * 2, seed=3)[dist.get_rank()].float()
    with counting() as sent:
        y = revert_sync_batchnorm(convert_sync_batchnorm(layer, 'torch'))(x)
    assert sent == []
    torch.testing.assert_close(y, SwitchNorm(3)(x))


def test_reverting_ends_what_converting_began(two):
    two(reverted)


def averaged(make, how):
    """What becomes of a model that an EMAHook copies."""
    try:
        ema = ExponentialMovingAverage(convert_sync_batchnorm(nn.Sequential(make(3)), how), update_buffers=True)
    except (TypeError, RuntimeError) as error:
        return str(error)
    return type(ema.module[0]).__name__


@pytest.mark.needs('mmcv')
@pytest.mark.parametrize('make', [nn.BatchNorm2d, SwitchNorm], ids=lambda make: make.__name__)
def test_mmcvs_norm_cannot_be_averaged(two, make):
    """It holds a process group, which nothing can copy; docs/finetuning.md says so."""
    assert all('ProcessGroup' in said for said in two(averaged, make, 'mmcv'))
    assert set(two(averaged, make, 'torch')) == {'SyncBatchNorm' if make is nn.BatchNorm2d else 'SwitchNorm'}
