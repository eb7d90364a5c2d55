"""Conversion of built models: the same function with all importance on BN, and everything in its place."""

import copy
import inspect
import re

import pytest
import torch
import torch.distributed as dist
from mmcv.ops import SyncBatchNorm as MMSyncBN
from mmengine.registry import MODELS
from support import Said, randomized, relative_error
from torch import nn
from torch.nn.utils import parametrize, prune

from sn_openmmlab import SwitchNorm, SwitchNorm1d, SwitchNorm3d, SyncSN, convert_switch_norm, fold_batch_norm
from sn_openmmlab.ops.torch_versions import VERSION

BN_ONLY = (0, 0, 1)
runs_sync_bn = pytest.mark.skipif(VERSION < (2, 0), reason='SyncBatchNorm of torch 1.13 refuses the CPU')


def resnet():
    torch.manual_seed(0)
    return randomized(MODELS.build(dict(type='mmdet.ResNet', depth=18, base_channels=16, stem_channels=16)))


@pytest.mark.parametrize('mode', ['train', 'eval', 'frozen'])
def test_one_hot_on_bn_is_the_same_function(mode):
    old = resnet()
    old.norm_eval = mode == 'frozen'
    old.train(mode != 'eval')
    new = convert_switch_norm(copy.deepcopy(old), init_ratios=BN_ONLY)
    assert sum(isinstance(m, SwitchNorm) for m in new.modules()) == 20
    x = torch.randn(3, 3, 64, 64)
    a, b = old(x), new(x)
    for i, j in zip(a, b):
        assert relative_error(j, i) < 1e-5
    sum(i.square().mean() for i in a).backward()
    sum(j.square().mean() for j in b).backward()
    gradients = dict(old.named_parameters())
    for name, p in new.named_parameters():
        if not name.endswith(('mean_weight', 'var_weight')) and gradients[name].grad is not None:
            assert relative_error(p.grad, gradients[name].grad) < 1e-3, name
    for name, layer in old.named_modules():  # the statistics go on as BatchNorm's would
        if isinstance(layer, nn.BatchNorm2d):
            bn = new.get_submodule(name).bn
            torch.testing.assert_close(bn.running_mean, layer.running_mean)
            torch.testing.assert_close(bn.running_var, layer.running_var)
            assert bn.num_batches_tracked == layer.num_batches_tracked == 7 + (mode == 'train')


@pytest.mark.parametrize(
    'old, new, shape',
    [
        (nn.BatchNorm1d(6, eps=1e-3, momentum=0.3), SwitchNorm1d, (4, 6)),
        (nn.BatchNorm1d(6), SwitchNorm1d, (4, 6, 5)),
        (nn.BatchNorm2d(6, momentum=None), SwitchNorm, (4, 6, 5, 5)),
        (nn.BatchNorm3d(6, affine=False), SwitchNorm3d, (4, 6, 3, 3, 3)),
        pytest.param(nn.SyncBatchNorm(6), SwitchNorm, (4, 6, 5, 5), marks=runs_sync_bn),
    ],
)
@pytest.mark.parametrize('training', [True, False])
def test_every_batch_norm(old, new, shape, training):
    model = nn.Sequential(randomized(copy.deepcopy(old))).train(training)
    converted = convert_switch_norm(model, init_ratios=BN_ONLY, inplace=False)
    assert type(converted[0]) is new and type(model[0]) is type(old)
    x = torch.randn(shape) * 2 + 1
    assert relative_error(converted(x), model(x)) < 1e-5
    assert converted[0].momentum == old.momentum and converted[0].eps == old.eps


@pytest.mark.parametrize('old', [nn.GroupNorm(2, 6, eps=1e-3), nn.InstanceNorm2d(6, affine=True)])
def test_group_and_instance_norm_keep_weight_and_shift(old):
    model = nn.Sequential(randomized(old))
    converted = convert_switch_norm(model, inplace=False)[0]
    assert torch.equal(converted.weight, old.weight) and torch.equal(converted.bias, old.bias)
    assert converted.eps == old.eps
    assert torch.equal(converted.bn.running_mean, torch.zeros(6)) and torch.equal(
        converted.bn.running_var, torch.ones(6)
    )


def test_instance_norm_is_the_ratio_of_in():
    model, x = nn.Sequential(nn.InstanceNorm2d(6)), torch.randn(2, 6, 5, 5)
    assert relative_error(convert_switch_norm(model, init_ratios=(1, 0, 0), inplace=False)(x), model(x)) < 1e-5


