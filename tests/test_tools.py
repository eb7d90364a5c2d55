"""tools/train.py and tools/test.py as users run them: real configs, on tiny data, in processes of their own."""

import importlib
import os
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch
from mmengine.config import Config
from support import TOOLS, Intruder, call
from torch import nn

from sn_openmmlab import SwitchNorm

# no random augmentation and no random sampling: mmengine does not save the state of the random number generators
DETECTOR = """
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', 'mmdet::_base_/default_runtime.py']
custom_imports = dict(imports=['sn_openmmlab'], allow_failed_imports=False)
norm_cfg = dict(type='SN', requires_grad=True)
model = dict(
    type='FCOS',
    backbone=dict(depth=18, base_channels=16, stem_channels=16, frozen_stages=-1, norm_cfg=norm_cfg, norm_eval=False,
                  init_cfg=None),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=16, norm_cfg=norm_cfg),
    bbox_head=dict(_delete_=True, type='FCOSHead', in_channels=16, feat_channels=16, stacked_convs=1, num_classes=4,
                   strides=[8, 16, 32, 64, 128], norm_cfg=norm_cfg),
    test_cfg=dict(max_per_img=5))
metainfo = dict(classes=('circle', 'rectangle', 'triangle', 'star'))
loads = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
         dict(type='Resize', scale=(64, 64))]
keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
train_dataloader = dict(
    batch_size=2, num_workers=1, sampler=dict(type='InfiniteSampler'),
    dataset=dict(
        type='CocoDataset', data_root=DATA, ann_file='annotations/instances_train.json', metainfo=metainfo,
        data_prefix=dict(img='images/train/'), pipeline=[*loads, dict(type='PackDetInputs')]))
test_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset', data_root=DATA, ann_file='annotations/instances_val.json', metainfo=metainfo,
        data_prefix=dict(img='images/val/'), test_mode=True,
        pipeline=[*loads, dict(type='PackDetInputs', meta_keys=keys)]))
test_evaluator = dict(type='CocoMetric', ann_file=DATA + '/annotations/instances_val.json')
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4, val_interval=4)
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05), paramwise_cfg=dict(norm_decay_mult=0.))
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=10)]
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(by_epoch=False, interval=100))
log_processor = dict(by_epoch=False)
randomness = dict(seed=0, deterministic=True)
"""

