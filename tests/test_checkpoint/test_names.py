"""Names of modules in other code bases and in those of OpenMMLab."""

import re
from contextlib import nullcontext

import pytest
import torch
from authors_models import FasterRCNNC4, ResNet
from mmengine.runner import CheckpointLoader

from sn_openmmlab.checkpoint import convert_checkpoint
from sn_openmmlab.ops.torch_versions import VERSION
from test_checkpoint.cases import backbone, build, save

pytestmark = pytest.mark.usefixtures('seed')


@pytest.mark.parametrize('deep_stem', [False, True])
def test_mmpretrain_names(deep_stem):
    """mmpretrain is not installed here; its names of a stem of three are those of mmcv's ConvModule."""
    net = ResNet(18, deep_stem=deep_stem)
    state, report = convert_checkpoint(net.state_dict(), target='mmpretrain')
    assert not report.skipped and not report.missing and len(state) == len(net.state_dict())
    assert torch.equal(state['head.fc.weight'], net.fc.weight) and torch.equal(state['head.fc.bias'], net.fc.bias)
    stem = {key for key in state if key.startswith(('backbone.stem.', 'backbone.conv1.', 'backbone.bn1.'))}
    tensors = ['weight', 'bias', 'mean_weight', 'var_weight', 'bn.running_mean', 'bn.running_var']
    if deep_stem:
        places = [(f'backbone.stem.{i}.conv', f'backbone.stem.{i}.bn') for i in range(3)]
    else:
        places = [('backbone.conv1', 'backbone.bn1')]
    assert stem == {f'{c}.weight' for c, _ in places} | {f'{n}.{t}' for _, n in places for t in tensors}
    blocks = {f'backbone.{key}' for key in convert_checkpoint(net.state_dict())[0] if key.startswith('layer')}
    assert state.keys() - stem - {'head.fc.weight', 'head.fc.bias'} == blocks


def test_parts_that_mmdet_shares_or_has_not():
    state = FasterRCNNC4(classes=3).state_dict()
    state['Keypoint_Outs.classify.weight'] = torch.zeros(1)
    copies = {key.replace('Box_Head', 'Mask_Head'): value for key, value in state.items() if 'Box_Head' in key}
    new, report = convert_checkpoint({**state, **copies})
    reasons = {key: reason for key, reason in report.skipped.items()}
    assert reasons.keys() == copies.keys() | {'Keypoint_Outs.classify.weight'}
    assert 'keypoint' in reasons.pop('Keypoint_Outs.classify.weight') and 'again' in set(reasons.values()).pop()
    copies['Mask_Head.res5.1.sn2.bias'] = torch.ones(1, 512, 1, 1)
    with pytest.raises(ValueError, match='Mask_Head.res5.1.sn2 is not the box head'):
        convert_checkpoint({**state, **copies})


def test_names_for_mmpretrain_and_of_whole_models(resnet18):
    state = torch.load(resnet18[1])
    new, report = convert_checkpoint(state, target='mmpretrain')
    assert torch.equal(new['head.fc.bias'], state['fc.bias']) and 'backbone.layer1.0.bn1.bn.running_var' in new
    whole = {f'backbone.{key}': value for key, value in state.items() if not key.startswith('fc')}
    new, _ = convert_checkpoint(whole, target='mmpretrain')
    assert {key.replace('.bn.', '.') for key in new} == whole.keys()


@pytest.mark.parametrize('wrapper', ['module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'])
def test_what_wrappers_of_torch_put_in_front_goes(resnet18, wrapper):
    state = torch.load(resnet18[1])
    assert (
        convert_checkpoint({wrapper + key: value for key, value in state.items()})[0].keys()
        == convert_checkpoint(state)[0].keys()
    )
    inner = {key.replace('layer1.', 'layer1._orig_mod.'): value for key, value in state.items()}
    assert convert_checkpoint(inner)[0].keys() == convert_checkpoint(state)[0].keys()