def test_mmcvs_sync_bn():
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)  # it asks for one when it is made
    try:
        for to, kind in ('SN', SwitchNorm), ('SyncSN', SyncSN):
            old = randomized(MMSyncBN(6, momentum=0.2))
            new = convert_switch_norm(nn.Sequential(old), to)[0]
            assert type(new) is kind and new.momentum == 0.2
            assert torch.equal(new.weight, old.weight) and torch.equal(new.bn.running_var, old.running_var)
    finally:
        dist.destroy_process_group()


def test_parameters_modes_and_dtype_stay():
    model = nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.GroupNorm(2, 6)).double()
    model[0].eval()
    model[1].requires_grad_(False)
    parameters = [p for m in model for p in (m.weight, m.bias)]
    assert convert_switch_norm(model) is model
    assert [p for m in model for p in (m.weight, m.bias)] == parameters  # the same objects
    assert not model[0].bn.training and model[1].bn.training
    assert {p.requires_grad for p in model[1].parameters()} == {False}
    assert {p.requires_grad for p in model[2].parameters()} == {True}
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_shared_layer_stays_shared_and_sn_is_left_alone():
    norm, own = nn.BatchNorm2d(6), SwitchNorm(6)
    model = nn.ModuleDict(dict(a=norm, b=nn.Sequential(norm), own=own, ln=nn.LayerNorm(6)))
    model.second = norm
    statistics = own.bn
    convert_switch_norm(model)
    assert model['a'] is model['b'][0] is model.second and isinstance(model['a'], SwitchNorm)
    assert model['own'] is own and own.bn is statistics and isinstance(model['ln'], nn.LayerNorm)


def test_a_model_that_is_itself_a_norm():
    assert isinstance(convert_switch_norm(nn.BatchNorm2d(6)), SwitchNorm)


@pytest.mark.parametrize('to', ['SN', 'SyncSN'])
def test_there_and_back(to):
    model = randomized(
        nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4, affine=False), nn.SyncBatchNorm(4))
    )
    model[1].eval()
    sn = convert_switch_norm(model, to, init_ratios=BN_ONLY, inplace=False)
    back = convert_switch_norm(sn, 'BN', inplace=False)
    kinds = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.BatchNorm2d] if to == 'SN' else [nn.SyncBatchNorm] * 4
    assert [type(m) for m in back] == kinds
    assert all(isinstance(m, SwitchNorm) for m in sn)
    assert [m.training for m in back] == [True, False, True, True]
    states = model.state_dict(), back.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_layers_that_are_no_batch_norm_are_named():
    model = nn.ModuleDict(
        dict(a=SwitchNorm(4, init_ratios=BN_ONLY), b=SwitchNorm(4), c=SwitchNorm(4, normalizers='in'))
    )
    with pytest.raises(ValueError, match=r'2 of 3 SN layers.*: b \(in/ln/bn 0\.333 0\.333 0\.333; .*\), c \(in 1; 1\)'):
        convert_switch_norm(model, 'BN')
    assert all(isinstance(m, SwitchNorm) for m in model.values())


@pytest.mark.parametrize(
    'model, kwargs, message',
    [
        (nn.Sequential(nn.BatchNorm2d(4)), dict(to='LN'), "'SN', 'SyncSN', 'SSN' or 'BN', got 'LN'"),
        (nn.Sequential(nn.BatchNorm2d(4)), dict(to='BN', init_ratios=BN_ONLY), 'leave it out'),
        (nn.Sequential(nn.BatchNorm2d(4)), dict(init_ratios=(1, 1, 1)), 'sum to 1'),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4, track_running_stats=False)), {}, 'track_running_stats=False.*: 1$'),
        (nn.Sequential(nn.ReLU(), nn.LazyBatchNorm2d()), {}, 'first forward: 1$'),
    ],
)
def test_errors(model, kwargs, message):
    before = [type(m) for m in model]
    with pytest.raises(ValueError, match=message):
        convert_switch_norm(model, **kwargs)
    assert [type(m) for m in model] == before


# -- layers that were changed after they were built ----------------------------------------------------------------


def replace_forward(layer):
    layer.forward = lambda x: type(layer).forward(layer, x).relu()


class Doubling(nn.Module):
    def forward(self, weight):
        return 2 * weight