# without custom_imports: the tools register SN all the same
SEGMENTOR = """
_base_ = ['mmseg::_base_/models/fcn_r50-d8.py', 'mmseg::_base_/default_runtime.py']
norm_cfg = dict(type='SN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(64, 64)), pretrained=None,
    backbone=dict(depth=18, base_channels=16, stem_channels=16, norm_cfg=norm_cfg),
    decode_head=dict(in_channels=128, channels=16, num_classes=5, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=64, channels=16, num_classes=5, norm_cfg=norm_cfg))
metainfo = dict(classes=('background', 'circle', 'rectangle', 'triangle', 'star'),
                palette=[[0, 0, 0], [230, 60, 60], [60, 180, 75], [60, 100, 230], [250, 190, 30]])
load, annotate, pack = dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler'),
    dataset=dict(
        type='BaseSegDataset', data_root=DATA, metainfo=metainfo,
        data_prefix=dict(img_path='images/train', seg_map_path='semantic/train'), pipeline=[load, annotate, pack]))
test_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset', data_root=DATA, metainfo=metainfo,
        data_prefix=dict(img_path='images/val', seg_map_path='semantic/val'), pipeline=[load, annotate, pack]))
test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
tta_pipeline = [load, dict(type='TestTimeAug', transforms=[
    [dict(type='RandomFlip', prob=0.), dict(type='RandomFlip', prob=1.)], [annotate], [pack]])]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1, val_interval=1)
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
auto_scale_lr = dict(base_batch_size=16)
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1),
                     visualization=dict(type='SegVisualizationHook'))
"""


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with data, and the configs det.py and seg.py."""
    place = tmp_path_factory.mktemp('tools')
    call(place, sys.executable, TOOLS / 'make_demo_data.py', 'data', '--train', '4', '--val', '2', '--size', '64x64')
    for name, text in ('det.py', DETECTOR), ('seg.py', SEGMENTOR):
        (place / name).write_text(f'DATA = {str(place / "data")!r}\n{text}')
    return place


@pytest.fixture(scope='module')
def detector(place):
    """The checkpoint of a training of det.py straight through."""
    call(place, sys.executable, TOOLS / 'train.py', 'det.py', '--work-dir', 'straight')
    return place / 'straight/iter_4.pth'


def load(path):
    return torch.load(path, weights_only=False)  # our own


def tensors(tree, prefix=''):
    """All tensors of a checkpoint by their path."""
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {k: v for key, value in items for k, v in tensors(value, f'{prefix}/{key}').items()}


def test_resumed_training_equals_training_straight_through(place, detector):
    """Bitwise: weights, SN's running statistics, and the optimizer's state."""
    train = [sys.executable, TOOLS / 'train.py', 'det.py', '--work-dir', 'stopped']
    call(place, *train, '--cfg-options', 'train_cfg.max_iters=2')
    assert not (place / 'stopped/iter_4.pth').exists()
    out = call(place, *train, '--resume')
    assert 'resumed epoch: 0, iter: 2' in out
    resumed, straight = load(place / 'stopped/iter_4.pth'), load(detector)
    for part in 'state_dict', 'optimizer':
        a, b = tensors(resumed[part]), tensors(straight[part])
        assert len(a) > 50 and a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
    earlier = load(place / 'stopped/iter_2.pth')['state_dict']
    name = 'backbone.layer1.0.bn1.mean_weight'
    assert not torch.equal(earlier[name], straight['state_dict'][name])  # there was something to learn


def test_evaluating_a_detector(place, detector):
    out = call(
        place, sys.executable, TOOLS / 'test.py', 'det.py', detector, '--work-dir', 'test',
        '--out', 'predictions.pkl', '--show-dir', 'pictures', '--cfg-options', 'model.test_cfg.score_thr=0.0',
    )  # fmt: skip
    assert f'Load checkpoint from {detector}' in out and 'coco/bbox_mAP' in out
    predictions = pickle.loads((place / 'predictions.pkl').read_bytes())
    assert sorted(p['img_id'] for p in predictions) == [1, 2]
    assert all(p['pred_instances']['bboxes'].shape == (5, 4) for p in predictions)
    pictures = sorted((place / 'pictures').iterdir())
    assert [p.name for p in pictures] == ['000001.jpg', '000002.jpg']
    # ground truth and predictions side by side
    assert all(cv2.imread(str(p)).shape == (64, 128, 3) for p in pictures)


def test_augmented_detection(place, detector):
    """mmdet's default flips; it is told apart by its NMS, which keeps boxes of both."""
    command = [sys.executable, TOOLS / 'test.py', 'det.py', detector, '--work-dir', 'test', '--out', 'augmented.pkl']
    call(place, *command, '--tta', '--cfg-options', 'model.test_cfg.score_thr=0.0', 'model.test_cfg.max_per_img=3')
    predictions = pickle.loads((place / 'augmented.pkl').read_bytes())
    assert all(3 < len(p['pred_instances']['bboxes']) <= 6 for p in predictions)


def test_segmentation(place):
    """Trains without --work-dir, in a config without custom_imports; --out and --show-dir as mmseg does it."""
    out = call(place, sys.executable, TOOLS / 'train.py', 'seg.py', '--auto-scale-lr')
    assert 'LR is set based on batch size of 16 and the current batch size is 2' in out
    assert 'norm_cfg says' not in out
    checkpoint = place / 'work_dirs/seg/iter_1.pth'
    assert load(checkpoint)['optimizer']['param_groups'][0]['lr'] == pytest.approx(0.01 * 2 / 16)

    options = ['--out', 'maps', '--show-dir', 'seg_pictures', '--tta']
    out = call(place, sys.executable, TOOLS / 'test.py', 'seg.py', checkpoint, *options)
    assert re.search(r'mIoU: +[\d.]+', out)
    maps = sorted((place / 'maps').iterdir())
    assert [p.name for p in maps] == ['000001.png', '000002.png']
    assert all(cv2.imread(str(p), cv2.IMREAD_UNCHANGED).shape == (64, 64) for p in maps)
    assert len(list((place / 'seg_pictures/vis_data/vis_image').glob('*.png'))) == 2


def test_a_norm_cfg_that_does_not_reach_the_model_is_told(place):
    """A child that redefines only the variable: what the base wrote into the model stays."""
    (place / 'base.py').write_text((place / 'seg.py').read_text().replace("dict(type='SN'", "dict(type='SyncBN'"))
    child = "_base_ = 'base.py'\nnorm_cfg = dict(type='SN')\nmodel = dict(auxiliary_head=dict(norm_cfg=norm_cfg))\n"
    (place / 'child.py').write_text(child)
    out = call(place, sys.executable, TOOLS / 'train.py', 'child.py', '--work-dir', 'child')
    assert (
        'WARNING - norm_cfg says SN, but backbone: 22 SyncBatchNorm; decode_head: 3 SyncBatchNorm. The variable '
        'reaches only the parts of the model that it is written into. Unless this is meant, set '
        'model.backbone.norm_cfg, model.decode_head.norm_cfg'
    ) in out


