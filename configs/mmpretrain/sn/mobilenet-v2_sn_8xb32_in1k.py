# MobileNetV2 with SN, in mmpretrain's own schedule of 300 epochs.
_base_ = 'mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py'

custom_imports = dict(imports=['sn_openmmlab'], allow_failed_imports=False)

norm_cfg = dict(type='SN', requires_grad=True)
model = dict(backbone=dict(norm_cfg=norm_cfg))

# no weight decay on weight, bias and the importance ratios' logits
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
