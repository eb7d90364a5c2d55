"""Swapping the norm of configs: what is found, what is left and named, and that nothing else changes."""

from collections import Counter

import pytest
import torch
from mmcv.cnn import build_norm_layer
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from sn_openmmlab import SwitchNorm, swap_norm
from sn_openmmlab.norms import own_modules, part_of
from sn_openmmlab.swap import plan_swap
from sn_openmmlab.swap.build import build, compare
from test_swap.cases import FCOS, SCRATCH, config

MASK = 'mmdet::strong_baselines/mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_lsj-100e_coco.py'
OCR = 'mmseg::ocrnet/ocrnet_hr18_4xb2-40k_cityscapes-512x1024.py'


@pytest.mark.parametrize(
    'name, changed, left',
    [
        (FCOS, dict(backbone=53, head=8), {}),  # the head's GN is a class default
        ('mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py', dict(backbone=52, neck=17, head=3), {}),  # all defaults
        ('mmdet::double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py', dict(backbone=53, head=12), {'BasicResBlock': 3}),
        ('mmdet::grid_rcnn/grid-rcnn_r50_fpn_gn-head_2x_coco.py', dict(backbone=53, head=8), {'GridHead': 1}),
        (MASK, dict(backbone=53, neck=8, head=8), {}),  # mmcv's own SyncBatchNorm
        ('mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py', dict(backbone=106), {}),
        ('mmdet::ld/ld_r18-gflv1-r101_fpn_1x_coco.py', dict(backbone=20, head=8), {}),  # the teacher has its own config
        ('mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', dict(backbone=53, head=5), {}),
        ('mmdet::gcnet/mask-rcnn_r50-gcb-r4-c3-c5_fpn_1x_coco.py', dict(backbone=53), {}),  # with plugins
        ('mmseg::encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024.py', dict(backbone=55, head=4), {}),
        (OCR, dict(backbone=305, head=9), {}),  # a list of heads
    ],
    ids=lambda value: value.split('/')[-1] if isinstance(value, str) else '',
)
def test_layers(name, changed, left):
    cfg = config(name)
    swap = plan_swap(cfg)
    assert Counter(norm.part for norm in swap.changed) == changed
    assert Counter(norm.owner for norm in swap.left) == left
    assert {norm.new for norm in swap.changed} == {SwitchNorm}
    kinds = Counter(type(m) for _, m in own_modules(build(swap.config)))
    assert kinds[SwitchNorm] == sum(changed.values())
    assert kinds[nn.GroupNorm] + kinds[nn.SyncBatchNorm] + kinds[nn.BatchNorm2d] == sum(left.values())
    assert cfg.model == config(name).model  # the argument is not touched


class Pathway(nn.Sequential):
    def __init__(self, width, norm_cfg=None, norm_eval=False):
        norms = [build_norm_layer(norm_cfg or dict(type='BN3d'), width)[1] for _ in range(3)]
        super().__init__(*[layer for norm in norms for layer in (nn.Conv3d(width, width, 1), norm)])
        self.norm_eval = norm_eval


@MODELS.register_module()
class PathwaysOfItsOwn(nn.Module):
    """As mmaction's SlowFast: what its dicts name is in no registry, but in a table of the class's module."""

    table = dict(pathway=Pathway, fixed=lambda width: Pathway(width))

    def __init__(self, slow, fast=dict(type='pathway', width=4)):  # noqa: B006
        super().__init__()
        for name, cfg in dict(slow=slow, fast=fast).items():
            setattr(self, name, self.table[cfg['type']](**{k: v for k, v in cfg.items() if k != 'type'}))


@MODELS.register_module()
class WithBackbone(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)


@pytest.mark.parametrize('to', ['SN', 'SyncSN'])
@pytest.mark.parametrize('slow, left', [('pathway', 0), ('fixed', 3)])
def test_classes_of_a_private_table(to, slow, left):
    backbone = dict(type='PathwaysOfItsOwn', slow=dict(type=slow, width=8))
    cfg = Config(dict(model=dict(type='WithBackbone', backbone=backbone)))
    swap = plan_swap(cfg, to)
    assert (len(swap.changed), len(swap.left)) == (6 - left, left)
    model = MODELS.build(swap.config.model)
    assert sum(isinstance(m, SwitchNorm) for m in model.modules()) == 6 - left
    model.backbone.fast(torch.randn(2, 4, 3, 5, 5)).sum().backward()


