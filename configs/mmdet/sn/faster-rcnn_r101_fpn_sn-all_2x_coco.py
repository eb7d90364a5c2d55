# Faster R-CNN R-101 FPN with SN in backbone, FPN and heads.
_base_ = './faster-rcnn_r50_fpn_sn-all_2x_coco.py'

model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')))
