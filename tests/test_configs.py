"""Every config that ships: it parses, builds, has the norms its name says, and spares norms from weight decay."""

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from support import CONFIGS, norms
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sn_openmmlab import SwitchNorm, SwitchNorm3d, SyncSN

SHIPPED = sorted(p for p in CONFIGS.glob('**/*.py') if '_base_' not in p.parts)
COCO = sorted((CONFIGS / 'mmdet/sn').glob('*.py'))
IMAGENET = sorted((CONFIGS / 'mmpretrain/sn').glob('*.py'))
KINETICS = sorted((CONFIGS / 'mmaction2/sn').glob('*.py'))
NORMS = dict(sn=SwitchNorm, syncsn=SyncSN, bn=nn.BatchNorm2d, syncbn=SyncBatchNorm, gn=nn.GroupNorm)
IN_3D = dict(sn=SwitchNorm3d, bn=nn.BatchNorm3d, gn=nn.GroupNorm)


def read(path):
    """A config, if the library that it inherits from is there."""
    library = dict(mmpretrain='mmpretrain', mmaction2='mmaction').get(path.parts[-3])
    if library:
        import_or_skip(library)
    return Config.fromfile(path)


def import_or_skip(library):
    """mmpretrain and mmaction2 are no part of the development environment: requirements/sweep.txt says why."""
    spec = importlib.util.find_spec(library)
    if library == 'mmaction' and spec and not Path(spec.origin).with_name('models').joinpath('localizers/drn').is_dir():
        for name in 'mmaction.models.localizers.drn', 'mmaction.models.localizers.drn.drn':  # lacks in 1.2.0 on PyPI
            sys.modules.setdefault(name, types.SimpleNamespace(DRN=None))
    try:
        importlib.import_module(f'{library}.models')
    except (ImportError, RuntimeError, AssertionError) as error:  # torchvision's, and mmaction2's check of versions
        pytest.skip(f'{library} does not import here ({str(error).splitlines()[0]}): requirements/sweep.txt')


def build(config):
    init_default_scope(config.default_scope)
    with torch.device('cpu' if config.default_scope == 'mmpretrain' else 'meta'):  # there mmpretrain cannot compute
        return MODELS.build(config.model)


@pytest.mark.parametrize('path', SHIPPED, ids=lambda p: p.stem)
def test_norms_are_those_of_the_name(path):
    config = read(path)
    kind, without_bn, where = re.search(
        r'_(sn|syncsn|bn|syncbn|gn)(-in-ln)?(-head|-frozen)?(?=[-_])', path.stem
    ).groups()
    assert config.custom_imports.imports == ['sn_openmmlab']
    model = build(config)
    layers = norms(model)
    if where == '-head':
        backbone = [layers.pop(name) for name in list(layers) if name.startswith('backbone.')]
        model.train()
        assert backbone and all(type(m) is nn.BatchNorm2d and not m.training for m in backbone)
    kinds = IN_3D if config.default_scope == 'mmaction' else NORMS
    assert layers and {type(m) for m in layers.values()} == {kinds[kind]}
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
    config = read(path)
    child = tmp_path / 'child.py'
    child.write_text(f"_base_ = 'sn_openmmlab::{path.relative_to(CONFIGS)}'")
    assert Config.fromfile(child).to_dict() == config.to_dict()


# -- ImageNet and Kinetics ------------------------------------------------------------------------------------------

SETTINGS = [(8, 32), (8, 16), (8, 8), (8, 4), (8, 2), (1, 16), (1, 32), (8, 1), (1, 8)]


def imagenet(norm, gpus, images):
    return CONFIGS / f'mmpretrain/sn/resnet50_{norm}_{gpus}xb{images}_in1k.py'


def test_batch_norm_of_single_images_has_no_config():
    assert not imagenet('bn', 8, 1).exists()  # the row that the paper has not


