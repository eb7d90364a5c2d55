"""Make tables and plots from the result files.

python -m benchmarks.report           # rewrite what stands between the markers of README.md and others, and the plot
python -m benchmarks.report --check   # fail if that would change the tables
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path

from benchmarks.harness import RESULTS

README = RESULTS.parent.parent / 'README.md'
DETAILS = RESULTS.parent / 'README.md'
SWAPPING = RESULTS.parent.parent / 'docs/swapping.md'
PLOT = RESULTS.parent.parent / 'docs/images/switch_norm_cpu.png'
PHASES = dict(forward='forward', backward='backward', both='forward and backward', eval='evaluation')
REFERENCE_SHAPES = 5  # the shapes that geometric means are taken over


def load(pattern: str) -> list[dict]:
    """Load the result files that match, ordered by name."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def geometric_mean(values: list[float]) -> float:
    """Geometric mean, which suits ratios."""
    return math.exp(sum(map(math.log, values)) / len(values))


def layer_tables(result: dict) -> str:
    """Ratios to BatchNorm by provider: a row for each shape, a table for each phase."""
    shapes = list(dict.fromkeys(tuple(row['shape']) for row in result['rows']))
    providers = list(dict.fromkeys(row['provider'] for row in result['rows']))
    cells = {(tuple(r['shape']), r['provider'], r['phase']): r for r in result['rows']}
    text = [
        f'## {_name_input(result)}, {_name_allocator(result)}{result["device"]}',
        '',
        _describe_conditions(result),
    ]
    for phase, title in PHASES.items():
        text += ['', f'{title.capitalize()}: ratio of medians to BatchNorm (BatchNorm itself in ms)', '']
        text += ['| shape | ' + ' | '.join(providers) + ' |', '| :--- |' + ' ---: |' * len(providers)]
        for shape in shapes:
            row = [cells[shape, name, phase] for name in providers]
            ratios = [
                f'{1e3 * r["median"]:.2f} ms' if r['provider'] == 'BatchNorm' else f'{r["ratio"]:.2f}' for r in row
            ]
            text.append('| ' + ' | '.join(['x'.join(map(str, shape)), *ratios]) + ' |')
        means = [
            geometric_mean([cells[shape, name, phase]['ratio'] for shape in shapes[:REFERENCE_SHAPES]])
            for name in providers
        ]
        label = f'geometric mean of the first {REFERENCE_SHAPES}'
        text.append('| ' + ' | '.join([label, *(f'{m:.2f}' for m in means)]) + ' |')
    text += ['', 'Kept for backward, as a multiple of the input', '']
    named = [name for name in providers if 'kept_bytes' in cells[shapes[0], name, 'both']]
    text += ['| shape | ' + ' | '.join(named) + ' |', '| :--- |' + ' ---: |' * len(named)]
    size = {'float64': 8, 'float32': 4}.get(result['dtype'], 2)
    for shape in shapes:
        row = [f'{cells[shape, name, "both"]["kept_bytes"] / (math.prod(shape) * size):.2f}' for name in named]
        text.append('| ' + ' | '.join(['x'.join(map(str, shape)), *row]) + ' |')
    return '\n'.join([*text, '', *_pass_table(result)])


def _pass_table(result: dict) -> list[str]:
    """Milliseconds of each pass of SN, and the multiple of the traffic bound that this is."""
    names = list(dict.fromkeys(row['name'] for row in result['passes']))
    text = ["SN's passes one by one: ms (multiple of the pass's own traffic bound)", '']
    text += ['| shape | ' + ' | '.join(names) + ' |', '| :--- |' + ' ---: |' * len(names)]
    for shape in dict.fromkeys(tuple(row['shape']) for row in result['passes']):
        cells = [
            f'{1e3 * r["median"]:.2f}' + (f' ({r["ratio_to_bound"]:.1f})' if r['ratio_to_bound'] else '')
            for r in result['passes']
            if tuple(r['shape']) == shape
        ]
        text.append('| ' + ' | '.join(['x'.join(map(str, shape)), *cells]) + ' |')
    return text


