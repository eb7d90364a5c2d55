"""Norms of volumes: a small 3-D ResNet on ModelNet10's shapes, 32 a step, as a stand-in for video.

*b8* and *b4* normalize 8 and 4 of the 32 shapes at a time, as many as the paper has clips on a GPU. ModelNet10
(Princeton) is for academic use; 3,991 training and 908 test shapes of 32 x 32 x 32 voxels.
"""

from __future__ import annotations

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import DATASETS, MODELS
from torch import Tensor, nn

from benchmarks.accuracy.classify import Classifier, Samples, norm_layer, settings
from benchmarks.accuracy.data import data_root

NAME = 'ModelNet10'
LICENCE = 'ModelNet10 (Wu et al., 2015), for academic use'
TESTED = 908  # samples
METRICS = {'accuracy': 'accuracy, %'}
IMAGES = 32
EPOCHS = 30
LR = 0.05  # at 32 shapes a step
NORMS = {
    **{f'BN-b{size}': dict(type='BN3d', images=size) for size in (8, 4)},
    **{f'SN-b{size}': dict(type='SN3d', images=size) for size in (8, 4)},
    'GN': dict(type='GN', num_groups=8),
}


def config(norm: dict, images: int, lr: float, epochs: int) -> Config:
    """Model, data, evaluator, optimizer and schedule; the runner adds the rest."""
    cfg = settings(dict(type='ModelNet10Shapes', data_root=data_root('modelnet10')), images, lr, epochs, 50)
    cfg.model = dict(type='VoxelResNet', norm=norm)
    return cfg


@DATASETS.register_module()
class ModelNet10Shapes(Samples):
    """The shapes of a split, (1, 32, 32, 32) uint8 of 0 and 1."""

    def __init__(self, data_root: str, split: str) -> None:
        with np.load(f'{data_root}modelnet10_32.npz') as data:
            bits, labels = data[f'{split}_bits'], data[f'{split}_label']
        voxels = np.unpackbits(bits, axis=1).reshape(-1, 1, 32, 32, 32)
        super().__init__(torch.from_numpy(voxels), torch.from_numpy(labels.astype('int64')))


class Move(BaseDataPreprocessor):
    """Voxels to -0.5 and 1.5; in training turn each shape upright, mirror it and shift it by up to 2 voxels."""

    def forward(self, data: dict, training: bool = False) -> dict:
        """Change the shapes of a batch."""
        data = self.cast_data(data)
        shapes = data['inputs']
        if training:
            shapes = torch.stack([_moved(shape) for shape in shapes])
        return dict(data, inputs=shapes.float() * 2 - 0.5)


def _moved(shape: Tensor) -> Tensor:
    shape = torch.rot90(shape, int(torch.randint(4, ())), (1, 2))  # about the last axis, which is up
    if torch.rand(()) < 0.5:
        shape = shape.flip(1)
    return torch.roll(shape, torch.randint(-2, 3, (3,)).tolist(), (1, 2, 3))


class Block(nn.Module):
    """Two convolutions, and a shortcut that projects where the size changes."""

    def __init__(self, channels: int, out: int, stride: int, norm: dict) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(channels, out, 3, stride, 1, bias=False),
            norm_layer(norm, out),
            nn.ReLU(),
            nn.Conv3d(out, out, 3, 1, 1, bias=False),
            norm_layer(norm, out),
        )
        self.shortcut = nn.Identity()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv3d(channels, out, 1, stride, bias=False), norm_layer(norm, out))

    def forward(self, x: Tensor) -> Tensor:
        """Add what the convolutions see."""
        return torch.relu(self.layers(x) + self.shortcut(x))


@MODELS.register_module()
class VoxelResNet(Classifier):
    """Four blocks of 16 to 64 channels."""

    def __init__(self, norm: dict, width: int = 16, classes: int = 10) -> None:
        network = nn.Sequential(
            nn.Conv3d(1, width, 5, 2, 2, bias=False),
            norm_layer(norm, width),
            nn.ReLU(),
            Block(width, width, 2, norm),
            Block(width, 2 * width, 1, norm),
            Block(2 * width, 4 * width, 2, norm),
            Block(4 * width, 4 * width, 1, norm),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(4 * width, classes),
        )
        super().__init__(network, Move())
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out')
