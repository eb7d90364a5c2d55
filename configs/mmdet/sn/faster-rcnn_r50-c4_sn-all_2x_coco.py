# Faster R-CNN R-50 C4 with SN in the backbone and in its last stage, which is the box head.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py'

custom_imports = dict(imports=['sn_openmmlab'], allow_failed_imports=False)

norm_cfg = dict(type='SN', requires_grad=True)
init_cfg = dict(type='Pretrained', checkpoint='torchvision://resnet50')
model = dict(
    # torchvision's network and images instead of caffe's
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(style='pytorch', norm_cfg=norm_cfg, norm_eval=False, init_cfg=init_cfg),
    roi_head=dict(shared_head=dict(style='pytorch', norm_cfg=norm_cfg, norm_eval=False, init_cfg=init_cfg)),
)

# no weight decay on weight, bias and the importance ratios' logits
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))

max_epochs = 24
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[16, 22], gamma=0.1),
]