@pytest.mark.parametrize(
    'norm, gpus, images',
    [(norm, *setting) for norm in ('sn', 'bn', 'gn') for setting in SETTINGS if (norm, *setting) != ('bn', 8, 1)],
)
def test_the_papers_imagenet_recipe(norm, gpus, images):
    name = 'sn-in-ln' if norm == 'sn' and (gpus, images) == (8, 1) else norm
    path = imagenet(name, gpus, images)
    assert path.exists()
    config = read(path)
    assert config.train_dataloader.batch_size == images and config.auto_scale_lr.base_batch_size == gpus * images
    optimizer = config.optim_wrapper.optimizer
    assert optimizer.lr == 0.1 * gpus * images / 256 and optimizer.weight_decay == 1e-4
    assert config.train_cfg.max_epochs == 100 and config.param_scheduler.milestones == [30, 60, 90]
    assert config.model.backbone.type == 'ResNet' and build(config).backbone.zero_init_residual


def test_the_cosine_of_120_epochs():
    config = read(CONFIGS / 'mmpretrain/sn/resnet50_sn_8xb32-coslr-120e_in1k.py')
    warm, cosine = config.param_scheduler
    assert warm.end == cosine.begin == 5
    assert cosine.end == cosine.begin + cosine.T_max == config.train_cfg.max_epochs == 120


@pytest.mark.parametrize('path', KINETICS, ids=lambda p: p.stem)
def test_the_kinetics_recipe(path):
    config = read(path)
    clips = int(re.search(r'8xb(\d)', path.stem)[1])
    assert config.train_dataloader.batch_size == clips and config.auto_scale_lr.base_batch_size == 8 * clips
    assert config.optim_wrapper.optimizer.lr == 0.01 * clips / 8


def without_norms(tree):
    """A config without what may differ between rows of a table: norms, checkpoint, and images as that one's were."""
    if isinstance(tree, dict):
        differs = ('norm_cfg', 'norm_eval', 'init_cfg', 'pretrained', 'data_preprocessor')
        return {k: without_norms(v) for k, v in tree.items() if k not in differs}
    return [*map(without_norms, tree)] if isinstance(tree, list) else tree


@pytest.mark.parametrize(
    'path',
    [p for p in (*COCO, *IMAGENET, *KINETICS) if re.search('_(gn|bn|syncsn)[-_]|norm-eval', p.stem)],
    ids=lambda p: p.stem,
)
def test_compared_configs_differ_in_the_norm_alone(path):
    twin = re.sub('_(gn|bn|syncsn)([-_])', r'_sn\2', path.name).replace('-frozen', '-all').replace('-norm-eval', '')
    twin = twin.replace('sn_8xb1_', 'sn-in-ln_8xb1_')
    assert twin != path.name
    config, other = read(path).to_dict(), read(path.with_name(twin)).to_dict()
    assert config['model'] != other['model']
    assert without_norms(config) == without_norms(other)


def test_collections_have_names_of_their_own():
    """mim keys them by name: of two with one name the second's data sets and README would be said of both."""
    index = yaml.safe_load((CONFIGS.parent / 'model-index.yml').read_text())['Import']
    files = [yaml.safe_load((CONFIGS.parent / path).read_text()) for path in index]
    names = [collection['Name'] for file in files for collection in file['Collections']]
    assert len(names) == len(set(names)) == len(files)
    assert all(m['In Collection'] == file['Collections'][0]['Name'] for file in files for m in file['Models'])


@pytest.mark.parametrize('family', ['mmdet', 'mmpretrain', 'mmaction2'])
def test_every_config_is_listed_with_its_schedule(family):
    folder = CONFIGS / family / 'sn'
    paths = sorted(folder.glob('*.py'))
    models = {m['Name']: m for m in yaml.safe_load((folder / 'metafile.yml').read_text())['Models']}
    readme = (folder / 'README.md').read_text()
    assert list(models) == [p.stem for p in paths]
    assert {*re.findall(r'\]\(([^/)]*\.py)\)', readme)} == {p.name for p in paths}
    for path in paths:
        assert models[path.stem]['Config'] == str(path.relative_to(CONFIGS.parent))
    for path in paths:
        config, metadata = read(path), models[path.stem]['Metadata']
        assert metadata['Epochs'] == config.train_cfg.max_epochs
        if family != 'mmdet':
            assert metadata['Batch Size'] == config.auto_scale_lr.base_batch_size
