# Dilated ResNet-50 on ADE20K: SN with the batch statistics of all GPUs.
_base_ = './fcn_r50-d8_sn_8xb2-100k_ade20k.py'

norm_cfg = dict(type='SyncSN', requires_grad=True)
model = dict(
    backbone=dict(norm_cfg=norm_cfg), decode_head=dict(norm_cfg=norm_cfg), auxiliary_head=dict(norm_cfg=norm_cfg)
)
