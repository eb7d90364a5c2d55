# Dilated ResNet-50 on Cityscapes: SN with the batch statistics of all GPUs.
_base_ = './fcn_r50-d8_sn_8xb2-90k_cityscapes-713x713.py'

norm_cfg = dict(type='SyncSN', requires_grad=True)
model = dict(
    backbone=dict(norm_cfg=norm_cfg), decode_head=dict(norm_cfg=norm_cfg), auxiliary_head=dict(norm_cfg=norm_cfg)
)
