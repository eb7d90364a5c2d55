"""Result files of accuracy cells to the tables of README.md beside this file, and to plots.

python -m benchmarks.accuracy.report           # rewrite what stands between the markers of README.md, and the plots
python -m benchmarks.accuracy.report --check   # fail if that would change the tables
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from benchmarks.accuracy.run import NORMS, RESULTS, TASKS, default_images, load_task, norms
from benchmarks.report import list_values, rewrite
from sn_openmmlab.analysis import mean_ratios
from sn_openmmlab.analysis.draw import COLORS, LINES
from sn_openmmlab.norms import part_name

README = Path(__file__).parent / 'README.md'
HOME = Path(__file__).resolve().parents[2] / 'README.md'
GUIDE = HOME.parent / 'docs/finetuning.md'
PLOTS = HOME.parent / 'docs/images'
SCRATCH, FINETUNED = ('bccd', 'camvid'), ('lite0_bccd', 'lite0_camvid')  # tasks whose norms share a table


def main(argv: list[str] | None = None) -> None:
    """Rewrite or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true')
    args = parser.parse_args(argv)
    by_task = {task: load(task) for task in TASKS}
    parts = [tables(task, results) for task, results in by_task.items() if results]
    scratch = summary_by_rate({task: by_task[task] for task in SCRATCH})
    finetuned = summary({task: by_task[task] for task in FINETUNED})
    rewrite(
        {
            (README, 'tables'): parts,
            (HOME, 'accuracy'): [scratch],
            (HOME, 'finetuning'): [finetuned],
            (GUIDE, 'finetuning'): [finetuned],
            (GUIDE, 'rates'): [rates({task: by_task[task] for task in FINETUNED})],
        },
        args.check,
    )
    if not args.check:
        for task, results in by_task.items():
            plot(task, results, PLOTS / f'accuracy_{task}.png')
        figure = draw_sizes(by_task['cifar10'])
        if figure:
            figure.savefig(PLOTS / 'batch_size.png', dpi=120)
        print('wrote', README)


def load(task: str) -> list[dict]:
    """The results of a task, by norm, images per step and seed."""
    results = [json.loads(path.read_text()) for path in RESULTS.glob(f'{task}_*.json')]
    order = list(norms(load_task(task)))
    return sorted(results, key=lambda r: (order.index(r['norm']), r['images'], r['lr'], r['epochs'], r['seed']))


def is_whole(result: dict) -> bool:
    """Whether a cell was trained as its task says, but for the learning rate and the number of images per step."""
    return (result['epochs'], result['variant']) == (load_task(result['task']).EPOCHS, '')


def is_compared(result: dict) -> bool:
    """Whether a cell is one of the comparison: trained as its task says."""
    task = load_task(result['task'])
    return is_whole(result) and (result['lr'], result['images']) == (task.LR, default_images(task))


