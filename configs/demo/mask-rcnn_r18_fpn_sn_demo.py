# Mask R-CNN with SN in every norm place, trained from scratch in minutes on two CPU cores: `make demo`.
# The data come from tools/make_demo_data.py. Everything is the usual Mask R-CNN's, only narrower, for smaller images
# and with fewer proposals.
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::_base_/default_runtime.py']
custom_imports = dict(imports=['sn_openmmlab'], allow_failed_imports=False)

norm_cfg = dict(type='SN', requires_grad=True)
roi_layer = dict(sampling_ratio=1)
num_classes = 4
model = dict(
    backbone=dict(
        depth=18,
        stem_channels=32,
        base_channels=32,
        frozen_stages=-1,
        norm_cfg=norm_cfg,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=48, num_outs=4, norm_cfg=norm_cfg),
    rpn_head=dict(in_channels=48, feat_channels=48, anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=48, roi_layer=roi_layer),
        bbox_head=dict(
            type='Shared4Conv1FCBBoxHead',
            in_channels=48,
            conv_out_channels=32,
            fc_out_channels=256,
            num_classes=num_classes,
            reg_class_agnostic=True,
            norm_cfg=norm_cfg,
        ),
        mask_roi_extractor=dict(out_channels=48, roi_layer=roi_layer),
        mask_head=dict(num_convs=2, in_channels=48, conv_out_channels=32, num_classes=num_classes, norm_cfg=norm_cfg),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=100, max_per_img=100),
        rcnn=dict(sampler=dict(num=24, pos_fraction=0.33)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=100), rcnn=dict(max_per_img=50)),
)

data_root = 'data/demo/'
metainfo = dict(
    classes=('circle', 'rectangle', 'triangle', 'star'),
    palette=[(230, 60, 60), (60, 180, 75), (60, 100, 230), (250, 190, 30)],
)
resize = dict(type='Resize', scale=(128, 128), keep_ratio=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    resize,
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    resize,
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),  # to draw them; unscaled, as predictions become
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,  # loading takes 6 % of an iteration, and a process of its own would want a third core
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='images/train/'),
        metainfo=metainfo,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='images/val/'),
        metainfo=metainfo,
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', ann_file=data_root + 'annotations/instances_val.json', metric=['bbox', 'segm'])
test_evaluator = val_evaluator

max_epochs = 5
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=2)  # the demo evaluates the last one
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.05, foreach=True),
    paramwise_cfg=dict(norm_decay_mult=0.0),
    clip_grad=dict(max_norm=5, norm_type=2),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', T_max=max_epochs, eta_min_ratio=0.01, convert_to_iter_based=True),
]

default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=max_epochs), visualization=dict(score_thr=0.5))
custom_hooks = [dict(type='SNRatioHook', interval=20, by_epoch=False)]
visualizer = dict(alpha=0.4, line_width=2)
randomness = dict(seed=0)
