"""Checkpoints of the authors' networks (authors_models.py) in models of OpenMMLab: the outputs must be the same.

The authors' variance over the pixels is unbiased, this project's is not, and no checkpoint can mend that. The networks
here have the biased one, so that all else can be held to float64; one test states what the difference comes to.
"""

import argparse
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from authors_models import C1, PPM, SN, FasterRCNNC4, MaskRCNN, ResNet, dilate
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint
from support import CONFIGS, TOOLS, Intruder, Said, can_be_saved
from torch import nn

from sn_openmmlab import SwitchNorm
from sn_openmmlab.checkpoint import convert_checkpoint
from sn_openmmlab.checkpoint.read import read_checkpoints_as_data, read_state_dict
from sn_openmmlab.ops.torch_versions import VERSION
from test_checkpoint.cases import SN_CFG, backbone, build, save

pytestmark = pytest.mark.usefixtures('seed')
STRIDE_8 = dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), contract_dilation=True)


def same(ours, theirs):
    ours, theirs = [x if isinstance(x, (list, tuple)) else [x] for x in (ours, theirs)]
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert b.std() > 1e-3  # else anything is the same
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def evaluated(model):
    """The model in float64 and evaluation mode, if all logits came from a checkpoint."""
    layers = [m for m in model.modules() if isinstance(m, SwitchNorm)]
    assert layers and not any(torch.equal(m.mean_weight, torch.ones_like(m.mean_weight)) for m in layers)
    model.double().eval()  # mmdet's backbones return nothing
    return model


def load_all(model, state):
    """Load so that every tensor of the model is in the dict, and nothing else."""
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and all(key.endswith('num_batches_tracked') for key in result.missing_keys)
    return evaluated(model)


# -- ImageNet ResNets -----------------------------------------------------------------------------------------------


class TestResNet:
    @pytest.fixture(scope='class')
    def theirs(self, tmp_path_factory):
        """A checkpoint as the authors' training code writes it."""
        torch.manual_seed(0)
        net = ResNet(50, width=8).float()
        state = OrderedDict((f'module.{key}', value.clone()) for key, value in net.state_dict().items())
        assert {tuple(state[f'module.layer1.0.sn1.{name}'].shape) for name in ('weight', 'bias')} == {(1, 8, 1, 1)}
        assert {'module.layer1.0.downsample.1.running_var', 'module.fc.bias'} <= state.keys()
        path = tmp_path_factory.mktemp('theirs') / 'resnet50.pth'
        return net.double(), save(dict(step=7, state_dict=state, best_prec1=0.5), path)

    def test_mmdet_loads_what_the_command_wrote(self, theirs, command, tmp_path, capsys):
        net, path = theirs
        command(path, tmp_path / 'new.pth', '--to', 'mmdet')
        out = capsys.readouterr().out
        assert f'{len(net.state_dict()) - 2} keys mapped, 2 skipped, 0 missing' in out
        assert 'skipped fc.weight, fc.bias: the classifier' in out
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        ours = load_all(backbone(base_channels=8), torch.load(tmp_path / 'new.pth')['state_dict'])
        with torch.no_grad():
            same(ours(x), net(x))

    @pytest.mark.parametrize('way', ['mmdet init_cfg', 'mmseg pretrained', 'file as mmseg pretrained'])
    def test_config_names_it(self, theirs, way, command, tmp_path):
        net, path = theirs
        x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
        address = f'switchnorm://{path}'
        if way.startswith('file'):
            command(path, tmp_path / 'new.pth', '--to', 'mmseg')
            address = str(tmp_path / 'new.pth')
        said = Said()
        if way == 'mmdet init_cfg':
            model = backbone(base_channels=8, init_cfg=dict(type='Pretrained', checkpoint=address))
        else:
            model = segmentor(FCN, pretrained=address, width=8)
            net = dilate(ResNet(50, width=8))
            net.load_state_dict(theirs[0].state_dict())
        said.listen()
        model.init_weights()
        said = '\n'.join(said.lines)
        assert 'unexpected key' not in said and not re.search(r'missing keys in source', said)
        assert ('371 keys mapped, 2 skipped' in said) == (not way.startswith('file'))
        model = evaluated(getattr(model, 'backbone', model))
        with torch.no_grad():
            same(model(x), net(x))

    @pytest.mark.parametrize(
        'options, kind, ours',
        [
            (dict(with_bn=False), 'mmdet.ResNet', dict(norm_cfg=dict(type='SN', normalizers=('in', 'ln')))),
            (dict(depth=50, caffe=True), 'mmdet.ResNet', dict(style='caffe')),
            (dict(deep_stem=True), 'mmseg.ResNetV1c', dict(stem_channels=128)),
            (dict(deep_stem=True), 'mmdet.ResNet', dict(deep_stem=True, stem_channels=128)),
        ],
        ids=['(8, 1)', 'caffe', 'mmseg deep stem', 'mmdet deep stem'],
    )
    def test_variants(self, options, kind, ours):
        options = {'depth': 18, **options}
        net = ResNet(fc=False, **options)
        state, report = convert_checkpoint(net.state_dict(), target=kind.split('.')[0])
        assert len(report.mapped) == len(net.state_dict()) and not report.skipped and not report.missing
        notes = '\n'.join(report.notes)
        assert ("normalizers=('in', 'ln')" in notes) == ('with_bn' in options)
        assert ('stem_channels=128' in notes) == ('deep_stem' in options)
        ours = load_all(backbone(kind, options['depth'], **ours), state)
        x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
        with torch.no_grad():
            same(ours(x), net(x))

    def test_their_unbiased_variance_stays_a_small_difference(self, monkeypatch):
        """0.7 % of the last features of a 128 x 128 image (4 x 4 pixels), 0.03 % of a 512 x 512 one."""
        net = ResNet(18, fc=False)
        ours = load_all(backbone(depth=18), convert_checkpoint(net.state_dict())[0])
        errors = {}
        for size in 128, 512:
            x = torch.randn(1, 3, size, size, dtype=torch.float64)
            monkeypatch.setattr(SN, 'unbiased', True)
            with torch.no_grad():
                errors[size] = [((a - b).norm() / b.norm()).item() for a, b in zip(ours(x), net(x))]
        assert 5e-3 < errors[128][3] < 1e-2 and 2e-4 < errors[512][3] < 5e-4
        assert all(large < small / 8 for large, small in zip(errors[512], errors[128]))

    def test_pre_activation_is_refused(self):
        """ResNet v2: of each convolution's input channels is the norm before it."""
        net = ResNet(18)
        for number in range(1, 5):
            for block in getattr(net, f'layer{number}'):
                block.sn1, block.sn2 = SN(block.conv1.in_channels), SN(block.conv2.in_channels)
        with pytest.raises(ValueError, match='layer2.0.sn1 has 64 channels .* ResNet v2'):
            convert_checkpoint(net.state_dict())


