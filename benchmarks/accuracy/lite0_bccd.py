"""Blood cells in BCCD, finetuned: EfficientNet-Lite0 of ImageNet, with BatchNorm, as backbone of a Faster R-CNN FPN."""

from mmengine.config import Config

from benchmarks.accuracy import bccd
from benchmarks.accuracy.bccd import METRICS
from benchmarks.accuracy.lite0 import CHANNELS, LABELS, NORMS, finetune

__all__ = ['EPOCHS', 'LABELS', 'LICENCE', 'LR', 'METRICS', 'NAME', 'NORMS', 'config']

NAME = 'BCCD, finetuned'
LICENCE = f'{bccd.LICENCE}; start: EfficientNet-Lite0 of Google, Apache 2.0'
EPOCHS = 12
LR = 0.01  # at 2 images a step


def config(way: dict, images: int, lr: float, epochs: int) -> Config:
    """The config from scratch with another backbone."""
    cfg = bccd.config(way['head'], images, lr, epochs)
    finetune(cfg, way)
    cfg.model.neck.in_channels = CHANNELS
    return cfg
