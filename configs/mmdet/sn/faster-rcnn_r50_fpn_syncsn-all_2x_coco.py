# Faster R-CNN R-50 FPN with SN in every norm place, its batch statistics synchronised over all GPUs.
_base_ = './faster-rcnn_r50_fpn_sn-all_2x_coco.py'

norm_cfg = dict(type='SyncSN', requires_grad=True)
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg)),
)
