# I3D ResNet-50 with BN at 8 GPUs x 4 clips, from torchvision's ResNet-50.
_base_ = './i3d_r50_sn_8xb4-32x2x1-100e_kinetics400-rgb.py'

norm_cfg = dict(type='BN3d', requires_grad=True)
model = dict(backbone=dict(norm_cfg=norm_cfg, pretrained='torchvision://resnet50'))
