"""torch.compile and activation checkpointing: one graph, for every batch and image size, equal to eager."""

import copy

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.utils.checkpoint import checkpoint

from sn_openmmlab import SwitchNorm

pytest.importorskip('torch._dynamo', reason='torch.compile came with torch 2')
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

SHAPES = [(2, 3, 64, 80), (3, 3, 96, 64), (4, 3, 48, 112)]  # dynamo takes sizes that are equal at first for one size


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Last(nn.Module):
    """A backbone's last feature map: one output, no tuple."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)[-1]


def resnet18():
    init_default_scope('mmdet')
    net = MODELS.build(dict(type='mmdet.ResNet', depth=18, base_channels=16, norm_cfg=dict(type='SN'), norm_eval=False))
    return Last(net)


def assert_equal_steps(compiled, eager, x):
    outputs = []
    for net in compiled, eager:
        net.zero_grad()
        y = net(x)
        if y.requires_grad:
            y.square().mean().backward()
        outputs.append(y)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for (name, a), (_, b) in zip(compiled.named_parameters(), eager.named_parameters()):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)
    for a, b in zip(compiled.buffers(), eager.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('training', [True, False])
def test_resnet18_is_one_graph_for_all_sizes(training):
    eager = resnet18()
    eager.train(training)
    net = copy.deepcopy(eager)
    counter = CompileCounterWithBackend('eager')
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
    for shape in SHAPES:
        assert_equal_steps(compiled, eager, torch.randn(shape))
    assert counter.frame_count == 1  # neither a graph break nor a recompilation


@pytest.mark.slow
@pytest.mark.parametrize('training', [True, False])
def test_resnet18_under_inductor(training):
    eager = resnet18()
    eager.train(training)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True)
    for shape in SHAPES[:2]:
        assert_equal_steps(compiled, eager, torch.randn(shape))


@pytest.mark.parametrize('kwargs', [{}, dict(normalizers=('in', 'ln')), dict(momentum=None)], ids=str)
def test_the_layer_compiles_with_every_option(kwargs):
    eager = SwitchNorm(4, **kwargs)
    compiled = torch.compile(copy.deepcopy(eager), backend='aot_eager', fullgraph=True, dynamic=True)
    for shape in (2, 4), (3, 4, 5), (2, 4, 6, 6):
        assert_equal_steps(compiled, eager, torch.randn(shape))


def test_activation_checkpointing_gives_the_same_gradients():
    """As for BatchNorm, the second forward pass updates the statistics a second time."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), SwitchNorm(4), nn.ReLU())
    other = copy.deepcopy(net)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    net(x).square().mean().backward()
    checkpoint(other, x, use_reentrant=False).square().mean().backward()
    for a, b in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    assert net[1].bn.num_batches_tracked == 1 and other[1].bn.num_batches_tracked == 2
