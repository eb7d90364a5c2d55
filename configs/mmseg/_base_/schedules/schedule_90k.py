# The schedule of PSPNet (Zhao et al., CVPR 2017) for Cityscapes, for 16 images a step.
_base_ = 'mmseg::_base_/schedules/schedule_80k.py'

max_iters = 90_000
optimizer = dict(lr=0.01, weight_decay=0.0001)
optim_wrapper = dict(
    optimizer=optimizer,
    paramwise_cfg=dict(norm_decay_mult=0.0),  # none on weight, bias and the importance ratios' logits
)
param_scheduler = [dict(type='PolyLR', eta_min=0.0, power=0.9, begin=0, end=max_iters, by_epoch=False)]
train_cfg = dict(max_iters=max_iters, val_interval=10_000)
default_hooks = dict(checkpoint=dict(interval=10_000))
auto_scale_lr = dict(enable=False, base_batch_size=16)
