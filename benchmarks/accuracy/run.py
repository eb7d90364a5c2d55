"""Train cells of the accuracy comparison: a task with a norm, images per step and a seed; one result file each.

    python -m benchmarks.accuracy.run --task bccd --norm BN GN SN SN-IN-LN --images 2 --seed 0

Cells that have a result are left out. A command that was stopped, at whatever moment, is continued by giving it again:
it goes on from the last whole epoch, and ends as if it had not been stopped (tests/test_accuracy.py).

A task is a module beside this one with

    NAME     what tables and plots call it
    LICENCE  where the data are from, and their licence
    METRICS  the compared metrics, named as mmengine logs them, and what tables call them; the first is plotted
    EPOCHS   length of a training
    LR       learning rate, one for all norms, at
    IMAGES   so many images a step; by default 2
    NORMS    what is compared, by name; by default this module's
    LABELS   what README.md calls those that stand in its table; by default all, by their names
    TESTED   how many samples an accuracy is of
    config(norm, images, lr, epochs)   mmengine Config of a value of NORMS: model, data, evaluator, optimizer and
                                       schedule, by epochs
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner, TestLoop, set_random_seed
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.accuracy.data import ROOT
from benchmarks.harness import environment, write
from sn_openmmlab import SwitchNorm, average_statistics
from sn_openmmlab.checkpoint.read import read_checkpoints_as_data

RESULTS = Path(__file__).parent / 'results'
WORK_DIR = ROOT / 'work_dirs/accuracy'
TASKS = ('bccd', 'camvid', 'lite0_bccd', 'lite0_camvid', 'cifar10', 'modelnet10')
NORMS = {
    'BN': dict(type='BN'),
    'GN': dict(type='GN', num_groups=32),
    'SN': dict(type='SN'),
    'SN-IN-LN': dict(type='SN', normalizers=('in', 'ln')),
}


@dataclass(frozen=True)
class Cell:
    """What is trained. ``options`` are changes of the task's config, and ``variant`` is what they are called."""

    task: str
    norm: str
    images: int
    seed: int
    lr: float
    epochs: int
    variant: str = ''
    options: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        parts = [self.task, self.norm, f'{self.images}img', f'lr{self.lr:g}', f'{self.epochs}e', f'seed{self.seed}']
        return '_'.join([*parts, self.variant] if self.variant else parts)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and train the cells that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--task', required=True, choices=TASKS)
    parser.add_argument('--norm', nargs='+', required=True, metavar='NORM', help=', '.join(NORMS) + "; or the task's")
    parser.add_argument('--images', type=int, help="images per step (default: the task's, as a rule 2)")
    parser.add_argument('--seed', type=int, nargs='+', default=[0], help='default: 0')
    parser.add_argument('--lr', type=float, help="default: the task's, for as many images as a step has")
    parser.add_argument('--epochs', type=int, help="default: the task's")
    parser.add_argument('--variant', default='', help='name of what --cfg-options change')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE')
    args = parser.parse_args(argv)
    if bool(args.variant) != bool(args.cfg_options):
        parser.error('--variant and --cfg-options belong together: results of another config need another name')
    if min(args.seed) < 0 or any(n is not None and n <= 0 for n in (args.images, args.epochs, args.lr)):
        parser.error('--images, --epochs and --lr must be above 0, and --seed at least 0')
    task = load_task(args.task)
    unknown = [norm for norm in args.norm if norm not in norms(task)]
    if unknown:
        parser.error(f'--norm: {args.task} has {", ".join(norms(task))}, and not {", ".join(unknown)}')
    images, epochs = args.images or default_images(task), args.epochs or task.EPOCHS
    lr = args.lr or task.LR * images / default_images(task)
    read_checkpoints_as_data()
    for seed, norm in itertools.product(args.seed, args.norm):
        cell = Cell(args.task, norm, images, seed, lr, epochs, args.variant, args.cfg_options)
        result = run_cell(cell)
        print(f'{cell.name}: {json.dumps(result["final"])}', flush=True)


def load_task(name: str):
    """The module of a task."""
    return importlib.import_module(f'benchmarks.accuracy.{name}')


def norms(task) -> dict[str, dict]:
    """What a task compares, by name."""
    return getattr(task, 'NORMS', NORMS)


def default_images(task) -> int:
    """Images per step of a task."""
    return getattr(task, 'IMAGES', 2)


def cell_config(cell: Cell, work_dir: Path) -> Config:
    """The task's config and what is the same for all tasks."""
    task = load_task(cell.task)
    cfg = task.config(copy.deepcopy(norms(task)[cell.norm]), cell.images, cell.lr, cell.epochs)
    interval = -(-cell.epochs // 4)
    cfg.merge_from_dict(
        dict(
            work_dir=str(work_dir / cell.name),
            experiment_name=cell.name,
            train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=cell.epochs, val_interval=interval),
            val_cfg=dict(type='ValLoop'),
            # two, since the older one is removed before the newer one is written
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2)),
            randomness=dict(seed=cell.seed),
            resume=True,
        )
    )
    cfg.merge_from_dict(cell.options)
    return cfg


