"""Trained cells as files that others can load: weights, config and model card.

    python -m benchmarks.accuracy.release cifar10_SN-b64_64img_lr0.05_10e_seed0 ...

A cell must have its result in `results/` and its training in `work_dirs/accuracy`. Written are, in `build/models`,

    CELL-HASH.pth   the state dict; HASH is the start of the file's SHA-256, as in OpenMMLab's model zoos
    CELL.py         the config, which takes the data from the folder that SN_DATA_ROOT names
    CELL.md         the card: data and licence, command, result, how to test the file

They are assets of a release on the project's page and no part of the repository. The card links to the weights there if
SN_OPENMMLAB_HOME says where that is. mim does not know them: the models of these tasks are defined in this folder,
which mim does not install.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
from dataclasses import fields
from pathlib import Path

import torch
from mmengine.config import Config

from benchmarks.accuracy.data import ROOT
from benchmarks.accuracy.report import ratios
from benchmarks.accuracy.run import RESULTS, WORK_DIR, Cell, load_task
from benchmarks.harness import write_whole
from sn_openmmlab.checkpoint.read import read_checkpoint
from sn_openmmlab.version import __version__

OUT = ROOT / 'build/models'
HOME = 'SN_OPENMMLAB_HOME'


def main(argv: list[str] | None = None) -> None:
    """Read the command line and write the files of each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('cells', nargs='+', metavar='CELL', help='name of a file in results/, without .json')
    args = parser.parse_args(argv)
    for name in args.cells:
        try:
            print('wrote', release(name))
        except FileNotFoundError as error:
            parser.error(str(error))


def release(name: str, work_dir: Path = WORK_DIR, results: Path = RESULTS, out: Path = OUT) -> Path:
    """Write the three files of a cell, and return where the weights are.

    Raises:
        FileNotFoundError: If the cell has no result, or its training is not on this machine.
    """
    path = results / f'{name}.json'
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist; train the cell by benchmarks.accuracy.run')
    result = json.loads(path.read_text())
    cell = Cell(**{field.name: result[field.name] for field in fields(Cell)})
    trained = work_dir / name / f'epoch_{cell.epochs}.pth'
    if not trained.is_file():
        raise FileNotFoundError(f'{trained} does not exist; remove {path.name} and train the cell on this machine')
    content = read_checkpoint(str(trained))
    meta = dict(cell=name, dataset_meta=content['meta'].get('dataset_meta'), sn_openmmlab=__version__)
    buffer = io.BytesIO()
    torch.save(dict(meta=meta, state_dict=content['state_dict']), buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    weights = write_whole(out / f'{name}-{digest}.pth', buffer.getvalue())
    write_whole(out / f'{name}.py', format_config(cell, trained).encode())
    write_whole(out / f'{name}.md', format_card(cell, result, weights).encode())
    return weights


def format_config(cell: Cell, trained: Path) -> str:
    """The config of a training for tools/test.py, with a variable where this machine has its data."""
    cfg = Config.fromfile(max(trained.parent.glob('*/vis_data/config.py')))  # as mmengine's Runner has written it
    cfg.merge_from_dict(
        dict(
            custom_imports=dict(imports=['sn_openmmlab', f'benchmarks.accuracy.{cell.task}']),
            work_dir=f'work_dirs/{cell.name}',
            resume=False,
            test_dataloader=cfg.val_dataloader,
            test_evaluator=cfg.val_evaluator,
            test_cfg=dict(type='TestLoop'),
        )
    )
    folder = Path(cfg.val_dataloader.dataset.data_root).parent
    return cfg.pretty_text.replace(str(folder), '{{$SN_DATA_ROOT:data}}')


def format_card(cell: Cell, result: dict, weights: Path) -> str:
    """The model card."""
    task, home = load_task(cell.task), os.environ.get(HOME, '').rstrip('/')
    link = f'[{weights.name}]({home}/releases/download/v{__version__}/{weights.name})' if home else weights.name
    options = [f'--{key} {getattr(cell, key)}' for key in ('task', 'norm', 'images', 'seed', 'lr', 'epochs')]
    if cell.variant:
        options += [f'--variant {cell.variant} --cfg-options ...']
    environment = result['environments'][-1]
    scores = [
        f'| {label} | {" | ".join(f"{final[metric]:.4g}" for final in result["final"].values())} |'
        for metric, label in task.METRICS.items()
    ]
    return '\n'.join(
        [
            f'# {cell.name}',
            '',
            f'{task.__doc__.splitlines()[0]} Norm: {cell.norm}. One training (seed {cell.seed}), made to compare norm '
            'layers and not to be the best network of its size.',
            '',
            f'- Weights: {link}',
            f'- Data, and what its licence asks of those who use the weights: {task.LICENCE}',
            f'- Trained by `python -m benchmarks.accuracy.run {" ".join(options)}` on {environment["device"]}, torch '
            f'{environment["torch"]}, {environment["date"]}, commit {environment["commit"]}',
            '- Tested, in a clone of the project, by `PYTHONPATH=. SN_DATA_ROOT=... python tools/test.py '
            f'{cell.name}.py {weights.name}`',
            '',
            f'| result | {" | ".join(result["final"])} |',
            '| :--- |' + ' ---: |' * len(result['final']),
            *scores,
            *ratios([result]),
            '',
        ]
    )


if __name__ == '__main__':
    main()
