# Faster R-CNN R-50 FPN with SN in every norm place, and frozen statistics in the backbone.
_base_ = './faster-rcnn_r50_fpn_sn-all_2x_coco.py'

model = dict(
    backbone=dict(
        norm_eval=True,
        # statistics of a BN network fit only what that network computes, so start close to it; the ratios of a
        # checkpoint with SN take the place of these
        norm_cfg=dict(init_ratios=(0.05, 0.05, 0.9)),
    )
)
