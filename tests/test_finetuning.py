"""Frozen statistics and parameters, over real training steps, on every backbone that has a switch for them."""

import copy

import pytest
import torch
from mmdet.models.backbones import Darknet
from mmengine.model import convert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sn_openmmlab import SwitchNorm

STAGE = dict(num_modules=1, block='BASIC')
HRNET = dict(
    stage1=dict(num_modules=1, num_branches=1, block='BOTTLENECK', num_blocks=(1,), num_channels=(8,)),
    stage2=dict(**STAGE, num_branches=2, num_blocks=(1, 1), num_channels=(4, 8)),
    stage3=dict(**STAGE, num_branches=3, num_blocks=(1, 1, 1), num_channels=(4, 8, 16)),
    stage4=dict(**STAGE, num_branches=4, num_blocks=(1, 1, 1, 1), num_channels=(4, 8, 16, 32)),
)
RESNET = dict(depth=18, base_channels=8, stem_channels=8)
UNET = dict(
    base_channels=4, num_stages=3, strides=(1, 1, 1), enc_num_convs=(2, 2, 2), dec_num_convs=(2, 2),
    downsamples=(True, True), enc_dilations=(1, 1, 1), dec_dilations=(1, 1),
)  # fmt: skip
CGNET = dict(num_channels=(8, 16, 32), num_blocks=(2, 2), reductions=(2, 4))

# frozen_stages and the norms that it freezes, None where the backbone has no such switch
BACKBONES = {
    'mmdet.ResNet': (RESNET, 1, ('bn1', 'layer1')),
    'mmdet.HRNet': (dict(extra=HRNET), None, ()),
    'mmdet.Darknet': ({}, 3, ('conv1', 'conv_res_block1', 'conv_res_block2')),
    'mmdet.CSPDarknet': (dict(widen_factor=0.125, deepen_factor=0.33), 1, ('stem', 'stage1')),
    'mmdet.CSPNeXt': (dict(widen_factor=0.125, deepen_factor=0.33), 1, ('stem', 'stage1')),
    'mmdet.MobileNetV2': (dict(widen_factor=0.25), 2, ('layer1', 'layer2')),
    'mmdet.EfficientNet': (dict(out_indices=(3, 4)), 2, ('layers.0', 'layers.1')),
    'mmdet.ResLayer': (dict(depth=50, stage=1), None, ()),
    'mmseg.ResNet': (dict(**RESNET, deep_stem=True), 1, ('stem', 'layer1')),
    'mmseg.HRNet': (dict(extra=HRNET), 2, ('bn1', 'bn2', 'layer1', 'transition1', 'stage2', 'transition2')),
    'mmseg.UNet': (UNET, None, ()),
    'mmseg.CGNet': (CGNET, None, ()),
    'mmseg.MobileNetV2': (dict(widen_factor=0.25), 2, ('layer1', 'layer2')),
    'mmseg.MobileNetV3': ({}, 2, ('layer0', 'layer1', 'layer2')),
}
# mmdet and mmseg freeze the parameters of MobileNetV2's stem and forget its statistics, BatchNorm's as SN's
PARAMETERS_ONLY = {'mmdet.MobileNetV2': {'conv1.bn'}, 'mmseg.MobileNetV2': {'conv1.bn'}}
SETTINGS = ['nothing', 'norm_eval', 'frozen_stages', 'requires_grad', 'all']
CASES = [
    (name, setting)
    for name, (_, stages, _) in BACKBONES.items()
    for setting in SETTINGS
    if setting != 'frozen_stages' or stages is not None
]


@pytest.fixture(autouse=True)
def small_darknet(monkeypatch):
    """Darknet-53 has no argument that makes it small."""
    slim = (1, 1, 1, 1, 1), ((32, 8), (8, 8), (8, 16), (16, 16), (16, 32))
    monkeypatch.setitem(Darknet.arch_settings, 53, slim)


def build(name, setting, norm='SN'):
    """The backbone in training, in float64, with parameters and statistics away from their start."""
    arguments, stages, _ = BACKBONES[name]
    norm_eval = setting in ('norm_eval', 'all')
    norm_cfg = dict(type=norm, requires_grad=setting not in ('requires_grad', 'all'))
    frozen = dict(frozen_stages=stages) if setting in ('frozen_stages', 'all') and stages is not None else {}
    init_default_scope(name.split('.')[0])
    torch.manual_seed(0)
    net = MODELS.build(dict(type=name, norm_cfg=norm_cfg, norm_eval=norm_eval, **frozen, **arguments)).double()
    for m in net.modules():
        if isinstance(m, SwitchNorm):
            for p in m.parameters():
                p.data.add_(torch.randn_like(p) * 0.3)
            m.bn.running_mean.normal_(0, 0.3)
            m.bn.running_var.uniform_(0.5, 2)
    net.train()
    return net


