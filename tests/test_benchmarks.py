"""The harness measures what it says, and the tables say what the result files say."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ops.cases import alone

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


def test_host_time_without_a_gpu(tmp_path):
    pytest.importorskip('triton', reason='Triton is not installed')
    alone('-m', 'benchmarks.bench_host', '--rounds', '2', '--out', str(tmp_path), cwd=ROOT)
    rows = json.loads((tmp_path / 'host_time.json').read_text())['rows']
    assert {(r['samples'], r['name'], r['phase']) for r in rows} == {
        (samples, name, phase)
        for samples in (2, 256)
        for name in ('BatchNorm', 'GroupNorm(32)', 'SN')
        for phase in ('forward', 'backward', 'eval')
    }
    assert all(0 < r['best'] <= r['median'] for r in rows)


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
    results = gpu.run_parts(parts, {**dict.fromkeys(parts, 60), 'hangs': 2}, tmp_path, tmp_path)
    assert [result.split(':')[0] for result in results.values()] == [
        'ended with 3', 'took longer than 2 s', 'ended with -9', 'ok', 'could not be started'
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
    options = ['-q', '-p', 'no:cacheprovider', '-k', 'unknown_backend or imported or equal_ratios or empty_input']
    command = [sys.executable, '-c', code, *options, *(f'tests/test_ops/{test}' for test in gpu.TESTS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_programs_of_the_tests_find_the_package_of_the_tests(tmp_path):
    """Where it is not installed, and one is a script in another folder."""
    gpu.make_bare(tmp_path)
    script = tmp_path / 'tests/script.py'
    script.write_text('import sn_openmmlab; print(sn_openmmlab.__file__)')
    code = f'import sys; sys.path.insert(1, "tests"); from test_ops.cases import alone; print(alone({str(script)!r}))'
    command = [sys.executable, '-c', code]
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert printed.split() == [str(tmp_path / 'sn_openmmlab/__init__.py')]
