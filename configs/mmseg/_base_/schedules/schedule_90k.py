# The schedule of PSPNet (Zhao et al., CVPR 2017) for Cityscapes, for 16 images a step.
_base_ = './schedule_100k.py'

max_iters = 90_000
optimizer = dict(lr=0.01)
optim_wrapper = dict(optimizer=optimizer)
param_scheduler = [dict(type='PolyLR', eta_min=0.0, power=0.9, begin=0, end=max_iters, by_epoch=False)]
train_cfg = dict(max_iters=max_iters)
