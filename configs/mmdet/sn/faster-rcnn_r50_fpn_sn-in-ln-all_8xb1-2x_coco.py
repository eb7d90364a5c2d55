# Faster R-CNN R-50 FPN for one image per GPU, where BN equals IN: SN without BN, "(8, 1)" in the paper.
_base_ = './faster-rcnn_r50_fpn_sn-all_2x_coco.py'

norm_cfg = dict(type='SN', normalizers=('in', 'ln'), requires_grad=True)
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg)),
)

# half the images per step: half the learning rate
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(optimizer=dict(lr=0.01))
auto_scale_lr = dict(base_batch_size=8)
