"""Training steps of the ImageNet and Kinetics configs by mmpretrain and mmaction2, and the way of their checkpoints."""

import re

import cv2
import numpy as np
import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from support import CONFIGS, norms
from test_configs import read

from sn_openmmlab import SwitchNorm
from sn_openmmlab.checkpoint import convert_checkpoint

OPTIONS = re.compile(r'(model\.\S+)=(\S+)')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """A folder a class, as ImageNet has them."""
    root, rng = tmp_path_factory.mktemp('imagenet'), np.random.default_rng(0)
    for name in 'n01440764', 'n01443537':
        (root / 'train' / name).mkdir(parents=True)
        for i in range(2):
            cv2.imwrite(str(root / f'train/{name}/{i}.JPEG'), rng.integers(0, 255, (70, 90, 3), dtype=np.uint8))
    return root


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    """Two videos and the list of them."""
    root, rng = tmp_path_factory.mktemp('kinetics'), np.random.default_rng(0)
    for i in range(2):
        video = cv2.VideoWriter(str(root / f'{i}.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 10, (80, 64))
        assert video.isOpened()
        for _ in range(20):
            video.write(rng.integers(0, 255, (64, 80, 3), dtype=np.uint8))
        video.release()
    (root / 'list.txt').write_text('0.avi 3\n1.avi 7\n')
    return root


def step(config):
    """One training step by the config's own pipeline, loader and optimizer; and what all models have to be after it."""
    torch.manual_seed(0)
    init_default_scope(config.default_scope)
    loader = Runner.build_dataloader(config.train_dataloader, seed=0)
    model = MODELS.build(config.model)
    model.init_weights()
    model.train()
    optim_wrapper = build_optim_wrapper(model, config.optim_wrapper)
    before = {name: p.clone() for name, p in model.named_parameters()}
    batch = next(iter(loader))
    losses = model.train_step(batch, optim_wrapper)
    assert len(batch['inputs']) == config.train_dataloader.batch_size
    assert all(torch.as_tensor(v).isfinite().all() for v in losses.values())
    assert all(p.isfinite().all() for p in model.parameters())
    layers = norms(model)
    own = [(f'{name}.{key}', p) for name, m in layers.items() for key, p in m.named_parameters()]
    assert all(p in optim_wrapper.optimizer.state for _, p in own)
    moved = sum(not torch.equal(p, before[name]) for name, p in own)
    assert moved > 0.2 * len(own)  # nothing arrives behind the last norms of blocks, whose weights start at 0


@pytest.mark.parametrize(
    'name',
    ['resnet50_sn_8xb2', 'resnet50_sn-in-ln_8xb1', 'resnet50_bn_8xb2', 'resnet50_gn_8xb2', 'mobilenet-v2_sn_8xb32'],
)
def test_one_step_on_images_in_imagenets_folders(name, images):
    config = read(CONFIGS / f'mmpretrain/sn/{name}_in1k.py')
    config.model.data_preprocessor = config.data_preprocessor  # as Runner does
    loader = config.train_dataloader
    loader.update(num_workers=0, persistent_workers=False, batch_size=min(loader.batch_size, 4))
    # ImageNet's own class insists on 1000 folders
    pipeline = loader.dataset.pipeline
    loader.dataset = dict(type='CustomDataset', data_root=str(images), data_prefix='train', pipeline=pipeline)
    pipeline[1].scale = 64
    step(config)


def test_the_last_norm_of_each_block_starts_at_zero():
    config = read(CONFIGS / 'mmpretrain/sn/resnet50_sn_8xb32_in1k.py')
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    model.init_weights()
    start = {name: m.weight.unique().tolist() for name, m in norms(model).items()}
    assert start == {name: [0.0 if name.endswith('bn3') else 1.0] for name in start} and len(start) == 53


# -- from ImageNet to other tasks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'library, config', [('mmdet', 'faster-rcnn_r50_fpn_sn-all_2x_coco'), ('mmseg', 'fcn_r50-d8_sn_8xb2-100k_ade20k')]
)
def test_the_checkpoint_is_the_backbone_of_detectors_and_segmentors(library, config, tmp_path):
    """By the command that README.md gives."""
    imagenet = read(CONFIGS / 'mmpretrain/sn/resnet50_sn_8xb32_in1k.py')
    init_default_scope('mmpretrain')
    trained = randomized(MODELS.build(imagenet.model))
    torch.save(dict(state_dict=trained.state_dict(), meta={}), tmp_path / 'epoch_100.pth')

    readme = (CONFIGS / 'mmpretrain/sn/README.md').read_text()
    command = re.search(rf'dist_train.sh configs/{library}/sn/{config}\.py 8 .*?(?=\ntools|\n```)', readme, re.S)[0]
    options = dict(OPTIONS.findall(command))
    assert options['model.backbone.init_cfg.checkpoint'].endswith('/resnet50_sn_8xb32_in1k/epoch_100.pth')
    options['model.backbone.init_cfg.checkpoint'] = str(tmp_path / 'epoch_100.pth')
    cfg = read(CONFIGS / library / f'sn/{config}.py')
    cfg.merge_from_dict({key: None if value == 'None' else value for key, value in options.items()})
    assert not cfg.model.get('pretrained')
    init_default_scope(library)
    backbone = MODELS.build(cfg.model.backbone)
    backbone.init_weights()
    expected = trained.backbone.state_dict()
    got = backbone.state_dict()
    assert got.keys() == expected.keys()
    assert [key for key in got if not torch.equal(got[key], expected[key])] == []


def randomized(model):
    """A model with nothing at its start."""
    generator = torch.Generator().manual_seed(0)
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():
            value.data.uniform_(0.5, 2, generator=generator)
    return model


# -- Kinetics ---------------------------------------------------------------------------------------------------------


def kinetics(name, pretrained=None):
    config = read(CONFIGS / f'mmaction2/sn/{name}-32x2x1-100e_kinetics400-rgb.py')
    config.model.backbone.pretrained = pretrained
    return config


@pytest.mark.parametrize('name', ['i3d_r50_sn_8xb4', 'i3d_r50_bn_8xb8', 'i3d_r50_gn_8xb4'])
def test_one_step_on_clips(name, clips):
    pytest.importorskip('decord', reason='the configs read videos by decord')
    config = kinetics(name)
    loader = config.train_dataloader
    loader.update(num_workers=0, persistent_workers=False, batch_size=2)
    loader.dataset.update(ann_file=str(clips / 'list.txt'), data_prefix=dict(video=str(clips)))
    loader.dataset.pipeline[1].clip_len = 8
    for transform in loader.dataset.pipeline:
        if transform.type == 'Resize' and transform.scale == (224, 224):
            transform.scale = (64, 64)
    step(config)


def test_an_imagenet_model_is_inflated(tmp_path, monkeypatch):
    """With statistics and importance ratios; from mmpretrain's names and from torchvision's."""
    config = kinetics('i3d_r50_sn_8xb8', str(tmp_path / 'sn.pth'))
    torchvision = pytest.importorskip('torchvision')
    batch_norm = randomized(torchvision.models.resnet50()).state_dict()
    flat, _ = convert_checkpoint(batch_norm, init_ratios=(0.001, 0.001, 0.998))
    whole = {f'backbone.{key}': value for key, value in flat.items()}
    torch.save(dict(state_dict=dict(whole, **{'head.fc.weight': torch.ones(2)})), tmp_path / 'epoch_100.pth')
    readme = (CONFIGS / 'mmaction2/sn/README.md').read_text()
    code = {}
    exec(re.search(r'```python\n(.*?)```', readme, re.S)[1], code)
    code['without_head'](tmp_path / 'epoch_100.pth', tmp_path / 'sn.pth')

    init_default_scope('mmaction')
    backbone = MODELS.build(config.model.backbone)
    backbone.init_weights()
    layers = {name: m for name, m in backbone.named_modules() if isinstance(m, SwitchNorm)}
    assert len(layers) == 53
    for name, layer in layers.items():
        there = name.replace('downsample.bn', 'downsample.1').replace('.bn', '').replace('conv', 'bn')
        for key, value in layer.state_dict().items():
            if 'num_batches' not in key:
                torch.testing.assert_close(value, flat[f'{there}.{key}'], msg=f'{name}.{key}')
    expected = flat['conv1.weight'][:, :, None] / 5
    torch.testing.assert_close(backbone.conv1.conv.weight, expected.expand_as(backbone.conv1.conv.weight))
