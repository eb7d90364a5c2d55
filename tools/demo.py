"""Show the whole path on a small set of images: making them, training, evaluation with pictures, and a summary.

Each step is a command, which is printed and can be run alone. All takes a few minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np

from sn_openmmlab.analysis import mean_ratios, read_ratios

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/demo/mask-rcnn_r18_fpn_sn_demo.py'
DATA = Path('data/demo')  # as in the config


def main() -> None:
    """Read the command line and run the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'), help='default: work_dirs/demo')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='as in train.py')
    args = parser.parse_args()
    start = time.monotonic()
    options = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
    test_dir, pictures = args.work_dir / 'test', args.work_dir / 'pictures'

    run('make_demo_data.py', DATA)
    run('train.py', CONFIG, '--work-dir', args.work_dir, *options)
    checkpoint = (args.work_dir / 'last_checkpoint').read_text().strip()
    run('test.py', CONFIG, checkpoint, '--work-dir', test_dir, '--show-dir', pictures, *options)

    scores = json.loads(max(test_dir.glob('*/*.json')).read_text())  # folders are named by date and time
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    print(f'\nMask R-CNN R-18 FPN with SN, trained from scratch on {DATA} in {minutes} min {seconds} s, all steps')
    print('\n'.join([*table_of_scores(scores), '', *table_of_ratios(checkpoint)]))
    together = args.work_dir / 'predictions.png'
    join_pictures(sorted(pictures.glob('*.jpg'))[:4], together)
    print(f'\npictures: {pictures}, ground truth left, prediction right; four of them: {together}')


def run(tool: str, *arguments) -> None:
    """Print and run one of the commands beside this file; end with its exit status if it fails."""
    command = [Path('tools', tool), *arguments]
    print('\n$ python', shlex.join(map(str, command)), flush=True)
    # threads that wait busily cost minutes if anything else runs on these cores
    environment = {'OMP_WAIT_POLICY': 'passive', **os.environ}
    status = subprocess.run([sys.executable, ROOT / 'tools' / tool, *map(str, arguments)], env=environment).returncode
    if status:
        raise SystemExit(status)


def table_of_scores(scores: dict) -> list[str]:
    """Box and mask AP of mmdet's CocoMetric."""
    lines = [f'{"":12s}   AP    AP50   AP75']
    for name, key in ('boxes', 'bbox'), ('masks', 'segm'):
        values = (scores[f'coco/{key}_mAP{threshold}'] for threshold in ('', '_50', '_75'))
        lines.append(f'{name:12s}' + ''.join(f'{value:7.3f}' for value in values))
    return lines


def table_of_ratios(checkpoint: str) -> list[str]:
    """Importance ratios in a checkpoint, averaged over the SN layers of each part of the model."""
    run = read_ratios(checkpoint)
    lines = [
        'importance ratios, averaged over layers',
        f'{"":22s}means                  variances',
        f'{"":12s}layers' + 2 * '     IN     LN     BN ',
    ]
    for part, layers in run.parts.items():
        means, variances = mean_ratios(run.layers[layer] for layer in layers)
        row = ' '.join(''.join(f'{ratio:7.3f}' for ratio in ratios) for ratios in (means, variances))
        lines.append(f'{part:12s}{len(layers):6d}{row}')
    return lines


def join_pictures(paths: list[Path], out: Path) -> None:
    """Write pictures of one size one below the other, two a row, into one file."""
    pictures = [cv2.imread(str(path)) for path in paths]
    if pictures:
        rows = [np.hstack(pictures[i : i + 2]) for i in range(0, len(pictures) - len(pictures) % 2, 2)]
        cv2.imwrite(str(out), np.vstack(rows or pictures))


if __name__ == '__main__':
    main()
