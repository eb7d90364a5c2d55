"""The harness measures what it says, and the tables say what the result files say."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu, report  # noqa: E402
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


def test_the_check_for_gpus_says_in_one_line_that_there_is_none(tmp_path):
    if torch.cuda.is_available():
        pytest.skip('there is one')
    for more in [], ['--only', 'tests', '--out', str(tmp_path)]:
        done = subprocess.run([sys.executable, '-m', 'benchmarks.gpu', *more], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and not done.stdout and not list(tmp_path.iterdir())
        assert re.fullmatch(
            'benchmarks.gpu needs a CUDA device, and torch sees none; .*bench_switch_norm\n', done.stderr
        )


def test_the_check_for_gpus_knows_its_parts(capsys):
    with pytest.raises(SystemExit) as end:
        gpu.main(['--only', 'float64'])
    assert end.value.code == 2 and "invalid choice: 'float64'" in capsys.readouterr().err
    assert sum(gpu.LIMITS.values()) <= 8 * 60


def test_a_part_that_fails_leaves_the_others(tmp_path):
    code = {
        'fails': 'import sys; print("wrong"); sys.exit(3)',
        'hangs': 'import time; print("slow", flush=True); time.sleep(60)',
        'dies': 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)',
        'works': 'print("right")',
    }
    parts = {part: [sys.executable, '-c', text] for part, text in code.items()}
    parts['is missing'] = ['no such program']
    results = gpu.run_parts(parts, dict.fromkeys(parts, 5), tmp_path, tmp_path)
    assert [result.split(':')[0] for result in results.values()] == [
        'ended with 3', 'took longer than 5 s', 'ended with -9', 'ok', 'could not be started'
    ]  # fmt: skip
    assert json.loads((tmp_path / 'gpu.json').read_text()) == dict(parts=results)
    logs = [(tmp_path / f'gpu_{part}.log').read_text() for part in code]
    assert logs == ['wrong\n', 'slow\n', '', 'right\n']


WITHOUT_OPENMMLAB = """
import sys
sys.modules['mmengine'] = None
import torch
from benchmarks import gpu
from benchmarks.harness import write
write('layer', gpu.bench(sys.argv[1], torch.device('cpu'), {'small': (2, 32, 4, 4)}, 0), gpu.Path(sys.argv[2]))
"""


@pytest.mark.parametrize('part', ['float32 contiguous', 'bfloat16 channels_last'])
def test_the_op_is_timed_without_openmmlab(part, tmp_path):
    """As on a bare machine, but on the CPU, where the device's time is the host's."""
    bare, out = tmp_path / 'bare', tmp_path / 'out'
    bare.mkdir()
    gpu.make_bare(bare)
    command = [sys.executable, '-c', WITHOUT_OPENMMLAB, part, str(out)]
    printed = subprocess.run(command, cwd=bare, check=True, capture_output=True, text=True).stdout
    result = json.loads((out / 'layer.json').read_text())
    providers = ['BatchNorm', 'GroupNorm(32)', 'SN', 'SN native']
    phases = [phase + kind for kind in ('', ' on host') for phase in ('forward', 'backward', 'both', 'eval')]
    assert [(r['provider'], r['phase']) for r in result['rows']] == list(itertools.product(providers, phases))
    assert all(r['median'] > 0 for r in result['rows']) and part == f'{result["dtype"]} {result["layout"]}'
    assert 'small 2x32x4x4, eval on host: BatchNorm 1.00  GroupNorm(32) ' in printed


def test_a_candidate_that_does_not_run_leaves_the_others(monkeypatch, capsys):
    made = gpu.candidates(False)
    monkeypatch.setattr(gpu, 'candidates', lambda compiled: {**made, 'SN': None})
    rows = gpu.bench('float32 contiguous', torch.device('cpu'), {'small': (2, 32, 4, 4)}, 0)['rows']
    assert {row['provider'] for row in rows} == {'BatchNorm', 'GroupNorm(32)', 'SN native'}
    assert "small: SN failed: TypeError: 'NoneType' object is not callable" in capsys.readouterr().out


def test_the_tests_of_the_kernels_need_no_openmmlab(tmp_path):
    """They are found, and import, where the package is ops alone."""
    pytest.importorskip('triton', reason='Triton is not installed')
    gpu.make_bare(tmp_path)
    code = 'import sys; sys.modules["mmengine"] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))'
    command = [
        sys.executable,
        '-c',
        code,
        '-q',
        '-p',
        'no:cacheprovider',
        *gpu.TESTS,
        '-k',
        'unknown_backend or imported',
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
