# ResNet-50 with GN at 8 GPUs x 1 image.
_base_ = './resnet50_sn-in-ln_8xb1_in1k.py'

norm_cfg = dict(_delete_=True, type='GN', num_groups=32, requires_grad=True)
model = dict(backbone=dict(norm_cfg=norm_cfg))
