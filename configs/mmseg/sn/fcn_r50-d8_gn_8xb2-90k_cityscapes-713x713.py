# Dilated ResNet-50 on Cityscapes: the paper's other baseline, GN.
_base_ = './fcn_r50-d8_sn_8xb2-90k_cityscapes-713x713.py'

norm_cfg = dict(type='GN', num_groups=32, requires_grad=True)
# a ResNet-50 trained with GN: BN's checkpoint would miss nearly all of GN's weights. It takes BGR images.
data_preprocessor = dict(mean=[103.530, 116.280, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False)
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained='open-mmlab://detectron/resnet50_gn',
    backbone=dict(norm_cfg=norm_cfg),
    decode_head=dict(norm_cfg=norm_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg),
)
