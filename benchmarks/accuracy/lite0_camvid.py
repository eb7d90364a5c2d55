"""Road scenes in CamVid, finetuned: EfficientNet-Lite0 of ImageNet, with BatchNorm, and an FCN head."""

from mmengine.config import Config

from benchmarks.accuracy import camvid
from benchmarks.accuracy.camvid import METRICS
from benchmarks.accuracy.lite0 import CHANNELS, LABELS, NORMS, finetune

__all__ = ['EPOCHS', 'LABELS', 'LICENCE', 'LR', 'METRICS', 'NAME', 'NORMS', 'config']

NAME = 'CamVid, finetuned'
LICENCE = f'{camvid.LICENCE}; start: EfficientNet-Lite0 of Google, Apache 2.0'
EPOCHS = 8
LR = 0.01  # at 2 images a step


def config(way: dict, images: int, lr: float, epochs: int) -> Config:
    """The config from scratch with another backbone and a head for it, at one scale."""
    cfg = camvid.config(way['head'], images, lr, epochs)
    finetune(cfg, way)
    head = cfg.model.decode_head
    head.update(in_channels=CHANNELS[1:], in_index=(1, 2, 3), input_transform='resize_concat')
    head.update(num_convs=1, concat_input=False)
    cfg.model.auxiliary_head = None
    cfg.tta_model = None
    return cfg
