"""Road scenes in CamVid (367 training and 101 validation images, 11 classes): FCN R-18-D8 from scratch.

Network, data and augmentation are those of the config for users, ``configs/mmseg/sn/fcn_r18-d8_sn_..._camvid-...py``:
images of half size (240 x 180), validated against label maps of full size.
"""

from mmengine.config import Config

import sn_openmmlab  # noqa: F401  (lets the config find mmseg's)
from benchmarks.accuracy.data import ROOT, data_root

NAME = 'CamVid'
LICENCE = 'CamVid (Brostow et al., 2009), CC BY-NC 4.0: not for commercial use'
METRICS = {'mIoU': 'mIoU', 'aAcc': 'pixel accuracy'}
EPOCHS = 8
LR = 0.01  # at 2 images a step


def config(norm_cfg: dict, images: int, lr: float, epochs: int) -> Config:
    """Model, data, evaluator, optimizer and schedule; the runner adds the rest."""
    cfg = Config.fromfile(ROOT / 'configs/mmseg/sn/fcn_r18-d8_sn_1xb2-20k_camvid-180x240.py')
    cfg.model.pretrained = None
    cfg.model.backbone.norm_eval = False
    for part in 'backbone', 'decode_head', 'auxiliary_head':
        cfg.model[part].norm_cfg = norm_cfg
    cfg.data_root = data_root('camvid')
    for loader in cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader:
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = cfg.data_root
    cfg.train_dataloader.update(batch_size=images, sampler=dict(type='DefaultSampler', shuffle=True))
    cfg.optim_wrapper.optimizer.lr = lr
    # custom keys take the place of norm_decay_mult; here so that an option of a cell needs to set lr_mult only:
    # --variant logits10 --cfg-options optim_wrapper.paramwise_cfg.custom_keys.{mean,var}_weight.lr_mult=10
    logits = dict(lr_mult=1.0, decay_mult=0.0)
    cfg.optim_wrapper.paramwise_cfg.custom_keys = dict(mean_weight=logits, var_weight=logits)
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200 // images),
        dict(type='PolyLR', power=0.9, eta_min=0.0, end=epochs, convert_to_iter_based=True),
    ]
    # the config's count iterations, the runner's epochs
    for name in ('train_cfg', 'default_hooks', 'log_processor'):
        del cfg._cfg_dict[name]
    return cfg