# -- segmentation ---------------------------------------------------------------------------------------------------

HEAD = dict(num_classes=7, norm_cfg=SN_CFG, align_corners=False, loss_decode=dict(type='CrossEntropyLoss'))
FCN = dict(HEAD, type='FCNHead', num_convs=1, concat_input=False, channels=32)
PSP = dict(HEAD, type='PSPHead', channels=16)


def segmentor(head, pretrained=None, width=64):
    model = dict(
        type='EncoderDecoder',
        pretrained=pretrained,
        backbone=dict(type='ResNet', depth=50, norm_cfg=SN_CFG, base_channels=width, stem_channels=width, **STRIDE_8),
        decode_head=dict(head, in_channels=32 * width, in_index=3),
        auxiliary_head=dict(FCN, in_channels=16 * width, in_index=2),
    )
    return build(Config(dict(model=model)).model, 'mmseg')


class TestSegmentation:
    @pytest.fixture(params=[(C1, FCN), (PPM, PSP)], ids=['C1', 'PPM'])
    def theirs(self, request, tmp_path):
        decoder, head = request.param
        encoder, decoder = dilate(ResNet(50, fc=False, width=8)), decoder(256, 7)
        save(encoder.state_dict(), tmp_path / 'encoder_epoch_20.pth')
        save(decoder.state_dict(), tmp_path / 'decoder_epoch_20.pth')
        return encoder, decoder, segmentor(head, width=8)

    def check(self, theirs):
        encoder, decoder, ours = theirs
        x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
        with torch.no_grad():
            features = encoder(x)
            expected = decoder(features)
            features = evaluated(ours).extract_feat(x)
            same([ours.decode_head(features), ours.auxiliary_head(features)], expected)

    def test_both_files_become_one_checkpoint(self, theirs, command, tmp_path, capsys):
        command(tmp_path / 'encoder_epoch_20.pth', tmp_path / 'decoder_epoch_20.pth', tmp_path / 'whole.pth')
        assert '0 skipped, 0 missing' in capsys.readouterr().out
        load_all(theirs[2], torch.load(tmp_path / 'whole.pth')['state_dict'])
        self.check(theirs)

    def test_config_names_both(self, theirs, tmp_path):
        """The encoder as ``pretrained``, the decoder as ``load_from``."""
        model = theirs[2]
        model.backbone.init_cfg = dict(type='Pretrained', checkpoint=f'switchnorm://{tmp_path}/encoder_epoch_20.pth')
        runner = Runner(
            model=model,
            work_dir=str(tmp_path),
            load_from=f'switchnorm://{tmp_path}/decoder_epoch_20.pth',
            default_scope='mmseg',
            experiment_name=tmp_path.name,
        )
        runner._init_model_weights()
        runner.load_or_resume()
        self.check(theirs)


