"""Names of modules in other code bases and in those of OpenMMLab."""

import pytest
import torch
from authors_models import FasterRCNNC4, ResNet
from mmengine.runner import CheckpointLoader

from sn_openmmlab.checkpoint import convert_checkpoint
from test_checkpoint.cases import backbone, save

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
    with pytest.raises(ValueError, match=f'have {shown!r} in front'):
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


@pytest.mark.parametrize(
    'names', [['backbone.bn1'], ['bn1', 'encoder.layer1.0'], ['stem.0'], ['neck.convs.0.bn', 'backbone.bn1']]
)
def test_names_that_models_have_stay(names):
    state = {f'{name}.running_mean': torch.ones(2) for name in names}
    assert set(convert_checkpoint(state)[1].mapped) == state.keys()
