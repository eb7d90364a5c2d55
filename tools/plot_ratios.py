"""Draw the importance ratios of trained networks with SN, without building them; several networks are compared.

Writes layers (stacked bars), parts (their means), radar (parts as in the paper's figure 1a), course (over training, if
SNRatioHook has logged it), ratios.html (interactive, works offline) and ratios.csv. docs/ratios.md shows them.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
from pathlib import Path

import numpy as np
from common import check_file, check_out, save
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sn_openmmlab.analysis import Run, draw, mean_ratios, page, read_ratios
from sn_openmmlab.ops import NORMALIZERS

FIGURES = ('png', 'svg', 'pdf')
COLUMNS = [f'{kind}_{normalizer}' for kind in ('mean', 'var') for normalizer in NORMALIZERS]


def main(argv: list[str] | None = None) -> None:
    """Read the command line, read the ratios, draw, print, and write all files at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'source',
        nargs='+',
        help='checkpoint; work directory, of which the last checkpoint and the log of SNRatioHook are read; or result '
        'of benchmarks/accuracy (.json)',
    )
    parser.add_argument('--labels', nargs='+', help='what to call the sources (default: their names)')
    parser.add_argument('--layers', metavar='REGEX', default='', help='only layers that have this in their names')
    parser.add_argument('--out', type=Path, default=Path('ratios'), help='folder to write into (default: ratios)')
    parser.add_argument(
        '--format',
        nargs='+',
        choices=[*FIGURES, 'html', 'csv'],
        default=['png', 'html', 'csv'],
        help='default: png html csv',
    )
    parser.add_argument('--force', action='store_true', help='replace files that exist')
    args = parser.parse_args(argv)
    runs = read(parser, args)
    files = render(runs, args.format)
    check_folder(parser, args, files)
    show(runs)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f'--out {args.out} cannot be made: {error.strerror}')
    for name, content in files.items():
        save(content, args.out / name)
    print(f'\nwritten to {args.out}: {", ".join(files)}')


def read(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Run]:
    """Read the ratios of all sources; end with an error if one has none, or no layer that was asked for."""
    if args.labels and len(args.labels) != len(args.source):
        parser.error(f'--labels: {len(args.labels)} for {len(args.source)} sources; give one each')
    try:
        re.compile(args.layers)
    except re.error as error:
        parser.error(f'--layers {args.layers!r} is no regular expression: {error}')
    runs = []
    for source, label in zip(args.source, args.labels or [None] * len(args.source)):
        if not Path(source).is_dir():
            check_file(parser, 'source', source)
        try:
            run = read_ratios(source, label)
        except (OSError, ValueError) as error:
            parser.error(f'{source}: {error}')
        runs.append(run.select(args.layers))
        if not runs[-1].layers:
            parser.error(f'--layers {args.layers!r} matches none of {source}, which are: {", ".join(run.layers)}')
        if run.label in [other.label for other in runs[:-1]]:
            parser.error(f'two sources would be called {run.label!r}; tell them apart with --labels')
    return runs


def check_folder(parser: argparse.ArgumentParser, args: argparse.Namespace, files: dict[str, bytes]) -> None:
    """End with an error if a file would be lost, or cannot be written."""
    if not str(args.out).isprintable():
        parser.error(f'--out {ascii(str(args.out))} cannot be printed; give another name')
    if args.out.exists() and not args.out.is_dir():
        parser.error(f'--out {args.out} is no folder')
    there = [name for name in files if (args.out / name).exists()]
    if there and not args.force:
        parser.error(f'{args.out} has {", ".join(there)} already; --force replaces them, --out names another folder')
    for name in files if args.out.exists() else ():
        check_out(parser, str(args.out / name), args.force)


def render(runs: list[Run], formats: list[str]) -> dict[str, bytes]:
    """Render the content of all files, by name."""
    files = {}
    kinds = [kind for kind in FIGURES if kind in formats]
    for name, figure in draw.figures(runs).items() if kinds else ():
        for kind in kinds:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=120)
            files[f'{name}.{kind}'] = buffer.getvalue()
    if 'html' in formats:
        files['ratios.html'] = page.render(runs).encode()
    if 'csv' in formats:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator='\n')
        rows.writerow(['run', 'part', 'layer', *COLUMNS])
        for run in runs:
            for part, layers in run.parts.items():
                rows.writerows(
                    [*map(cell, (run.label, part, layer)), *numbers(run.layers[layer], 6)] for layer in layers
                )
        files['ratios.csv'] = text.getvalue().encode()
    return files


def cell(name: str) -> str:
    """Write a name for a spreadsheet, which reads text that begins with one of these as a formula."""
    return f"'{name}" if name.startswith(('=', '+', '-', '@')) else name


def numbers(ratios: np.ndarray, digits: int) -> list[str]:
    """Format means, then variances; a normalizer that the layer lacks is empty."""
    return ['' if np.isnan(ratio) else f'{ratio:.{digits}f}' for ratio in ratios.flat]


def show(runs: list[Run]) -> None:
    """Print a table of each run."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    for run in runs:
        table = Table(title=escape(f'{run.label}: {len(run.layers)} SN layers'), title_justify='left')
        table.add_column('layer', no_wrap=True)
        for column in COLUMNS:
            table.add_column(column.replace('_', ' ').upper(), justify='right')
        for part, layers in run.parts.items():
            mean = numbers(mean_ratios(run.layers[layer] for layer in layers), 3)
            table.add_row(escape(f'{part} ({len(layers)})'), *mean, style='bold')
            for layer in layers:
                table.add_row(escape(f'  {layer}'), *numbers(run.layers[layer], 3))
            table.add_section()
        console.print(table)


if __name__ == '__main__':
    main()