ADDITIONS = {
    'forward hook': (lambda m: m.register_forward_hook(lambda m, a, y: y.relu()), '_forward_hooks'),
    'forward pre-hook': (lambda m: m.register_forward_pre_hook(lambda m, a: (a[0] + 1,)), '_forward_pre_hooks'),
    'backward hook': (lambda m: m.register_full_backward_hook(lambda m, a, b: None), '_backward_hooks'),
    'hook of the state': (lambda m: m._register_state_dict_hook(lambda m, state, *_: None), '_state_dict_hooks'),
    'hook of loading': (
        lambda m: m._register_load_state_dict_pre_hook(lambda *_: None), '_load_state_dict_pre_hooks'
    ),
    'forward': (replace_forward, 'forward'),
    'buffer': (lambda m: m.register_buffer('scale', torch.ones(6)), 'scale'),
    'prune': (lambda m: prune.l1_unstructured(m, 'weight', amount=0.5), 'weight_orig'),
    'weight_norm': (lambda m: nn.utils.weight_norm(m, dim=None), 'weight_g'),
    'parametrization': (lambda m: parametrize.register_parametrization(m, 'weight', Doubling()), 'Parametrized'),
    'child': (lambda m: m.add_module('more', nn.ReLU()), '1 ('),
}  # fmt: skip
CHANGED = {
    'BN': (lambda: nn.BatchNorm2d(6), 'SN'),
    'GN': (lambda: nn.GroupNorm(2, 6), 'SyncSN'),
    'IN': (lambda: nn.InstanceNorm2d(6, affine=True), 'SSN'),
    'timm': (lambda: BatchNormAct2d(6), 'SN'),
    'SN': (lambda: SwitchNorm(6, init_ratios=BN_ONLY), 'BN'),
    'timm to SN': (lambda: convert_switch_norm(BatchNormAct2d(6), init_ratios=BN_ONLY), 'BN'),
    'SN to BN': (lambda: convert_switch_norm(SwitchNorm(6, init_ratios=BN_ONLY), 'BN'), 'SN'),
}


@pytest.mark.parametrize('inplace', [True, False])
@pytest.mark.parametrize('addition', ADDITIONS)
@pytest.mark.parametrize('kind', CHANGED)
def test_what_was_added_to_a_layer_is_no_silent_loss(kind, addition, inplace):
    """Refused by name before anything changes, also of the layers that could be converted."""
    make, to = CHANGED[kind]
    add, name = ADDITIONS[addition]
    model = nn.Sequential(make(), make(), make())
    add(model[1])
    layers, state = [*model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='(hooks, methods or tensors were added|replace them by hand)') as error:
        convert_switch_norm(model, to, inplace=inplace)
    assert ' 1 (' in str(error.value) and name in str(error.value) and ' 2 (' not in str(error.value)
    assert [*model.modules()] == layers and model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('addition', [name for name in ADDITIONS if 'forward ' in name or 'backward' in name])
def test_a_hook_on_the_child_is_no_silent_loss(addition):
    """It runs around the layer's computation."""
    add, name = ADDITIONS[addition]
    model = nn.Sequential(SwitchNorm(6, init_ratios=BN_ONLY), SwitchNorm(6, init_ratios=BN_ONLY))
    handle = add(model[1].bn)
    with pytest.raises(ValueError, match=rf'added to these layers.*: 1 \(bn\.{name}\); take them away'):
        convert_switch_norm(model, 'BN')
    handle.remove()
    assert type(convert_switch_norm(model, 'BN')[1]) is nn.BatchNorm2d


@pytest.mark.parametrize('base, to', [(nn.BatchNorm2d, 'SN'), (SwitchNorm, 'BN')])
@pytest.mark.parametrize('method', ['forward', '__call__'])
def test_a_class_that_is_called_in_another_way_is_refused_by_name(base, to, method):
    own = type('Own', (base,), {method: lambda self, x: getattr(base, method)(self, x).relu()})
    layer = own(6, **(dict(init_ratios=BN_ONLY) if to == 'BN' else {}))
    with pytest.raises(ValueError, match=r'__call__ of their own.*: a \(Own\); replace'):
        convert_switch_norm(nn.ModuleDict(dict(a=layer)), to)


def test_the_remedy_works():
    """Taken away and added to the new layer, a hook and a mask mean what they did."""
    model = nn.Sequential(randomized(nn.BatchNorm2d(6))).eval()
    handle = model[0].register_forward_hook(lambda m, a, y: y.relu())
    prune.l1_unstructured(model[0], 'weight', amount=0.5)
    x = torch.randn(2, 6, 5, 5)
    expected = model(x)
    handle.remove()
    prune.remove(model[0], 'weight')
    convert_switch_norm(model, init_ratios=BN_ONLY)[0].register_forward_hook(lambda m, a, y: y.relu())
    assert relative_error(model(x), expected) < 1e-5


def no_tracking(layer):
    layer.track_running_stats = False


def no_statistics(layer):
    layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None  # as TENT does


def no_count(layer):
    layer.num_batches_tracked = None