def test_norms_that_cannot_be_sn_are_no_cause_for_a_warning(import_tool):
    """LayerNorm of transformers, to which no norm_cfg=dict(type='SN') fits; BatchNorm and GroupNorm are one."""
    train = import_tool('train')
    model = nn.ModuleDict(dict(backbone=nn.LayerNorm(4), neck=nn.GroupNorm(2, 4), head=SwitchNorm(4)))
    runner = SimpleNamespace(model=model, cfg=Config(dict(model=dict(backbone={}, neck={}, head={}))))
    assert train.count_other_norms(runner) == {'neck': {'GroupNorm': 1}}


def test_two_processes(place):
    """dist_train.sh and dist_test.sh on the CPU: two processes with an image each do what one does with both."""
    synchronised = [f'model.{part}.norm_cfg.type=SyncSN' for part in ('backbone', 'neck', 'bbox_head')]
    options = ['--cfg-options', 'train_cfg.max_iters=1', *synchronised]
    call(place, sys.executable, TOOLS / 'train.py', 'det.py', '--work-dir', 'one', *options)
    two = ['--work-dir', 'two', *options, 'train_dataloader.batch_size=1']
    out = call(place, TOOLS / 'dist_train.sh', 'det.py', 2, *two)
    assert 'Distributed training: True' in out and 'GPU number: 2' in out
    one, two = (tensors(load(place / name / 'iter_1.pth')['optimizer']) for name in ('one', 'two'))
    gradients = [name for name in one if name.endswith('exp_avg')]
    assert len(gradients) > 50
    for name in gradients:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)

    options = ['--work-dir', 'two', '--out', 'two.pkl', '--cfg-options', 'model.test_cfg.score_thr=0.0', *synchronised]
    out = call(place, TOOLS / 'dist_test.sh', 'det.py', 'two/iter_1.pth', 2, *options)
    assert 'coco/bbox_mAP' in out
    assert sorted(p['img_id'] for p in pickle.loads((place / 'two.pkl').read_bytes())) == [1, 2]


def test_a_checkpoint_that_holds_code_is_refused(place, import_tool, monkeypatch):
    monkeypatch.chdir(place)
    torch.save(dict(state_dict={}, meta=Intruder()), 'intruder.pth')
    with pytest.raises(SystemExit, match='(?s)mkdir.*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1'):
        import_tool('test').main(['det.py', 'intruder.pth'])
    assert not Path('intruded').exists()


@pytest.mark.parametrize('way', ['load_from', 'init_cfg', 'test'])
def test_an_address_that_cannot_be_converted_is_told_in_a_line(place, import_tool, monkeypatch, way):
    monkeypatch.chdir(place)
    torch.save(nn.Conv2d(3, 4, 1).state_dict(), 'plain.pth')
    address = 'switchnorm://plain.pth'
    settings = {'load_from': [f'load_from={address}'],
                'init_cfg': ['model.init_cfg.type=Pretrained', f'model.init_cfg.checkpoint={address}']}  # fmt: skip
    tool, argv = 'test', ['det.py', address]
    if way in settings:
        tool, argv = 'train', ['det.py', '--work-dir', 'refused', '--cfg-options', *settings[way]]
    with pytest.raises(
        SystemExit, match=r'^error: switchnorm://plain\.pth: .*neither an SN nor a BatchNorm layer .*weight'
    ):
        import_tool(tool).main(argv)


