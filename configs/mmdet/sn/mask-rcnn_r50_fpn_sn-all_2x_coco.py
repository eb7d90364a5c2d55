# Mask R-CNN R-50 FPN with SN in backbone, FPN, a 4conv1fc box head and the mask head (Luo et al., ICLR 2019).
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py'

custom_imports = dict(imports=['sn_openmmlab'], allow_failed_imports=False)

norm_cfg = dict(type='SN', requires_grad=True)
model = dict(
    # the stem and the first residual stage are frozen (frozen_stages=1, inherited): stages 1 and 2 as the paper counts.
    # The paper's row starts from an ImageNet model trained with SN, whose statistics move. The inherited BN checkpoint
    # loads too, but take ..._sn-all-norm-eval_2x_coco.py for it (README.md).
    backbone=dict(norm_cfg=norm_cfg, norm_eval=False),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)

# no weight decay on weight, bias and the importance ratios' logits
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