def no_affine(layer):
    layer.weight = layer.bias = None


def no_weight(layer):
    layer.weight = None


def run(layer, x):
    """Outputs of three calls, in training, evaluation and training mode, and the statistics after them."""
    outputs = [layer.train(mode)(x + mode) for mode in (True, False, True)]
    bn = getattr(layer, 'bn', layer)
    return [*outputs, *(v for v in (bn.running_mean, bn.running_var, bn.num_batches_tracked) if v is not None)]


@pytest.mark.parametrize('change', [no_tracking, no_count, no_affine, no_weight])
def test_a_changed_batch_norm_stays_what_it_is(change):
    old = randomized(nn.BatchNorm2d(6))
    change(old)
    new = convert_switch_norm(copy.deepcopy(old), init_ratios=BN_ONLY)
    back = convert_switch_norm(copy.deepcopy(new), 'BN')
    x = torch.randn(4, 6, 5, 5)
    expected = run(old, x)
    for layer in new, back:
        torch.testing.assert_close(run(layer, x), expected, rtol=1e-4, atol=1e-5)
        assert getattr(layer, 'bn', layer).track_running_stats == old.track_running_stats


@pytest.mark.parametrize('change', [no_tracking, no_statistics, no_count])
def test_a_changed_child_goes_back_as_what_it_is(change):
    old = randomized(SwitchNorm(6, init_ratios=BN_ONLY))
    change(old.bn)
    back = convert_switch_norm(copy.deepcopy(old), 'BN')
    x = torch.randn(4, 6, 5, 5)
    torch.testing.assert_close(run(back, x), run(old, x), rtol=1e-4, atol=1e-5)


def test_a_batch_norm_that_lost_its_statistics_is_refused_by_name():
    layer = nn.BatchNorm2d(6)
    no_statistics(layer)
    with pytest.raises(ValueError, match='keep no running statistics.*: a$'):
        convert_switch_norm(nn.ModuleDict(dict(a=layer)))


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's, which timm.utils.freeze puts in place of each BatchNorm2d."""

    def __init__(self, bn):
        super().__init__()
        self.eps = bn.eps
        for name, value in dict(weight=torch.ones(6), bias=torch.zeros(6), **dict(bn.named_buffers())).items():
            if name != 'num_batches_tracked':
                self.register_buffer(name, value.clone())


def test_a_frozen_child():
    """No BatchNorm stays frozen in training mode; in evaluation it is one, and is folded."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), randomized(SwitchNorm(6, init_ratios=BN_ONLY))).eval()
    x = torch.randn(2, 3, 7, 7)
    expected = model(x)
    model[1].bn = FrozenBatchNorm2d(model[1].bn).eval()
    with pytest.raises(ValueError, match=r'stay in training mode.*: 1 \(FrozenBatchNorm2d\); undo it first'):
        convert_switch_norm(model, 'BN')
    assert fold_batch_norm(model, x) == 1 and relative_error(model(x), expected) < 1e-5


@pytest.mark.parametrize(
    'layers, words',
    [
        ([FrozenBatchNorm2d(nn.BatchNorm2d(6))], 'frozen by their class: 1 FrozenBatchNorm2d.'),
        ([FrozenBatchNorm2d(nn.BatchNorm2d(6)), nn.BatchNorm2d(6)], 'frozen by their class: 1 FrozenBatchNorm2d.'),
        ([nn.LayerNorm(6), nn.LayerNorm(6), nn.ReLU()], 'changes nothing: .* but 2 LayerNorm.'),
        ([nn.ReLU()], 'changes nothing: .* but no norm at all.'),
        ([nn.LayerNorm(6), nn.BatchNorm2d(6)], None),
        ([nn.LayerNorm(6), SwitchNorm(6)], None),
        ([SwitchNorm(6, init_ratios=BN_ONLY)], None),
    ],
)
def test_what_stays_is_told(layers, words):
    model = nn.Sequential(*copy.deepcopy(layers))
    if isinstance(model[0], SwitchNorm):
        model[0].bn = FrozenBatchNorm2d(model[0].bn)  # of an SN layer, which is not converted
    said = Said()
    said.listen()
    convert_switch_norm(model)
    warned = [line for line in said.lines if line.startswith('convert_switch_norm')]
    assert len(warned) == (words is not None) and all(re.search(words, line) for line in warned)


# -- norms of other libraries, which do more --------------------------------------------------------------------------

BASES = {
    nn.BatchNorm1d: (6,), nn.BatchNorm2d: (6,), nn.BatchNorm3d: (6,), nn.SyncBatchNorm: (6,),
    nn.InstanceNorm1d: (6,), nn.InstanceNorm2d: (6,), nn.InstanceNorm3d: (6,), nn.GroupNorm: (2, 6), MMSyncBN: (6,),
}  # fmt: skip


@pytest.fixture
def group():
    """mmcv's SyncBatchNorm asks for one when it is made."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('base', BASES)