@pytest.mark.parametrize('statistics, norm_eval', [('frozen', True), ('train', False)])
def test_norm_eval_of_classes_of_a_private_table(statistics, norm_eval):
    slow = dict(type='pathway', width=8, norm_eval=not norm_eval)
    cfg = Config(dict(model=dict(type='WithBackbone', backbone=dict(type='PathwaysOfItsOwn', slow=slow))))
    assert plan_swap(cfg, statistics=statistics).config.model.backbone.slow.norm_eval is norm_eval


def test_a_place_without_effect_keeps_its_norm():
    swap = plan_swap(config('mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py'))
    assert Counter(norm.part for norm in swap.left) == {'backbone': 53}
    assert swap.refused == {'backbone.norm_cfg': 'has no effect, its class builds its norms by itself'}
    assert 'norm_cfg' not in swap.config.model.backbone


def test_arguments_of_a_class_without_a_name():
    swap = plan_swap(config('mmseg::stdc/stdc1_in1k-pre_4xb12-80k_cityscapes-512x1024.py'))
    assert Counter(norm.owner for norm in swap.left) == {'AttentionRefinementModule': 4}
    assert swap.config.model.backbone.ffm_cfg.norm_cfg == dict(type='SN', requires_grad=True)


class OnlyBN(nn.Module):
    """A neck of the kind of mmpretrain's RepVGG."""

    def __init__(self, norm_cfg):
        super().__init__()
        assert norm_cfg['type'] == 'BN', 'only BN can be fused'
        self.norm = nn.BatchNorm2d(256)


def test_a_class_that_refuses_is_named():
    cfg = config(FCOS)
    cfg.model.neck = [cfg.model.neck, dict(type=OnlyBN, norm_cfg=dict(type='BN'))]
    swap = plan_swap(cfg)
    assert swap.refused == {'neck.1.norm_cfg': 'AssertionError: only BN can be fused'}
    assert [(norm.name, norm.owner) for norm in swap.left] == [('neck.1.norm', 'OnlyBN')]
    assert swap.config.model.neck[1].norm_cfg == dict(type='BN') and len(swap.changed) == 61


def test_a_trained_teacher_keeps_its_norms():
    swap = plan_swap(config('mmdet::lad/lad_r50-paa-r101_fpn_2xb8_coco_1x.py'))
    assert Counter(norm.part for norm in swap.changed) == dict(backbone=53, head=8)
    assert swap.config.model.teacher_backbone.norm_cfg.type == 'BN'


def test_parts():
    model = swap_norm(config(FCOS), parts='head').model
    assert model.backbone == config(FCOS).model.backbone and model.bbox_head.norm_cfg.type == 'SN'
    cfg = swap_norm(config(MASK), parts=['neck'])
    assert {m.new for m in plan_swap(config(MASK), parts=['neck']).changed} == {SwitchNorm}
    assert cfg.model.neck.norm_cfg.type == 'SN' and cfg.model.roi_head == config(MASK).model.roi_head
    assert part_of('detector.backbone.layer1') == 'backbone' and part_of('decode_head.bottleneck') == 'head'


@pytest.mark.parametrize(
    'kwargs, norm, norm_eval',
    [
        (dict(), dict(type='SN', requires_grad=True), True),
        (dict(statistics='train'), dict(type='SN', requires_grad=True), False),
        (dict(statistics='frozen'), dict(type='SN', requires_grad=False), True),
        (dict(statistics='synced'), dict(type='SyncSN', requires_grad=True), False),
        (dict(to='SyncSN'), dict(type='SyncSN', requires_grad=True), True),
        (dict(to='SyncBN'), dict(type='SyncBN', requires_grad=False), True),
        (dict(to='BN', statistics='synced'), dict(type='SyncBN', requires_grad=True), False),
        (dict(to='GN'), dict(type='GN', requires_grad=False, num_groups=32), True),
        (dict(init_ratios=[0, 0, 1]), dict(type='SN', requires_grad=True, init_ratios=(0, 0, 1)), True),
    ],
)
def test_statistics_and_targets(kwargs, norm, norm_eval):
    backbone = swap_norm(config(FCOS), **kwargs).model.backbone
    assert backbone.norm_cfg == norm and backbone.norm_eval == norm_eval


LARGE = 'mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py'
BISENET = 'mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py'
WHOLE = {'model.init_cfg': dict(type='Pretrained', checkpoint='x.pth'), 'model.backbone.init_cfg': None}


