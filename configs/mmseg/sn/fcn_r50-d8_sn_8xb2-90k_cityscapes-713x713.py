# Dilated ResNet-50 with SN everywhere, on Cityscapes with 8 GPUs of 2 images (Luo et al., ICLR 2019).
_base_ = [
    '../_base_/models/fcn_r50-d8_sn.py',
    '../_base_/datasets/cityscapes_713x713.py',
    '../_base_/schedules/schedule_90k.py',
    'mmseg::_base_/default_runtime.py',
]

crop_size = (713, 713)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    # 713 is 8 x 89 + 1: the corners of input and features fall together
    decode_head=dict(align_corners=True),
    auxiliary_head=dict(align_corners=True),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(476, 476)),
)
