# ADE20K in whole images: short sides drawn from 300 to 575, tested at 450, --tta at 300, 400, 500 and 600, flipped too.
# No crop: the two images of a GPU are padded to one size by the model's data_preprocessor.
_base_ = 'mmseg::_base_/datasets/ade20k.py'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomChoiceResize', scales=[(1000, short) for short in range(300, 576, 25)], keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 450), keep_ratio=True),
    dict(type='LoadAnnotations'),  # after Resize: predictions are compared at the image's own size
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(2048, short), keep_ratio=True) for short in (300, 400, 500, 600)],
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
