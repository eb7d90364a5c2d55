"""Every config that ships: it parses, builds, has the norms its name says, and spares norms from weight decay."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from sn_openmmlab import SwitchNorm, SyncSN

CONFIGS = Path(__file__).parent.parent / 'configs'
SHIPPED = sorted(p for p in CONFIGS.glob('**/*.py') if '_base_' not in p.parts)
COCO = sorted((CONFIGS / 'mmdet/sn').glob('*.py'))
NORMS = dict(sn=SwitchNorm, syncsn=SyncSN, bn=nn.BatchNorm2d, syncbn=SyncBatchNorm, gn=nn.GroupNorm)


def build(config):
    init_default_scope(config.default_scope)
    with torch.device('meta'):
        return MODELS.build(config.model)


def norms(model):
    """Norm layers by name, without the holders of SN layers' batch statistics."""
    own = {id(m.bn) for m in model.modules() if isinstance(m, SwitchNorm)}
    kinds = (_NormBase, nn.GroupNorm, nn.LayerNorm)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and id(m) not in own}


def foreign_norms(model):
    """Names of norm layers that are not SN."""
    return [name for name, m in norms(model).items() if not isinstance(m, SwitchNorm)]


@pytest.mark.parametrize('path', SHIPPED, ids=lambda p: p.stem)
def test_norms_are_those_of_the_name(path):
    kind, without_bn, where = re.search(
        r'_(sn|syncsn|bn|syncbn|gn)(-in-ln)?(-head|-frozen)?(?=[-_])', path.stem
    ).groups()
    config = Config.fromfile(path)
    assert config.custom_imports.imports == ['sn_openmmlab']
    model = build(config)
    layers = norms(model)
    if where == '-head':
        backbone = [layers.pop(name) for name in list(layers) if name.startswith('backbone.')]
        model.train()
        assert backbone and all(type(m) is nn.BatchNorm2d and not m.training for m in backbone)
    assert layers and {type(m) for m in layers.values()} == {NORMS[kind]}
    if kind.endswith('sn'):
        assert all((m.bn is None) == bool(without_bn) for m in layers.values())

    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    trained = [p for m in layers.values() for p in m.parameters() if p.requires_grad]
    assert bool(trained) == (where != '-frozen') and all(decay[id(p)] == 0 for p in trained)
    assert max(decay.values()) > 0


# -- COCO -----------------------------------------------------------------------------------------------------------


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
    assert {re.sub('[.]bn$', '', n) for n, training in modes.items() if not training} == frozen


@pytest.mark.parametrize('name', ['faster-rcnn', 'mask-rcnn'])
def test_from_scratch_nothing_is_frozen_or_loaded(name):
    config = Config.fromfile(CONFIGS / f'mmdet/sn/{name}_r50-scratch_fpn_sn-all_3x_coco.py')
    assert config.train_cfg.max_epochs == 36 and config.param_scheduler[1].milestones == [28, 34]
    assert config.model.backbone.init_cfg is None
    model = build(config)
    model.train()
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize('name', ['faster-rcnn', 'mask-rcnn'])
def test_one_image_per_gpu(name):
    config = Config.fromfile(CONFIGS / f'mmdet/sn/{name}_r50_fpn_sn-in-ln-all_8xb1-2x_coco.py')
    assert config.train_dataloader.batch_size == 1 and config.train_cfg.max_epochs == 24
    assert config.optim_wrapper.optimizer.lr == 0.01 and config.auto_scale_lr.base_batch_size == 8


@pytest.mark.parametrize('name', ['faster-rcnn', 'mask-rcnn'])
def test_frozen_statistics_in_the_backbone(name):
    model = build(Config.fromfile(CONFIGS / f'mmdet/sn/{name}_r50_fpn_sn-all-norm-eval_2x_coco.py'))
    model.train()
    for layer, m in norms(model).items():
        assert m.bn.training != layer.startswith('backbone.')
        assert m.init_ratios is None  # near BN where its weights are loaded


@pytest.mark.parametrize('path', sorted((CONFIGS / 'mmseg/sn').glob('[pdu]*.py')), ids=lambda p: p.stem)
def test_mmsegs_networks_follow_the_recipe_for_batch_norm_checkpoints(path):
    model = build(Config.fromfile(path))
    model.train()
    frozen = {layer.partition('.')[0] for layer, m in norms(model).items() if not m.bn.training}
    assert frozen == {'backbone'}


@pytest.mark.parametrize('path', SHIPPED, ids=lambda p: p.stem)
def test_inheriting_changes_nothing(path, tmp_path):
    """No class is looked for in a scope of this package, which has none."""
    child = tmp_path / 'child.py'
    child.write_text(f"_base_ = 'sn_openmmlab::{path.relative_to(CONFIGS)}'")
    assert Config.fromfile(child).to_dict() == Config.fromfile(path).to_dict()


def without_norms(tree):
    """A config without what may differ between rows of a table: norms, checkpoint, and images as that one's were."""
    if isinstance(tree, dict):
        differs = ('norm_cfg', 'norm_eval', 'init_cfg', 'data_preprocessor')
        return {k: without_norms(v) for k, v in tree.items() if k not in differs}
    return [*map(without_norms, tree)] if isinstance(tree, list) else tree


@pytest.mark.parametrize(
    'path', [p for p in COCO if re.search('_(gn|bn|syncsn)-|norm-eval', p.stem)], ids=lambda p: p.stem
)
def test_compared_configs_differ_in_the_norm_alone(path):
    twin = re.sub('_(gn|bn|syncsn)-', '_sn-', path.name).replace('-frozen', '-all').replace('-norm-eval', '')
    assert twin != path.name
    config, other = Config.fromfile(path).to_dict(), Config.fromfile(path.with_name(twin)).to_dict()
    assert config['model'] != other['model']
    assert without_norms(config) == without_norms(other)


def test_collections_have_names_of_their_own():
    """mim keys them by name: of two with one name the second's data sets and README would be said of both."""
    index = yaml.safe_load((CONFIGS.parent / 'model-index.yml').read_text())['Import']
    files = [yaml.safe_load((CONFIGS.parent / path).read_text()) for path in index]
    names = [collection['Name'] for file in files for collection in file['Collections']]
    assert len(names) == len(set(names)) == len(files)
    assert all(m['In Collection'] == file['Collections'][0]['Name'] for file in files for m in file['Models'])


def test_every_coco_config_is_listed_with_its_schedule():
    text = (CONFIGS / 'mmdet/sn/metafile.yml').read_text()
    models = {m['Name']: m for m in yaml.safe_load(text)['Models']}
    readme = (CONFIGS / 'mmdet/sn/README.md').read_text()
    assert list(models) == [p.stem for p in COCO]
    for path in COCO:
        model = models[path.stem]
        assert model['Config'] == str(path.relative_to(CONFIGS.parent))
        assert model['Metadata']['Epochs'] == Config.fromfile(path).train_cfg.max_epochs
        assert f']({path.name})' in readme
    assert {*re.findall(r'\]\(([^/)]*\.py)\)', readme)} == {p.name for p in COCO}
