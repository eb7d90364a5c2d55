"""Blood cells in BCCD (205 training and 87 validation images, 3 classes): Faster R-CNN R-18 FPN from scratch.

Everything is mmdet's Faster R-CNN but narrower, for images of half size (320 x 240), with a norm in backbone, FPN and a
4conv1fc box head.
"""

from pathlib import Path

import mmdet
from mmengine.config import Config

from benchmarks.accuracy.data import data_root

NAME = 'BCCD'
LICENCE = 'BCCD (github.com/Shenggan/BCCD_Dataset), MIT'
METRICS = {'coco/bbox_mAP': 'box AP', 'coco/bbox_mAP_50': 'box AP50'}
EPOCHS = 12
LR = 0.02  # at 2 images a step


def config(norm_cfg: dict, images: int, lr: float, epochs: int) -> Config:
    """Model, data, evaluator, optimizer and schedule; the runner adds the rest."""
    cfg = Config.fromfile(Path(mmdet.__file__).parent / '.mim/configs/_base_/models/faster-rcnn_r50_fpn.py')
    cfg.merge_from_dict(dict(model=_model(norm_cfg), default_scope='mmdet', **_data(images)))
    cfg.optim_wrapper = dict(
        optimizer=dict(type='SGD', lr=lr, momentum=0.9, weight_decay=1e-4),
        paramwise_cfg=dict(norm_decay_mult=0.0),
        clip_grad=dict(max_norm=10, norm_type=2),
    )
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200 // images),
        dict(type='MultiStepLR', milestones=[round(epochs * 2 / 3), round(epochs * 8 / 9)], gamma=0.1),
    ]
    return cfg


def _model(norm_cfg: dict) -> dict:
    width = 64
    return dict(
        backbone=dict(
            depth=18,
            frozen_stages=-1,
            norm_eval=False,
            zero_init_residual=False,
            init_cfg=None,
            norm_cfg=norm_cfg,
        ),
        # cells are 10 to 120 pixels wide at this size
        neck=dict(in_channels=[64, 128, 256, 512], out_channels=width, num_outs=4, norm_cfg=norm_cfg),
        rpn_head=dict(
            in_channels=width, feat_channels=width, anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32])
        ),
        roi_head=dict(
            bbox_roi_extractor=dict(out_channels=width),
            bbox_head=dict(
                type='Shared4Conv1FCBBoxHead',
                in_channels=width,
                conv_out_channels=width,
                fc_out_channels=256,
                num_classes=3,
                norm_cfg=norm_cfg,
            ),
        ),
        train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=250), rcnn=dict(sampler=dict(num=64))),
        test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=100)),
    )


def _data(images: int) -> dict:
    root = data_root('bccd')
    load, annotate = dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)
    resize = dict(type='Resize', scale=(320, 240), keep_ratio=True)
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')

    def loader(split, batch_size, **pipeline):
        return dict(
            batch_size=batch_size,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=split == 'train'),
            dataset=dict(
                type='CocoDataset',
                data_root=root,
                ann_file=f'annotations/{split}.json',
                data_prefix=dict(img=f'{split}/'),
                metainfo=dict(classes=('RBC', 'WBC', 'Platelets')),
                test_mode=split == 'val',
                **pipeline,
            ),
        )

    flips = dict(type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal'])
    return dict(
        train_dataloader=loader('train', images, pipeline=[load, annotate, resize, flips, dict(type='PackDetInputs')]),
        val_dataloader=loader('val', 4, pipeline=[load, resize, annotate, dict(type='PackDetInputs', meta_keys=keys)]),
        val_evaluator=dict(type='CocoMetric', ann_file=f'{root}annotations/val.json', metric='bbox'),
    )
