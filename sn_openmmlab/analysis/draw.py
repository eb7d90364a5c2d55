"""Figures of importance ratios."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..ops import NORMALIZERS
from .read import Run, mean_ratios

# Okabe and Ito's: colour-blind readers can tell them apart, and by lightness so can readers of a print in grey.
COLORS = dict(zip(NORMALIZERS, ('#E69F00', '#009E73', '#0072B2')))
LINES = dict(zip(NORMALIZERS, ('-', '--', '-.')))
TITLES = ('means', 'variances')


def figures(runs: list[Run]) -> dict[str, Figure]:
    """Draw all figures that some runs allow; by name.

    - ``layers``: stacked bars of every layer.
    - ``parts``: stacked bars of every part's mean, run beside run.
    - ``radar``: the same around a circle, as in the paper's figure 1a; for runs with 3 or more parts.
    - ``course``: mean and quartiles of every part's layers over training; for runs with a log of the hook.
    """
    found = dict(layers=layers(runs), parts=parts(runs))
    around = [run for run in runs if len(run.parts) >= 3]
    if around:
        found['radar'] = radar(around)
    logged = [run for run in runs if run.course]
    if logged:
        found['course'] = course(logged)
    return found


def layers(runs: list[Run]) -> Figure:
    """Draw stacked bars of every layer, with one column for the means and one for the variances of each run."""
    names: dict[str, dict[str, None]] = {}
    for run in runs:
        for part, layers in run.parts.items():
            names.setdefault(part, {}).update(dict.fromkeys(layers))
    rows = [row for part, layers in names.items() for row in (part, *layers)]
    figure = Figure(figsize=(2.4 + 2 * 1.9 * len(runs), 0.9 + 0.135 * len(rows)), layout='constrained')
    axes = figure.subplots(1, 2 * len(runs), sharey=True, squeeze=False)[0]
    for i, run in enumerate(runs):
        places = [rows.index(layer) for layer in run.layers]
        for kind, ax in enumerate(axes[2 * i : 2 * i + 2]):
            _draw_bars(ax, places, [ratios[kind] for ratios in run.layers.values()])
            ax.set_title(_make_title(runs, run, TITLES[kind]), fontsize=8)
    axes[0].set_yticks(range(len(rows)), map(_escape, rows), fontsize=6)
    for row, label in zip(rows, axes[0].get_yticklabels()):
        if row in names:
            label.set(fontsize=7.5, fontweight='bold')
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    _draw_legend(figure)
    return figure


def parts(runs: list[Run]) -> Figure:
    """Draw stacked bars of every part, with numbers: means over its layers."""
    rows = [(part, run) for part in _list_parts(runs) for run in runs if part in run.parts]
    places = np.arange(len(rows)) + 0.5 * np.cumsum(
        [i > 0 and rows[i - 1][0] != part for i, (part, _) in enumerate(rows)]
    )
    figure = Figure(figsize=(8, 0.9 + 0.3 * (places[-1] + 1)), layout='constrained')
    axes = figure.subplots(1, 2, sharey=True)
    for kind, ax in enumerate(axes):
        values = [mean_ratios(run.layers[layer] for layer in run.parts[part])[kind] for part, run in rows]
        _draw_bars(ax, places, values, numbers=True)
        ax.set_title(TITLES[kind], fontsize=9)
    names = [part if len(runs) == 1 else f'{part}, {run.label}' for part, run in rows]
    axes[0].set_yticks(places, map(_escape, names), fontsize=8)
    axes[0].set_ylim(places[-1] + 0.6, -0.6)
    _draw_legend(figure)
    return figure


def radar(runs: list[Run]) -> Figure:
    """Draw the parts of each run around a circle, with a line for each normalizer; farther out is more important."""
    figure = Figure(figsize=(9, 0.4 + 4.2 * len(runs)), layout='constrained')
    polar = dict(projection='polar', theta_offset=np.pi / 2, theta_direction=-1)
    axes = figure.subplots(len(runs), 2, subplot_kw=polar, squeeze=False)
    of_runs = [
        np.stack([mean_ratios(run.layers[layer] for layer in layers) for layers in run.parts.values()]) for run in runs
    ]
    top = max(0.5, *(np.ceil(np.nanmax(means) * 10) / 10 for means in of_runs))  # one scale for all
    for run, means, row in zip(runs, of_runs, axes):
        angles = 2 * np.pi * np.arange(len(means)) / len(means)
        for kind, ax in enumerate(row):
            for normalizer, values in zip(NORMALIZERS, means[:, kind].T):
                closed, color = [*range(len(means)), 0], COLORS[normalizer]
                ax.plot(angles[closed], values[closed], LINES[normalizer], color=color, marker='o', markersize=4, lw=2)
                ax.fill(angles, np.nan_to_num(values), color=color, alpha=0.08)
            ax.set_rlim(0, top)
            ax.set_rgrids(np.arange(0.2, top + 0.01, 0.2), angle=180 / len(means), fontsize=7, color='0.4')
            _, labels = ax.set_thetagrids(np.degrees(angles), [*map(_escape, run.parts)], fontsize=8)
            for angle, label in zip(angles, labels):
                label.set_horizontalalignment(('center', 'left', 'right')[int(np.sign(np.sin(angle).round(9)))])
            ax.set_title(_make_title(runs, run, TITLES[kind]), fontsize=9)
            ax.spines['polar'].set_color('0.8')
            ax.grid(color='0.85')
    _draw_legend(figure)
    return figure


def course(runs: list[Run]) -> Figure:
    """Draw ratios over training: a part's mean as a line, the middle half of its layers as a band."""
    parts = _list_parts(runs)
    figure = Figure(figsize=(1 + 6 * len(runs), 0.9 + 1.6 * len(parts)), layout='constrained')
    axes = figure.subplots(len(parts), 2 * len(runs), sharey=True, squeeze=False)
    for column, ax in np.ndenumerate(axes):
        part, run, kind = parts[column[0]], runs[column[1] // 2], column[1] % 2
        values = part_course(run, part)[:, :, kind]
        if not values.size:
            ax.axis('off')
            continue
        for i, normalizer in enumerate(NORMALIZERS):
            style = dict(color=COLORS[normalizer])
            if not np.isnan(values[..., i]).all():  # some layer has it
                ratios = np.nan_to_num(values[..., i])
                ax.plot([*run.course], ratios.mean(1), LINES[normalizer], linewidth=2, **style)
                ax.fill_between([*run.course], *np.quantile(ratios, (0.25, 0.75), 1), alpha=0.2, linewidth=0, **style)
        ax.grid(color='0.9')
        ax.tick_params(labelsize=7)
        ax.spines[['top', 'right']].set_visible(False)
        ax.set_title(_make_title(runs, run, f'{part}, {TITLES[kind]}'), fontsize=8)
    axes[0, 0].set_ylim(0)  # of all
    figure.supxlabel('iterations', fontsize=8)
    _draw_legend(figure)
    return figure


def part_course(run: Run, part: str) -> np.ndarray:
    """Ratios of a part's layers over training (steps, layers, 2, 3)."""
    logged = [layer for layer in run.parts.get(part, ()) if all(layer in ratios for ratios in run.course.values())]
    ratios = np.array([[ratios[layer] for layer in logged] for ratios in run.course.values()])
    return ratios.reshape(len(run.course), len(logged), 2, 3)


def _list_parts(runs: list[Run]) -> list[str]:
    return [*dict.fromkeys(part for run in runs for part in run.parts)]


def _make_title(runs: list[Run], run: Run, text: str) -> str:
    return _escape(f'{run.label}\n{text}' if len(runs) > 1 else text)


def _escape(name: str) -> str:
    """Escape a name for matplotlib, which reads text between two dollar signs as a formula."""
    return name.replace('$', r'\$')


def _draw_bars(
    ax: Axes, places: Sequence[float] | np.ndarray, layers: Sequence[np.ndarray], numbers: bool = False
) -> None:
    ratios = np.nan_to_num(layers)
    left = np.zeros(len(ratios))
    for normalizer, values in zip(NORMALIZERS, ratios.T):
        bars = ax.barh(places, values, 0.86, left, color=COLORS[normalizer])
        if numbers:
            texts = [f'{value:.2f}' if value >= 0.08 else '' for value in values]
            ax.bar_label(
                bars, texts, label_type='center', fontsize=7.5, color='white' if normalizer == 'bn' else 'black'
            )
        left += values
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.5, 1], ['0', '0.5', '1'])
    ax.tick_params(labelsize=7, left=False)
    ax.spines[:].set_visible(False)


def _draw_legend(figure: Figure) -> None:
    lines = [
        figure.axes[0].plot([], [], color=color, linewidth=6, label=normalizer.upper())[0]
        for normalizer, color in COLORS.items()
    ]
    figure.legend(handles=lines, loc='outside upper center', ncols=3, frameon=False, fontsize=9, handlelength=1.2)
