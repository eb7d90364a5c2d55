# Dilated ResNet-50 with SN everywhere, on ADE20K with 8 GPUs of 2 images (Luo et al., ICLR 2019).
_base_ = [
    '../_base_/models/fcn_r50-d8_sn.py',
    '../_base_/datasets/ade20k_short-300-575.py',
    '../_base_/schedules/schedule_100k.py',
    'mmseg::_base_/default_runtime.py',
]

data_preprocessor = dict(size_divisor=8)  # pads to the larger image of the two
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
