# Faster R-CNN R-50 FPN with SN in every norm place, from random weights: nothing is frozen, and 270k iterations.
_base_ = './faster-rcnn_r50_fpn_sn-all_2x_coco.py'

model = dict(backbone=dict(frozen_stages=-1, zero_init_residual=False, init_cfg=None))

max_epochs = 36
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[28, 34], gamma=0.1),
]
