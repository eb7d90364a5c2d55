"""Engines for several processes, by their own code over gloo: FSDP 1 and 2, DistributedDataParallel, launchers."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from processes import counting
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, always_wrap_policy, size_based_auto_wrap_policy
from torch.nn.modules.batchnorm import _BatchNorm

from sn_openmmlab import SwitchNorm

CPU = torch.device('cpu')
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