@pytest.mark.parametrize(
    'name, argv, message',
    [
        ('train', ['none.py'], r"config 'none\.py' is no file"),
        ('test', ['full/loop.py', 'det.py'], r'full/loop\.py inherits from itself'),
        ('train', ['full/orphan.py'], r'full/orphan\.py cannot be read: .*gone\.py'),
        ('train', ['det.py', '--resume', 'none.pth'], r"checkpoint 'none\.pth' is no file"),
        ('train', ['det.py', '--resume', '--work-dir', 'full'], r"that full/last_checkpoint names, '' is no file"),
        ('train', ['det.py', '--auto-scale-lr'], r'--auto-scale-lr: det\.py .*base_batch_size'),
        ('train', ['det.py', '--amp'], '--amp needs a GPU'),
        ('train', ['det.py', '--cfg-options', 'norm_cfg.type=BN'], r'norm_cfg\.type.*model\.backbone\.norm_cfg'),
        ('train', ['det.py', '--cfg-options', 'default_scope=mmnone'], r"default_scope='mmnone'.*not installed"),
        ('train', ['det.py', '--launcher', 'horovod'], "invalid choice: 'horovod'"),
        ('train', ['det.py', '--resume', 'switchnorm://none.pth'], r"'switchnorm://none\.pth' is no file"),
        ('train', ['det.py', '--cfg-options', 'load_from=none.pth'], r"load_from 'none\.pth' is no file"),
        (
            'train',
            ['det.py', '--cfg-options', 'model.init_cfg.checkpoint=switchnorm://none.pth'],
            r"model\.init_cfg\.checkpoint 'switchnorm://none\.pth' is no file \(from ",
        ),
        ('test', ['det.py', 'none.pth'], r"checkpoint 'none\.pth' is no file"),
        ('test', ['det.py', 'switchnorm://none.pth'], r"checkpoint 'switchnorm://none\.pth' is no file"),
        ('test', ['det.py', 'det.py', '--out', 'x.json'], r'--out x\.json: .*\.pkl'),
        ('test', ['seg.py', 'seg.py', '--out', 'x.pkl'], r'--out x\.pkl: mmseg .*folder'),
        ('test', ['seg.py', 'seg.py', '--tta', '--cfg-options', 'tta_model=None'], '--tta needs tta_model'),
        ('test', ['det.py', 'det.py', '--show-dir', 'x', '--cfg-options', 'default_scope=mmcv'], 'mmdet and mmseg'),
        (
            'test',
            ['seg.py', 'seg.py', '--show-dir', 'x', '--cfg-options', 'default_hooks.visualization=None'],
            "visualization=dict.type='SegVisualizationHook'",
        ),
        ('test', ['seg.py', 'seg.py', '--show-dir', 'x', '--cfg-options', 'visualizer.vis_backends=[]'], 'LocalVisB'),
        ('test', ['seg.py', 'seg.py', '--show-dir', 'x', '--show'], 'not both'),
    ],
)
def test_wrong_input_ends_before_any_work(place, import_tool, monkeypatch, capsys, name, argv, message):
    monkeypatch.chdir(place)
    if '--amp' in argv and torch.cuda.is_available():
        pytest.skip('has a GPU')
    Path('full').mkdir(exist_ok=True)
    Path('full/last_checkpoint').write_text('')  # as a full disk leaves it
    Path('full/loop.py').write_text("_base_ = './loop.py'")
    Path('full/orphan.py').write_text("_base_ = './gone.py'")
    before = sorted(place.rglob('*'))
    with pytest.raises(SystemExit) as ended:
        import_tool(name).main(argv)
    assert ended.value.code == 2
    assert re.search(message, ' '.join(capsys.readouterr().err.split()))
    assert sorted(place.rglob('*')) == before


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh'])
def test_scripts_say_how_to_call_them(tmp_path, script):
    assert f'{script} ' in call(tmp_path, TOOLS / script, 'config.py', fails=True)


@pytest.mark.parametrize('kind', ['train', 'test'])
def test_slurm_scripts_start_the_tool_under_srun(tmp_path, monkeypatch, kind):
    """With an srun that does what Slurm's does with its command: run it."""
    (tmp_path / 'srun').write_text('#!/bin/sh\necho "$@"\nwhile [ "$1" != python ]; do shift; done\nexec "$@"\n')
    (tmp_path / 'srun').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv('GPUS', '2')
    out = call(tmp_path, TOOLS / f'slurm_{kind}.sh', 'part', 'job', 'no config.py', 'last', fails=True)
    assert '-p part --job-name=job --gres=gpu:8 --ntasks=2' in out
    assert ("config 'no config.py' is no file" if kind == 'train' else "checkpoint 'last' is no file") in out


@pytest.mark.parametrize(
    'argv, message',
    [
        (['plot_ratios', 'none.pth'], "plot_ratios.py: error: source 'none.pth' is no file"),
        ([], 'where TOOL is one of average_stats, convert_checkpoint, '),
        (['common'], 'usage: python -m sn_openmmlab TOOL ...'),
    ],
)
def test_tools_of_the_installed_package(import_tool, monkeypatch, capsys, argv, message):
    monkeypatch.setattr(sys, 'argv', ['sn_openmmlab', *argv])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module('sn_openmmlab.__main__').main()
    assert message in f'{ended.value}{capsys.readouterr().err}'