def summary(result: dict) -> str:
    """Geometric means of ratios to BatchNorm: SN on this device's kernels, by its textbook formula, and GroupNorm."""
    names = ['SN cpp', 'SN triton', 'SN native', 'SN textbook', 'GroupNorm(32)']
    names = [name for name in names if _list_ratios(result, name, 'both')]
    text = [f'{result["dtype"]}, {result["device"]}, {_describe_conditions(result)}', '']
    text += ['| time / BatchNorm2d | ' + ' | '.join(names) + ' |', '| :--- |' + ' ---: |' * len(names)]
    for phase, title in PHASES.items():
        means = [f'{geometric_mean(_list_ratios(result, name, phase)[:REFERENCE_SHAPES]):.2f}' for name in names]
        text.append('| ' + ' | '.join([f'{title}, geometric mean of {REFERENCE_SHAPES} shapes', *means]) + ' |')
    worst = [f'{max(_list_ratios(result, name, "both")[:REFERENCE_SHAPES]):.2f}' for name in names]
    text.append('| ' + ' | '.join(['forward and backward, slowest of them', *worst]) + ' |')
    return '\n'.join(text)


def _list_ratios(result: dict, provider: str, phase: str) -> list[float]:
    return [r['ratio'] for r in result['rows'] if (r['provider'], r['phase']) == (provider, phase)]


def model_table(result: dict) -> str:
    """Seconds a training step, ratio to BN, peak memory."""
    text = [f'## Training steps, {_name_allocator(result)}{result["device"]}', '', _describe_conditions(result), '']
    text += ['| model | images | norm | step (s), 20 to 80 % | ratio to BN | peak memory (MiB) |']
    text += ['| :--- | :--- | :--- | ---: | ---: | ---: |']
    for r in result['rows']:
        span = f'{r["median"]:.3f} ({r["p20"]:.3f} to {r["p80"]:.3f})'
        size, peak = 'x'.join(map(str, r['size'])), r['peak_bytes'] / 2**20
        text.append(f'| {r["model"]} | {size} | {r["norm"]} | {span} | {r["ratio"]:.2f} | {peak:.0f} |')
    return '\n'.join(text)


def gpu_tables(result: dict) -> str:
    """Microseconds of the device by shape, with ratios to BatchNorm in brackets; and mean ratios of the host's time."""
    cells = {(tuple(r['shape']), r['provider'], r['phase']): r for r in result['rows']}
    shapes, names = (list(dict.fromkeys(key[i] for key in cells)) for i in range(2))
    text = [f'## {_name_input(result)}, {result["device"]}', '', _describe_conditions(result)]
    for phase, title in PHASES.items():
        text += ['', f'{title.capitalize()}: us on the GPU (ratio to BatchNorm)', '']
        text += ['| shape | ' + ' | '.join(names) + ' |', '| :--- |' + ' ---: |' * len(names)]
        for shape in shapes:
            row = [cells[shape, name, phase] for name in names]
            times = [f'{1e6 * r["median"]:.0f} ({r["ratio"]:.2f})' for r in row]
            text.append('| ' + ' | '.join(['x'.join(map(str, shape)), *times]) + ' |')
        for where, suffix in ('', ''), ('the host, ', ' on host'):
            means = [f'{geometric_mean(_list_ratios(result, name, phase + suffix)):.2f}' for name in names]
            text.append('| ' + ' | '.join([f'{where}geometric mean', *means]) + ' |')
    return '\n'.join(text)


def gpu_summary(results: list[dict]) -> str:
    """Geometric means over all shapes of SN's and GroupNorm's time on the GPU and on the host, over BatchNorm's."""
    device, version, date, commit = (list_values(results, key) for key in ('device', 'torch', 'date', 'commit'))
    phases = {'both': 'forward and backward', 'eval': 'evaluation', 'both on host': 'host, forward and backward'}
    text = [f'{device}, torch {version}, {date}, commit {commit}', '']
    text += ['| time / BatchNorm2d, SN (GroupNorm(32)) | ' + ' | '.join(phases.values()) + ' |']
    text += ['| :--- |' + ' ---: |' * len(phases)]
    for result in results:
        means = [
            [geometric_mean(_list_ratios(result, name, phase)) for name in ('SN', 'GroupNorm(32)')] for phase in phases
        ]
        text.append('| ' + ' | '.join([_name_input(result), *(f'{sn:.2f} ({gn:.2f})' for sn, gn in means)]) + ' |')
    return '\n'.join(text)


def list_values(environments: list[dict], key: str) -> str:
    """What several measurements have under a key, each once."""
    return ', '.join(sorted({str(environment[key]) for environment in environments}))


