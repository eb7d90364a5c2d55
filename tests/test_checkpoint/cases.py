"""What tests of converting checkpoints share."""

import torch
from mmengine.registry import MODELS, init_default_scope

SN_CFG = dict(type='SN')


def save(content, path):
    torch.save(content, path)
    return path


def build(config, scope='mmdet'):
    init_default_scope(scope)
    return MODELS.build(config)


def backbone(kind='mmdet.ResNet', depth=50, norm_cfg=SN_CFG, **kwargs):
    return build(dict(type=kind, depth=depth, norm_cfg=norm_cfg, **kwargs), kind.split('.')[0])
