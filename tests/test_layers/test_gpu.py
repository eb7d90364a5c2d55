"""The layer on a GPU, as a user's training has it. All of it needs one."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sn_openmmlab import SwitchNorm, SyncSN, convert_switch_norm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')


def network(norm=SwitchNorm):
    """A small one with maps of several sizes."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), norm(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), norm(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def batch(device='cpu'):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 33, 28, generator=generator).to(device), torch.arange(8).to(device)


def step(net, x, target):
    net.zero_grad()
    loss = nn.functional.cross_entropy(net(x), target)
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters()), *(b.clone() for b in net.buffers())]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """cuDNN's convolutions in full float32, so that the devices can be compared."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_a_layer_that_moves_to_the_gpu_and_back_computes_the_same(mode):
    net = network().train()
    for _ in range(2):
        step(net, *batch())
    getattr(net, mode)()
    expected = step(copy.deepcopy(net), *batch())
    found = step(copy.deepcopy(net).cuda(), *batch('cuda'))
    back = step(copy.deepcopy(net).cuda().cpu(), *batch())
    for a, b, c in zip(found, expected, back):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(c, b)


def losses(dtype):
    """Of 20 steps."""
    net, (x, target) = network().cuda(), batch('cuda')
    optimizer, scaler = torch.optim.SGD(net.parameters(), 0.1), torch.amp.GradScaler('cuda', init_scale=1024)
    found = []
    for _ in range(20):
        with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
            loss = nn.functional.cross_entropy(net(x), target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(loss.item())
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in net.parameters())
    return found


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_mixed_precision_trains_as_single_precision(dtype):
    exact, found = losses(torch.float32), losses(dtype)
    assert exact[-1] < exact[0] - 0.2
    assert found == pytest.approx(exact, rel=0.02)


def test_channels_last_is_the_same_network():
    net, (x, target) = network().cuda(), batch('cuda')
    other = copy.deepcopy(net).to(memory_format=torch.channels_last)
    for a, b in zip(step(other, x.to(memory_format=torch.channels_last), target), step(net, x, target)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_batch_norm_network_answers_as_before_when_converted():
    net = network(nn.BatchNorm2d).cuda()
    for _ in range(20):
        step(net, *batch('cuda'))
    net.eval()
    converted = convert_switch_norm(copy.deepcopy(net))
    assert sum(isinstance(m, SwitchNorm) for m in converted.modules()) == 2
    x = batch('cuda')[0]
    torch.testing.assert_close(converted(x), net(x), rtol=0.02, atol=0.02)


def synchronised_step(kwargs):
    """This process's part of a batch on the GPU that all share, through gloo."""
    x, target = (t.chunk(2)[dist.get_rank()] for t in batch('cuda'))
    net = network(lambda channels: SyncSN(channels, **kwargs)).cuda()
    return [t.cpu() for t in step(net, x, target)]


@pytest.mark.parametrize('kwargs', [{}, dict(normalizers=('ln', 'bn'))], ids=str)
def test_synchronised_statistics_are_those_of_the_whole_batch(two, kwargs):
    torch.backends.cudnn.allow_tf32 = False
    first, second = two(synchronised_step, kwargs)
    net = network(lambda channels: SwitchNorm(channels, **kwargs)).cuda()
    expected = [t.cpu() for t in step(net, *batch('cuda'))]
    learned = 1 + len(list(net.parameters()))
    for a, b, whole in zip(first[:learned], second[:learned], expected[:learned]):
        torch.testing.assert_close((a + b) / 2, whole, rtol=1e-2, atol=1e-4)
    for a, b, whole in zip(first[learned:], second[learned:], expected[learned:]):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, whole, rtol=1e-3, atol=1e-4)
