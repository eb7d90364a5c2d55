"""Swap the norm of every config of the installed mmdet and mmseg, and record what became of each.

Each config gets one JSON line: its status, how many layers changed in each part, and which classes kept norms of their
own. Configs that the file has are skipped, so that a sweep can be stopped and started again. `python -m
benchmarks.report` makes the tables. Some configs need packages beyond mmdet and mmseg: `pip install -r
requirements/sweep.txt`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import multiprocessing
import os
import random
import signal
import tempfile
import time
import warnings
from collections import Counter
from datetime import date
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.utils import get_installed_path
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from sn_openmmlab.swap import PARTS, plan_swap
from sn_openmmlab.swap.write import check_child, render_child

RESULTS = Path(__file__).parent / 'results/swap_sweep.jsonl'
ENVIRONMENT = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm', 'transformers')


def main(argv: list[str] | None = None) -> None:
    """Sweep what the result file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--libraries', nargs='+', default=['mmdet', 'mmseg'], help='(default: mmdet mmseg)')
    parser.add_argument('--sample', type=int, metavar='N', help='of each library, N configs drawn at random')
    parser.add_argument('--out', type=Path, default=RESULTS, help='result file, JSON lines (default: %(default)s)')
    parser.add_argument('--processes', type=int, default=2, help='(default: 2)')
    parser.add_argument('--timeout', type=int, default=120, help='seconds for one config (default: 120)')
    args = parser.parse_args(argv)
    names = [name for library in args.libraries for name in draw_sample(list_configs(library), args.sample)]
    sort_records(args.out)  # without a line that was cut off when a sweep was stopped
    done = {record['config'] for record in read_records(args.out)}
    todo = [name for name in names if name not in done]
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    # spawned, as torch's threads do not survive a fork; renewed, as building models leaks memory
    context, folder = multiprocessing.get_context('spawn'), tempfile.TemporaryDirectory()
    pool = context.Pool(args.processes, set_up_worker, [folder.name], maxtasksperchild=100)
    with folder, pool, args.out.open('a', encoding='utf-8') as file, Progress(*columns) as progress:
        jobs = ((name, args.timeout) for name in todo)
        for record in progress.track(pool.imap_unordered(swap_one, jobs), total=len(todo)):
            file.write(json.dumps(record) + '\n')
            file.flush()
    sort_records(args.out)
    for status, n in Counter(record['status'] for record in read_records(args.out)).most_common():
        print(f'{n:5} {status}')


def list_configs(library: str) -> list[str]:
    """List the configs of an installed library as ``mmdet::...``, without its bases."""
    root = Path(get_installed_path(library), '.mim/configs')
    if not root.is_dir():
        raise SystemExit(f'{library} has no configs in {root}')
    paths = sorted(path.relative_to(root) for path in root.rglob('*.py'))
    return [f'{library}::{path.as_posix()}' for path in paths if '_base_' not in path.parts]


def draw_sample(names: list[str], n: int | None) -> list[str]:
    """Draw ``n`` of the names, always the same; None is all."""
    return names if n is None else random.Random(0).sample(names, min(n, len(names)))


def read_records(path: Path) -> list[dict]:
    """Read the records of a result file, whole lines only."""
    records = []
    for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [record for record in records if 'config' in record]


def sort_records(path: Path) -> None:
    """Sort the records, under a line that names the versions that made them."""
    names = [name for name in ENVIRONMENT if importlib.util.find_spec(name)]
    head = {name: importlib.import_module(name).__version__ for name in names}
    records = sorted(read_records(path), key=lambda record: record['config'])
    draft = path.with_suffix('.tmp')
    draft.write_text('\n'.join(map(json.dumps, [{'date': f'{date.today()}', **head}, *records])) + '\n')
    os.replace(draft, path)


def set_up_worker(folder: str) -> None:
    """Set up a worker: one thread, no warnings, and in its folder BERT's configuration, which GLIP's head reads."""
    torch.set_num_threads(1)
    os.chdir(folder)
    with contextlib.suppress(ImportError):
        from transformers import BertConfig

        BertConfig().save_pretrained('bert-base-uncased')  # its defaults are that model's
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGALRM, raise_timeout)


def raise_timeout(*_: object) -> None:
    """End a config that takes too long."""
    raise TimeoutError


def swap_one(job: tuple[str, int]) -> dict:
    """Swap one config to SN in all parts, write it as a delta, read that again, and record what became of it."""
    name, timeout = job
    library, _, path = name.partition('::')
    package = Path(get_installed_path(library))
    start = time.perf_counter()
    record = {'config': name, 'status': 'failed'}
    signal.alarm(timeout)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            record.update(swap_file(package / '.mim/configs' / path))
    except Exception as error:
        record['reason'] = f'{type(error).__name__}: {error}'
    finally:
        signal.alarm(0)
    if 'reason' in record:
        first_line = record['reason'].splitlines()[0].replace(f'{package.parent}/', '')
        record['reason'] = ' '.join(first_line.split())[:200]
    return {**record, 'seconds': round(time.perf_counter() - start, 2)}


def swap_file(path: Path) -> dict:
    """Swap a config file, write and read the delta, and return a record."""
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        return {'status': 'unreadable', 'reason': f'{type(error).__name__}: {error}'}
    if 'model' not in cfg:
        return {'status': 'no model'}
    try:
        swap = plan_swap(cfg)
    except RuntimeError as error:
        if 'as it is' not in str(error):
            raise
        return {'status': 'unbuildable', 'reason': str(error).partition('as it is: ')[2]}
    changed, left = Counter(n.part for n in swap.changed), Counter(f'{n.part}: {n.owner}' for n in swap.left)
    if swap.changed:
        with tempfile.TemporaryDirectory() as folder:
            delta = Path(folder, 'delta.py')
            delta.write_text(render_child(cfg, swap, str(path), 'SN', PARTS, delta.parent))
            check_child(cfg, swap, delta)
    status = 'fully' if swap.changed else 'not applicable'
    if swap.left:
        status = 'partly' if swap.changed else 'own norms only'
    parts = {'changed': dict(changed), 'left': dict(left), 'refused': swap.refused, 'other': len(swap.other)}
    return {'status': status, **{key: value for key, value in parts.items() if value}}


if __name__ == '__main__':
    main()
