"""A training step of each family of COCO configs, on COCO-format data, through the config's own pipeline and loader."""

import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from support import CONFIGS, norms

sys.path.insert(0, str(Path(__file__).parent.parent / 'tools'))

import make_demo_data  # noqa: E402

SAMPLE = [
    'cascade-mask-rcnn_r50_fpn_sn-all_20e',
    'faster-rcnn_r50-c4_sn-all_2x',
    'faster-rcnn_r50-scratch_fpn_sn-all_3x',
    'faster-rcnn_r50_fpn_bn-all_2x',
    'faster-rcnn_r50_fpn_gn-head_2x',
    'faster-rcnn_r50_fpn_sn-all-norm-eval_2x',
    'faster-rcnn_r50_fpn_sn-in-ln-all_8xb1-2x',
    'mask-rcnn_r50_fpn_gn-all_2x',
    'mask-rcnn_r50_fpn_sn-head_2x',
    'mask-rcnn_r50_fpn_syncsn-all_2x',
    'retinanet_r50_fpn_sn-all_2x',
]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Four pictures in COCO's folders: annotations/instances_train2017.json and train2017/."""
    out = tmp_path_factory.mktemp('data') / 'coco'
    make_demo_data.make_demo_data(out, train=4, val=1, size=(64, 96))
    (out / 'images/train').rename(out / 'train2017')
    (out / 'annotations/instances_train.json').rename(out / 'annotations/instances_train2017.json')
    return out


@pytest.mark.parametrize('name', SAMPLE)
def test_one_step_on_coco_format_data(name, data):
    torch.manual_seed(0)
    config = Config.fromfile(CONFIGS / f'mmdet/sn/{name}_coco.py')
    init_default_scope('mmdet')
    config.merge_from_dict(small(config))
    dataset = config.train_dataloader.dataset
    dataset.update(data_root=str(data), metainfo=dict(classes=make_demo_data.CLASSES), filter_cfg=None)
    dataset.pipeline[2].scale = (96, 64)
    loader = Runner.build_dataloader(config.train_dataloader, seed=0)
    model = MODELS.build(config.model)
    model.train()
    optim_wrapper = build_optim_wrapper(model, config.optim_wrapper)
    layers = norms(model)
    trained = {n for n, m in layers.items() if any(p.requires_grad for p in m.parameters())}
    before = {n: m.weight.clone() for n, m in layers.items()}

    batch = next(iter(loader))
    losses = model.train_step(batch, optim_wrapper)

    assert len(batch['inputs']) == config.train_dataloader.batch_size
    assert sum(len(sample.gt_instances) for sample in batch['data_samples']) > 0
    assert all(torch.as_tensor(v).isfinite().all() for v in losses.values())
    assert all(p.isfinite().all() for p in model.parameters())
    frozen = {n for n in layers if n in ('backbone.bn1', 'backbone.gn1') or n.startswith('backbone.layer1.')}
    assert trained == set(layers) - (set() if 'scratch' in name else frozen)
    moved = {n for n, m in layers.items() if not torch.equal(m.weight, before[n])}
    assert moved <= trained
    # not all: no box of these small pictures belongs to the coarsest levels
    assert len(moved) > 0.7 * len(trained)
    assert all(p in optim_wrapper.optimizer.state for n in trained for p in layers[n].parameters())


def small(config):
    """Settings that make a step cheap: few proposals, no checkpoint, no worker processes."""
    settings = {
        'model.backbone.init_cfg': None,
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
    }
    if 'roi_head' in config.model:
        train = config.model.train_cfg
        train.rpn_proposal.update(nms_pre=100, max_per_img=50)
        for stage in train.rcnn if isinstance(train.rcnn, list) else [train.rcnn]:
            stage.sampler.num = 16
        if 'shared_head' in config.model.roi_head:
            settings['model.roi_head.shared_head.init_cfg'] = None
    return settings
