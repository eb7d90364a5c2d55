# DeepLabV3 R-50-D8 with SN, in mmseg's standard 80k schedule on Cityscapes.
_base_ = 'mmseg::deeplabv3/deeplabv3_r50-d8_4xb2-80k_cityscapes-512x1024.py'

custom_imports = dict(imports=['sn_openmmlab'], allow_failed_imports=False)

norm_cfg = dict(type='SN', requires_grad=True)
model = dict(
    # the recipe for the inherited BN checkpoint: the backbone starts near BN and keeps its statistics
    backbone=dict(norm_cfg=norm_cfg, norm_eval=True),
    decode_head=dict(norm_cfg=norm_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg),
)

# no weight decay on weight, bias and the importance ratios' logits
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