@pytest.mark.parametrize('prefix', ['model.', 'model.backbone.', 'encoder_q.', 'student.', 'net.encoder.'])
def test_names_that_no_model_has_are_no_success(resnet18, prefix, command, tmp_path, capsys):
    """Refused with the remedies, all of which work."""
    state = {key: value for key, value in torch.load(resnet18[1]).items() if not key.startswith('fc')}
    foreign = {'module.' + prefix + key: value for key, value in state.items()}
    foreign['module.queue'] = torch.ones(1)
    path = save(foreign, tmp_path / 'foreign.pth')
    with pytest.raises(SystemExit):
        command(path, tmp_path / 'new.pth')
    shown = prefix if prefix != 'model.backbone.' else 'model.'
    assert f'--prefix {shown}' in ' '.join(capsys.readouterr().err.split()) and not (tmp_path / 'new.pth').exists()
    with pytest.raises(ValueError, match=f"have {shown!r} in front.* prefix='module.{shown[:-1]}'"):
        CheckpointLoader.load_checkpoint(f'switchnorm://{path}')
    command(path, tmp_path / 'new.pth', '--prefix', prefix)
    assert f'skipped queue: not under {prefix}' in capsys.readouterr().out
    assert torch.load(tmp_path / 'new.pth')['state_dict'].keys() >= convert_checkpoint(state)[0].keys()
    for same in prefix[:-1], f'module.{prefix}':
        assert (
            convert_checkpoint(foreign, prefix=same)[0].keys() == convert_checkpoint(foreign, prefix=prefix)[0].keys()
        )
    with pytest.raises(ValueError, match="none of its names begins with prefix='other.'; they are "):
        convert_checkpoint(foreign, prefix='other.')
    _, report = convert_checkpoint(foreign, prefix='')
    assert prefix + 'bn1.bn.running_mean' in report.mapped.values() and not report.skipped
    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix=f'module.{prefix}'[:-1])
    ours = backbone(depth=18, base_channels=8, init_cfg=init_cfg)
    ours.init_weights()
    assert torch.equal(ours.bn1.bn.running_mean, state['bn1.running_mean'])


BRANCHES = {
    f'stage{i}': dict(
        num_modules=1,
        num_branches=i,
        block='BOTTLENECK' if i == 1 else 'BASIC',
        num_blocks=(1,) * i,
        num_channels=(8, 16, 32, 64)[:i],
    )
    for i in (1, 2, 3, 4)
}
LAYERS_OF = dict(in_channels=3, depth=18, num_stages=4, out_indices=(0, 1, 2, 3), strides=(1, 2, 2, 2))
BACKBONES = {
    'mmdet.CSPDarknet': {}, 'mmdet.CSPNeXt': {}, 'mmdet.Darknet': {}, 'mmdet.DetectoRS_ResNet': dict(depth=50),
    'mmdet.DetectoRS_ResNeXt': dict(depth=50, groups=32), 'mmdet.EfficientNet': {}, 'mmdet.HourglassNet': {},
    'mmdet.HRNet': dict(extra=BRANCHES), 'mmdet.MobileNetV2': {}, 'mmdet.RegNet': dict(arch='regnetx_400mf'),
    'mmdet.Res2Net': dict(depth=50), 'mmdet.ResNeSt': dict(depth=50), 'mmdet.ResNet': dict(depth=18),
    'mmdet.ResNetV1d': dict(depth=50), 'mmdet.ResNeXt': dict(depth=50),
    'mmdet.TridentResNet': dict(depth=50, num_branch=3, test_branch_idx=1, trident_dilations=(1, 2, 3), num_stages=3,
                                strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,)),
    'mmseg.BiSeNetV1': dict(backbone_cfg=dict(type='ResNet', **LAYERS_OF)), 'mmseg.BiSeNetV2': {}, 'mmseg.CGNet': {},
    'mmseg.DDRNet': {}, 'mmseg.ERFNet': {}, 'mmseg.FastSCNN': {}, 'mmseg.HRNet': dict(extra=BRANCHES),
    'mmseg.ICNet': dict(backbone_cfg=dict(type='ResNetV1c', **LAYERS_OF)), 'mmseg.MobileNetV2': {},
    'mmseg.MobileNetV3': {}, 'mmseg.MSCAN': {}, 'mmseg.PIDNet': {}, 'mmseg.ResNet': dict(depth=18),
    'mmseg.ResNetV1c': dict(depth=50), 'mmseg.ResNeSt': dict(depth=50), 'mmseg.ResNeXt': dict(depth=50),
    'mmseg.STDCNet': dict(
        stdc_type='STDCNet1', in_channels=3, channels=(32, 64, 256, 512, 1024), bottleneck_type='cat', num_convs=4,
        norm_cfg=dict(type='BN'), act_cfg=dict(type='ReLU')),
    'mmseg.UNet': {},
}  # fmt: skip
FRONTS = [
    'model.', 'net.', 'network.', 'encoder.', 'net.encoder.', 'student.', 'teacher.', 'encoder_q.', 'model.module.',
    'ema.', 'online_network.', 'target_network.encoder.', '_forward_module.',
]  # fmt: skip