# -- detectors ------------------------------------------------------------------------------------------------------


def detector(name, **changes):
    config = Config.fromfile(CONFIGS / f'mmdet/sn/{name}_r50_fpn_sn-all_2x_coco.py')
    config.model.backbone.init_cfg = None
    config.merge_from_dict(changes)
    return build(config.model)


def last_class_first(scores):
    """mmdet's scores with the background where Detectron has it."""
    return torch.cat([scores[:, -1:], scores[:, :-1]], 1)


class TestDetectors:
    @pytest.fixture(scope='class')
    def theirs(self):
        torch.manual_seed(0)
        return MaskRCNN().float().double()

    def check_fpn(self, theirs, ours):
        x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
        with torch.no_grad():
            pyramid = ours.neck(ours.backbone(x))
            same(pyramid, theirs.Conv_Body(x)[::-1])
            same(ours.rpn_head.forward_single(pyramid[0]), theirs.rpn(pyramid[0]))
            rois = torch.randn(3, 256, 7, 7, dtype=torch.float64)
            scores, deltas = ours.roi_head.bbox_head(rois)
            their_scores, their_deltas = theirs.boxes(rois)
            same([last_class_first(scores), deltas], [their_scores, their_deltas[:, 4:]])

    @pytest.mark.parametrize('way', ['command', 'load_from'])
    def test_mask_rcnn(self, theirs, way, command, tmp_path):
        """81 classes, SN everywhere; each of the tensors has its place."""
        content = dict(step=1, model=theirs.float().state_dict(), optimizer=dict(lr=0.1))
        path = save(content, tmp_path / 'model_step1.pth')
        theirs.double()
        ours = detector('mask-rcnn')
        if way == 'command':
            command(path, tmp_path / 'new.pth', '--from', 'detectron', '--to', 'mmdet')
            load_all(ours, torch.load(tmp_path / 'new.pth')['state_dict'])
        else:
            runner = Runner(
                model=ours,
                work_dir=str(tmp_path),
                load_from=f'switchnorm://{path}',
                default_scope='mmdet',
                experiment_name=tmp_path.name,
            )
            runner.load_or_resume()
            evaluated(ours)
        self.check_fpn(theirs, ours)
        rois = torch.randn(2, 256, 14, 14, dtype=torch.float64)
        with torch.no_grad():
            same(ours.roi_head.mask_head(rois), theirs.masks(rois)[:, 1:])

    def test_faster_rcnn_with_two_layers_and_sn_in_the_backbone_only(self):
        theirs = MaskRCNN(sn=False)
        state, report = convert_checkpoint(theirs.state_dict())
        assert len(report.mapped) == len(theirs.state_dict()) and not report.missing
        head = dict(type='Shared2FCBBoxHead', norm_cfg=None)
        ours = detector('faster-rcnn', **{'model.neck.norm_cfg': None, 'model.roi_head.bbox_head': head})
        self.check_fpn(theirs, load_all(ours, state))

    def test_c4(self):
        """Without pyramid: res5 is the box head; two scores an anchor become mmdet's one."""
        theirs = FasterRCNNC4()
        state, report = convert_checkpoint(theirs.state_dict())
        assert len(report.mapped) == len(theirs.state_dict()) and not report.missing
        ours = load_all(build(c4_config()), state)
        x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
        rois = torch.randn(2, 1024, 14, 14, dtype=torch.float64)
        with torch.no_grad():
            features = ours.backbone(x)
            same(features, theirs.Conv_Body(x)[-1:])
            scores = ours.rpn_head.forward_single(features[0])[0].sigmoid()
            same(scores, theirs.objectness(features[0]))
            scores, deltas = ours.roi_head.bbox_head(ours.roi_head.shared_head(rois))
            their_scores, their_deltas = theirs.boxes(rois)
            same([last_class_first(scores), deltas], [their_scores, their_deltas[:, 4:]])

    def test_class_agnostic_predictors_stay(self, theirs):
        state = theirs.state_dict()
        for name, outputs in ('Box_Outs.bbox_pred', 4), ('Mask_Outs.classify', 1):
            state.update({f'{name}.{t}': state[f'{name}.{t}'][:outputs] for t in ('weight', 'bias')})
        new, report = convert_checkpoint(state)
        assert torch.equal(new['roi_head.bbox_head.fc_reg.weight'], state['Box_Outs.bbox_pred.weight'])
        notes = ' '.join(report.notes)
        assert 'bbox_head.reg_class_agnostic=True' in notes and 'mask_head.class_agnostic=True' in notes
        state['Box_Outs.bbox_pred.bias'] = state['Box_Outs.bbox_pred.bias'].repeat(2)
        state['Box_Outs.bbox_pred.weight'] = state['Box_Outs.bbox_pred.weight'].repeat(2, 1)
        with pytest.raises(ValueError, match='fc_reg would have 8 outputs for 81 classes, not 324'):
            convert_checkpoint(state)

    def test_folded_batch_norm_is_noted(self, theirs):
        """SN heads on a backbone with frozen BatchNorm, which Detectron stores as scale and shift."""
        state = {}
        for key, value in theirs.state_dict().items():
            if '.conv_body.' not in key or not re.search(r'sn\d\.|downsample\.1\.', key):
                state[key] = value
            elif key.endswith(('.weight', '.bias')):
                state[key.replace('.sn', '.bn')] = value.reshape(-1)
        new, report = convert_checkpoint(state)
        assert len(new) == len(state) and not report.missing
        assert 'BatchNorm folded' in ' '.join(report.notes)
        ours = detector('mask-rcnn', **{'model.backbone.norm_cfg': dict(type='BN', requires_grad=False)})
        result = ours.load_state_dict(new, strict=False)
        assert not result.unexpected_keys and all('running_' in key or 'tracked' in key for key in result.missing_keys)


