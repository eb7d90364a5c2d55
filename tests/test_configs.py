"""Every config that ships: it parses, builds, has SN in every norm place, and spares norms from weight decay."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from sn_openmmlab import SwitchNorm

CONFIGS = Path(__file__).parent.parent / 'configs'
SHIPPED = sorted(p for p in CONFIGS.glob('**/*.py') if '_base_' not in p.parts)


def build(config):
    init_default_scope(config.default_scope)
    with torch.device('meta'):
        return MODELS.build(config.model)


def foreign_norms(model):
    """Names of norm layers that are neither SN nor the holder of an SN layer's batch statistics."""
    own = {id(m.bn) for m in model.modules() if isinstance(m, SwitchNorm)}
    kinds = (_NormBase, nn.GroupNorm, nn.LayerNorm)
    return [
        name
        for name, m in model.named_modules()
        if isinstance(m, kinds) and not isinstance(m, SwitchNorm) and id(m) not in own
    ]


@pytest.mark.parametrize('path', SHIPPED, ids=lambda p: p.stem)
def test_sn_stands_in_every_norm_place(path):
    config = Config.fromfile(path)
    model = build(config)
    assert any(isinstance(m, SwitchNorm) for m in model.modules())
    assert not foreign_norms(model)
    assert config.custom_imports.imports == ['sn_openmmlab']

    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    no_decay = {id(p) for g in wrapper.optimizer.param_groups if g['weight_decay'] == 0 for p in g['params']}
    norms = [p for m in model.modules() if isinstance(m, SwitchNorm) for p in m.parameters() if p.requires_grad]
    assert norms and all(id(p) in no_decay for p in norms)
    assert any(g['weight_decay'] > 0 for g in wrapper.optimizer.param_groups)


@pytest.mark.parametrize('name', ['faster-rcnn', 'mask-rcnn'])
def test_the_papers_coco_recipe(name):
    config = Config.fromfile(CONFIGS / f'mmdet/sn/{name}_r50_fpn_sn-all_2x_coco.py')
    assert config.train_cfg.max_epochs == 24 and config.param_scheduler[1].milestones == [16, 22]
    assert config.optim_wrapper.optimizer.lr == 0.02 and config.train_dataloader.batch_size == 2
    backbone = build(config).backbone
    backbone.train()
    assert not backbone.norm_eval
    frozen = {n for n, m in backbone.named_modules() if isinstance(m, SwitchNorm) and not m.weight.requires_grad}
    assert frozen == {n for n in frozen if n == 'bn1' or n.startswith('layer1')} and len(frozen) == 11
    modes = {n: m.training for n, m in backbone.named_modules() if isinstance(m, _BatchNorm)}
    assert {n.removesuffix('.bn') for n, training in modes.items() if not training} == frozen
