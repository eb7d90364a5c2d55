# ResNet-101 with SN, as the ResNet-50.
_base_ = './resnet50_sn_8xb32_in1k.py'

model = dict(backbone=dict(depth=101))