def c4_config():
    import mmdet

    path = Path(mmdet.__file__).parent / '.mim/configs/_base_/models/faster-rcnn_r50-caffe-c4.py'
    config = Config.fromfile(path).model
    for part in config.backbone, config.roi_head.shared_head:
        part.norm_cfg, part.init_cfg = SN_CFG, None
    return config


# -- BatchNorm ------------------------------------------------------------------------------------------------------


class TestBatchNorm:
    def test_ratios_are_stored(self, resnet18, command, tmp_path):
        net, path = resnet18
        command('--init-ratios', 0, 0, 1, path, tmp_path / 'new.pth')
        command('--init-ratios', 1 / 3, 1 / 3, 1 / 3, path, tmp_path / 'equal.pth')
        state = torch.load(tmp_path / 'new.pth')['state_dict']
        ours = backbone(depth=18, base_channels=8)
        ours.load_state_dict(state)
        x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
        with torch.no_grad():
            ours.double().eval(), net.double().eval()
            same(ours(x), net(x))
        ours.load_state_dict(torch.load(tmp_path / 'equal.pth')['state_dict'])
        for layer in ours.modules():
            if isinstance(layer, SwitchNorm):
                torch.testing.assert_close(layer.importance_ratios, torch.full((2, 3), 1 / 3))
        direct = backbone(depth=18, base_channels=8, norm_cfg=dict(SN_CFG, init_ratios=(1 / 3, 1 / 3, 1 / 3)))
        direct.load_state_dict(net.state_dict())  # weights are corrected alike
        for name, value in direct.state_dict().items():
            torch.testing.assert_close(ours.float().state_dict()[name], value)

    def test_without_ratios_layers_start_near_batch_norm(self, resnet18, command, tmp_path):
        net, path = resnet18
        command(path, tmp_path / 'new.pth')
        state = torch.load(tmp_path / 'new.pth')['state_dict']
        assert not any(key.endswith('mean_weight') for key in state)
        ours, direct = backbone(depth=18, base_channels=8), backbone(depth=18, base_channels=8)
        ours.load_state_dict(state)
        direct.load_state_dict(net.state_dict())
        torch.testing.assert_close(ours.bn1.importance_ratios, torch.tensor([[0.001, 0.001, 0.998]] * 2))
        assert all(torch.equal(value, direct.state_dict()[name]) for name, value in ours.state_dict().items())

    def test_by_the_scheme_the_models_own_ratios_stay(self, resnet18):
        _, path = resnet18
        init_cfg = dict(type='Pretrained', checkpoint=f'switchnorm://{path}')
        ours = backbone(
            depth=18, base_channels=8, norm_cfg=dict(SN_CFG, init_ratios=(0.2, 0.3, 0.5)), init_cfg=init_cfg
        )
        ours.init_weights()
        torch.testing.assert_close(ours.bn1.importance_ratios[0], torch.tensor([0.2, 0.3, 0.5]))
        assert torch.equal(ours.bn1.bn.running_mean, torch.load(path)['bn1.running_mean'])

    def test_the_description_of_the_data_stays(self, resnet18, command, tmp_path):
        """Else a detector of blood cells names what it finds as COCO does; the rest describes a BatchNorm model."""
        colours = np.array([[0, 0, 0], [1, 2, 3]])
        data = dict(dataset_meta=dict(classes=('RBC', 'WBC'), palette=colours), CLASSES=('RBC', 'WBC'))
        path = save(
            dict(state_dict=torch.load(resnet18[1]), meta=dict(data, cfg='BN', epoch=3)), tmp_path / 'whole.pth'
        )
        command(path, tmp_path / 'new.pth')
        loaded = [
            torch.load(tmp_path / 'new.pth', weights_only=False)['meta'],  # our own
            CheckpointLoader.load_checkpoint(f'switchnorm://{path}')['meta'],
        ]
        for meta in loaded:
            assert meta['dataset_meta']['classes'] == meta['CLASSES'] == ('RBC', 'WBC')
            assert np.array_equal(meta['dataset_meta']['palette'], colours)
            assert not {'cfg', 'epoch', 'PALETTE'} & meta.keys()

    def test_a_command_line_beside_the_weights_is_data(self, resnet18, command, tmp_path):
        """As torchvision, DETR and DeiT save it. What SN layers advise for such a file works."""
        content = dict(model=torch.load(resnet18[1]), args=argparse.Namespace(lr=0.1, device='cuda'))
        path = save(content, tmp_path / 'theirs.pth')
        ours = backbone(depth=18, base_channels=8, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
        with pytest.raises(RuntimeError, match=r'switchnorm://PATH.*tools/convert_checkpoint\.py'):
            ours.init_weights()
        command(path, tmp_path / 'new.pth')
        for address in str(tmp_path / 'new.pth'), f'switchnorm://{path}':
            ours.init_cfg = dict(type='Pretrained', checkpoint=address)
            ours.init_weights()
            assert torch.equal(ours.bn1.bn.running_mean, content['model']['bn1.running_mean'])


# -- the wrong kind -------------------------------------------------------------------------------------------------


class Model(BaseModule):
    """A model that has a backbone, as whole models do."""

    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = backbone(depth=18, **kwargs)


class TestUnconverted:
    @pytest.fixture(params=['bare', 'module', 'backbone', 'decoder', 'detectron', 'nested'])
    def theirs(self, request, tmp_path):
        state = ResNet(18, width=8).float().state_dict()
        if request.param == 'decoder':
            state = C1(512, 7).float().state_dict()
        prefix = dict(module='module.', backbone='backbone.', detectron='Conv_Body.conv_body.').get(request.param, '')
        state = {prefix + key: value for key, value in state.items()}
        return save(dict(model=state, step=1) if request.param == 'nested' else state, tmp_path / 'theirs.pth')

    @pytest.mark.parametrize('way', ['load_state_dict', 'mmengine', 'init_cfg', 'load_from'])
    def test_is_an_error_that_names_the_command(self, theirs, way, tmp_path):
        model = Model()
        before = {key: value.clone() for key, value in model.state_dict().items() if 'bn' in key}
        with pytest.raises(RuntimeError, match=r'switchnorm://PATH.*tools/convert_checkpoint\.py'):
            if way == 'load_state_dict':
                model.load_state_dict(torch.load(theirs), strict=False)
            elif way == 'mmengine':
                load_checkpoint(model, str(theirs))
            elif way == 'init_cfg':
                model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(theirs))
                model.init_weights()
            else:
                options = dict(default_scope='mmdet', experiment_name=tmp_path.name)
                Runner(model=model, work_dir=str(tmp_path), load_from=str(theirs), **options).load_or_resume()
        if way != 'init_cfg':  # which has initialised the other way before it reads
            assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())

    def test_other_partial_loads_stay_what_they_are(self):
        """Only a layer that gets nothing complains, and only of the authors' names."""
        model, whole = backbone(depth=18), backbone(depth=18).state_dict()
        result = model.load_state_dict({key: v for key, v in whole.items() if 'layer4' not in key}, strict=False)
        assert result.missing_keys and not result.unexpected_keys
        neck = nn.ModuleDict(dict(neck=SwitchNorm(4)))
        result = neck.load_state_dict(whole, strict=False)
        assert set(result.unexpected_keys) == whole.keys()

    @pytest.mark.parametrize('normalizers, built', [(('in', 'ln'), 3), (('in', 'ln', 'bn'), 2)])
    def test_logits_of_another_number(self, normalizers, built, tmp_path):
        theirs = ResNet(18, fc=False, with_bn=built == 3).float()
        ours = backbone(depth=18, norm_cfg=dict(type='SN', normalizers=normalizers))
        trained = {2: r"\('in', 'ln'\)", 3: r"\('in', 'ln', 'bn'\)"}[built]
        remedy = rf"trained with normalizers={trained}, .*norm_cfg=dict\(type='SN', normalizers="
        with pytest.raises(RuntimeError, match=remedy) as error:
            ours.load_state_dict(convert_checkpoint(theirs.state_dict())[0])
        assert str(error.value).count('SwitchNorm layers of other normalizers') == 1
        path, said = save(theirs.state_dict(), tmp_path / 'theirs.pth'), Said()
        said.listen()
        load_checkpoint(ours, f'switchnorm://{path}', logger='current')
        assert len(re.findall(remedy, '\n'.join(said.lines))) == 1


