"""Engines for several processes, by their own code over gloo: FSDP 1 and 2, DistributedDataParallel, launchers."""

import copy
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from mmengine.model import BaseModel
from mmengine.runner import FlexibleRunner
from processes import Processes, counting, free_port
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, always_wrap_policy, size_based_auto_wrap_policy
from torch.nn.modules.batchnorm import _BatchNorm

from sn_openmmlab import SwitchNorm, SyncSN

CPU = torch.device('cpu')
ENGINES = Path(__file__).parents[1] / 'docs/engines.md'
# each puts a unit of its own around every BatchNorm: the first since there is mixed precision
WRAPPED = dict(
    mixed_precision=dict(
        mixed_precision=MixedPrecision(buffer_dtype=torch.float32),
        auto_wrap_policy=partial(size_based_auto_wrap_policy, min_num_params=10**9),
    ),
    always=dict(auto_wrap_policy=always_wrap_policy),
    by_class=dict(auto_wrap_policy=ModuleWrapPolicy({nn.BatchNorm2d})),
)


def network(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4))


def bn_like(channels):
    return SwitchNorm(channels, init_ratios=(0, 0, 1))


def buffers(net):
    return {k.replace('_fsdp_wrapped_module.', ''): v.clone() for k, v in net.named_buffers()}


def batch():
    """Each process has images of another mean."""
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 10 * dist.get_rank()


def fsdp1(how, norm, freeze):
    net = network(norm)
    wrapped = FullyShardedDataParallel(copy.deepcopy(net), device_id=CPU, use_orig_params=True, **WRAPPED[how])
    assert any(type(m.bn) is not type(net[1].bn) for m in wrapped.modules() if isinstance(m, SwitchNorm))
    if freeze:  # as OpenMMLab's backbones do for norm_eval=True
        for m in (*net.modules(), *wrapped.modules()):
            if isinstance(m, _BatchNorm):
                m.eval()
    results = []
    for model in net, wrapped:
        with counting() as sent:
            loss = model(batch()).pow(3).sum()
        assert sent == []
        loss.backward()
        results.append((loss.item(), buffers(model)))
    (loss, expected), (got_loss, got) = results
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)
    start = buffers(network(norm))
    assert all(torch.equal(got[k], start[k]) == freeze for k in start)


@pytest.mark.parametrize('freeze', [False, True], ids=['training', 'norm_eval'])
@pytest.mark.parametrize('how', WRAPPED)
def test_fsdp1_that_wraps_each_batch_norm_changes_nothing(two, how, freeze):
    """Statistics are each process's own, and what is frozen stays."""
    two(fsdp1, how, bn_like, freeze)


# -- what each engine does to one training step -----------------------------------------------------------------------


def wrapped_by(engine, net, half):
    if engine == 'DDP':
        return nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)  # as mmengine's
    if engine == 'FSDP1':
        policy = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.float32) if half else None
        return FullyShardedDataParallel(net, device_id=CPU, use_orig_params=True, mixed_precision=policy)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if half else None, output_dtype=torch.float32)
    mesh = dist.device_mesh.init_device_mesh('cpu', (dist.get_world_size(),))
    return fully_shard(net, mesh=mesh, mp_policy=policy)


def steps(engine, kind, half, checkpointed, accumulate):
    """Losses and statistics of two steps by an engine, and, without one, of the same on each process's images."""
    norm = SyncSN if kind == 'SyncSN' else SwitchNorm
    results = []
    for wrap in False, True:
        net = network(norm)
        if checkpointed:
            net = nn.Sequential(Checkpointed(net[:3]), *net[3:])
        model = wrapped_by(engine, net, half) if wrap else net
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        losses = []
        with counting() as sent:
            for i in range(2 * accumulate):
                loss = model(batch() + i).square().mean()
                loss.backward()
                losses.append(loss.item())
                if (i + 1) % accumulate == 0:
                    optimizer.step()
        results.append((losses, buffers(net), list(sent)))
    (losses, expected, sent), (got_losses, got, got_sent) = results
    assert got_losses == pytest.approx(losses, rel=0.05 if half else 1e-5)
    assert all(value.dtype != torch.bfloat16 for value in got.values())
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0.05 if half else 1e-5, atol=0.05 if half else 1e-6, msg=name)
    calls = 2 * accumulate * (2 * 2 + checkpointed)  # two layers forward and backward; one of them twice forward
    assert len(got_sent) == len(sent) == (calls if kind == 'SyncSN' else 0)
    assert not sent or set(sent) == {2 * 4 + 1, 2 * 4}  # 2C + 1 numbers forward, 2C backward


class Checkpointed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)


@pytest.mark.parametrize('checkpointed, accumulate', [(False, 1), (True, 1), (False, 2)], ids=['plain', 'cp', 'acc'])
@pytest.mark.parametrize('kind', ['SN', 'SyncSN'])
@pytest.mark.parametrize('engine', ['DDP', 'FSDP1', 'FSDP2'])
def test_engines_compute_the_same_at_the_same_price(two, engine, kind, checkpointed, accumulate):
    two(steps, engine, kind, False, checkpointed, accumulate)


