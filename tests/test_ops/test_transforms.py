"""Tensors that are no plain memory, and transforms that have to see each operation: right, or a clear error.

Forward and backward, beside GroupNorm where it has the same duty. What once ended the process runs in one of its own.
"""

import json
import re
import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sn_openmmlab import SwitchNorm, switch_norm

TwoTensor = pytest.importorskip('torch.testing._internal.two_tensor', reason='came with torch 2.1').TwoTensor

CLOSE = dict(rtol=1e-4, atol=1e-5)
BACKENDS = ['native', None]  # None: the C++ passes, where the installation could compile them


@pytest.fixture(autouse=True, params=BACKENDS, ids=['native', 'default'])
def backend(request, monkeypatch):
    torch.manual_seed(0)
    if request.param is None:
        monkeypatch.delenv('SN_BACKEND', raising=False)
    else:
        monkeypatch.setenv('SN_BACKEND', request.param)


def norm(kind, training):
    """A norm away from its start, whose statistics no forward moves."""
    layer = nn.GroupNorm(1, 3) if kind == 'GN' else SwitchNorm(3, momentum=0.0)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer.train(training)


each_norm = pytest.mark.parametrize('kind', ['GN', 'SN'])
each_mode = pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])


def images():
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)) * 2 + 1


def directions(k=4):
    return torch.randn(k, 2, 3, 4, 5, generator=torch.Generator().manual_seed(2))


# -- transforms of the backward ---------------------------------------------------------------------------------------


@each_norm
@each_mode
def test_batched_backward(kind, training):
    layer, x = norm(kind, training), images().requires_grad_()
    inputs, y = [x, *layer.parameters()], layer(x)
    got = torch.autograd.grad(y, inputs, directions(), is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, inputs, v, retain_graph=True) for v in directions()]
    for a, b in zip(got, map(torch.stack, zip(*each))):
        torch.testing.assert_close(a, b, **CLOSE)


@each_norm
@each_mode
@pytest.mark.parametrize('strategy', ['reverse-mode', 'forward-mode'])
def test_vectorized_jacobian(kind, training, strategy):
    layer, x = norm(kind, training), images()[:1]
    got = torch.autograd.functional.jacobian(layer, x, vectorize=True, strategy=strategy)
    torch.testing.assert_close(got, torch.autograd.functional.jacobian(layer, x), **CLOSE)


@each_norm
@each_mode
@pytest.mark.parametrize('grad', [True, False], ids=['grad', 'no_grad'])
def test_forward_mode(kind, training, grad):
    """Without gradients the tangent used to be lost, without a word."""
    layer, x, v = norm(kind, training), images(), directions(1)[0]
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))).tangent
    step = 1e-3
    double = norm(kind, training).double()
    double.load_state_dict(layer.state_dict())
    with torch.no_grad():
        ends = [double(x.double() + sign * step * v.double()) for sign in (1, -1)]
    torch.testing.assert_close(tangent.double(), (ends[0] - ends[1]) / (2 * step), rtol=1e-3, atol=1e-3)


@each_norm
@each_mode
def test_torch_func(kind, training):
    if training and kind == 'SN':
        pytest.skip('moves its running statistics in place, which torch.func refuses of BatchNorm too')
    layer, x, v = norm(kind, training), images(), directions(1)[0]
    y, pull = torch.func.vjp(layer, x)
    (dx,) = pull(v)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(dx, torch.autograd.grad(layer(leaf), leaf, v)[0], **CLOSE)
    _, tangent = torch.func.jvp(layer, (x,), (v,))
    torch.testing.assert_close((tangent * v).sum(), (dx * v).sum(), rtol=1e-3, atol=1e-3)


@each_mode
def test_make_fx_records_operations(training):
    layer = norm('SN', training)
    graph = make_fx(layer)(images())
    other = images() * 3 - 1
    torch.testing.assert_close(graph(other), layer(other), **CLOSE)


# -- gradients that are not written out -------------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize('batch', [2, 0])
def test_zero_tensor_as_gradient(training, batch):
    """Which autograd makes where nothing arrives; torch's own GroupNorm takes one for garbage."""
    layer, x = norm('SN', training), images()[:batch].requires_grad_()
    grads = torch.autograd.grad(layer(x), [x, *layer.parameters()], torch._efficientzerotensor(x.shape))
    assert not any(g.any() for g in grads)


@each_norm
@each_mode
def test_negated_views(kind, training):
    layer, x, v = norm(kind, training), images().requires_grad_(), directions(1)[0]
    torch.testing.assert_close(layer(torch._neg_view(x)), layer(-x))
    for a, b in zip(
        torch.autograd.grad(layer(x), [x, *layer.parameters()], torch._neg_view(v)),
        torch.autograd.grad(layer(x), [x, *layer.parameters()], -v),
    ):
        torch.testing.assert_close(a, b, **CLOSE)


PARAMETERS = 'mean_weight', 'var_weight', 'weight', 'bias', 'running_mean', 'running_var'