@pytest.fixture(scope='module')
def good():
    torch.manual_seed(0)
    return ResNet(18, width=8).float().state_dict()


def cut(good, path, zipped=True):
    torch.save(good, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:100_000])


def zip_file(path):
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('readme.txt', 'hello')


BAD = {
    'code': (lambda good, path: torch.save(dict(state_dict=good, x=Intruder()), path), 'run posix.mkdir. Refused'),
    'code, old format': (
        lambda good, path: torch.save([good, Intruder()], path, _use_new_zipfile_serialization=False),
        'run posix.mkdir. Refused',
    ),
    'code, plain pickle': (lambda good, path: path.write_bytes(pickle.dumps(Intruder(), 2)), 'mkdir. Refused'),
    'truncated': (cut, 'or not all of one'),
    'truncated, old format': (lambda good, path: cut(good, path, False), 'or not all of one'),
    'empty': (lambda good, path: path.write_bytes(b''), 'or not all of one'),
    'text': (lambda good, path: path.write_text('hello\n'), 'or not all of one'),
    'zip': (lambda good, path: zip_file(path), 'or not all of one'),
    'tensor': (lambda good, path: torch.save(torch.ones(2), path), 'a Tensor, not a state dict'),
    'list': (lambda good, path: torch.save([torch.ones(2)], path), 'a list, not a state dict'),
    'numbers': (lambda good, path: torch.save(dict(good, epoch=3), path), 'no state dict .* also epoch'),
    'nothing': (lambda good, path: torch.save(dict(state_dict={}), path), 'no state dict .* nothing'),
    'no norms': (lambda good, path: torch.save({'fc.weight': torch.ones(2)}, path), 'neither an SN nor a BatchNorm'),
    'own': (lambda good, path: torch.save(convert_checkpoint(good)[0], path), 'names of OpenMMLab .*load it as it is'),
    'unknown part': (lambda good, path: torch.save({**good, 'se.weight': torch.ones(2)}, path), 'se.weight'),
    'odd logits': (lambda good, path: torch.save({**good, 'sn1.var_weight': torch.ones(2)}, path), 'sn1 .*logits'),
    'sparse': (lambda good, path: torch.save(dict(good, w=torch.eye(2).to_sparse()), path), 'w is a sparse_coo tensor'),
    'compressed': (
        lambda good, path: torch.save(dict(good, w=torch.eye(2).to_sparse_csr()), path),
        'w is a sparse_csr',
    ),
    'meta': (lambda good, path: torch.save(dict(good, w=torch.ones(2, device='meta')), path), 'w is a meta tensor'),
    'quantized': (
        lambda good, path: torch.save(dict(good, w=torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8)), path),
        r'(w is a quantized tensor|would run torch\._utils\._rebuild_qtensor)',  # by what this torch reads as data
    ),
    **{
        name: (lambda good, path, make=make: torch.save(dict(good, w=make()), path), message)
        for name, make, message in [
            (
                'nested',
                lambda: torch.nested.nested_tensor([torch.ones(2)]),
                r'(w is a nested tensor|would run torch\._utils\._rebuild_nested_tensor)',
            ),
            ('float8', lambda: torch.ones(2).to(torch.float8_e4m3fn), '(w is a float8_e4m3fn tensor|would run)'),
        ]
        if can_be_saved(make)
    },
    'control codes': (lambda good, path: torch.save({**good, 'w\x1b[2J': torch.ones(2)}, path), r"name 'w\\x1b\[2J'"),
    'odd size': (lambda good, path: torch.save({**good, 'sn1.bias': torch.ones(2)}, path), r'sn1\.bias has 2'),
}


