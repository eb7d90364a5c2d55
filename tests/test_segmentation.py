"""configs/mmseg: the paper's recipes, training on data of the datasets' own layout, and testing with --tta."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import mmseg
import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import nn

from sn_openmmlab import SwitchNorm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.accuracy import run  # noqa: E402

FAMILY = ROOT / 'configs/mmseg/sn'
CONFIGS = sorted(FAMILY.glob('*.py'))
ADE20K = 'fcn_r50-d8_{}_8xb2-100k_ade20k'
CITYSCAPES = 'fcn_r50-d8_{}_8xb2-90k_cityscapes-713x713'
BASELINES = ('syncsn', 'syncbn', 'gn', 'sn-in-ln')


def read(stem):
    return Config.fromfile(FAMILY / f'{stem}.py')


# -- the recipes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_every_config_can_test_at_several_scales(path):
    config = Config.fromfile(path)
    assert config.tta_model.type == 'SegTTAModel'
    resizes, flips = config.tta_pipeline[-1].transforms[:2]
    assert len(resizes) >= 4 and {f.prob for f in flips} == {0, 1}


@pytest.mark.parametrize('stem', [ADE20K, CITYSCAPES], ids=['ade20k', 'cityscapes'])
def test_the_papers_network(stem):
    config = read(stem.format('sn'))
    init_default_scope('mmseg')
    with torch.device('meta'):
        model = MODELS.build(config.model)
        stages = model.backbone(torch.empty(1, 3, 713, 713))
        logits = model.decode_head(stages)
    assert model.backbone.conv1.kernel_size == (7, 7) and not model.backbone.deep_stem
    assert [tuple(s.shape[1:]) for s in stages[2:]] == [(1024, 90, 90), (2048, 90, 90)]
    head = [m for m in model.decode_head.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.kernel_size, m.out_channels) for m in head] == [((1, 1), logits.shape[1]), ((3, 3), 512)]
    assert model.decode_head.loss_decode.loss_weight == 1
    assert model.auxiliary_head.loss_decode.loss_weight == 0.4 and model.auxiliary_head.in_index == 2
    assert config.train_dataloader.batch_size == 2 and config.model.pretrained == 'torchvision://resnet50'
    assert config.optim_wrapper.optimizer.weight_decay == 1e-4
    [policy] = config.param_scheduler
    assert policy.type == 'PolyLR' and policy.power == 0.9 and policy.end == config.train_cfg.max_iters
    if stem is ADE20K:
        assert config.train_cfg.max_iters == 100_000 and config.optim_wrapper.optimizer.lr == 0.02
        sides = [min(scale) for scale in config.train_dataloader.dataset.pipeline[2].scales]
        assert (min(sides), max(sides)) == (300, 575)
    else:
        [crop] = [t for t in config.train_dataloader.dataset.pipeline if t.type == 'RandomCrop']
        # padding would hide a smaller crop
        assert crop.crop_size == config.model.data_preprocessor.size == config.model.test_cfg.crop_size == (713, 713)


@pytest.mark.parametrize('stem', [ADE20K, CITYSCAPES], ids=['ade20k', 'cityscapes'])
@pytest.mark.parametrize('norm', BASELINES)
def test_what_is_compared_differs_in_the_norm_only(stem, norm):
    """And, for GN, in the ImageNet model, with the images that this one was trained on."""
    different = set(differences(read(stem.format('sn')).to_dict(), read(stem.format(norm)).to_dict()))
    parts = {f'model.{part}.norm_cfg' for part in ('backbone', 'decode_head', 'auxiliary_head')}
    allowed = parts | {'norm_cfg'}
    if norm == 'gn':
        allowed |= {'model.pretrained', 'model.data_preprocessor', 'data_preprocessor'}
    assert parts <= {key.rpartition('.')[0] for key in different}
    assert [key for key in different if not {key, key.rpartition('.')[0]} & allowed] == []


def differences(a, b, prefix=''):
    """Dotted keys whose values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in {**a, **b} for d in differences(a.get(k), b.get(k), f'{prefix}.{k}' if prefix else k)]
    return [] if a == b else [prefix]


def test_readme_and_metafile_know_every_config():
    models = yaml.safe_load((FAMILY / 'metafile.yaml').read_text())['Models']
    assert sorted(m['Name'] for m in models) == [p.stem for p in CONFIGS]
    assert all((ROOT / m['Config']).stem == m['Name'] and (ROOT / m['Config']).is_file() for m in models)
    assert 'configs/mmseg/sn/metafile.yaml' in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    readme = (FAMILY / 'README.md').read_text()
    assert [p.name for p in CONFIGS if f'({p.name})' not in readme] == []