def tables(name: str, results: list[dict]) -> str:
    """Norms by images per step and learning rate; and all other cells: short trainings and variants."""
    task = load_task(name)
    text = [f'## {task.__doc__.splitlines()[0]}', '', _conditions(results)]
    groups = {}
    whole = sorted(filter(is_whole, results), key=lambda r: (r['images'], r['lr']))
    for r in whole:
        groups.setdefault((str(r['images']), f'{r["lr"]:g}', r['norm']), []).append(r)
    if groups:
        kinds = list(dict.fromkeys(k for r in whole for k in r['final'] if k != 'diverged')) or ['moving average']
        text += [
            '',
            f'After the last of {task.EPOCHS} epochs; mean ± standard deviation (lowest to highest) of the seeds.'
            + _test_error(task),
            '',
            f'| images per step | learning rate | norm | seeds | metric | {" | ".join(kinds)} |',
            '| ---: | ---: | :--- | ---: | :--- |' + ' ---: |' * len(kinds),
        ]
        for key, cells in groups.items():
            head = [*key, str(len(cells))]
            for metric, label in task.METRICS.items():
                values = [_spread([_value(r, kind, metric) for r in cells]) for kind in kinds]
                if all('diverged' in r['final'] for r in cells):
                    values[0] = 'diverged'
                text.append('| ' + ' | '.join([*head, label, *values]) + ' |')
                head = [''] * 4
        text += ratios([r for r in results if is_compared(r)])
    others = [r for r in results if not is_whole(r)]
    if others:
        metric, label = next(iter(task.METRICS.items()))
        text += ['', f'Short trainings and variants, {label} after the last epoch:', '']
        text += [f'| norm | images per step | learning rate | epochs | changed | seeds | {label} |']
        text += ['| :--- | ---: | ---: | ---: | :--- | ---: | ---: |']
        groups = {}
        for r in others:
            groups.setdefault((r['norm'], r['images'], f'{r["lr"]:g}', r['epochs'], r['variant']), []).append(r)
        for key, cells in groups.items():
            value = _spread([_value(r, 'moving average', metric) for r in cells]) or 'diverged'
            text.append(f'| {" | ".join(map(str, [*key, len(cells), value]))} |')
    return '\n'.join(text)


def ratios(results: list[dict]) -> list[str]:
    """Importance ratios at the end: the mean over the layers of a part, and the seeds, which have one learning rate."""
    rows = []
    for (norm, part), layers in _by_part(results).items():
        means = ' | '.join(f'{ratio:.3f}' for ratio in mean_ratios(layers).flat)
        rows.append(f'| {norm} | {part} | {means} |')
    if not rows:
        return []
    rate = results[0]['lr']
    head = ['', f'Importance ratios after the last epoch at {rate:g}, mean over layers and seeds:', '']
    head += ['| norm | part | IN, means | LN, means | BN, means | IN, variances | LN, variances | BN, variances |']
    return [*head, '| :--- | :--- |' + ' ---: |' * 6, *rows]


def _by_part(results: list[dict]) -> dict[tuple[str, str], list]:
    """Importance ratios of the layers that have BN's, by norm and part."""
    parts = {}
    for result in results:
        for layer, values in result.get('importance_ratios', {}).items():
            if len(values[0]) == 3:
                parts.setdefault((result['norm'], part_name(layer)), []).append(values)
    return parts


def summary(by_task: dict[str, list[dict]]) -> str:
    """The comparison, evaluated with the moving average: a row a norm, a column a task."""
    by_task = {name: [r for r in results if is_compared(r)] for name, results in by_task.items()}
    heads = [_name_result(load_task(name)) for name in by_task]
    text = [f'| norm | {" | ".join(heads)} |', '| :--- |' + ' ---: |' * len(heads)]
    trained = {r['norm'] for results in by_task.values() for r in results}
    labels = {name: label for task in map(load_task, by_task) for name, label in labels_of(task).items()}
    for norm in filter(trained.__contains__, labels):
        row = [_entry(name, [r for r in results if r['norm'] == norm]) for name, results in by_task.items()]
        text.append(f'| {" | ".join([labels[norm], *row])} |')
    return '\n'.join(text)


def summary_by_rate(by_task: dict[str, list[dict]]) -> str:
    """As :func:`summary`, at each learning rate: a row for it, a column a norm."""
    text = [f'| | learning rate | {" | ".join(NORMS)} |', '| :--- | ---: |' + ' ---: |' * len(NORMS)]
    for name, results in by_task.items():
        task = load_task(name)
        results = [r for r in results if is_whole(r) and r['images'] == default_images(task)]
        for lr in sorted({r['lr'] for r in results}):
            row = [_entry(name, [r for r in results if (r['norm'], r['lr']) == (norm, lr)]) for norm in NORMS]
            text.append(f'| {" | ".join([_name_result(task), f"{lr:g}", *row])} |')
    return '\n'.join(text)