@pytest.mark.parametrize('kind', ['forward', 'child'])
def test_a_class_that_does_more_than_its_base_is_refused_by_name(base, kind, group):
    class Own(base):
        if kind == 'forward':

            def forward(self, x):
                return super().forward(x).relu()

    layer = Own(*BASES[base])
    if kind == 'child':
        layer.act = nn.ReLU()
    model = nn.Sequential(nn.ReLU(), layer)
    with pytest.raises(ValueError, match=r'children, or are of classes with a forward .*: 1 \(Own\); replace'):
        convert_switch_norm(model)
    assert model[1] is layer


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: it normalizes, drops and activates. timm imports torchvision, whose wheel on PyPI is for CUDA."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.drop, self.act = nn.Dropout(0.5), nn.PReLU(num_features)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


BatchNormAct2d.__module__ = 'timm.layers.norm_act'


@pytest.mark.parametrize('to', ['SN', pytest.param('SyncSN', marks=runs_sync_bn), 'SSN'])
@pytest.mark.parametrize('training', [False, True])
def test_timms_activations_stay(to, training):
    """To SN and back, through deepcopy, and folded; the same keys, so that checkpoints of timm's still fit."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), randomized(BatchNormAct2d(6)), nn.Conv2d(6, 6, 1)).train(training)
    x = torch.randn(4, 3, 5, 5)

    def output(net):
        torch.manual_seed(1)  # of the dropout
        return copy.deepcopy(net)(x)

    expected = output(model)
    converted = convert_switch_norm(model, to, init_ratios=BN_ONLY, inplace=False)
    assert isinstance(converted[1], SwitchNorm) and converted[1].act.weight.shape == (6,)
    assert relative_error(output(converted), expected) < 1e-5
    assert {'1.weight', '1.bias', '1.act.weight', '1.bn.running_mean'} <= converted.state_dict().keys()
    back = convert_switch_norm(converted, 'BN', inplace=False)
    assert relative_error(output(back), expected) < 1e-5
    again = convert_switch_norm(back, init_ratios=BN_ONLY)
    assert isinstance(again[1], SwitchNorm) and relative_error(output(again), expected) < 1e-5
    if not training:
        assert fold_batch_norm(converted, x) == 1 and relative_error(output(converted), expected) < 1e-5


@pytest.mark.parametrize('name', ['efficientnet_b0', 'resnetv2_50', 'densenet121', 'mobilenetv3_small_050'])
def test_models_of_timm(name):
    timm = pytest.importorskip(
        'timm', reason='timm imports torchvision, whose wheel on PyPI does not load without CUDA'
    )
    torch.manual_seed(0)
    model = randomized(timm.create_model(name)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert relative_error(convert_switch_norm(model, init_ratios=BN_ONLY)(x), expected) < 1e-4


@pytest.mark.parametrize('base', BASES)
def test_a_layer_without_a_bias(base, group):
    """Its function stays, and nothing learns that did not."""
    if 'bias' not in inspect.signature(base.__init__).parameters:
        pytest.skip(f'{base.__name__} always has one here')
    layer = base(*BASES[base], bias=False, **({} if base is nn.GroupNorm else dict(affine=True)))
    model = nn.Sequential(randomized(layer)).eval()
    x = torch.randn(2, 6, *[5] * (3 if '3d' in base.__name__ else 1 if '1d' in base.__name__ else 2))
    converted = convert_switch_norm(model, init_ratios=BN_ONLY, inplace=False)
    assert converted[0].bias.tolist() == [0] * 6 and not converted[0].bias.requires_grad
    assert torch.equal(converted[0].weight, layer.weight) and converted[0].weight.requires_grad
    y = converted(x)
    if hasattr(layer, 'running_mean') and layer.running_mean is not None:
        assert relative_error(y, model(x)) < 1e-5


@pytest.mark.parametrize('rank', [1, 2, 3])
def test_an_instance_norm_with_running_statistics_is_refused(rank):
    """In evaluation it is a BatchNorm, in training none."""
    layer = getattr(nn, f'InstanceNorm{rank}d')(4, track_running_stats=True)
    with pytest.raises(ValueError, match='InstanceNorms keep running statistics.*: a$'):
        convert_switch_norm(nn.ModuleDict(dict(a=layer)))
