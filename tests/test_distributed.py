"""Synchronised statistics over real processes (gloo), against one process on the joined batch, in float64."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from sn_openmmlab import SwitchNorm, SyncSN

TOLERANCE = dict(rtol=1e-10, atol=1e-10)
# images of each rank as (N, C, H, W); the ranks of one case together make the joined batch
EVEN = [(2, 3, 4, 5), (2, 3, 4, 5), (2, 3, 4, 5), (2, 3, 4, 5)]
UNEVEN = [(1, 3, 4, 5), (3, 3, 6, 2), (2, 3, 1, 1), (1, 3, 7, 7)]
EMPTY_RANK = [(2, 3, 4, 5), (0, 3, 4, 5), (1, 3, 3, 3), (0, 3, 4, 5)]
ALL_EMPTY = [(0, 3, 7, 7)] * 4


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


def check(make_layer, shapes, frozen=False, group_size=None):
    rank, size = dist.get_rank(), group_size or dist.get_world_size()
    layer = prepare(make_layer(group_size))
    if frozen:
        layer.bn.eval()
    everything = batches(shapes[: dist.get_world_size()], seed=1)
    x = everything[rank].clone().requires_grad_()

    sent, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda t, **kwargs: (sent.append(t.numel()), all_reduce(t, **kwargs))
    y = layer(x)
    sent.append('backward')
    loss_of(y).backward()
    dist.all_reduce = all_reduce
    assert sent == (['backward'] if frozen else [7, 'backward', 6])  # 2C + 1 numbers forward, 2C backward

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


def sync(group_size):
    return SyncSN(3, group_size=group_size)


def converted(group_size):
    return nn.SyncBatchNorm.convert_sync_batchnorm(SwitchNorm(3))


def check_half_precision():
    """Under AMP the layers are float32 and the maps half: statistics stay float32, and are those of all ranks."""
    layer, bn = SyncSN(3, momentum=1.0), SwitchNorm(3, momentum=1.0)
    everything = [x.bfloat16() for x in batches([(2, 3, 4, 5)] * dist.get_world_size(), seed=2)]
    assert layer(everything[dist.get_rank()]).dtype == torch.bfloat16
    bn(torch.cat(everything))
    torch.testing.assert_close(layer.bn.running_mean, bn.bn.running_mean)
    torch.testing.assert_close(layer.bn.running_var, bn.bn.running_var)


def worker(rank, world, port, cases):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=world)
    for case in cases:
        check(*case)
    check_half_precision()
    with pytest.raises(ValueError, match=f'group_size=3 does not divide the world size {world}'):
        SyncSN(3, group_size=3)
    dist.barrier()
    dist.destroy_process_group()


def spawn(world, cases):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (world, port, cases), nprocs=world)  # raises what a rank raised


def test_two_ranks_equal_one_process_on_the_joined_batch():
    cases = [(make, shapes) for make in (sync, converted) for shapes in (EVEN, UNEVEN, EMPTY_RANK, ALL_EMPTY)]
    spawn(2, [*cases, (sync, UNEVEN, True)])


def test_four_ranks_and_groups_of_two():
    spawn(4, [(sync, UNEVEN), (sync, EMPTY_RANK), (sync, UNEVEN, False, 2), (sync, EMPTY_RANK, False, 2)])
