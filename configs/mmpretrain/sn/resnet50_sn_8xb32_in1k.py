# ResNet-50 with SN on ImageNet (Luo et al., ICLR 2019): 100 epochs, learning rate 0.1 for 8 GPUs x 32 images.
# Inherited: the last norm of each block starts at 0 (zero_init_residual), and the rate falls at 30, 60 and 90 epochs.
_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'

custom_imports = dict(imports=['sn_openmmlab'], allow_failed_imports=False)

norm_cfg = dict(type='SN', requires_grad=True)
model = dict(backbone=dict(norm_cfg=norm_cfg))

# no weight decay on weight, bias and the importance ratios' logits
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
