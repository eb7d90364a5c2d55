# ResNet-50 with BN at 8 GPUs x 32 images.
_base_ = './resnet50_sn_8xb32_in1k.py'

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(backbone=dict(norm_cfg=norm_cfg))