def expected_frozen(name, setting, layers):
    """Names of the norm layers whose statistics, and of those whose parameters, the setting says are frozen."""
    stages = BACKBONES[name][2] if setting in ('frozen_stages', 'all') else ()
    within = {n for n in layers if any(f'{n}.'.startswith(f'{stage}.') for stage in stages)}
    assert all(any(f'{n}.'.startswith(f'{stage}.') for n in layers) or 'transition' in stage for stage in stages)
    statistics = set(layers) if setting in ('norm_eval', 'all') else within
    forgotten = PARAMETERS_ONLY.get(name, set()) if stages else set()
    parameters = set(layers) if setting in ('requires_grad', 'all') else within | forgotten
    return statistics, parameters


def frozen_formula(layer, x):
    """IN and LN of the sample, BN of the running statistics."""
    w, v = layer.mean_weight.softmax(0), layer.var_weight.softmax(0)
    pixels = tuple(range(2, x.dim()))
    var_in, mean_in = torch.var_mean(x, pixels, correction=0, keepdim=True)
    var_ln, mean_ln = torch.var_mean(x, (1, *pixels), correction=0, keepdim=True)
    shape = (-1, *[1] * len(pixels))
    mean = w[0] * mean_in + w[1] * mean_ln + w[2] * layer.bn.running_mean.view(shape)
    var = v[0] * var_in + v[1] * var_ln + v[2] * layer.bn.running_var.view(shape)
    return (x - mean) / (var + layer.eps).sqrt() * layer.weight.view(shape) + layer.bias.view(shape)


@pytest.mark.parametrize('name, setting', CASES, ids=lambda v: v)
def test_over_training_steps(name, setting):
    net = build(name, setting)
    layers = {n: m for n, m in net.named_modules() if isinstance(m, SwitchNorm)}
    statistics, parameters = expected_frozen(name, setting, layers)
    assert layers and (setting != 'frozen_stages' or 0 < len(statistics) < len(layers))

    seen = {}
    for n, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, n=n: seen.update({n: [args[0].detach().clone()]}))
        layer.register_forward_hook(lambda _, args, y, n=n: seen[n].append(y.detach().clone()))
    optimizer = build_optim_wrapper(net, dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)))
    before = {n: t.detach().clone() for n, t in net.state_dict().items()}
    for step in range(2):
        layers_before = copy.deepcopy(layers)
        x = torch.randn(2, 256 if name == 'mmdet.ResLayer' else 3, 64, 64, dtype=torch.float64)
        out = net(x)
        outs = out if isinstance(out, (tuple, list)) else [out]
        optimizer.update_params(sum((y * torch.randn_like(y)).mean() for y in outs))
        for n in statistics:  # in every step, with the parameters of that step
            x, y = seen[n]
            torch.testing.assert_close(y, frozen_formula(layers_before[n], x), rtol=1e-7, atol=1e-7)
        assert set(seen) == set(layers), step

    moved = {n for n, t in net.state_dict().items() if not torch.equal(t, before[n])}
    for n in layers:
        buffers = {f'{n}.bn.{buffer}' for buffer in ('running_mean', 'running_var', 'num_batches_tracked')}
        own = {f'{n}.{p}' for p in ('weight', 'bias', 'mean_weight', 'var_weight')}
        assert buffers & moved == (set() if n in statistics else buffers), n
        assert own & moved == (set() if n in parameters else own), n
    # no gradient, no move; and everything else, the convolutions, learns unless its stage is frozen
    for n, p in net.named_parameters():
        assert (n in moved) == p.requires_grad, n
    if setting in ('nothing', 'norm_eval', 'requires_grad'):
        norms = {id(p) for layer in layers.values() for p in layer.parameters()}
        assert all(p.requires_grad for p in net.parameters() if id(p) not in norms)


@pytest.mark.parametrize('name, setting', [c for c in CASES if c[1] != 'nothing'], ids=lambda v: v)
def test_each_setting_freezes_what_it_freezes_of_batch_norm(name, setting):
    sn, bn = build(name, setting), build(name, setting, norm='BN')
    modes = {n: m.training for n, m in bn.named_modules() if isinstance(m, nn.BatchNorm2d)}
    layers = {n: m for n, m in sn.named_modules() if isinstance(m, SwitchNorm)}
    assert {n: m.bn.training for n, m in layers.items()} == modes
    learns = {n: p.requires_grad for n, p in bn.named_parameters()}
    own = {n: p.requires_grad for n, p in sn.named_parameters() if not n.endswith(('mean_weight', 'var_weight'))}
    assert own == learns
    for n, m in layers.items():
        assert {p.requires_grad for p in m.parameters()} == {learns[f'{n}.weight']}, n


@pytest.mark.parametrize('name', ['mmdet.EfficientNet', 'mmdet.ResLayer'])
def test_norm_eval_that_misses_converted_norms(name):
    """They look for BatchNorm2d only, which sync_bn='torch' replaces, of BatchNorm as of SN; SyncSN keeps one."""
    modes = {}
    for norm in 'SN', 'BN', 'SyncSN':
        net = build(name, 'norm_eval', norm)
        if norm != 'SyncSN':
            net = convert_sync_batchnorm(net)
        net.train()
        modes[norm] = {m.training for m in net.modules() if isinstance(m, _BatchNorm)}
    assert modes == dict(SN={True}, BN={True}, SyncSN={False})