def rates(by_task: dict[str, list[dict]]) -> str:
    """The recipe by the learning rate of the logits: a column a task, and LN's part in the means of its heads."""
    by_task = {name: [r for r in results if is_compared(r)] for name, results in by_task.items()}
    tasks = [load_task(name) for name in by_task]
    heads = [f'{_name_result(task)} | LN in the means of its head' for task in tasks]
    text = [f"| rate of the logits / the others' | {' | '.join(heads)} |", '| ---: |' + ' ---: |' * 2 * len(heads)]
    for norm, way in sorted(norms(tasks[0]).items(), key=lambda item: item[1]['logits']):
        by_norm = {name: [r for r in results if r['norm'] == norm] for name, results in by_task.items()}
        if norm.startswith('SN-frozen') and any(by_norm.values()):
            row = [f'{way["logits"]:g}']
            for name, cells in by_norm.items():
                parts = _by_part(cells)
                head = parts.get((norm, 'box head')) or parts.get((norm, 'decode head'))
                row += [_entry(name, cells), f'{mean_ratios(head)[0][1]:.2f}' if head else '']
            text.append(f'| {" | ".join(row)} |')
    return '\n'.join(text)


def _name_result(task) -> str:
    return f'{task.NAME}, {next(iter(task.METRICS.values()))}'


def _entry(name: str, cells: list[dict]) -> str:
    """A task's first metric with the moving average, and of how many seeds."""
    if not cells:
        return 'not trained yet'
    metric = next(iter(load_task(name).METRICS))
    return f'{_spread([_value(r, "moving average", metric) for r in cells]) or "diverged"} ({_count(cells)})'


def _count(seeds: list) -> str:
    return f'{len(seeds)} seed{"s" if len(seeds) > 1 else ""}'


def labels_of(task) -> dict[str, str]:
    """What a table of several tasks calls the norms that stand in it."""
    labels = getattr(task, 'LABELS', None)
    return {name: f'{label} (`{name}`)' for name, label in labels.items()} if labels else {n: n for n in norms(task)}


def _value(result: dict, kind: str, metric: str) -> float | None:
    """The metric; None where there is none of this kind, and 0 where mmdet gave none since nothing was detected."""
    return result['final'][kind].get(metric, 0.0) if kind in result['final'] else None


def _spread(values: list[float | None]) -> str:
    """Mean, and the spread where there is more than one; and how many have none."""
    known = [v for v in values if v is not None]
    if not known:
        return ''
    text = f'{statistics.mean(known):#.3g}'
    if len(known) > 1:
        digits = len(text.partition('.')[2])  # of the mean, and then of all
        text += f' ± {statistics.stdev(known):.{digits}f} ({min(known):.{digits}f} to {max(known):.{digits}f})'
    return text + (f', {len(values) - len(known)} diverged' if len(known) < len(values) else '')


def _test_error(task) -> str:
    """What the size of a classification task's test set leaves open."""
    if not hasattr(task, 'TESTED'):
        return ''
    return f' The {task.TESTED} test samples leave a standard error of up to {50 / task.TESTED**0.5:.1f} % in each.'


def _conditions(results: list[dict]) -> str:
    environments = [e for r in results for e in r['environments']]
    device, version, threads, commit = (
        list_values(environments, key) for key in ('device', 'torch', 'threads', 'commit')
    )
    dates = sorted(e['date'] for e in environments)
    return f'{device}, torch {version}, {threads} threads, {dates[0]} to {dates[-1]}, commit {commit}.'


