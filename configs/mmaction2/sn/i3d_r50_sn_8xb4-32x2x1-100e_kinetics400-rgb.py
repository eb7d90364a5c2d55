# I3D ResNet-50 with SN at 8 GPUs x 4 clips, and half the learning rate.
_base_ = './i3d_r50_sn_8xb8-32x2x1-100e_kinetics400-rgb.py'

train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=0.005))
auto_scale_lr = dict(base_batch_size=32)
