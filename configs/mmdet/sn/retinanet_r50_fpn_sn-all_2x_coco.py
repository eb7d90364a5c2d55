# RetinaNet R-50 FPN with SN in backbone, FPN and head.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_imports = dict(imports=['sn_openmmlab'], allow_failed_imports=False)

norm_cfg = dict(type='SN', requires_grad=True)
model = dict(
    # the stem and the first residual stage are frozen (frozen_stages=1, inherited)
    backbone=dict(norm_cfg=norm_cfg, norm_eval=False),
    neck=dict(norm_cfg=norm_cfg),
    # the five levels share convolutions, not norms: one moving average cannot stand for five levels
    bbox_head=dict(type='RetinaSepBNHead', num_ins=5, norm_cfg=norm_cfg),
)

# no weight decay on weight, bias and the importance ratios' logits; the shared convolutions are met five times
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0, bypass_duplicate=True))
