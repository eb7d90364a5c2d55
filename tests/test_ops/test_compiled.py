"""torch.compile and activation checkpointing: one graph, for every batch and image size, equal to eager."""

import copy

import pytest
import torch
import torch.distributed as dist
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.utils.checkpoint import checkpoint

from sn_openmmlab import SwitchNorm
from sn_openmmlab.ops.torch_versions import VERSION

pytest.importorskip('torch._dynamo', reason='torch.compile came with torch 2')
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

one_graph = pytest.mark.skipif(VERSION < (2, 1), reason='torch 2.0 compiles SN in several graphs')
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


@pytest.mark.needs('mmdet')
@one_graph
@pytest.mark.skipif(VERSION == (2, 4), reason='torch 2.4 cuts a compiled ResNet of mmdet short, with BatchNorm too')
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


@pytest.mark.needs('mmdet')
@pytest.mark.slow
@one_graph
@pytest.mark.parametrize('training', [True, False])
def test_resnet18_under_inductor(training):
    eager = resnet18()
    eager.train(training)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True)
    for shape in SHAPES[:2]:
        assert_equal_steps(compiled, eager, torch.randn(shape))


@one_graph
@pytest.mark.parametrize('kwargs', [{}, dict(normalizers=('in', 'ln')), dict(momentum=None)], ids=str)
def test_the_layer_compiles_with_every_option(kwargs):
    eager = SwitchNorm(4, **kwargs)
    compiled = torch.compile(copy.deepcopy(eager), backend='aot_eager', fullgraph=True, dynamic=True)
    for shape in (2, 4), (3, 4, 5), (2, 4, 6, 6):
        assert_equal_steps(compiled, eager, torch.randn(shape))


# The operators that compiled layers keep, so that they run the kernels of eager ones


needs_operators = pytest.mark.skipif(VERSION < (2, 7), reason='before torch 2.7 compiled layers take the formula')


def step(net, x, dy):
    y = net(x)
    return [y, *torch.autograd.grad(y, [x, *net.parameters()], dy)]


@needs_operators
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    'kwargs', [{}, dict(normalizers=('in', 'ln')), dict(momentum=None), dict(affine=False)], ids=str
)
def test_compiled_kernels_are_the_eager_ones(kwargs, training):
    """To the bit, in one graph without a break."""
    eager = SwitchNorm(8, **kwargs).train(training)
    for p in eager.parameters():
        nn.init.normal_(p)
    net = copy.deepcopy(eager)
    compiled = torch.compile(net, backend='aot_eager', fullgraph=True, dynamic=True)
    for x in torch.randn(2, 8, 6, 5), torch.randn(3, 8, 7, 9).to(memory_format=torch.channels_last), torch.randn(4, 8):
        x.requires_grad_()
        dy = torch.randn(x.shape)
        assert all(map(torch.equal, step(compiled, x, dy), step(eager, x, dy)))
    for a, b in zip(net.buffers(), eager.buffers()):
        torch.testing.assert_close(a, b)


@needs_operators
@pytest.mark.parametrize('frozen', [True, False], ids=['frozen', 'batch'])
@pytest.mark.parametrize('shape', [(2, 8, 4, 4), (3, 8), (0, 8, 4, 4)], ids=str)
def test_operators_are_what_they_say(shape, frozen):
    from sn_openmmlab.ops.compiled import _backward, _forward, _switch_norm

    x, *parameters = (torch.randn(size).requires_grad_() for size in (shape, 3, 3, 8, 8))
    statistics = (torch.randn(8), torch.rand(8) + 0.5) if frozen else (None, None)
    arguments = x, *parameters, *statistics, 'in ln bn', 1e-5, frozen, None
    torch.library.opcheck(_switch_norm, arguments)
    y, kept = _switch_norm(*arguments)
    assert y.shape == shape and y.requires_grad and not kept.requires_grad
    with torch.no_grad():  # what is left of it when autograd has been
        for operator, given in (_forward, arguments), (_backward, (y, x, *parameters, kept, *arguments[-4:])):
            torch.library.opcheck(operator, given, test_utils=('test_schema', 'test_faketensor'))


@needs_operators
def test_what_runs_has_no_more_to_do_with_autograd():
    """Each dispatch to autograd's part of an operator would cost the host half as much as the layer."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    called = set()

    def read(graph, _):
        called.update(str(node.target) for node in graph.graph.nodes if 'sn_openmmlab' in str(node.target))
        return make_boxed_func(graph.forward)

    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    step(torch.compile(SwitchNorm(4), backend=aot_autograd(fw_compiler=read)), x, x.detach())
    assert called == {f'sn_openmmlab.switch_norm_{way}.default' for way in ('forward', 'backward')}


@needs_operators
def test_a_second_derivative_of_a_compiled_layer_is_refused():
    net, x = torch.compile(SwitchNorm(4), backend='eager'), torch.randn(2, 4, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match='a compiled switch_norm has no double backward'):
        torch.autograd.grad(net(x).square().sum(), x, create_graph=True)


TRANSFORMS = dict(
    grad=lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    second=lambda f, x: TRANSFORMS['grad'](lambda x: TRANSFORMS['grad'](f, x), x),
    jvp=lambda f, x: torch.func.jvp(f, (x,), (x.sin(),))[1],
    vmap=lambda f, x: torch.func.vmap(f)(torch.stack([x, x.sin()])),
)


@needs_operators
@pytest.mark.parametrize('name', TRANSFORMS)
def test_transforms_in_a_compiled_function_see_through_the_layer(name):
    """By the formula: an operator would give no forward derivatives, and none of second order."""
    net, x = SwitchNorm(4).eval(), torch.randn(2, 4, 3, 3)
    compiled = torch.compile(lambda x: TRANSFORMS[name](net, x), backend='aot_eager')
    torch.testing.assert_close(compiled(x), TRANSFORMS[name](net, x))


def compiled_step(sync):
    """Output, gradients and statistics of this process's half of a batch, or of all of it in one process."""
    x, dy = torch.randn(2, 4, 8, 5, 5, generator=torch.Generator().manual_seed(0)).unbind()
    if sync:
        x, dy = (t.chunk(2)[dist.get_rank()] for t in (x, dy))
    net = MODELS.build(dict(type='SyncSN' if sync else 'SN', num_features=8))
    compiled = torch.compile(net, backend='aot_eager', fullgraph=True)
    return [t.detach() for t in step(compiled, x.clone().requires_grad_(), dy)], list(net.buffers())


@needs_operators
def test_sync_sn_compiles(two):
    results, buffers = zip(*two(compiled_step, True))
    y, dx, *small = zip(*results)
    expected, expected_buffers = compiled_step(False)
    for got, exact in zip([torch.cat(y), torch.cat(dx), *map(sum, small)], expected):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
    for ours in buffers:
        torch.testing.assert_close(ours, expected_buffers)


@needs_operators
def test_the_formula_is_compiled_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv('SN_BACKEND', 'reference')
    net, x = SwitchNorm(8), torch.randn(2, 8, 5, 5)
    graphs = []
    torch.compile(net, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)(x)
    assert graphs and not any('switch_norm' in str(node.target) for node in graphs[0].graph.nodes)


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
