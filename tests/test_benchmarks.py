"""The harness measures what it says, and the tables say what the result files say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402
from benchmarks.bench_switch_norm import PASSES, bench_shape, on_backend  # noqa: E402
from benchmarks.harness import compare, kept_bytes  # noqa: E402
from sn_openmmlab import SwitchNorm  # noqa: E402


def test_tables_are_generated_from_the_result_files():
    report.main(['--check'])


def test_candidates_alternate_after_warm_up():
    order = []

    def candidate(name, seconds):
        return lambda: (order.append(name), dict(step=seconds))[1]

    times = compare({'a': candidate('a', 1.0), 'b': candidate('b', 2.0)}, seconds=0, rounds=5)
    assert order == ['a', 'b'] * 7
    assert times['b']['step'] == dict(median=2.0, p20=2.0, p80=2.0, runs=5)


def test_switch_norm_keeps_its_input_and_little_more():
    layer, x = SwitchNorm(8), torch.randn(2, 8, 64, 64, requires_grad=True)
    kept = kept_bytes(lambda: layer(x), list(layer.parameters()))
    assert x.nbytes <= kept <= 1.01 * x.nbytes


def test_rows_hold_every_provider_and_phase():
    makes = {'BatchNorm': torch.nn.BatchNorm2d, 'SN native': on_backend('native')}
    rows, passes = bench_shape((2, 4, 8, 8), torch.float32, 'channels_last', torch.device('cpu'), makes, seconds=0)
    phases = {(r['provider'], r['phase']) for r in rows}
    assert phases == {(p, f) for p in (*makes, 'traffic bound') for f in report.PHASES}
    assert all(r['ratio'] == pytest.approx(1) for r in rows if r['provider'] == 'BatchNorm')
    assert [r['name'] for r in passes] == list(PASSES)
    copy = next(r['median'] for r in rows if (r['provider'], r['phase']) == ('traffic bound', 'both')) / 4
    bounds = [r['median'] / r['ratio_to_bound'] / copy for r in passes if 'algebra' not in r['name']]
    assert bounds == pytest.approx([0.5, 1, 1, 1.5])  # and a copy is a read and a write


def without_interpreter(*command):
    env = {k: v for k, v in os.environ.items() if k not in ('TRITON_INTERPRET', 'SN_BACKEND')}
    return subprocess.run(
        [sys.executable, *command], env=env, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def test_host_time_without_a_gpu(tmp_path):
    pytest.importorskip('triton', reason='Triton is not installed')
    without_interpreter('-m', 'benchmarks.bench_host', '--rounds', '2', '--out', str(tmp_path))
    rows = json.loads((tmp_path / 'host_time.json').read_text())['rows']
    assert {(r['samples'], r['name'], r['phase']) for r in rows} == {
        (samples, name, phase)
        for samples in (2, 256)
        for name in ('BatchNorm', 'GroupNorm(32)', 'SN')
        for phase in ('forward', 'backward', 'eval')
    }
    assert all(0 < r['best'] <= r['median'] for r in rows)


COUNT_LOOK_UPS = """
from benchmarks.bench_host import pretend_to_have_a_gpu
pretend_to_have_a_gpu()
import torch
from sn_openmmlab import SwitchNorm
from sn_openmmlab.ops.backends.triton_kernels import launch
taken, run = [], launch._run
launch._run = lambda kernel, *args: (taken.append(kernel.__name__), run(kernel, *args))[1]
layer, x = SwitchNorm(8), torch.randn(2, 8, 5, 5, requires_grad=True)
for _ in range(3):
    layer(x).sum().backward()
print(len(taken), len(set(taken)))
"""


def test_kernels_are_looked_up_once():
    """Triton's own look-up costs ten times a launch; after the first step none is left."""
    triton = pytest.importorskip('triton', reason='Triton is not installed')
    if tuple(map(int, triton.__version__.split('.')[:2])) < (3, 3):
        pytest.skip('compiled kernels of older Triton take other arguments')
    assert without_interpreter('-c', COUNT_LOOK_UPS).split() == ['6', '5']  # combine serves forward and backward


COMPARE_LAUNCHES = """
from benchmarks.bench_host import NothingToLaunch, pretend_to_have_a_gpu
pretend_to_have_a_gpu()
import torch
from sn_openmmlab.ops import switch_norm
from sn_openmmlab.ops.backends.triton_kernels.launch import Chain

def seen(args):
    for a in args:
        if isinstance(a, tuple):
            yield list(seen(a))
        elif isinstance(a, torch.Tensor):
            yield a.data_ptr()
        else:
            yield None if type(a).__name__ in ('LazyDict', 'HookChain') else a  # what a profiler wants to know

launched, compared, run = [], 0, Chain.run
def twice(self, *args):
    global compared
    run(self, *args)
    first = list(launched)
    launched.clear()
    run(self, *args)
    assert self._known and launched == first, (first, launched)
    compared += len(first)
    launched.clear()

NothingToLaunch.launch = lambda self, *args: launched.append(list(seen(args)))
Chain.run = twice
for shape in (2, 8, 5, 5), (3, 5, 7), (1, 4, 200, 300), (300, 40, 2, 2):
    for affine in True, False:
        x, logits = torch.randn(shape, requires_grad=True), torch.ones(3)
        weight = torch.ones(shape[1]) if affine else None
        mean, var, tracked = torch.zeros(shape[1]), torch.ones(shape[1]), torch.tensor(0)
        for training in True, False:
            args = logits, logits, weight, weight, mean, var, tracked
            switch_norm(x, *args, training=training).sum().backward()
            with torch.no_grad():
                switch_norm(x, *args, training=training)
print(compared)
"""


def test_launches_of_a_chain_are_those_of_triton():
    """To the argument: after the first run a chain starts compiled kernels itself."""
    triton = pytest.importorskip('triton', reason='Triton is not installed')
    if tuple(map(int, triton.__version__.split('.')[:2])) < (3, 3):
        pytest.skip('compiled kernels of older Triton take other arguments')
    assert int(without_interpreter('-c', COMPARE_LAUNCHES)) > 100