@pytest.mark.parametrize(
    'name, change, frozen',
    [
        (FCOS, {}, True),
        (FCOS, WHOLE, True),
        ('mmdet::grid_rcnn/grid-rcnn_r50_fpn_gn-head_2x_coco.py', {}, True),  # a class makes a norm by itself
        (OCR, {}, True),  # pretrained= of the whole model; norm_eval was False
        (SCRATCH, {}, False),
        (SCRATCH, dict(load_from='detector.pth'), False),  # GN's checkpoint: no statistics to freeze
        (LARGE, {}, False),  # 32 images a process
        (LARGE, {'train_dataloader.batch_size': 4}, True),
        (BISENET, dict(load_from='x.pth'), False),  # a backbone without norm_eval
    ],
)
def test_the_recipe_for_checkpoints(name, change, frozen):
    cfg = config(name)
    cfg.merge_from_dict(change)
    new = swap_norm(cfg)
    assert bool(new.model.backbone.get('norm_eval')) == frozen
    assert 'init_ratios' not in str(new.model)  # layers start near BatchNorm by themselves


def test_frozen_statistics_are_those_of_the_child():
    cfg = swap_norm(config(FCOS), statistics='frozen')
    cfg.model.backbone.init_cfg = None
    backbone = MODELS.build(dict(cfg.model.backbone, _scope_='mmdet'))
    backbone.train()
    layers = [m for m in backbone.modules() if isinstance(m, SwitchNorm)]
    assert len(layers) == 53 and not any(layer.bn.training for layer in layers)


def test_there_and_back_is_the_same_model():
    cfg = config('mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py')
    back = swap_norm(swap_norm(cfg), to='BN')
    assert not any(norm.changes for norm in compare(build(cfg), build(back)))


def test_arguments_are_kept_where_the_new_norm_has_them():
    cfg = config('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py')
    cfg.model.backbone.norm_cfg = dict(type='BN', momentum=0.03, eps=0.001, track_running_stats=True)
    assert swap_norm(cfg).model.backbone.norm_cfg == dict(type='SN', momentum=0.03, eps=0.001)
    assert swap_norm(cfg, to='GN', parts='head').model.bbox_head.norm_cfg == dict(type='GN', num_groups=32)


def test_groups_that_do_not_fit_are_named():
    swap = plan_swap(config('mmseg::hrnet/fcn_hr18_4xb2-40k_cityscapes-512x1024.py'), to='GN')
    assert 'num_channels' in swap.refused['backbone.norm_cfg'] and {norm.part for norm in swap.left} == {
        'backbone',
        'head',
    }


def test_variables_and_imports():
    cfg = config(OCR)
    cfg.custom_imports = dict(imports='mmseg.models', allow_failed_imports=True)
    new = swap_norm(cfg)
    assert new.norm_cfg == dict(type='SN', requires_grad=True)
    assert new.custom_imports == dict(imports=['mmseg.models', 'sn_openmmlab'], allow_failed_imports=True)
    assert swap_norm(new, to='SyncSN').custom_imports == new.custom_imports
    assert swap_norm(cfg, parts='head').norm_cfg == cfg.norm_cfg
    assert swap_norm(cfg, to='GN', parts='head').custom_imports == cfg.custom_imports


@pytest.mark.parametrize(
    'name, kwargs, error, message',
    [
        (FCOS, dict(to='LN'), ValueError, "one of .*got 'LN'"),
        (FCOS, dict(parts=['stem']), ValueError, "some of .*'stem'"),
        (FCOS, dict(parts=[]), ValueError, 'some of'),
        (FCOS, dict(statistics='none'), ValueError, "got 'none'"),
        (FCOS, dict(to='GN', statistics='train'), ValueError, 'GN has none'),
        (FCOS, dict(to='BN', init_ratios=(0, 0, 1)), ValueError, 'not for BN'),
        (FCOS, dict(init_ratios=(0, 1)), ValueError, 'init_ratios must be 3'),
        (FCOS, dict(parts='head', statistics='frozen'), ValueError, 'not among the parts'),
        ('mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py', dict(to='BN'), ValueError, 'nothing changes'),
        ('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', {}, ValueError, 'nothing changes.*32 LayerNorm'),
        (BISENET, dict(statistics='frozen'), ValueError, 'norm_eval, which the backbone of this model does not have'),
        (
            'mmdet::misc/d2_retinanet_r50-caffe_fpn_ms-90k_coco.py',
            {},
            RuntimeError,
            'cannot be built as it is.*etectron2',
        ),
    ],
)
def test_errors(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        swap_norm(config(name), **kwargs)


def test_a_config_without_model():
    with pytest.raises(ValueError, match='no model'):
        swap_norm(Config(dict(default_scope='mmdet')))
