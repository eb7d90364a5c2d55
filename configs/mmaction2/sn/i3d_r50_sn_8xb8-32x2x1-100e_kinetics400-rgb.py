# I3D ResNet-50 with SN on Kinetics-400, at 8 GPUs x 8 clips: the larger of the paper's two settings.
_base_ = 'mmaction::recognition/i3d/i3d_imagenet-pretrained-r50_8xb8-32x2x1-100e_kinetics400-rgb.py'

custom_imports = dict(imports=['sn_openmmlab'], allow_failed_imports=False)

norm_cfg = dict(type='SN3d', requires_grad=True)
# a ResNet-50 with SN, whose weights are inflated; README.md beside this file says how to make it, of BN's too
model = dict(backbone=dict(norm_cfg=norm_cfg, pretrained='resnet50_sn.pth'))

# no weight decay on weight, bias and the importance ratios' logits
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