@pytest.mark.parametrize('engine', ['FSDP1', 'FSDP2'])
def test_statistics_stay_float32_under_mixed_precision(two, engine):
    two(steps, engine, 'SN', True, False, 1)


# -- mmengine's strategy ----------------------------------------------------------------------------------------------


class Loss(BaseModel):
    def __init__(self):
        super().__init__()
        self.net = network(SwitchNorm)

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.net(inputs).square().mean())


def train(work_dir, name, changes, wrapper='OptimWrapper'):
    """Train two steps by a strategy of docs/engines.md; the model, and the images that each process took."""
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE='2')  # as torchrun does
    documented = {}
    exec(re.search(rf'```python\n([^`]*{name}[^`]*)```', ENGINES.read_text()).group(1), documented)
    strategy = documented['strategy']
    changes(strategy)
    images = [dict(inputs=batch()[i] + i) for i in range(2)]
    runner = FlexibleRunner(
        Loss(),
        work_dir=f'{work_dir}/{dist.get_rank()}',
        strategy=strategy,
        train_dataloader=torch.utils.data.DataLoader(images, 1),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(type=wrapper, optimizer=dict(type='Adam', lr=0.0)),
        default_hooks=dict(checkpoint=None),
        log_level='ERROR',
    )
    runner.train()
    return runner.strategy.model, images


def by_fsdp(work_dir):
    def changes(strategy):
        strategy['model_wrapper']['device_id'] = CPU
        strategy['model_wrapper']['auto_wrap_policy']['min_num_params'] = 1

    model, images = train(work_dir, 'FSDPStrategy', changes)
    assert type(model).__name__ == 'MMFullyShardedDataParallel'
    compare(model, images, torch.float32)


def by_deepspeed(work_dir, stage):
    os.environ['DS_ACCELERATOR'] = 'cpu'
    model, images = train(
        work_dir, 'DeepSpeedStrategy', lambda s: s['zero_optimization'].update(stage=stage), 'DeepSpeedOptimWrapper'
    )
    assert type(model).__name__ == 'MMDeepSpeedEngineWrapper'
    compare(model, images, torch.bfloat16)


def compare(model, images, dtype):
    """Statistics with those of a model that took the same images alone."""
    alone = network(SwitchNorm).to(dtype)
    for image in images:
        alone(image['inputs'][None].to(dtype))
    got, expected = {k.split('net.')[-1]: v for k, v in buffers(model).items()}, buffers(alone)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


def test_mmengines_fsdp_strategy(two, tmp_path):
    two(by_fsdp, str(tmp_path))


@pytest.mark.parametrize('stage', [1, 2, 3])
def test_mmengines_deepspeed_strategy(tmp_path, stage):
    pytest.importorskip('deepspeed', reason='deepspeed 0.16.9 is optional, see docs/engines.md')
    processes = Processes(2)  # of its own, since mmengine makes one such strategy a process
    try:
        processes(by_deepspeed, str(tmp_path), stage)
    finally:
        processes.stop()


# -- torchrun over machines ------------------------------------------------------------------------------------------

SCRIPT = """
import sys, weakref, torch, torch.distributed as dist
from sn_openmmlab import SyncSN
dist.init_process_group('gloo')  # mmengine's init_dist('pytorch') sets a GPU
rank = dist.get_rank()
layers = SyncSN(2, momentum=1.0), SyncSN(2, momentum=1.0, group_size=2)
for layer in layers:
    layer(torch.full((1, 2, 3, 3), float(rank)))
subgroup = weakref.ref(layers[1]._find_group(layers[1].bn))
dist.destroy_process_group()
with open(f'{sys.argv[1]}/{rank}', 'w') as file:
    print(*(layer.bn.running_mean[0].item() for layer in layers), subgroup() is None, file=file)
"""


def test_torchrun_over_two_nodes_of_two_processes(tmp_path):
    """Statistics are those of all four; in groups of two, of each node's own. A subgroup ends with its world."""
    port = free_port()
    (tmp_path / 'script.py').write_text(SCRIPT)
    command = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc-per-node=2']
    command += ['--master-addr=127.0.0.1', f'--master-port={port}']
    nodes = [
        subprocess.Popen(
            [*command, f'--node-rank={rank}', str(tmp_path / 'script.py'), str(tmp_path)],
            env=dict(os.environ, OMP_NUM_THREADS='1'),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        assert [node.wait(timeout=240) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.terminate()  # torchrun ends its processes with it
    seen = [(tmp_path / str(rank)).read_text().split() for rank in range(4)]
    assert seen == [['1.5', '0.5' if rank < 2 else '2.5', 'True'] for rank in range(4)]