def host_table(result: dict, without: str = '') -> str:
    """Microseconds of the host for a layer on a GPU: the best of all rounds, and their median."""
    cells = {(r['samples'], r['name'], r['phase']): r for r in result['rows']}
    names = list(dict.fromkeys(r['name'] for r in result['rows']))
    text = [
        f'## Host time of a layer on a GPU, {without}{result["device"]}',
        '',
        _describe_conditions(result),
        '',
    ]
    text += [f'| us, best (median), {result["channels"]} channels | forward | backward | evaluation |']
    text += ['| :--- | ---: | ---: | ---: |']
    # torch's norms compute on the CPU here, which takes no time for 2 samples only
    for samples, name in [(2, name) for name in names] + [(256, 'SN')]:
        row = [cells[samples, name, phase] for phase in ('forward', 'backward', 'eval')]
        times = ' | '.join(f'{r["best"]:.0f} ({r["median"]:.0f})' for r in row)
        text.append(f'| {name}, {samples} samples | {times} |')
    return '\n'.join(text)


def _name_input(result: dict) -> str:
    return f'{result["dtype"]}, {result["layout"].replace("_", " ")}'


def _name_allocator(result: dict) -> str:
    return '' if result['keeps_freed_memory'] else 'freed memory left to glibc, '


def _describe_conditions(result: dict) -> str:
    return (
        f'torch {result["torch"]}, {result["threads"]} threads, load {result["load"]:.1f} at the start, '
        f'{result["date"]}, commit {result["commit"]}.'
    )


STATUSES = {
    'fully': 'swapped fully',
    'partly': 'swapped but for norms that a class makes by itself',
    'own norms only': 'nothing swapped: classes make all norms by themselves',
    'not applicable': 'nothing to swap: LayerNorm only, or no norm',
    'unbuildable': 'not buildable, as shipped, in this environment',
    'unreadable': 'not readable, as shipped, in this environment',
    'failed': 'failed',
}


def sweep_table(records: list[dict]) -> str:
    """How many configs of each library ended with which status."""
    head, *records = records
    libraries = sorted({record['config'].partition('::')[0] for record in records})
    numbers = {
        status: [
            sum(r['status'] == status and r['config'].startswith(f'{lib}::') for r in records) for lib in libraries
        ]
        for status in STATUSES
    }
    text = ['| configs | ' + ' | '.join([*libraries, 'all']) + ' |', '| :--- |' + ' ---: |' * (len(libraries) + 1)]
    for status, row in numbers.items():
        text.append('| ' + ' | '.join([STATUSES[status], *map(str, row), str(sum(row))]) + ' |')
    fully, partly, own, _, unbuildable, unreadable, failed = (sum(row) for row in numbers.values())
    after = fully + partly + own
    before, unbuilt = after + failed, unbuildable + unreadable
    seconds = sum(record['seconds'] for record in records)
    versions = ', '.join(f'{name} {version}' for name, version in head.items() if name != 'date')
    text += [
        '',
        f'{before} configs build and have a BN, SyncBN, GN or IN. {after} of them ({after / before:.1%}) build after '
        f'the swap; if the {unbuilt} that do not even build before it were all counted as having such a norm, this '
        f'would be {after / (before + unbuilt):.1%}. In {fully} ({fully / before:.1%}) no such norm is left, in '
        f'{partly} only norms that a class makes by itself, and {own} have no others. '
        'The models are built without language models, trackers and trained teachers. '
        f'{seconds / 60:.0f} minutes of work in one process, {head["date"]}; {versions}.',
    ]
    return '\n'.join(text)


def sweep_owners(records: list[dict]) -> str:
    """The classes that make norms by themselves."""
    found = {}
    for record in records[1:]:
        for owner, n in record.get('left', {}).items():
            found.setdefault((owner.partition(': ')), []).append((record['config'], n))
    text = ['| part | class | norms | configs | one of them |', '| :--- | :--- | ---: | ---: | :--- |']
    for (part, _, owner), rows in sorted(found.items()):
        counts = sorted({n for _, n in rows})
        span = f'{counts[0]}' if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'
        text.append(f'| {part} | `{owner}` | {span} | {len(rows)} | `{rows[0][0]}` |')
    return '\n'.join(text)


def sweep_reasons(records: list[dict]) -> str:
    """Configs that could not be swapped, by reason."""
    found = {}
    for record in records[1:]:
        if 'reason' in record:
            found.setdefault(record['reason'], []).append(f'`{record["config"]}`')
    rows = sorted(found.items(), key=lambda item: -len(item[1]))
    text = ['| configs | reason | which |', '| ---: | :--- | :--- |']
    text += [f'| {len(names)} | {reason.replace("|", "/")} | {", ".join(names)} |' for reason, names in rows]
    return '\n'.join(text)