def run_cell(cell: Cell, work_dir: Path = WORK_DIR, results: Path = RESULTS) -> dict:
    """Train a cell to its end and write its result; or read the one that is there.

    Raises:
        ValueError: If there is a result or a started training of this name by another config.
    """
    cfg, path = cell_config(cell, work_dir), results / f'{cell.name}.json'
    state = dict(config=_plain(cfg), environments=[], curve=[])
    for known in path, Path(cfg.work_dir, 'state.json'):
        if known.exists():
            found = json.loads(known.read_text())
            if found['config'] != state['config']:
                raise ValueError(f'{known} is of another config; remove it, or give the other one a --variant name')
            if known == path:
                return found
            state = found
    state['environments'].append(environment(torch.device('cuda' if torch.cuda.is_available() else 'cpu')))
    runner = Runner.from_cfg(cfg)
    runner.register_hook(Record(state, Path(cfg.work_dir), cell.seed))
    try:
        runner.train()
        final = evaluate(runner, state['curve'][-1]['metrics'], cell.seed)
    except Diverged as error:
        final = dict(diverged=str(error))
    layers = {} if 'diverged' in final else dict(runner.model.named_modules())
    result = dict(
        **asdict(cell),
        final=final,
        seconds=sum(row['seconds'] for row in state['curve']),
        iterations=len(runner.train_dataloader) * len(state['curve']),
        **state,
        importance_ratios={n: m.importance_ratios.tolist() for n, m in layers.items() if isinstance(m, SwitchNorm)},
    )
    return json.loads(write(cell.name, result, results).read_text())


def _plain(cfg: Config) -> dict:
    """A config as JSON has it, without this machine's folders."""
    root = cfg.val_dataloader.dataset.data_root
    text = json.dumps({k: v for k, v in cfg.to_dict().items() if k != 'work_dir'})
    return json.loads(text.replace(root, f'$SN_DATA_ROOT/{Path(root).name}/'))


class Diverged(ArithmeticError):
    """The loss is no longer a finite number."""


class Record(Hook):
    """Keeps the curve, and makes a resumed training the same as one straight through.

    mmengine does not save the state of the random number generators, so that they are seeded at the start of each
    epoch.
    """

    def __init__(self, state: dict, folder: Path, seed: int) -> None:
        self.state, self.folder, self.seed = state, folder, seed

    def before_train(self, runner) -> None:
        """Forget epochs that have no checkpoint, and make up for an evaluation that was cut off."""
        self.state['curve'] = self.state['curve'][: runner.epoch]
        self._save()
        rows, interval = self.state['curve'], runner.train_loop.val_interval
        if rows and (runner.epoch % interval == 0 or runner.epoch == runner.max_epochs) and 'metrics' not in rows[-1]:
            runner.val_loop.run()

    def before_train_epoch(self, runner) -> None:
        """Seed."""
        set_random_seed(1000 * self.seed + runner.epoch)
        self.losses, self.start = [], time.perf_counter()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Stop where the loss is no number."""
        self.losses.append(outputs['loss'].item())
        if not math.isfinite(self.losses[-1]):
            raise Diverged(f'loss {self.losses[-1]} in iteration {runner.iter + 1}')

    def after_train_epoch(self, runner) -> None:
        """Add a row, before the checkpoint is written."""
        seconds, loss = time.perf_counter() - self.start, sum(self.losses) / len(self.losses)
        self.state['curve'].append(dict(epoch=runner.epoch + 1, loss=loss, seconds=seconds))
        self._save()

    def after_val_epoch(self, runner, metrics=None) -> None:
        """Complete the row of an epoch, once."""
        self.state['curve'][-1].setdefault('metrics', _numbers(metrics))
        self._save()

    def _save(self) -> None:
        write('state', self.state, self.folder)


def evaluate(runner: Runner, metrics: dict, seed: int) -> dict:
    """Metrics at the end, with the moving average and, where there are batch statistics, with their batch average.

    The batch average (Luo et al., section 3.1) is :func:`sn_openmmlab.average_statistics` of one epoch, and leaves
    frozen statistics alone. Where the task has a ``tta_model``, both are also tested with it.
    """
    final = {'moving average': metrics, **_augmented(runner, 'moving average')}
    runner.model.train()
    if not any(isinstance(m, _BatchNorm) and m.training for m in runner.model.modules()):
        return final
    set_random_seed(seed)
    runner.train_dataloader.sampler.set_epoch(0)
    average_statistics(runner.model, runner.train_dataloader)
    return {**final, 'batch average': _numbers(runner.val_loop.run()), **_augmented(runner, 'batch average')}


def _augmented(runner: Runner, name: str) -> dict:
    """Metrics of the test with augmented images, by the config's ``tta_model`` and ``tta_pipeline``, if it has them."""
    cfg = runner.cfg
    if not cfg.get('tta_model'):
        return {}
    loader, model = copy.deepcopy(cfg.test_dataloader), runner.model
    loader.dataset.pipeline = cfg.tta_pipeline
    loop = TestLoop(runner, loader, cfg.test_evaluator)
    runner.model = MODELS.build(dict(cfg.tta_model, module=model))
    try:
        return {f'{name}, multi-scale': _numbers(loop.run())}
    finally:
        runner.model = model


def _numbers(metrics: dict) -> dict:
    """mmseg's metrics are numpy's float32, rounded to two digits, which JSON does not know."""
    return {name: round(value.item(), 6) if hasattr(value, 'item') else value for name, value in metrics.items()}


if __name__ == '__main__':
    main()
