# What mask-rcnn_r50-scratch_fpn_sn-all_3x_coco.py is compared with: the same, with BN.
_base_ = './mask-rcnn_r50-scratch_fpn_sn-all_3x_coco.py'

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
