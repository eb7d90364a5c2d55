# What faster-rcnn_r50-c4_sn-all_2x_coco.py is compared with: the same, with BN, frozen as is usual for C4.
_base_ = './faster-rcnn_r50-c4_sn-all_2x_coco.py'

norm_cfg = dict(type='BN', requires_grad=False)
model = dict(
    backbone=dict(norm_cfg=norm_cfg, norm_eval=True),
    roi_head=dict(shared_head=dict(norm_cfg=norm_cfg, norm_eval=True)),
)
