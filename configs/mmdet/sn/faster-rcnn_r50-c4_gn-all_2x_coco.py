# What faster-rcnn_r50-c4_sn-all_2x_coco.py is compared with: the same, with GN, and a checkpoint with GN.
_base_ = './faster-rcnn_r50-c4_sn-all_2x_coco.py'

norm_cfg = dict(type='GN', num_groups=32, requires_grad=True)
init_cfg = dict(checkpoint='open-mmlab://detectron/resnet50_gn')
model = dict(
    # as the checkpoint's images were
    data_preprocessor=dict(mean=[103.530, 116.280, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(norm_cfg=norm_cfg, init_cfg=init_cfg),
    roi_head=dict(shared_head=dict(norm_cfg=norm_cfg, init_cfg=init_cfg)),
)