def arguments():
    sizes = (3, 3, 3, 3, 3, 3)
    generator = torch.Generator().manual_seed(3)
    args = {name: torch.rand(size, generator=generator) + 0.5 for name, size in zip(PARAMETERS, sizes)}
    return dict(x=images(), **args)


@pytest.mark.parametrize('change', [torch._neg_view, lambda t: TwoTensor(t, t)], ids=['negated view', 'subclass'])
@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters_that_are_no_plain_memory_count(name, change):
    args = arguments()
    got = switch_norm(**{**args, name: change(args[name])})
    got = got.a if isinstance(got, TwoTensor) else got
    expected = switch_norm(**{**args, name: -args[name] if change is torch._neg_view else args[name]})
    torch.testing.assert_close(got, expected, equal_nan=True, **CLOSE)  # the root of a negated variance


# -- other devices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters_on_another_device_are_named(name):
    args = arguments()
    with pytest.raises(ValueError, match=rf'{name} is on meta and the input on cpu; move one, e.g. by layer.to'):
        switch_norm(**{**args, name: args[name].to('meta')})


def test_input_on_another_device_is_named():
    with pytest.raises(ValueError, match='mean_weight is on cpu and the input on meta'):
        switch_norm(**{**arguments(), 'x': images().to('meta')})
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert SwitchNorm(3)(torch.empty(2, 3, 4, 5)).shape == (2, 3, 4, 5)


DIED = {  # what ended the process once, and what it has to print
    'a layer on meta': ("SwitchNorm(8, device='meta')(x)", 'is on meta and the input on cpu'),
    'assigned to a model on meta': (
        "bn = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict(); meta = torch.device('meta')\n"
        'with meta: model = nn.Sequential(nn.Conv2d(3, 8, 3), SwitchNorm(8))\n'
        'model.load_state_dict(bn, assign=True); print(model(torch.randn(2, 3, 8, 8)).isfinite().all())',
        r'tensor\(True\)',
    ),
    'DTensor': (
        'import torch.distributed as dist; from torch.distributed.tensor import distribute_module\n'
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "layer = distribute_module(SwitchNorm(8), dist.device_mesh.init_device_mesh('cpu', (1,))); layer(x)",
        'mixed torch.Tensor and DTensor|does not have a sharding strategy',  # before torch 2.11
    ),
    'a real input among fake tensors': (
        'from torch._subclasses import FakeTensorMode; layer = SwitchNorm(8).eval()\n'
        'with FakeTensorMode(allow_non_fake_inputs=True): print(type(layer(x)).__name__)',
        'FakeTensor',
    ),
    **{
        f'freed {name}': (f'layer = SwitchNorm(8); free({name}); layer(x)', r'has no memory: it was freed')
        for name in ('x', 'layer.weight', 'layer.mean_weight', 'layer.bn.running_mean', 'layer.bn.num_batches_tracked')
    },
    'x freed before backward': (
        'y = SwitchNorm(8)(x.requires_grad_()).sum(); free(x); y.backward()',
        'x, of shape .* has no memory',
    ),
    'weight freed before backward': (
        'layer = SwitchNorm(8); y = layer(x).sum(); free(layer.weight); y.backward()',
        'weight, of shape .* has no memory',
    ),
    'x freed before a double backward': (
        'y = SwitchNorm(8)(x.requires_grad_()).sum(); free(x); torch.autograd.grad(y, x, create_graph=True)',
        'x, of shape .* has no memory',
    ),
    'a freed gradient': (
        'y = SwitchNorm(8)(x.requires_grad_()); dy = torch.ones_like(y); free(dy); y.backward(dy)',
        'the gradient of the output, of shape .* has no memory',
    ),
}
PROCESS = """
import json, sys, torch
from torch import nn
from sn_openmmlab import SwitchNorm
def free(t): (t.untyped_storage() if hasattr(t, 'untyped_storage') else t.storage()).resize_(0)  # as FSDP does
for case, code in json.loads(sys.argv[1]).items():
    print(f'-- {case}', flush=True)
    try:
        exec(code, dict(globals(), x=torch.randn(2, 8, 5, 5)))
    except Exception as error:
        print(error, flush=True)
"""


def test_no_process_dies():
    codes = json.dumps({case: code for case, (code, _) in DIED.items()})
    done = subprocess.run([sys.executable, '-c', PROCESS, codes], capture_output=True, text=True)
    said = dict(text.split('\n', 1) for text in re.split('^-- ', done.stdout, flags=re.M)[1:])
    assert done.returncode == 0, f'it ended with {done.returncode} in {[*said][-1:]}: {done.stderr}'
    for case, (_, expected) in DIED.items():
        assert re.search(expected, said[case]), (case, done.stderr)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_layer_on_a_gpu_and_an_input_on_the_cpu():
    with pytest.raises(ValueError, match='is on cuda:0 and the input on cpu'):
        SwitchNorm(3).cuda()(images())
