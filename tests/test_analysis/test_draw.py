"""Figures of importance ratios; as files: test_plot_ratios.py."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex
from ratio_trainings import NAMES, learned
from support import ROOT

from sn_openmmlab import read_ratios
from sn_openmmlab.analysis import draw


def test_figures_show_these_ratios(trained):
    """Widths and colours of the bars, and the points of the radar and of the course."""
    model, work_dir = trained
    run, ratios = read_ratios(work_dir), learned(model)
    figures = draw.figures([run])
    assert set(figures) == {'layers', 'parts', 'radar', 'course'}
    for kind in 0, 1:
        bars = {}
        for bar in figures['layers'].axes[kind].patches:
            bars.setdefault(to_hex(bar.get_facecolor()), []).append(bar.get_width())
        for i, normalizer in enumerate(('in', 'ln', 'bn')):
            widths = [ratios[name][kind].get(normalizer, 0) for name in NAMES]
            np.testing.assert_allclose(bars[draw.COLORS[normalizer].lower()], widths, atol=1e-6)
            backbone = sum(ratios[name][kind][normalizer] for name in NAMES[:2]) / 2
            for name in 'radar', 'course':
                line = figures[name].axes[kind].lines[i]
                assert line.get_color() == draw.COLORS[normalizer]
                assert line.get_ydata()[0 if name == 'radar' else -1] == pytest.approx(backbone, abs=1e-6)


def test_importing_the_package_does_not_import_matplotlib():
    code = 'import sys, mmengine.runner; before = "matplotlib" in sys.modules; import sn_openmmlab; '
    code += 'print(before, "matplotlib" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ['False', 'False'], done.stderr