class TestRefused:
    @pytest.mark.parametrize('kind', BAD)
    def test_bad_file(self, kind, good, command, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')  # which is for other ways of loading
        write, message = BAD[kind]
        write(good, tmp_path / 'bad.pth')
        with pytest.raises(SystemExit) as ended:
            command('bad.pth', 'new.pth')
        assert ended.value.code == 2
        assert re.search(rf'bad\.pth: .*{message}', ' '.join(capsys.readouterr().err.split()))
        with pytest.raises(ValueError, match=rf'switchnorm://bad\.pth: (?s:.)*{message}'):
            CheckpointLoader.load_checkpoint('switchnorm://bad.pth')
        assert [p.name for p in tmp_path.iterdir()] == ['bad.pth']

    def test_no_file(self):
        with pytest.raises(FileNotFoundError, match='none.pth'):
            CheckpointLoader.load_checkpoint('switchnorm://none.pth')

    @pytest.mark.parametrize(
        'argv, message',
        [
            (['none.pth', 'new.pth'], r"checkpoint 'none\.pth' is no file"),
            (['https://host/good.pth', 'new.pth'], 'is an address; download it'),
            (['good.pth', 'none/new.pth'], "'none', the folder to write 'new.pth' into"),
            (['good.pth', 'folder'], "'folder' is a folder"),
            (['good.pth', 'there.pth'], r"'there\.pth' exists; --force"),
            (['good.pth', 'good.pth', '--force'], r'good\.pth is the checkpoint to read'),
            (['good.pth', 'device', '--force'], "'device' is a device or a pipe, which a file would replace"),
            (['good.pth', 'pipe', '--force'], "'pipe' is a device or a pipe, which a file would replace"),
            (['good.pth', 'link to pipe', '--force'], "'link to pipe' is a device or a pipe"),
            (['good.pth', f'{"x" * 260}.pth'], 'cannot be written: File name too long'),
            (['good.pth', 'loop', '--force'], "'loop' cannot be written: (Symlink loop|Too many levels)"),
            (['good.pth', 'new.pth', '--prefix', 'model.'], "prefix='model.' is for BatchNorm checkpoints"),
            (['good.pth', 'good.pth', 'new.pth'], 'good.pth has keys of the file before it'),
            (['good.pth', 'new.pth', '--from', 'bn'], 'by its keys .* is a switchnorm checkpoint, not a bn one'),
            (['good.pth', 'new.pth', '--from', 'gn'], "invalid choice: 'gn'"),
            (['good.pth', 'new.pth', '--to', 'mmocr'], "invalid choice: 'mmocr'"),
            (['decoder.pth', 'new.pth', '--to', 'mmdet'], 'a decoder, which is for mmseg, not for mmdet'),
            (['detector.pth', 'new.pth', '--to', 'mmseg'], 'a detector, which is for mmdet, not for mmseg'),
            (['--init-ratios', '0', '0', '1', 'good.pth', 'new.pth'], 'is for BatchNorm checkpoints'),
            (['--init-ratios', '0', '0', '2', 'bn.pth', 'new.pth'], 'init_ratios must be 3 .* sum to 1'),
            (['--init-ratios', '0', '0', '1', 'no var.pth', 'new.pth'], "0 has values {'running_mean': 2, 'weight': 2"),
            (['--init-ratios', '0', '0', '1', 'odd var.pth', 'new.pth'], "0 has values .*'running_var': 3"),
        ],
    )
    def test_wrong_input(self, argv, message, good, command, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / 'folder').mkdir()
        os.mkfifo('pipe')
        os.symlink('pipe', 'link to pipe')
        os.symlink(os.devnull, 'device')  # as a node of its own, which only root can make
        for name in 'good', 'there':
            save(good, tmp_path / f'{name}.pth')
        save({f'Conv_Body.conv_body.{key}': value for key, value in good.items()}, tmp_path / 'detector.pth')
        save(C1(512, 7).state_dict(), tmp_path / 'decoder.pth')
        bn = nn.Sequential(nn.BatchNorm2d(2)).state_dict()
        save(bn, tmp_path / 'bn.pth')
        save({key: value for key, value in bn.items() if key != '0.running_var'}, tmp_path / 'no var.pth')
        save(dict(bn, **{'0.running_var': torch.ones(3)}), tmp_path / 'odd var.pth')
        (tmp_path / 'loop').symlink_to('loop')
        before = {path: path.lstat() for path in tmp_path.rglob('*')}
        with pytest.raises(SystemExit) as ended:
            command(*argv)
        assert ended.value.code == 2
        assert re.search(message, ' '.join(capsys.readouterr().err.split()))
        after = {path: path.lstat() for path in tmp_path.rglob('*')}
        assert {p: (s.st_mtime_ns, s.st_size) for p, s in before.items()} == {
            p: (s.st_mtime_ns, s.st_size) for p, s in after.items()
        }

    @pytest.mark.skipif(VERSION < (2, 0), reason='torch 1.13 ends the process where it cannot write')
    @pytest.mark.parametrize('there', [False, True])
    def test_failed_write_leaves_everything_as_it_was(self, there, good, tmp_path):
        """With a limit on the size of files, as on a full disk."""
        save(good, tmp_path / 'good.pth')
        if there:
            (tmp_path / 'new.pth').write_text('precious')
        command = f'ulimit -f 100; "$0" "{TOOLS}/convert_checkpoint.py" good.pth new.pth --force'
        done = subprocess.run(['bash', '-c', command, sys.executable], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and 'Traceback' not in done.stderr
        assert done.stderr.splitlines()[-1] == 'error: new.pth not written: File too large'  # torch 2.4 warns before
        assert sorted(p.name for p in tmp_path.iterdir()) == ['good.pth', *(['new.pth'] if there else [])]
        assert not there or (tmp_path / 'new.pth').read_text() == 'precious'

    @pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name)
    def test_a_stopped_write_leaves_nothing(self, number, tmp_path):
        """In the midst of torch.save, by the signals of schedulers, shells and keyboards."""
        (tmp_path / 'new.pth').write_text('precious')
        code = f"""
            import os, sys, time
            sys.path.insert(0, {str(TOOLS)!r})
            import common, torch

            class Slow:
                def __reduce__(self):
                    print(*os.listdir('.'), flush=True)
                    time.sleep(60)

            common.save([torch.ones(3), Slow()], 'new.pth')
        """
        command = [sys.executable, '-c', textwrap.dedent(code)]
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            # not ignored, as by what a shell or nohup starts in the background
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        )  # fmt: skip
        assert any(re.search(r'new\.pth\.\d+\.part', line) for line in iter(process.stdout.readline, ''))
        process.send_signal(number)
        said = process.communicate()[0]
        # by KeyboardInterrupt Python ends in either way
        assert process.returncode in (128 + number, -number, *([1] if number == signal.SIGINT else [])), said
        assert [p.name for p in tmp_path.iterdir()] == ['new.pth']
        assert (tmp_path / 'new.pth').read_text() == 'precious'

    def test_equal_input_gives_equal_bytes(self, good, command, tmp_path, monkeypatch):
        save(good, tmp_path / 'good.pth')
        for name, pid in ('a.pth', 1), ('b.pth', 23456):
            monkeypatch.setattr(os, 'getpid', lambda pid=pid: pid)
            command(tmp_path / 'good.pth', tmp_path / name)
        assert (tmp_path / 'a.pth').read_bytes() == (tmp_path / 'b.pth').read_bytes()

    def test_a_link_is_followed_and_names_may_be_long(self, good, command, tmp_path):
        save(good, tmp_path / 'good.pth')
        target = tmp_path / f'{"ä" * 120}.pth'  # 244 bytes, of 255
        target.write_text('not precious')
        (tmp_path / 'link.pth').symlink_to(target)
        command(tmp_path / 'good.pth', tmp_path / 'link.pth', '--force')
        assert (tmp_path / 'link.pth').is_symlink() and torch.load(target)['meta']['converted_from'] == 'switchnorm'

    def test_force_replaces_and_verbose_lists(self, good, command, tmp_path, capsys):
        (tmp_path / 'new.pth').write_text('not precious')
        command(save(good, tmp_path / 'good.pth'), tmp_path / 'new.pth', '--force', '--verbose')
        saved = torch.load(tmp_path / 'new.pth')
        assert saved['meta']['converted_from'] == 'switchnorm' and len(saved['state_dict']) == len(good) - 2
        out = capsys.readouterr().out
        assert 'sn1.running_mean -> bn1.bn.running_mean\n' in out and 'fc.bias skipped: ' in out


