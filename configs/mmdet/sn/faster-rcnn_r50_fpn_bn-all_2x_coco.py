# What faster-rcnn_r50_fpn_sn-all_2x_coco.py is compared with: the same, with BN trained in every place.
_base_ = './faster-rcnn_r50_fpn_sn-all_2x_coco.py'

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg)),
)
