# FCN R-18-D8 with SN on CamVid (480 x 360, 11 classes) at half size: a template for data of your own.
# Any set of images and label maps of the same names will do: change data_root, metainfo and the sizes. A label map is a
# PNG of one channel that holds each pixel's index into `classes`, and 255 where a pixel is to be ignored.
#
#   data/camvid/images/{train,val}/NAME.jpg
#   data/camvid/annotations/{train,val}/NAME.png
_base_ = [
    '../_base_/models/fcn_r50-d8_sn.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_20k.py',
]

data_root = 'data/camvid/'
metainfo = dict(
    classes=(
        'sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'vehicle', 'pedestrian', 'bicyclist',
    ),
    palette=[
        [70, 130, 180], [70, 70, 70], [153, 153, 153], [128, 64, 128], [244, 35, 232], [107, 142, 35],
        [220, 220, 0], [190, 153, 153], [0, 0, 142], [220, 20, 60], [119, 11, 32],
    ],
)  # fmt: skip
scale = (240, 180)  # width, height
crop_size = (180, 240)  # height, width
num_classes = len(metainfo['classes'])

data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained='torchvision://resnet18',  # None trains from scratch
    backbone=dict(depth=18, norm_eval=True),  # statistics of the checkpoint; from scratch False
    decode_head=dict(in_channels=512, channels=128, num_classes=num_classes),
    auxiliary_head=dict(in_channels=256, channels=64, num_classes=num_classes),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=scale, ratio_range=(0.75, 1.75), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations'),  # after Resize: predictions are compared at the image's own size
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=(int(scale[0] * r), int(scale[1] * r)), keep_ratio=True)
                for r in (0.75, 1.0, 1.25, 1.5)
            ],
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
dataset = dict(type='BaseSegDataset', data_root=data_root, metainfo=metainfo)
train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'), pipeline=train_pipeline, **dataset
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path='images/val', seg_map_path='annotations/val'), pipeline=test_pipeline, **dataset
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

# no weight decay on weight, bias and the importance ratios' logits
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
