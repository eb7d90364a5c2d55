# What faster-rcnn_r50_fpn_sn-head_2x_coco.py is compared with: the same, with GN.
_base_ = './faster-rcnn_r50_fpn_sn-head_2x_coco.py'

norm_cfg = dict(type='GN', num_groups=32, requires_grad=True)
model = dict(
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg)),
)
