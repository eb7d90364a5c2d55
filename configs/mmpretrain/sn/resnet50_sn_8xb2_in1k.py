# ResNet-50 with SN at 8 GPUs x 2 images.
_base_ = './resnet50_sn_8xb32_in1k.py'

train_dataloader = dict(batch_size=2)
optim_wrapper = dict(optimizer=dict(lr=0.00625))  # 0.1 for 256 images
auto_scale_lr = dict(base_batch_size=16)
