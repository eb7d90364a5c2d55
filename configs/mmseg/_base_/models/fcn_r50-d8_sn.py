# The segmentation network of Luo et al. (ICLR 2019), with SN: ResNet-50 with original 7x7 stem, dilated to stride 8;
# one 3x3 convolution of 512 channels and a classifier; an auxiliary head on stage 3, weighted 0.4.
_base_ = 'mmseg::_base_/models/fcn_r50-d8.py'

custom_imports = dict(imports=['sn_openmmlab'], allow_failed_imports=False)

norm_cfg = dict(type='SN', requires_grad=True)
loss_decode = dict(avg_non_ignore=True)  # padding would dilute the loss otherwise
model = dict(
    # The paper starts from an ImageNet model trained with SN, whose statistics move. This BN checkpoint loads too, near
    # BN; for it freeze its statistics: backbone.norm_eval=True (README.md beside the configs).
    # mmseg's networks have ResNetV1c, whose stem is three 3x3 convolutions, and a checkpoint of that
    pretrained='torchvision://resnet50',
    backbone=dict(type='ResNet', norm_cfg=norm_cfg),
    decode_head=dict(num_convs=1, concat_input=False, norm_cfg=norm_cfg, loss_decode=loss_decode),
    auxiliary_head=dict(norm_cfg=norm_cfg, loss_decode=loss_decode),
)