def plot(name: str, results: list[dict], path: Path) -> None:
    """The metric over epochs: a thin line for each seed, a thick one for their mean."""
    results = [r for r in results if is_compared(r) and 'diverged' not in r['final']]
    if not results:
        return
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    task = load_task(name)
    metric, label = next(iter(task.METRICS.items()))
    figure, axes = plt.subplots(figsize=(6, 4), layout='constrained')
    for i, norm in enumerate(norms(task)):
        curves = [
            {row['epoch']: row['metrics'].get(metric, 0.0) for row in r['curve'] if 'metrics' in row}
            for r in results
            if r['norm'] == norm
        ]
        if not curves:
            continue
        for curve in curves:
            axes.plot(*zip(*curve.items()), color=f'C{i}', linewidth=0.6, alpha=0.6)
        mean = {epoch: statistics.mean(curve[epoch] for curve in curves) for epoch in curves[0]}
        axes.plot(*zip(*mean.items()), color=f'C{i}', linewidth=2, label=f'{norm} ({_count(curves)})')
    axes.set_xlabel('epoch')
    axes.set_ylabel(label)
    axes.set_title(f'{task.NAME}, {default_images(task)} images a step, learning rate {task.LR:g}', fontsize=10)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_sizes(results: list[dict]):
    """Accuracy and SN's importance ratios against the number of images that statistics are of, as the paper's figure 1.

    Points are means over seeds, and bars go from the lowest to the highest; a norm that takes statistics of one image
    only is a level line. None without results.
    """
    results = [r for r in results if is_compared(r) and 'diverged' not in r['final']]
    if not results:
        return None
    from matplotlib.figure import Figure

    task = load_task('cifar10')
    figure = Figure(figsize=(12, 4.2), layout='constrained')
    accuracy, *axes = figure.subplots(1, 3)
    for color, kind in enumerate(('BN', 'SN', 'GN', 'SN-IN-LN')):
        for average, line in ('moving average', '-'), ('batch average', '--'):
            by_size = _by_size([r for r in results if average in r['final']], kind)
            if by_size:
                by_size = {size: [r['final'][average]['accuracy'] for r in cells] for size, cells in by_size.items()}
                middle = {size: statistics.mean(values) for size, values in by_size.items()}
                below = [middle[size] - min(values) for size, values in by_size.items()]
                above = [max(values) - middle[size] for size, values in by_size.items()]
                accuracy.errorbar(
                    middle.keys(), middle.values(), [below, above], color=f'C{color}', linestyle=line, capsize=2,
                    marker='.', label=f'{kind}, {average}' if kind in ('BN', 'SN') else kind,
                )  # fmt: skip
    accuracy.set(title=f'{task.NAME}, {task.EPOCHS} epochs', ylabel='accuracy, %')
    accuracy.legend(
        fontsize=8, frameon=False, loc='upper center', bbox_to_anchor=(0.45, -0.15), ncol=3, columnspacing=1
    )  # below the axis, where it covers no line
    for kind, (ax, title) in enumerate(zip(axes, ('means', 'variances'))):
        by_size = {
            size: [mean_ratios(r['importance_ratios'].values())[kind] for r in cells]
            for size, cells in _by_size(results, 'SN').items()
        }
        for k, name in enumerate(COLORS):
            points = {size: statistics.mean(ratios[k] for ratios in seeds) for size, seeds in by_size.items()}
            ax.plot(points.keys(), points.values(), LINES[name], color=COLORS[name], marker='.', label=name.upper())
        ax.set(title=f'mean importance ratios of SN, {title}', ylim=(0, 1))
        ax.legend(frameon=False, fontsize=8)
    for ax in (accuracy, *axes):
        ax.set_xscale('log', base=2)
        ax.set_xlabel('images that statistics of the batch are of')
        ax.set_xticks(task.SIZES, task.SIZES)
        ax.invert_xaxis()
    return figure


def _by_size(results: list[dict], kind: str) -> dict[int, list[dict]]:
    """The cells of a norm by the number of images of its statistics; at both ends those that do not depend on it."""
    sizes, found = load_task('cifar10').SIZES, {}
    for result in results:
        norm, _, size = result['norm'].partition('-b')
        if norm == kind:
            for at in [int(size)] if size else [sizes[0], sizes[-1]]:
                found.setdefault(at, []).append(result)
    return found


if __name__ == '__main__':
    main()
