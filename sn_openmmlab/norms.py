"""Which modules of a model are norm layers, and which part of the model they are in."""

from __future__ import annotations

from typing import Any

from mmengine.model import is_model_wrapper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .layers import SwitchNorm


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm layer of any kind."""
    if isinstance(module, SwitchNorm) or is_switchable(type(module)):
        return True
    return 'Norm' in type(module).__name__ and not [*module.children()]


def is_switchable(cls: type) -> bool:
    """Whether SN can replace a class of layers: a norm of maps (N, C, \\*) that is not SN already."""
    if issubclass(cls, SwitchNorm):
        return False
    return issubclass(cls, (_InstanceNorm, nn.GroupNorm)) or is_batch_norm(cls)


def is_batch_norm(cls: type) -> bool:
    """Whether a class is a BatchNorm: torch's, or mmcv's SyncBatchNorm, which does not derive from torch's."""
    return issubclass(cls, _BatchNorm) or any(map(is_mmcv_sync_bn, cls.__mro__))


def own_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules by name, without the children of SN layers, which only hold statistics."""
    inside = {id(m) for layer in model.modules() if isinstance(layer, SwitchNorm) for m in layer.children()}
    return [(name, module) for name, module in model.named_modules() if id(module) not in inside]


def unwrap(model: nn.Module) -> Any:
    """The model without a wrapper such as DistributedDataParallel: its names are those of checkpoints."""
    return model.module if is_model_wrapper(model) else model


def part_of(place: str) -> str:
    """The part ('backbone', 'neck' or 'head') that a place in ``cfg.model``, or a module's name, belongs to."""
    for name in place.split('.'):
        if name in ('backbone', 'image_encoder') or name.endswith('_backbone'):
            return 'backbone'
        if name == 'neck' or name.endswith('_neck'):
            return 'neck'
    return 'head'


def part_name(layer: str) -> str:
    """What figures and logs call the part of a layer: 'backbone', 'neck', or the head by name, such as 'box head'.

    A layer outside these, as in a checkpoint of a backbone alone, is in the part that its first name says.
    """
    names = layer.split('.')
    part = part_of(layer)
    if part != 'head':
        return part
    heads = [name for name in names if name.endswith('head')]
    return heads[-1].replace('bbox', 'box').replace('_', ' ') if heads else names[0]


def is_mmcv_sync_bn(cls: type) -> bool:
    """Whether a class is mmcv's SyncBatchNorm itself; told by its name, so that mmcv is not imported."""
    return cls.__module__ == 'mmcv.ops.sync_bn' and cls.__name__ == 'SyncBatchNorm'
