# ResNet-50 with SN, the longer schedule: 120 epochs, 5 of them of warm-up, and a cosine.
_base_ = './resnet50_sn_8xb32_in1k.py'

train_cfg = dict(max_epochs=120)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=5, end=120, T_max=115, convert_to_iter_based=True),
]
