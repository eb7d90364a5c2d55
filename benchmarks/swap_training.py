"""Train one config of every family of mmdet and mmseg with SN for a step; as shipped too, if that fails.

    python -m benchmarks.swap_training

A family is a folder of configs that benchmarks/results/swap_sweep.jsonl says can be swapped. Its config with the fewest
norm layers is swapped, and trained for a step on two small images, on the CPU, from random weights. If that fails, the
config is trained with its own norms on the same images: a failure there too is not about SN. Each config gets one JSON
line. Families that the file has are skipped, so that a run can be stopped and started again. `python -m
benchmarks.report` makes the table.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path

import mmdet
import mmseg
import numpy as np
import torch
from mmdet.structures import ReIDDataSample
from mmdet.testing import demo_mm_inputs, demo_track_inputs
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmengine.utils import get_installed_path
from mmseg.structures import SegDataSample
from rich.progress import track
from torch import nn

from benchmarks.harness import RESULTS
from sn_openmmlab import SwitchNorm, swap_norm

SWEEP = RESULTS / 'swap_sweep.jsonl'
OUT = RESULTS / 'swap_training.jsonl'


def main(argv: list[str] | None = None) -> None:
    """Train what the result file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=OUT, help='result file, JSON lines (default: %(default)s)')
    parser.add_argument('--processes', type=int, default=2, help='(default: 2)')
    args = parser.parse_args(argv)
    if not args.out.exists():
        head = dict(date=f'{date.today()}', torch=torch.__version__, mmdet=mmdet.__version__, mmseg=mmseg.__version__)
        args.out.write_text(json.dumps(head) + '\n')
    done = {json.loads(line)['config'] for line in args.out.read_text().splitlines()[1:]}
    todo = [name for name in one_of_each_family() if name not in done]
    # spawned, as torch's threads do not survive a fork; renewed, as some models leave much memory behind
    pool = multiprocessing.get_context('spawn').Pool(args.processes, set_up_worker, maxtasksperchild=20)
    with pool, args.out.open('a') as file:
        for record in track(pool.imap_unordered(try_one, todo), total=len(todo)):
            file.write(json.dumps(record) + '\n')
            file.flush()


def one_of_each_family() -> list[str]:
    """Choose from each folder the config with the fewest norm layers that can be swapped; subfolders come last."""
    families = {}
    for record in map(json.loads, SWEEP.read_text().splitlines()[1:]):
        if 'changed' in record:
            name = record['config']
            norms = sum(record['changed'].values()) + sum(record.get('left', {}).values()) + record.get('other', 0)
            families.setdefault(name.partition('/')[0], []).append((name.count('/'), norms, name))
    return [min(family)[-1] for family in families.values()]


def set_up_worker() -> None:
    """Set a worker up: one thread, no warnings."""
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)


def try_one(name: str) -> dict:
    """Train a config with SN for a step, and as shipped if that fails."""
    start, record = time.perf_counter(), {'config': name}
    cfg = read(name)
    record['sn'] = find_fault(lambda: swap_norm(cfg, statistics='train'))
    if record['sn']:
        record['as shipped'] = find_fault(lambda: cfg)
    return {**record, 'seconds': round(time.perf_counter() - start, 1)}


def read(name: str) -> Config:
    """A config of an installed library."""
    library, _, path = name.partition('::')
    return Config.fromfile(Path(get_installed_path(library), '.mim/configs', path))