# -- training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """ADE20K, Cityscapes and CamVid in their own layouts, with two training images and one to validate on each."""
    root = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)

    def make(name, image, label, height, width, values):
        """Noise, and labels in vertical stripes: each of ``values``, from left to right."""
        for path in image, label:
            (root / name / path).parent.mkdir(parents=True, exist_ok=True)
        stripes = np.array(values, np.uint8)[np.arange(width) * len(values) // width]
        cv2.imwrite(str(root / name / image), rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        cv2.imwrite(str(root / name / label), np.tile(stripes, (height, 1)))

    for split, count in ('training', 2), ('validation', 1):
        for i in range(count):
            image, label = f'images/{split}/ADE_{i}.jpg', f'annotations/{split}/ADE_{i}.png'
            make('ade', image, label, 96 + 32 * i, 160, [0, 1, 5, 150])
    for split, count in ('train', 2), ('val', 1):
        for i in range(count):
            stem = f'{split}/aachen/aachen_{i:06}_000019'
            image, label = f'leftImg8bit/{stem}_leftImg8bit.png', f'gtFine/{stem}_gtFine_labelTrainIds.png'
            make('cityscapes', image, label, 64, 128, [0, 7, 18, 255])
            make('camvid', f'images/{split}/{i}.jpg', f'annotations/{split}/{i}.png', 90, 120, [0, 3, 10, 255])
    return root


def slim(config, root):
    """The config with few channels and without ImageNet's weights, on the data in ``root``."""
    model = config.model
    base, scale = 8, 8  # channels, and by how much there are fewer
    for part in model.backbone, model.decode_head, model.auxiliary_head:
        if 'num_groups' in part.norm_cfg:
            part.norm_cfg.num_groups = base
    model.pretrained = None
    # branches whose last norm starts at weight 0 would have no gradient in the first step
    model.backbone.update(base_channels=base, stem_channels=base, zero_init_residual=False)
    model.decode_head.update(in_channels=shrink(model.decode_head.in_channels, scale), channels=32)
    model.auxiliary_head.update(in_channels=model.auxiliary_head.in_channels // scale, channels=32)
    for loader in config.train_dataloader, config.val_dataloader, config.test_dataloader:
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(root)
    for loader in config.val_dataloader, config.test_dataloader:
        shrink_images(loader.dataset.pipeline)
    config.train_cfg.update(max_iters=1, val_interval=1)
    config.randomness = dict(seed=0)
    return config


def shrink(channels, scale):
    return channels // scale if isinstance(channels, int) else [c // scale for c in channels]


def shrink_images(transforms):
    """To a quarter of the size, where a pipeline resizes."""
    for transform in transforms:
        if transform.type == 'Resize':
            transform.scale = tuple(side // 4 for side in transform.scale)


class Step(Hook):
    """Keeps what the model sees in its step, and the gradients."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        batch = runner.model.data_preprocessor(copy.deepcopy(data_batch), True)
        self.shape = tuple(batch['inputs'].shape[2:])
        self.labels = {label for s in batch['data_samples'] for label in s.gt_sem_seg.data.unique().tolist()}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        # SGD's first momentum is the gradient; the weights themselves may lack the digits for a small step
        state = runner.optim_wrapper.optimizer.state
        self.gradients = {n: state[p]['momentum_buffer'].clone() for n, p in runner.model.named_parameters()}


def train(config, folder):
    """A step and a validation, in ``folder``: the hook, the config, the model and the metrics."""
    config.work_dir = str(folder)
    runner = Runner.from_cfg(config)
    step = Step()
    runner.register_hook(step)
    step.config, step.folder, step.model = config, folder, runner.train()
    step.metrics = {k: runner.message_hub.get_scalar(f'val/{k}').current() for k in ('aAcc', 'mIoU', 'mAcc')}
    return step


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    """Train a slim version of a config for one step and validate it, once a module."""
    done = {}

    def trained(stem, root):
        if stem not in done:
            config = slim(read(stem), data / root)
            done[stem] = train(config, tmp_path_factory.mktemp('work'))
        return done[stem]

    return trained


@pytest.mark.parametrize('norm', ['sn', 'gn'])
def test_a_step_on_ade20k(trained, norm):
    result = trained(ADE20K.format(norm), 'ade')
    assert result.labels == {0, 4, 149, 255}  # 0 is nothing, and 255 besides that is padding
    assert all(300 <= side and side % 8 == 0 for side in result.shape)
    assert_trained(result)


@pytest.mark.parametrize('norm', ['syncsn', 'sn-in-ln'])
def test_a_step_on_cityscapes(trained, norm):
    result = trained(CITYSCAPES.format(norm), 'cityscapes')
    assert {255} < result.labels | {255} <= {0, 7, 18, 255} and result.shape == (713, 713)
    assert_trained(result)


def test_a_step_on_data_of_ones_own(trained):
    result = trained('fcn_r18-d8_sn_1xb2-20k_camvid-180x240', 'camvid')
    assert {255} < result.labels | {255} <= {0, 3, 10, 255} and result.shape == (180, 240)
    assert_trained(result)


def assert_trained(result):
    assert all(t.isfinite().all() for t in result.model.state_dict().values())
    assert all(0 <= value <= 100 for value in result.metrics.values())
    learned = {
        n: g for n, g in result.gradients.items() if n.endswith(('mean_weight', 'var_weight')) or 'conv_seg' in n
    }
    assert len(learned) >= 4 and all(g.isfinite().all() and g.any() for g in learned.values())


@pytest.mark.parametrize('stem', [p.stem for p in CONFIGS if p.stem.endswith('ade20k-512x512')])
def test_pooling_to_one_pixel_at_one_image(stem, data):
    """PSP and ASPP pool to N x C x 1 x 1, where BN cannot train at N = 1."""
    torch.manual_seed(0)
    config = slim(read(stem), data / 'ade')
    config.model.data_preprocessor.size = (64, 64)
    init_default_scope('mmseg')
    model = MODELS.build(config.model)
    model.train()
    pooled = []
    for m in model.modules():
        if isinstance(m, SwitchNorm):
            m.register_forward_hook(lambda m, args, out: pooled.append(m) if args[0].shape[2:] == (1, 1) else None)
    sample = SegDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64)))
    sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, 64, 64)))
    batch = dict(inputs=[torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)], data_samples=[sample])
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    for _ in range(2):
        losses = model.train_step(batch, wrapper)
    assert len(pooled) == 2
    assert all(torch.as_tensor(v).isfinite().all() for v in losses.values())
    assert all(t.isfinite().all() for t in model.state_dict().values())


# -- testing ------------------------------------------------------------------------------------------------------


def test_tta_is_what_mmsegs_own_tool_does(trained, tmp_path):
    result = trained(ADE20K.format('sn'), 'ade')
    # written out, since on the onedl line mmengine finds bases in mmseg:: only after sn_openmmlab was imported
    config = copy.deepcopy(result.config)
    shrink_images(config.tta_pipeline[1].transforms[0])
    config.dump(tmp_path / 'config.py')
    found = []
    for name, tool in ('ours', ROOT / 'tools/test.py'), ('theirs', Path(mmseg.__file__).parent / '.mim/tools/test.py'):
        command = [sys.executable, tool, 'config.py', result.folder / 'iter_1.pth', '--tta']
        done = subprocess.run(
            [*map(str, command), '--work-dir', name, '--out', f'{name}_maps'],
            cwd=tmp_path,
            env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        [scores] = (tmp_path / name).glob('*/*.json')
        scores = json.loads(scores.read_text())
        [maps] = (tmp_path / f'{name}_maps').iterdir()
        found.append(([scores[k] for k in ('aAcc', 'mIoU', 'mAcc')], cv2.imread(str(maps), cv2.IMREAD_UNCHANGED)))
    (our_scores, our_map), (their_scores, their_map) = found
    assert our_scores == their_scores and np.array_equal(our_map, their_map)
    assert len(np.unique(our_map)) > 1
    assert our_scores != list(result.metrics.values())  # of one scale


def test_a_camvid_cell(data, tmp_path, monkeypatch):
    monkeypatch.setenv('SN_DATA_ROOT', str(data))
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')  # the runner sets it for good
    rule = 'optim_wrapper.paramwise_cfg.custom_keys.{}_weight.lr_mult'
    options = {rule.format('mean'): 10.0, rule.format('var'): 10.0}
    cell = run.Cell('camvid', 'SN', 2, 0, 0.01, 2, 'logits10', options)
    cfg = run.cell_config(cell, tmp_path)
    init_default_scope('mmseg')
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    logits = [i for i, (n, _) in enumerate(model.named_parameters()) if n.endswith(('mean_weight', 'var_weight'))]
    assert {(groups[i]['lr'], groups[i]['weight_decay']) for i in logits} == {(0.1, 0.0)}
    assert {g['lr'] for i, g in enumerate(groups) if i not in logits} == {0.01}

    result = run.run_cell(cell, tmp_path / 'work', tmp_path / 'results')
    kinds = [
        f'{statistics}{test}' for statistics in ('moving average', 'batch average') for test in ('', ', multi-scale')
    ]
    assert list(result['final']) == kinds
    assert all(0 <= result['final'][kind]['mIoU'] <= 100 for kind in kinds)
    assert len({tuple(result['final'][kind].values()) for kind in kinds}) == 4  # four tests indeed
    assert json.loads((tmp_path / f'results/{cell.name}.json').read_text())['final'] == result['final']
    assert result['iterations'] == 2 and len(result['importance_ratios']) > 20
