"""Write a config with another norm: a small file that inherits from the one given and changes its norm layers."""

from __future__ import annotations

import argparse
import math
import os
import re
import tempfile
import warnings
from collections import Counter
from pathlib import Path

from common import part_of, stopping
from mmengine.config import Config
from mmengine.hub import get_config
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from yapf.yapflib.yapf_api import FormatCode

from sn_openmmlab import SwitchNorm, skeleton
from sn_openmmlab.bases import NEED_HELP
from sn_openmmlab.swap import PARTS, STATISTICS, TARGETS, Swap, plan_swap


class Code(str):
    """A string that is written as it is, not quoted."""


def main(argv: list[str] | None = None) -> None:
    """Read the command line, swap, show, verify and write."""
    args, parser = parse(argv)
    try:
        cfg = get_config(args.config) if '::' in args.config else Config.fromfile(args.config)
    except (Exception, SystemExit) as error:
        parser.error(f'{args.config} cannot be read: {why(error)}')
    if Config._is_lazy_import(cfg.filename):
        parser.error(
            f'{args.config} is a new-style config (read_base, or an import), from which a file with _base_ cannot '
            'inherit; in Python sn_openmmlab.swap_norm(Config.fromfile(...)) swaps it'
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # what models say when they are built
            swap = plan_swap(cfg, args.to, args.parts, args.statistics, args.init_ratios)
    except (ValueError, RuntimeError) as error:
        parser.error(f'{args.config}: {error}')
    console = Console()
    show(console, args.config, cfg, swap)
    if not swap.changed:
        parser.error(f'{args.config}: nothing to write, no norm layer changes')
    with stopping(), tempfile.TemporaryDirectory(dir=None if args.dry_run else args.out.parent) as folder:
        # as deep as the file to come, so that a relative base is right in both
        draft = Path(folder if args.dry_run else args.out.parent, f'.{args.out.stem[:50]}.{Path(folder).name}.py')
        try:
            draft.write_text(write(cfg, swap, args, draft.parent), encoding='utf-8')
            check(cfg, swap, draft)
            if args.dry_run:
                console.print(f'\n[dim]# {escape(str(args.out))}, not written (--dry-run)')
                console.print(Text(write(cfg, swap, args, args.out.parent)))
            else:
                os.replace(draft, args.out)
                console.print(f'\nwritten and read again: {escape(str(args.out))}')
        finally:
            draft.unlink(missing_ok=True)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """The command line, checked as far as that goes without reading the config."""
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
    args.out = args.out or Path(f'{Path(args.config).stem}_{args.to.lower()}-{name_of(args.parts)}.py')
    if args.out.suffix != '.py':
        parser.error(f'--out {args.out}: the name must end in .py')
    for path in args.config, str(args.out):  # which stand in the new file
        if not path.isprintable():
            parser.error(f'{ascii(path)} cannot be written into a config; rename it')
    if not args.out.parent.is_dir():
        parser.error(f'--out {args.out}: there is no folder {args.out.parent}')
    try:
        if args.out.exists():
            parser.error(f'{args.out} exists; name another file with --out, or remove it first')
        if not args.dry_run:
            part_of(args.out).touch()
            part_of(args.out).unlink()
    except OSError as error:
        parser.error(f'--out {args.out} cannot be written: {error.strerror}')
    return args, parser


def why(error: BaseException) -> str:
    """What kept a config from being read; mmengine may say nothing, and leave it to the error before."""
    if isinstance(error, RecursionError):
        return 'its _base_ leads back to itself'
    if isinstance(error, SystemExit):
        return 'it ends Python (SystemExit)'
    said = error
    while not str(said) and (said.__cause__ or said.__context__):
        said = said.__cause__ or said.__context__
    return f'{type(said).__name__}: {said}'


def name_of(parts: tuple[str, ...]) -> str:
    """As config names have it: sn-all, sn-backbone-neck."""
    return 'all' if parts == PARTS else '-'.join(parts)


def write(cfg: Config, swap: Swap, args: argparse.Namespace, folder: Path) -> str:
    """The text of the new config, for a file in ``folder``."""
    old, new = plain(cfg), plain(swap.config)
    norms = [norm for _, _, norm in flat(old['model'], new['model']) if isinstance(norm, dict)]
    main_norm = max(norms, key=norms.count)
    # heads: mmdet's get_flops.py takes what has a head_norm_cfg for one certain model
    name = name_of(args.parts).replace('-', '_').replace('head', 'heads')
    variable = 'norm_cfg' if args.parts == PARTS else f'{name}_norm_cfg'
    said = {key: difference(old.get(key), value, main_norm, variable) for key, value in new.items()}
    said = {key: said[key] for key in new if new[key] != old.get(key)}
    head = [
        f'# {Path(args.config).name} with {args.to} in {", ".join(args.parts)}; made by swap_norm.py',
        f'_base_ = {base(args.config, cfg.text, folder)}',
    ]
    lines = []
    if 'custom_imports' in said:
        lines.append(f'custom_imports = {code(said.pop("custom_imports"))}')
    lines.append(f'{variable} = {code(main_norm)}')
    outer = said.pop(variable, None)
    lines += [f'{key} = {code(said[key])}' for key in sorted(said, key='model'.__eq__)]
    if outer is not None and set(old.get(variable, {})) - set(main_norm):
        lines.append(f'{variable} = dict(_delete_=True, **{variable})')
    text, _ = FormatCode('\n'.join(lines), style_config=dict(based_on_style='pep8'))
    return '\n'.join([*head, '', text])


def base(config: str, text: str, folder: Path) -> str:
    """The right side of ``_base_ =``: relative to the file for files.

    mmengine evaluates it before it looks for the base, so that this package can be imported in it, and enter the
    libraries that mmengine would not find by itself.
    """
    name = config if '::' in config else Path(os.path.relpath(config, folder)).as_posix()
    helped = set(re.findall(r'\b(\w+)::', f'{name}\n{text}')) & NEED_HELP
    return f"__import__('sn_openmmlab') and {name!r}" if helped else repr(name)


def difference(old, new, main_norm: dict, variable: str):
    """What a child of ``old`` has to say to become ``new``."""
    if not isinstance(new, dict) or not isinstance(old, dict):
        return refer(new, main_norm, variable)
    gone = old.keys() - new.keys()
    if new == main_norm:
        return Code(f'dict(_delete_=True, **{variable})' if gone else variable)
    if gone:
        return {'_delete_': True, **refer(new, main_norm, variable)}
    if new.get('type') in TARGETS:
        return new
    return {k: difference(old.get(k), v, main_norm, variable) for k, v in new.items() if k not in old or old[k] != v}


def refer(value, main_norm: dict, variable: str):
    """``value`` with the variable's name where its norm stands."""
    if value == main_norm:
        return Code(variable)
    if isinstance(value, dict):
        return {k: refer(v, main_norm, variable) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(refer(v, main_norm, variable) for v in value)
    return value


def code(value) -> str:
    """Python that makes ``value``."""
    if isinstance(value, Code):
        return value
    if isinstance(value, dict):
        if all(isinstance(key, str) and key.isidentifier() for key in value):
            return f'dict({", ".join(f"{k}={code(v)}" for k, v in value.items())})'
        return f'{{{", ".join(f"{k!r}: {code(v)}" for k, v in value.items())}}}'
    if isinstance(value, list):
        return f'[{", ".join(map(code, value))}]'
    if isinstance(value, tuple):
        return f'({", ".join(map(code, value))}{"," * (len(value) == 1)})'
    return f"float('{value}')" if isinstance(value, float) and not math.isfinite(value) else repr(value)


def plain(value):
    """``value`` in dicts of Python, without the scopes that mmengine enters while reading, to be compared."""
    if isinstance(value, (dict, Config)):
        return {key: plain(value[key]) for key in value if key != '_scope_'}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return (
        Code("float('nan')") if isinstance(value, float) and math.isnan(value) else value
    )  # which is equal to itself, as NaN is not


def check(cfg: Config, swap: Swap, path: Path) -> None:
    """Read the new config, and compare it with what it is to say."""
    read, meant = plain(Config.fromfile(path)), plain(swap.config)
    wrong = [key for key in ('model', 'custom_imports') if read.get(key) != meant.get(key)]
    wrong += [key for key in meant if 'norm' not in key and key not in wrong and read.get(key) != meant[key]]
    if wrong:
        raise AssertionError(f'{path} reads back as another config in {", ".join(wrong)}; this is a bug of this tool')


def show(console: Console, name: str, cfg: Config, swap: Swap) -> None:
    """What changes and what does not, by part."""
    console.print(f'[bold]{escape(name)}[/]: {len(swap.changed)} norm layers change')
    for part in PARTS:
        changes = [c for c in flat(plain(cfg.model), plain(swap.config.model)) if skeleton.part_of(c[0]) == part]
        norms = [norm for norm in swap.changed if norm.part == part]
        if not changes and not norms:
            continue
        console.print(f'\n[bold]{part}[/]: {counts(norms)}')
        for place, old, new in changes:
            if old is not None:
                console.print(Text(f'  - {place}={code(old)}', 'red'))
            console.print(Text(f'  + {place}={code(new)}', 'green'))
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
        console.print(f'left alone: {counts(swap.other)}')
    for note in notes(swap):
        console.print(Text(f'note: {note}', 'yellow'))


def notes(swap: Swap):
    """What the change from another norm to SN means beside the norm."""
    local = {norm.new for norm in swap.changed} == {SwitchNorm}
    if local and any('Sync' in norm.old.__name__ for norm in swap.changed):
        yield 'batch statistics are those of each process now; --statistics synced keeps them those of all'
    backbone = swap.config.model.get('backbone', {})
    if any(norm.part == 'backbone' for norm in swap.changed) and backbone.get('norm_eval') is True:
        yield (
            'backbone.norm_eval=True: BN statistics are those of the checkpoint, which measured better at 2 images '
            'than those of the batch (--statistics train)'
        )


def counts(norms) -> str:
    """How many layers of which kinds."""
    kinds = Counter((n.old.__name__, n.new.__name__) for n in norms)
    return ', '.join(f'{n} {old} -> {new}' if old != new else f'{n} {old}' for (old, new), n in kinds.items()) or 'none'


def flat(old, new, place: str = ''):
    """Places that differ, with what was there and what is: norms as a whole."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict) and new.get('type') not in TARGETS:
        for key in new:
            yield from flat(old.get(key), new[key], f'{place}.{key}'.lstrip('.'))
    elif isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new)):
            yield from flat(a, b, f'{place}.{i}')
    else:
        yield place, old, new


if __name__ == '__main__':
    main()