def training_table(records: list[dict], sweep: list[dict]) -> str:
    """How many families train for a step with SN, and why the others do not."""
    head, *records = records
    families = {r['config'].partition('/')[0] for r in sweep[1:] if 'changed' in r}
    failed = sorted((r for r in records if r['sn']), key=lambda r: (bool(r['as shipped']), r['config']))
    alone = sum(not r['as shipped'] for r in failed)
    versions = ', '.join(f'{name} {version}' for name, version in head.items() if name != 'date')
    text = [
        f'{len(records)} of {len(families)} families tried: {len(records) - len(failed)} train with SN, '
        f'{len(failed) - alone} fail with SN and as shipped, {alone} with SN only. {head["date"]}; {versions}.',
        '',
        '| config | with SN | as shipped |',
        '| :--- | :--- | :--- |',
    ]
    for r in failed:
        said = [(r[key] or 'trains').replace('|', '/') for key in ('sn', 'as shipped')]
        text.append(f'| `{r["config"]}` | {said[0]} | {"the same" if said[1] == said[0] else said[1]} |')
    return '\n'.join(text)


def plot(result: dict, path: Path) -> None:
    """Forward and backward of every provider as bars, BatchNorm as the line at 1."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    rows = [r for r in result['rows'] if r['phase'] == 'both' and r['provider'] != 'BatchNorm']
    shapes = list(dict.fromkeys(tuple(r['shape']) for r in rows))
    providers = list(dict.fromkeys(r['provider'] for r in rows))
    figure, axes = plt.subplots(figsize=(10, 3.6), layout='constrained')
    width = 0.8 / len(providers)
    for i, name in enumerate(providers):
        heights = [r['ratio'] for r in rows if r['provider'] == name]
        axes.bar([s + i * width for s in range(len(shapes))], heights, width, label=name)
    axes.axhline(1, color='black', linewidth=1)
    axes.set_yscale('log', base=2)
    axes.set_yticks([0.5, 1, 2, 4, 8], ['0.5', '1', '2', '4', '8'])
    axes.set_xticks(
        [s + 0.4 - width / 2 for s in range(len(shapes))], ['x'.join(map(str, s)) for s in shapes], fontsize=8
    )
    axes.set_ylabel('time / BatchNorm2d')
    axes.set_title(f'Forward and backward, {result["dtype"]}, {result["device"]}', fontsize=10)
    axes.legend(ncols=len(providers), fontsize=8, loc='upper center', bbox_to_anchor=(0.5, -0.12), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def rewrite(tables: dict[tuple[Path, str], list[str]], check: bool) -> None:
    """Put tables between the named markers of files, or only check that they are there."""
    for (path, name), parts in tables.items():
        begin, end = f'<!-- {name} begin -->', f'<!-- {name} end -->'
        text = path.read_text()
        block = '\n\n'.join([begin, *parts, end])
        new = re.sub(f'{begin}.*{end}', lambda _, block=block: block, text, flags=re.DOTALL)
        if check and new != text:
            sys.exit(f'{path} is not what the result files say; run the report again, without --check')
        path.write_text(new)


def main(argv: list[str] | None = None) -> None:
    """Rewrite or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true')
    args = parser.parse_args(argv)
    sweep, training = (
        [json.loads(line) for line in (RESULTS / f'swap_{name}.jsonl').read_text().splitlines()]
        for name in ('sweep', 'training')
    )
    tables = {
        (README, 'tables'): [
            *map(summary, load('switch_norm_*_float32_contiguous.json')),
            gpu_summary(load('gpu_*_*.json')),
        ],
        (DETAILS, 'tables'): [
            *map(model_table, load('models_*.json')),
            *(host_table(result, 'measured without one, ') for result in load('host_time.json')),
            *map(host_table, load('host_time_cuda.json')),
            *map(gpu_tables, load('gpu_*_*.json')),
            *map(layer_tables, load('switch_norm_*.json')),
        ],
        (README, 'sweep'): [sweep_table(sweep)],
        (SWAPPING, 'sweep'): [sweep_table(sweep)],
        (SWAPPING, 'owners'): [sweep_owners(sweep)],
        (SWAPPING, 'reasons'): [sweep_reasons(sweep)],
        (SWAPPING, 'training'): [training_table(training, sweep)],
    }
    rewrite(tables, args.check)
    if args.check:
        return
    for result in load('switch_norm_cpu_float32_contiguous.json'):
        plot(result, PLOT)
    print('wrote', *dict.fromkeys(path for path, _ in tables))


if __name__ == '__main__':
    main()
