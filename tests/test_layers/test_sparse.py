"""SSN: the layer against the formula, and checkpoints; its ratios: test_ops/test_sparsestmax.py."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.fx
import torch.nn.functional as F
from mmengine.registry import MODELS
from test_ops.cases import POINTS, double
from torch import nn
from torch.autograd import gradcheck
from torch.nn.utils import stateless

from sn_openmmlab import SparseSwitchNorm, SwitchNorm, convert_switch_norm
from sn_openmmlab.ops import sparsestmax
from sn_openmmlab.ops.torch_versions import VERSION


def make(means='circle', variances=None, cls=SparseSwitchNorm, **kwargs):
    """A layer away from its start, with the ratios of one point for the means, and of another for the variances."""
    z, rho, _ = POINTS[means]
    layer = cls(4, **kwargs).double()
    layer.mean_weight.data = double(z)
    layer.var_weight.data = double(z if variances is None else POINTS[variances][0]).roll(1)
    layer.radius.fill_(rho)
    generator = torch.Generator().manual_seed(0)
    for p in layer.weight, layer.bias, layer.bn.running_mean:
        p.data.normal_(generator=generator)
    layer.bn.running_var.uniform_(0.5, 2, generator=generator)
    return layer


def formula(layer, x, z, v, weight):
    """The definition with ratios p in place of softmax, on any input of 4 dimensions."""
    p, q = sparsestmax(z, layer.radius), sparsestmax(v, layer.radius)
    moments = [torch.var_mean(x, axes, correction=0, keepdim=True) for axes in ((2, 3), (1, 2, 3), (0, 2, 3))]
    if not layer.bn.training:
        moments[2] = layer.bn.running_var.view(1, 4, 1, 1), layer.bn.running_mean.view(1, 4, 1, 1)
    mean = sum(a * m for a, (_, m) in zip(p, moments))
    var = sum(b * s for b, (s, _) in zip(q, moments))
    y = (x - mean) / (var + layer.eps).sqrt()
    return y * weight.view(1, 4, 1, 1) + layer.bias.view(1, 4, 1, 1)


functional_call = getattr(torch, 'func', stateless).functional_call  # before torch 2 it was there


def images(seed=1):
    return torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    'means, variances',
    [('inside', None), ('circle', None), ('edge', None), ('edge_of_the_circle', 'inside'), ('end', None)],
)
def test_layer_and_all_its_gradients_equal_the_formula(means, variances, training):
    layer = make(means, variances).train(training)
    x = images().requires_grad_()
    inputs = x, layer.mean_weight, layer.var_weight, layer.weight
    y, expected = layer(x), formula(layer, *inputs)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    dy = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y).cos()
    grads = torch.autograd.grad(y, inputs, dy)
    for grad, exact in zip(grads, torch.autograd.grad(expected, inputs, dy)):
        torch.testing.assert_close(grad, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('means', ['inside', 'circle', 'edge'])
def test_gradcheck(means):
    layer = make(means)

    def function(x, z, v):
        return functional_call(layer, dict(mean_weight=z, var_weight=v), (x,))

    z, v = (t.detach().clone().requires_grad_() for t in (layer.mean_weight, layer.var_weight))
    layer.bn.eval()  # statistics that stay
    assert gradcheck(function, (images()[:2, :, :2, :2].requires_grad_(), z, v))


def one_hot(mean, var=None):
    layer = make('end')
    layer.mean_weight.data, layer.var_weight.data = (
        F.one_hot(torch.tensor(k), 3).double() for k in (mean, mean if var is None else var)
    )
    return layer.eval()


def test_evaluation_computes_the_chosen_normalizer_only(monkeypatch):
    x, passed = images(), []
    from sn_openmmlab.layers import switch_norm as module

    monkeypatch.setattr(
        module, 'switch_norm', lambda *a, own=module.switch_norm, **k: (passed.append(k), own(*a, **k))[1]
    )
    norms = (
        lambda m: F.instance_norm(x, None, None, m.weight, m.bias),
        lambda m: F.group_norm(x, 1, m.weight, m.bias),
        lambda m: F.batch_norm(x, m.bn.running_mean, m.bn.running_var, m.weight, m.bias),
    )
    for k, norm in enumerate(norms):
        layer = one_hot(k)
        torch.testing.assert_close(layer(x), norm(layer), rtol=1e-10, atol=1e-10)
        assert not passed  # torch's own
        y = layer(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(y, norm(layer), rtol=1e-10, atol=1e-10)
        for shape in (0, 4, 7, 7), (1, 4, 1, 1), (3, 4):
            assert layer(torch.ones(shape, dtype=torch.float64)).isfinite().all()
        with pytest.raises(ValueError, match='has num_features=4, but the input'):
            layer(x[:, :2])
        passed, normalizers = [], [k['normalizers'] for k in passed]
        assert normalizers == [(('in', 'ln', 'bn')[k],)][: k < 2]
    layer = one_hot(2, 0)
    expected = formula(layer, x, layer.mean_weight, layer.var_weight, layer.weight)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    assert passed[-1]['normalizers'] == ('in', 'bn')
    layer.train()(x)
    assert passed[-1]['normalizers'] == ('in', 'ln', 'bn')


@pytest.mark.parametrize('affine', [True, False], ids=['affine', 'plain'])
@pytest.mark.parametrize(
    'normalizers, chosen',
    [
        (('in', 'ln', 'bn'), 0),
        (('in', 'ln', 'bn'), 1),
        (('in', 'ln', 'bn'), 2),
        (('in',), 0),
        (('ln',), 0),
        (('bn',), 0),
    ],
    ids=str,
)
@pytest.mark.parametrize('training', [True, False])
def test_logits_have_a_gradient_where_there_is_nothing_to_learn(training, normalizers, chosen, affine):
    """It is 0. DistributedDataParallel waits for one of every parameter, also of layers in evaluation mode."""
    ratios = F.one_hot(torch.tensor(chosen), len(normalizers)).tolist()
    layer = SparseSwitchNorm(4, affine=affine, normalizers=normalizers, init_ratios=ratios)
    layer.radius.fill_(1.0)
    y = layer.train(training)(images().float())
    y.square().mean().backward()
    assert layer.mean_weight.grad.eq(0).all() and layer.var_weight.grad.eq(0).all()
    layer.requires_grad_(False)
    torch.testing.assert_close(
        layer(images().float()), y
    )  # in training BN's batch moments, which do not depend on modes


def one_hot_in_ddp():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), one_hot(2).float(), nn.Conv2d(4, 4, 1), one_hot(0).float())
    model = nn.parallel.DistributedDataParallel(net)
    for _ in range(3):  # the second forward is where DDP finds what the first backward has missed
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_data_parallel_training_with_layers_in_evaluation_mode(two):
    two(one_hot_in_ddp)


def test_what_evaluation_computes_follows_modes_and_checkpoints():
    layer, other = one_hot(2), one_hot(0)
    state = other.state_dict()
    layer.bn.train()
    layer.load_state_dict(state)
    assert torch.equal(layer(images()), other(images()))
    assert layer.bn.training and not layer.training  # loading leaves modes alone
    layer.mean_weight.data.copy_(one_hot(1).mean_weight)
    assert torch.equal(layer.eval()(images()), make_like(layer)(images()))


def make_like(layer):
    other = one_hot(0)
    other.load_state_dict(layer.state_dict())
    return other


@pytest.mark.skipif(VERSION < (2, 1), reason='torch 2.0 compiles SN in several graphs')
@pytest.mark.parametrize('training', [True, False])
def test_compile(training):
    layer = make('circle').float().train(training)
    layer.momentum = 0.0
    x = images().float()
    y = layer(x)
    torch.testing.assert_close(torch.compile(layer, backend='eager', fullgraph=True)(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('training', [True, False])
def test_fx_and_half_precision(training):
    layer = make('circle').float().train(training)
    layer.momentum = 0.0
    x = images().float()
    y = layer(x)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(layer))(x), y)
    half = layer(x.bfloat16())  # the layer's own parameters stay float32, as under autocast
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0.05, atol=0.05)
    assert copy.deepcopy(layer).bfloat16()(x.bfloat16()).isfinite().all()
    chosen = one_hot(2).float()
    assert chosen(x.bfloat16()).dtype == torch.bfloat16


def test_half_precision_still_knows_the_end():
    layer = make('end').half()
    assert layer.importance_ratios.tolist() == [[0, 1, 0], [0, 0, 1]]


def synchronised():
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(make('circle', 'inside'))
    xs = images(1), images(2)
    y, whole = layer(xs[dist.get_rank()]), make('circle', 'inside')
    expected = whole(torch.cat(xs)).chunk(2)[dist.get_rank()]
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.bn.running_var, whole.bn.running_var, rtol=1e-10, atol=1e-10)


def test_synchronised_statistics(two):
    two(synchronised)


def test_starting_values():
    layer = MODELS.build(dict(type='SSN', num_features=4, init_ratios=(0.2, 0.3, 0.5)))
    assert isinstance(layer, SparseSwitchNorm) and layer.radius == 0
    torch.testing.assert_close(layer.importance_ratios, torch.tensor([[0.2, 0.3, 0.5]] * 2))
    layer.radius.fill_(1.0)
    layer.mean_weight.data.fill_(7)
    layer.reset_parameters()
    assert layer.radius == 0 and layer.importance_ratios[0, 2] == 0.5
    torch.testing.assert_close(SparseSwitchNorm(4).importance_ratios, torch.full((2, 3), 1 / 3))
    assert SparseSwitchNorm(4, normalizers=('in', 'ln'))(images().float()).shape == (3, 4, 5, 6)
    assert SparseSwitchNorm(4, device='meta').eval().radius.is_meta


def test_converted_models():
    net = convert_switch_norm(nn.Sequential(nn.BatchNorm2d(4)), to='SSN', init_ratios=(0, 0, 1))
    assert isinstance(net[0], SparseSwitchNorm)
    x = images().float()
    torch.testing.assert_close(net.eval()(x), nn.BatchNorm2d(4).eval()(x))
    assert type(convert_switch_norm(net, to='BN')[0]) is nn.BatchNorm2d


# -- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('strict', [True, False])
def test_a_checkpoint_of_sn_gives_its_ratios(strict):
    old, new, x = SwitchNorm(4, init_ratios=(0.2, 0.3, 0.5)), SparseSwitchNorm(4), images().float()
    old.var_weight.data = torch.tensor([3.0, -2.0, 0.5])
    new.radius.fill_(0.7)
    new.load_state_dict(old.state_dict(), strict=strict)
    torch.testing.assert_close(new.importance_ratios, old.importance_ratios)
    torch.testing.assert_close(new(x), old(x))


@pytest.mark.parametrize('point', ['circle', 'edge_of_the_circle', 'end'])
def test_a_checkpoint_of_ssn_gives_sn_its_ratios(point):
    old, new = nn.Sequential(make(point)), nn.Sequential(SwitchNorm(4).double())
    new.load_state_dict(old.state_dict(), strict=True)
    torch.testing.assert_close(new[0].importance_ratios, old[0].importance_ratios)
    torch.testing.assert_close(new.eval()(images()), old.eval()(images()), rtol=1e-10, atol=1e-10)


def test_checkpoints_of_ssn_and_batch_norm_load_strictly():
    layer, other = make('edge'), SparseSwitchNorm(4).double()
    other.load_state_dict(layer.state_dict(), strict=True)
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in other.state_dict().items())
    assert 'radius' in layer.state_dict()
    bn = nn.BatchNorm2d(4)
    bn(images().float())
    new = SparseSwitchNorm(4, init_ratios=(0.2, 0.3, 0.5))
    new.load_state_dict(bn.state_dict(), strict=True)
    assert torch.equal(new.bn.running_mean, bn.running_mean) and new.importance_ratios[0, 2] == 0.5
    with pytest.raises(RuntimeError, match='Missing key.*radius'):
        nn.Sequential(SparseSwitchNorm(4)).load_state_dict({}, strict=True)


@pytest.mark.parametrize('name', ['in', 'ln', 'bn'])
def test_one_normalizer_is_traced_with_logits_that_learn(name):
    """As the error of torch.jit.script advises; the check of the trace wants the same graph twice."""
    layer = SparseSwitchNorm(4, init_ratios=[float(name == other) for other in ('in', 'ln', 'bn')])
    layer.radius.fill_(1)
    x = images().float()
    traced = torch.jit.trace(layer.eval(), x)
    assert torch.equal(traced(x + 1), layer(x + 1))


@pytest.mark.parametrize('radius', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('training', [True, False])
def test_logits_that_are_no_numbers_are_not_hidden(training, radius):
    """A layer that has diverged must not look like IN alone."""
    logits = torch.tensor([float('nan'), 0.0, 1.0])
    assert sparsestmax(logits, radius).isnan().all()
    layer = SparseSwitchNorm(4)
    layer.radius.fill_(radius)
    layer.mean_weight.data.copy_(logits)
    assert layer.train(training)(images().float()).isnan().all()
    into_sn = SwitchNorm(4)
    into_sn.load_state_dict(layer.state_dict())
    assert into_sn.mean_weight.isnan().any()


def test_a_radius_that_is_no_number_is_not_hidden():
    assert sparsestmax(torch.tensor([0.2, 0.0, 1.0]), float('nan')).isnan().all()
    layer = SparseSwitchNorm(4)
    layer.radius.fill_(float('nan'))
    assert layer.eval()(images().float()).isnan().all()