def test_what_is_missing_and_what_looks_wrong_is_said(good):
    state = dict(good)
    for key in 'sn1.running_mean', 'layer2.0.sn2.var_weight', 'layer2.0.downsample.1.weight':
        del state[key]
    for key in [key for key in state if key.startswith('layer3.')]:
        del state[key]
    state['layer1.0.sn1.running_var'] = torch.zeros(1, 8, 1)
    state['layer1.0.sn2.running_var'] = torch.full((1, 8, 1), torch.nan)
    _, report = convert_checkpoint(state)
    assert set(report.missing) == {
        'bn1.bn.running_mean',
        'layer2.0.bn2.var_weight',
        'layer2.0.downsample.1.weight',
        'layer3.0.conv1.weight',
    }
    text = str(report)
    assert re.search(r'layer1\.0\.bn1\.bn\.running_var: all 0', text)
    assert re.search(r'layer1\.0\.bn2\.bn\.running_var has values that are not finite', text)
    _, report = convert_checkpoint(
        {f'Conv_Body.res1.{key}': value for key, value in good.items() if key.startswith('sn1')}
    )
    assert report.missing[0] == 'backbone.conv1.weight' and 'roi_head.bbox_head.fc_reg.weight' in report.missing


@pytest.mark.skipif(VERSION < (2, 6), reason='torch before 2.6 has no list of what is allowed')
def test_reading_one_leaves_what_is_allowed_for_good(tmp_path):
    """torch's own safe_globals removes at its end also what had been allowed before."""
    path = str(tmp_path / 'checkpoint.pth')
    torch.save(dict(state_dict=dict(weight=torch.ones(1)), history=HistoryBuffer([1], [1])), path)
    read_checkpoints_as_data()
    assert read_state_dict(path).keys() == {'weight'}
    assert isinstance(torch.load(path, weights_only=True)['history'], HistoryBuffer)