def find_fault(make_config: Callable[[], Config]) -> str:
    """Train a config for a step, and say what is wrong, in one line; empty where nothing is."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return train_step(make_config())
    except Exception as error:
        text = ' '.join(str(error).replace(f'{Path(mmdet.__file__).parents[1]}/', '').split())
        return f'{type(error).__name__}: {text}'[:160]


def train_step(cfg: Config) -> str:
    """Train the model of a config for a step; tell what is wrong with it afterwards, if anything."""
    cfg = copy.deepcopy(cfg)
    shrink(cfg.model)
    torch.manual_seed(0)
    init_default_scope(cfg.default_scope)
    for counter in 'epoch', 'iter':  # what the runner tells
        MessageHub.get_current_instance().update_info(counter, 0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for module in model.modules():
        if type(module).__name__ == 'TridentConv':  # mmdet leaves its weight as it found the memory
            nn.init.kaiming_uniform_(module.weight)
    model.train()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SwitchNorm)}
    # a mean teacher has no gradients, but statistics of its own
    layers = {name: m for name, m in layers.items() if not name.startswith('teacher.')}
    before = {name: m.bn.running_mean.clone() for name, m in layers.items()}

    # train_step in its parts, which would clear the gradients
    losses = model(**model.data_preprocessor(make_inputs(cfg), True), mode='loss')
    loss, _ = model.parse_losses(losses)
    loss.backward()
    torch.optim.SGD(model.parameters(), 1e-4).step()

    if not loss.isfinite():
        return f'the loss is {loss}'
    if not all(p.isfinite().all() for p in model.parameters()):
        return 'parameters are not finite after the step'
    trained = {name for name, m in layers.items() if m.weight.requires_grad}
    reached = {name for name in trained if layers[name].mean_weight.grad is not None}
    moved = {name for name, m in layers.items() if not torch.equal(m.bn.running_mean, before[name])}
    if not all(layers[name].mean_weight.grad.isfinite().all() for name in reached):
        return 'gradients of importance ratios are not finite'
    if not reached <= moved <= trained:  # frozen stages keep their statistics
        return f'statistics moved in {len(moved)} of {len(trained)} layers, {len(reached)} of which have gradients'
    if layers and len(reached) <= 0.8 * len(trained):
        return f'only {len(reached)} of {len(trained)} SN layers have gradients'
    return ''


def shrink(node) -> None:
    """Make a model small: no checkpoints, no trackers, no padding to the training size, few proposals."""
    if isinstance(node, (list, tuple)):
        for item in node:
            shrink(item)
    if not isinstance(node, dict):
        return
    small = dict(nms_pre=100, max_per_img=50) if 'rpn_proposal' in node else {}
    node.get('rpn_proposal', {}).update(small)
    for key, value in node.items():
        if key == 'pretrained' or key == 'init_cfg' and 'Pretrained' in str(value):
            node[key] = None
        elif key in ('batch_augments', 'teacher_ckpt', 'tracker'):
            node[key] = None
        elif key == 'num_cp':  # activation checkpointing by fairscale
            node[key] = 0
        elif key == 'sampler' and 'num' in value:
            value.num = 16
        elif key == 'data_preprocessor' and 'size' in value:
            value.size = (128, 128)
        shrink(node[key])


def make_inputs(cfg: Config) -> dict:
    """Make a few small images, or clips of two, with the annotations that models of this kind learn from."""
    if cfg.default_scope == 'mmseg':
        samples = [SegDataSample(metainfo=dict(img_shape=(128, 128), ori_shape=(128, 128))) for _ in range(2)]
        for sample in samples:
            for name in 'gt_sem_seg', 'gt_edge_map':
                setattr(sample, name, PixelData(data=torch.randint(0, 2, (1, 128, 128))))
        images = [torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8) for _ in samples]
        return dict(inputs=images, data_samples=samples)
    sizes = [[3, 96, 128], [3, 128, 96]]
    preprocessor = cfg.model.get('data_preprocessor', {})
    kind = str(preprocessor.get('type'))
    if 'Track' in kind and not preprocessor.get('use_det_processor'):
        return demo_track_inputs(2, 2, [0], sizes, num_items=[2, 3], num_classes=2, with_mask=True)
    if 'ReID' in kind:  # two images of each of two persons
        samples = [ReIDDataSample().set_gt_label(i // 2) for i in range(4)]
        return dict(inputs=[torch.rand(3, 256, 128) for _ in samples], data_samples=samples)
    data = demo_mm_inputs(2, sizes, num_items=[2, 3], num_classes=2, with_mask=True, with_semantic=True)
    for sample in data['data_samples']:
        objects = sample.gt_instances
        objects.labels.zero_()  # which every detector knows
        sample.proposals = InstanceData(bboxes=objects.bboxes.clone(), scores=torch.ones(len(objects)))
        sample.set_metainfo(dict(homography_matrix=np.eye(3, dtype=np.float32)))
    if 'MultiBranch' in kind:  # semi-supervised
        branches = 'sup', 'unsup_teacher', 'unsup_student'
        return {key: {branch: copy.deepcopy(value) for branch in branches} for key, value in data.items()}
    return data


if __name__ == '__main__':
    main()