@pytest.mark.parametrize('kind', BACKBONES)
def test_real_backbones_pass_bare_and_are_refused_behind_other_names(kind):
    """By convert_checkpoint, whose advice leaves exactly the names of the backbone; also of one of several copies."""
    values_count = kind in ('mmdet.EfficientNet', 'mmseg.MSCAN')  # which compute their rates of dropout by torch
    with nullcontext() if values_count or VERSION < (2, 0) else torch.device('meta'):
        net = build(dict(type=kind, **BACKBONES[kind]), kind.split('.')[0])
    state = {key: torch.zeros(1) for key in net.state_dict() if key.endswith(('running_mean', 'weight'))}
    expected = convert_checkpoint(state)[0].keys()
    for usual in '', 'backbone.', 'module.', 'img_backbone.':
        _, report = convert_checkpoint({usual + key: value for key, value in state.items()})
        assert not report.skipped
    copies = ['encoder_q.', 'encoder_k.'], ['student.backbone.', 'teacher.backbone.']
    for fronts in [*([front] for front in FRONTS), *copies]:
        foreign = {front + key: value for front in fronts for key, value in state.items()}
        foreign['queue'] = torch.zeros(1)
        with pytest.raises(ValueError) as error:
            convert_checkpoint(foreign)
        advised = re.findall(r'--prefix (\w\S*)', str(error.value))
        assert advised == [front.replace('backbone.', '') for front in fronts]
        for prefix in fronts:
            assert convert_checkpoint(foreign, prefix=prefix)[0].keys() == expected


ADVICE = {
    'a sequence': (['encoder_q.0', 'encoder_q.1', 'encoder_q.4.0.bn1'], ['encoder_q.']),
    'with a projector': (['online_net.bn1', 'target_net.bn1', 'projector.1'], ['online_net.', 'target_net.']),
    'by numbers': (['model.0', 'model.1'], ['model.']),
    'ends in norms': (['model.encoder.norm1', 'model.encoder.norm2'], ['model.encoder.']),
    'a whole model': (['model.backbone.bn1', 'model.decode_head.convs.0.bn'], ['model.']),
    'a head': (['model.decode_head.convs.0.bn'], ['model.']),
    'CLIP': (['visual.bn1', 'visual.layer1.0.bn1', 'visual.layer2.0.bn1'], ['visual.']),
    'after normalizing': (['1.bn1', '1.layer1.0.bn1'], ['1.']),
}  # fmt: skip


@pytest.mark.parametrize('case', ADVICE)
def test_what_is_advised_for_names(case):
    """Never a prefix that leaves out part of a model."""
    norms, prefixes = ADVICE[case]
    with pytest.raises(ValueError) as error:
        convert_checkpoint({f'{norm}.running_mean': torch.zeros(1) for norm in norms})
    assert re.findall(r'--prefix (\w\S*)', str(error.value)) == prefixes


@pytest.mark.parametrize(
    'names',
    [
        ['backbone.bn1'],
        ['bn1', 'encoder.layer1.0'],
        ['stem.0'],
        ['neck.convs.0.bn', 'backbone.bn1'],
        ['a.layer2.tree1.bn1', 'a.layer3.bn1', 'level0.1'],  # one model of many parts
        ['base_layer.1', 'level0.1', 'level2.tree1.bn1', 'level5.tree1.tree1.bn1'],  # timm's dla34
        ['timm_model.bn1', 'timm_model.layer1.0.bn1'],  # timm in mmseg
        ['backbone.bn1', 'neck.0.bn', 'encoder_k.module.0.bn1'],  # MoCo in mmpretrain
        ['encoder.0.bn1', 'decoder.0.bn1'],
        ['model'],
    ],
)
def test_names_that_models_have_stay(names):
    state = {f'{name}.running_mean': torch.ones(2) for name in names}
    assert set(convert_checkpoint(state)[1].mapped) == state.keys()
