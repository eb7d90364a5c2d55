# I3D ResNet-50 with GN at 8 GPUs x 8 clips. Of a ResNet-50 with GN mmaction2 inflates the convolutions alone.
_base_ = './i3d_r50_sn_8xb8-32x2x1-100e_kinetics400-rgb.py'

norm_cfg = dict(type='GN', num_groups=32, requires_grad=True)
model = dict(backbone=dict(norm_cfg=norm_cfg, pretrained='resnet50_gn.pth'))
