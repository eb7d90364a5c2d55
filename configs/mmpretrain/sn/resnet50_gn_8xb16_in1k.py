# ResNet-50 with GN at 8 GPUs x 16 images.
_base_ = './resnet50_sn_8xb16_in1k.py'

norm_cfg = dict(type='GN', num_groups=32, requires_grad=True)
model = dict(backbone=dict(norm_cfg=norm_cfg))
