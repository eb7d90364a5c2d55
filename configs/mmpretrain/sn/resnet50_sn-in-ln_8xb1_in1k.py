# ResNet-50 with SN without BN at 8 GPUs x 1 image, of which BN would be IN.
_base_ = './resnet50_sn_8xb32_in1k.py'

norm_cfg = dict(type='SN', normalizers=('in', 'ln'), requires_grad=True)
model = dict(backbone=dict(norm_cfg=norm_cfg))

train_dataloader = dict(batch_size=1)
optim_wrapper = dict(optimizer=dict(lr=0.003125))  # 0.1 for 256 images
auto_scale_lr = dict(base_batch_size=8)
