"""Write a config with another norm: a small file that inherits from CONFIG and changes its norm layers."""

from __future__ import annotations

import argparse
import os
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common import exit_on_signals, refuse_unwritable, try_to_write
from mmengine.config import Config
from mmengine.hub import get_config
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sn_openmmlab import SwitchNorm
from sn_openmmlab.norms import part_of
from sn_openmmlab.swap import PARTS, STATISTICS, TARGETS, Norm, Swap, plan_swap
from sn_openmmlab.swap.rewrite import is_pretrained
from sn_openmmlab.swap.write import check_child, find_differences, name_parts, render_child, to_code, to_plain


def main(argv: list[str] | None = None) -> None:
    """Read the command line, swap, show, verify and write."""
    args, parser = parse(argv)
    try:
        cfg = get_config(args.config) if '::' in args.config else Config.fromfile(args.config)
    except (Exception, SystemExit) as error:
        parser.error(f'{args.config} cannot be read: {explain(error)}')
    if Config._is_lazy_import(cfg.filename):
        parser.error(
            f'{args.config} is a new-style config (read_base, or an import), from which a file with _base_ cannot '
            'inherit; in Python sn_openmmlab.swap_norm(Config.fromfile(...)) swaps it'
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # what models warn of when they are built
            swap = plan_swap(cfg, args.to, args.parts, args.statistics, args.init_ratios)
    except (ValueError, RuntimeError) as error:
        parser.error(f'{args.config}: {error}')
    console = Console()
    show(console, args.config, cfg, swap)
    if not swap.changed:
        parser.error(f'{args.config}: nothing to write, no norm layer changes')
    child = cfg, swap, args.config, args.to, args.parts
    with exit_on_signals(), tempfile.TemporaryDirectory(dir=None if args.dry_run else args.out.parent) as folder:
        # as deep as the final file, so that a relative base is right in both
        draft = Path(folder if args.dry_run else args.out.parent, f'.{args.out.stem[:50]}.{Path(folder).name}.py')
        try:
            draft.write_text(render_child(*child, draft.parent), encoding='utf-8')
            try:
                check_child(cfg, swap, draft)
            except AssertionError as error:
                parser.error(f'{args.config}: {error}')
            if args.dry_run:
                console.print(f'\n[dim]# {escape(str(args.out))}, not written (--dry-run)')
                console.print(Text(render_child(*child, args.out.parent)))
            else:
                os.replace(draft, args.out.resolve())  # not the link, if it is one
                console.print(f'\nwritten and read again: {escape(str(args.out))}')
        finally:
            draft.unlink(missing_ok=True)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line, and check what can be checked without the config."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file, or one of an installed library: mmdet::..., mmseg::...')
    parser.add_argument('--to', choices=TARGETS, default='SN', help='the new norm (default: SN)')
    parser.add_argument('--parts', nargs='+', choices=[*PARTS, 'all'], default=['all'], help='where (default: all)')
    parser.add_argument(
        '--statistics',
        choices=STATISTICS,
        help='of the batch: train (norm_eval=False), frozen (norm_eval=True in the backbone: those of the checkpoint), '
        'synced (over all processes); default for SN and SyncSN: frozen where the backbone starts from a BatchNorm '
        'checkpoint, else train; for other norms: what the config says',
    )
    parser.add_argument(
        '--init-ratios',
        nargs=3,
        type=float,
        metavar=('IN', 'LN', 'BN'),
        help='importance ratios to start from (default: near BN where weights of a BN checkpoint come, else equal)',
    )
    parser.add_argument('--out', type=Path, help='file to write, a new one (default: CONFIG_NORM-PARTS.py here)')
    parser.add_argument('--dry-run', action='store_true', help='show and verify, but write nothing')
    args = parser.parse_args(argv)
    args.parts = PARTS if 'all' in args.parts else tuple(part for part in PARTS if part in args.parts)
    if '::' not in args.config and not Path(args.config).is_file():
        parser.error(f'config {args.config!r} is no file (from {os.getcwd()})')
    args.out = args.out or Path(f'{Path(args.config).stem}_{args.to.lower()}-{name_parts(args.parts)}.py')
    if args.out.suffix != '.py':
        parser.error(f'--out {args.out}: the name must end in .py')
    for path in args.config, str(args.out):  # they are written into the new file
        if not path.isprintable():
            parser.error(f'{ascii(path)} cannot be written into a config; rename it')
    if not args.out.parent.is_dir():
        parser.error(f'--out {args.out}: there is no folder {args.out.parent}')
    with refuse_unwritable(parser, f'--out {args.out}'):
        if args.out.exists():
            parser.error(f'{args.out} exists; name another file with --out, or remove it first')
        if not args.dry_run:
            try_to_write(args.out)
    return args, parser


def explain(error: BaseException) -> str:
    """Explain why a config cannot be read. One without a message is explained by the one before it, or its line."""
    if isinstance(error, RecursionError):
        return 'its _base_ leads back to itself'
    if isinstance(error, SystemExit):
        return 'it ends Python (SystemExit)'
    cause = error
    while not str(cause) and (cause.__cause__ or cause.__context__):
        cause = cause.__cause__ or cause.__context__
    if str(cause):
        return f'{type(cause).__name__}: {cause}'
    lines = [frame for frame in traceback.extract_tb(cause.__traceback__) if frame.name == '<module>']
    return f'{type(cause).__name__} in {Path(lines[-1].filename).name}: {lines[-1].line}'


def show(console: Console, name: str, cfg: Config, swap: Swap) -> None:
    """Show what changes and what does not, by part."""
    console.print(f'[bold]{escape(name)}[/]: {len(swap.changed)} norm layers change')
    differences = list(find_differences(to_plain(cfg.model), to_plain(swap.config.model)))
    for part in PARTS:
        changes = [difference for difference in differences if part_of(difference[0]) == part]
        norms = [norm for norm in swap.changed if norm.part == part]
        if not changes and not norms:
            continue
        console.print(f'\n[bold]{part}[/]: {count_kinds(norms)}')
        for place, old, new in changes:
            if old is not None:
                console.print(Text(f'  - {place}={to_code(old)}', 'red'))
            console.print(Text(f'  + {place}={to_code(new)}', 'green'))
    rows = Counter((norm.part, norm.old.__name__, norm.owner) for norm in swap.left)
    if rows:
        table = Table('part', 'layers', 'of', 'the first', title='Not swapped', title_justify='left')
        for (part, kind, owner), n in rows.items():
            first = next(
                norm.name for norm in swap.left if (norm.part, norm.old.__name__, norm.owner) == (part, kind, owner)
            )
            table.add_row(part, f'{n} {kind}', owner, escape(first))
        console.print('', table)
    for place, reason in swap.refused.items():
        console.print(Text(f'{place} keeps its norm: {reason}', 'yellow'))
    if swap.other:
        console.print(f'left alone: {count_kinds(swap.other)}')
    for note in list_notes(swap):
        console.print(Text(f'note: {note}', 'yellow'))


def list_notes(swap: Swap) -> Iterator[str]:
    """List what else changes when a norm becomes another."""
    local = {norm.new for norm in swap.changed} == {SwitchNorm}
    if local and any('Sync' in norm.old.__name__ for norm in swap.changed):
        yield 'batch statistics are those of each process now; --statistics synced keeps them those of all'
    backbone = swap.config.model.get('backbone', {})
    if any(norm.part == 'backbone' for norm in swap.changed) and backbone.get('norm_eval') is True:
        yield (
            'backbone.norm_eval=True: BN statistics are those of the checkpoint, which measured better at 2 images '
            'than those of the batch (--statistics train)'
        )
    renamed = [norm for norm in swap.changed if norm.part == 'backbone' and norm.old_name != norm.name]
    if renamed and is_pretrained(swap.config):
        old, new = renamed[0].old_name, renamed[0].name
        yield (
            f'{len(renamed)} norms of the backbone have other names now ({old} is {new}). A checkpoint of the old norm '
            'has not: it would fill the convolutions, and leave the norms at their start. Set one of the new norm, for '
            'SN one of BatchNorm, with the mean and std of its images; or none'
        )


def count_kinds(norms: list[Norm]) -> str:
    """Count the layers of each kind, in words."""
    kinds = Counter((n.old.__name__, n.new.__name__) for n in norms)
    return ', '.join(f'{n} {old} -> {new}' if old != new else f'{n} {old}' for (old, new), n in kinds.items()) or 'none'


if __name__ == '__main__':
    main()
