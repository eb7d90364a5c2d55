"""A page for exploring importance ratios; it needs no network and no other file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from .draw import COLORS, LINES
from .read import Run

TEMPLATE = Path(__file__).with_name('page.html')
DASHES = {'-': '', '--': '6 4', '-.': '8 3 2 3'}
STEPS = 200  # of a course; nobody could see more, and the file would grow


def render(runs: list[Run]) -> str:
    """Render the page: its template with the ratios in it as JSON."""
    data = dict(
        normalizers=[dict(name=name.upper(), color=color, dash=DASHES[LINES[name]]) for name, color in COLORS.items()],
        runs=[_describe_run(run) for run in runs],
    )
    text = json.dumps(data, allow_nan=False).replace('<', '\\u003c')  # so that no label can end its HTML element
    return TEMPLATE.read_text(encoding='utf-8').replace('/*data*/', text)


def _describe_run(run: Run) -> dict:
    steps = [*run.course]
    steps = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, min(len(steps), STEPS)).astype(int))]
    layers = [
        dict(
            name=layer,
            part=part,
            ratios=_round_ratios(run.layers[layer]),
            course=[_round_ratios(run.course[step][layer]) for step in steps]
            if all(layer in run.course[step] for step in steps)
            else [],
        )
        for part, names in run.parts.items()
        for layer in names
    ]
    return dict(label=run.label, steps=steps, layers=layers)


def _round_ratios(ratios: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(ratio) else round(float(ratio), 4) for ratio in row] for row in ratios]
