"""Statistics of fewer and fewer images: ResNet-20 on CIFAR-10 (a JPEG copy), 64 images a step.

Whatever the norm takes its statistics of, a step has 64 images, so that SGD is the same in all cells: *b2* normalizes 2
of them at a time, as 32 processes with 2 images each do. What does not depend on other images (GN, SN without BN) has
one cell. Trained on 10,000 images, tested on all 10,000 of the test set.

The images have been compressed with losses: accuracies are not comparable with published ones.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import DATASETS, MODELS
from torch import Tensor, nn

from benchmarks.accuracy.classify import Classifier, Samples, norm_layer, settings
from benchmarks.accuracy.data import data_root

NAME = 'CIFAR-10 (JPEG copy)'
LICENCE = 'CIFAR-10 (Krizhevsky, 2009), as JPEG; no licence stated'
TESTED = 10000  # samples
METRICS = {'accuracy': 'accuracy, %'}
IMAGES = 64
EPOCHS = 10
LR = 0.05  # at 64 images a step
SIZES = (64, 32, 16, 8, 4, 2)
NORMS = {
    **{f'BN-b{size}': dict(type='BN', images=size) for size in SIZES},
    **{f'SN-b{size}': dict(type='SN', images=size) for size in SIZES},
    'GN': dict(type='GN', num_groups=8),
    'SN-IN-LN': dict(type='SN', normalizers=('in', 'ln')),
}


def config(norm: dict, images: int, lr: float, epochs: int) -> Config:
    """Model, data, evaluator, optimizer and schedule; the runner adds the rest."""
    cfg = settings(dict(type='CIFAR10Images', data_root=data_root('cifar10'), size=10000), images, lr, epochs, 100)
    cfg.model = dict(type='CIFARResNet', norm=norm, border='reflect')
    return cfg


@DATASETS.register_module()
class CIFAR10Images(Samples):
    """The first ``size`` images of a split, which is shuffled, (3, 32, 32) uint8 in RGB; of the test set all."""

    def __init__(self, data_root: str, split: str, size: int) -> None:
        with np.load(f'{data_root}{split}.npz') as data:
            jpeg, ends, labels = data['jpeg'], data['end'], data['label']
        if split == 'train':
            ends, labels = ends[:size], labels[:size]
        starts = [0, *ends[:-1]]
        pictures = [cv2.imdecode(jpeg[start:end], cv2.IMREAD_COLOR)[..., ::-1] for start, end in zip(starts, ends)]
        images = np.stack(pictures).transpose(0, 3, 1, 2)
        super().__init__(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype('int64')))


class Augment(BaseDataPreprocessor):
    """Normalize with ImageNet's mean and deviation; in training shift by up to 4 pixels and flip each image.

    Args:
        border (str): What a shift brings in, by its name in ``F.pad``: ``'reflect'``, the image itself, or
            ``'constant'``, black, which the statistics of single images see in training and not in testing.
    """

    def __init__(self, border: str) -> None:
        super().__init__()
        self.border = border
        self.register_buffer('mean', torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1), persistent=False)

    def forward(self, data: dict, training: bool = False) -> dict:
        """Change the images of a batch."""
        data = self.cast_data(data)
        images = data['inputs']
        if training:
            n, _, height, width = images.shape
            top, left = torch.randint(0, 9, (2, n, 1))
            rows, columns = top + torch.arange(height), left + torch.arange(width)
            columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
            each = torch.arange(n)[:, None, None, None]
            channels = torch.arange(3)[None, :, None, None]
            images = F.pad(images, (4, 4, 4, 4), self.border)
            images = images[each, channels, rows[:, None, :, None], columns[:, None, None, :]]
        return dict(data, inputs=(images.float() - self.mean) / self.std)


class Block(nn.Module):
    """Two convolutions, and a shortcut without parameters."""

    def __init__(self, channels: int, out: int, stride: int, norm: dict) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = norm_layer(norm, out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = norm_layer(norm, out)
        self.stride, self.more = stride, out - channels

    def forward(self, x: Tensor) -> Tensor:
        """Add what the convolutions see."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        pad = (0, 0, 0, 0, self.more // 2, self.more - self.more // 2)
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], pad))


@MODELS.register_module()
class CIFARResNet(Classifier):
    """The ResNet of 6n + 2 layers for CIFAR (He et al., CVPR 2016, section 4.2), of 16, 32 and 64 channels."""

    def __init__(self, norm: dict, border: str, depth: int = 20, classes: int = 10) -> None:
        n, widths = (depth - 2) // 6, (16, 32, 64)
        blocks, channels = [], widths[0]
        for stage, width in enumerate(widths):
            for i in range(n):
                blocks.append(Block(channels, width, 2 if stage and not i else 1, norm))
                channels = width
        stem = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), norm_layer(norm, widths[0]), nn.ReLU()]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
        super().__init__(nn.Sequential(*stem, *blocks, *head), Augment(border))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
