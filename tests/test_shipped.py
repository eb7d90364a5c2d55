"""Configs as they are shipped, from the first step to a prediction: by the tools, and by OpenMMLab's inferencers.

With made data, small images, and no checkpoint to start from. One-stage detectors run on mmcv-lite too.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from mmcv import _ext
from mmdet.apis import DetInferencer
from mmengine.hub import get_config, get_model
from mmengine.registry import MODELS, DefaultScope
from mmseg.apis import MMSegInferencer
from support import TOOLS

from sn_openmmlab import SwitchNorm, read_ratios
from sn_openmmlab.checkpoint.read import read_checkpoints_as_data

DETECTOR = """
_base_ = 'sn_openmmlab::mmdet/sn/retinanet_r50_fpn_sn-all_2x_coco.py'
model = dict(
    backbone=dict(init_cfg=None), bbox_head=dict(num_classes=4), test_cfg=dict(score_thr=0.0, max_per_img=5))
train_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(data_root='data/', ann_file='annotations/instances_train.json', data_prefix=dict(img='images/train/'),
                 metainfo=dict(classes=('circle', 'rectangle', 'triangle', 'star'))))
val_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(data_root='data/', ann_file='annotations/instances_val.json', data_prefix=dict(img='images/val/'),
                 metainfo=dict(classes=('circle', 'rectangle', 'triangle', 'star'))))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/annotations/instances_val.json')
test_evaluator = val_evaluator
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=5, val_interval=5)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=3), logger=dict(interval=1))
log_processor = dict(by_epoch=False)
"""
TWO_STAGES = DETECTOR.replace('retinanet_r50', 'mask-rcnn_r50').replace(
    'bbox_head=dict(num_classes=4), test_cfg=dict(score_thr=0.0, max_per_img=5)',
    'roi_head=dict(bbox_head=dict(num_classes=4), mask_head=dict(num_classes=4)),\n'
    '    test_cfg=dict(rcnn=dict(score_thr=0.0, max_per_img=5))',
)
SEGMENTOR = """
_base_ = 'sn_openmmlab::mmseg/sn/fcn_r18-d8_sn_1xb2-20k_camvid-180x240.py'
model = dict(pretrained=None)
train_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(data_root='data', data_prefix=dict(img_path='images/train', seg_map_path='semantic/train')))
val_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(data_root='data', data_prefix=dict(img_path='images/val', seg_map_path='semantic/val')))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=5, val_interval=5)
default_hooks = dict(checkpoint=dict(interval=3), logger=dict(interval=1))
"""
SCALES = [
    f'{loader}_dataloader.dataset.pipeline.{i}.scale=(96,64)' for loader, i in (('train', 2), ('val', 1), ('test', 1))
]


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp('shipped')
    (place / 'detector.py').write_text(DETECTOR)
    (place / 'two-stages.py').write_text(TWO_STAGES)
    (place / 'segmentor.py').write_text(SEGMENTOR)
    # images for five iterations: mmengine waits for 2 seconds before it begins anew
    call(place, 'make_demo_data.py', 'data', '--train', '10', '--val', '2', '--size', '64x64')
    return place


def call(place, tool, *args):
    command = [sys.executable, TOOLS / tool, *args]
    done = subprocess.run(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    'name, metric, options',
    [
        pytest.param('detector', 'coco/bbox_mAP', SCALES, id='detector'),
        pytest.param(
            'two-stages',
            'coco/segm_mAP',
            SCALES,
            id='two-stages',
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(_ext.__file__.endswith('.py'), reason='mmcv-lite has no operators'),
            ],
        ),
        pytest.param('segmentor', 'mIoU', [], id='segmentor'),
    ],
)
def test_training_resuming_and_inferring(place, monkeypatch, name, metric, options):
    config, options = f'{name}.py', ['--work-dir', name, '--cfg-options', 'randomness.seed=0', *options]
    call(place, 'train.py', config, *options, 'train_cfg.max_iters=3')
    checkpoint = place / name / 'iter_5.pth'
    assert not checkpoint.exists()
    out = call(place, 'train.py', config, '--resume', *options)
    assert 'iter: 3' in out and checkpoint.exists()
    first, last = read_ratios(place / name / 'iter_3.pth').layers, read_ratios(checkpoint).layers
    assert len(first) > 20 and all(np.isfinite(v).all() for v in last.values())
    assert any(not np.array_equal(first[layer], last[layer]) for layer in first)
    assert metric in call(place, 'test.py', config, checkpoint, *options)

    monkeypatch.chdir(place)
    read_checkpoints_as_data()  # upstream's mmengine cannot read its own from torch 2.6 on
    image = str(next((place / 'data/images/val').iterdir()))
    if name != 'segmentor':
        inferencer = DetInferencer(model=config, weights=str(checkpoint), device='cpu', show_progress=False)
        boxes = torch.tensor(inferencer(image)['predictions'][0]['bboxes'])
        assert boxes.shape == (5, 4) and boxes.isfinite().all()
    else:
        inferencer = MMSegInferencer(model=config, weights=str(checkpoint), device='cpu')
        labels = inferencer(image)['predictions']
        assert labels.shape == (64, 64) and labels.max() < 11
    layers = {name: m for name, m in inferencer.model.named_modules() if isinstance(m, SwitchNorm)}
    assert all(np.allclose(layers[layer].importance_ratios, ratios, atol=1e-5) for layer, ratios in last.items())


def test_what_goes_by_name_or_wants_weights():
    """docs/quickstart.md, Predict: what each says, and that the way shown instead works."""
    name = 'sn_openmmlab::mmseg/sn/fcn_r18-d8_sn_1xb2-20k_camvid-180x240.py'
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'sn_openmmlab\.utils'"):
        get_model(name)
    with pytest.raises(AssertionError, match='Cannot find `Weights`'):
        get_config(name, pretrained=True)
    with pytest.raises(ValueError, match='Cannot find model: faster-rcnn_r50_fpn_sn-all_2x_coco in mmdet'):
        DetInferencer('faster-rcnn_r50_fpn_sn-all_2x_coco')
    cfg = get_config(name)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        assert any(isinstance(m, SwitchNorm) for m in MODELS.build(cfg.model).modules())
