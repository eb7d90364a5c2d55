"""The whole check on a GPU in one command: ``python -m benchmarks.gpu [--out DIR] [--only PART ...]``.

Needs torch, Triton and pytest, and nothing of OpenMMLab. It tests the kernels against the formula in float64 on the
device, and times the op in float32, float16 and bfloat16 and both layouts, and compiled. Each part is a process with a
limit of time, and leaves a file in DIR whatever becomes of the others; all take eight minutes at most.

Time on the GPU and on the host are measured apart: the GPU sleeps until the host has enqueued everything, and the cache
is overwritten before. So the first is what the kernels take, and the second what a layer costs a model that waits for
the host.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import RESULTS, SHAPES, compare, environment, write

ROOT = Path(__file__).parents[1]
TESTS = ['test_switch_norm.py', 'test_cuda.py', 'test_backends/test_choose.py', 'test_backends/test_triton_kernels']
TIMED = [
    f'{dtype} {layout}' for dtype in ('float32', 'float16', 'bfloat16') for layout in ('contiguous', 'channels_last')
]
LIMITS = {'tests': 210, **dict.fromkeys(TIMED, 35), 'float32 contiguous compiled': 60}  # seconds
_PARALLEL = ['-n', 'auto'] if importlib.util.find_spec('xdist') else []  # each test compiles kernels of its own
CYCLES = 10_000_000  # that the GPU sleeps, 5 ms or more: the host is done by then
FLUSHED = 2**28  # bytes, more than any cache holds


def candidates(compiled: bool) -> dict[str, Callable]:
    """The op and torch's norms, of input, weight, bias, logits, statistics and mode."""
    from sn_openmmlab.ops import switch_norm

    def batch_norm(x, weight, bias, logits, statistics, training):
        return F.batch_norm(x, *statistics, weight, bias, training=training)

    def group_norm(x, weight, bias, logits, statistics, training):  # which takes parameters of its input's dtype only
        return F.group_norm(x, 32, weight.to(x.dtype), bias.to(x.dtype))

    def sn(x, weight, bias, logits, statistics, training):
        return switch_norm(x, *logits, weight, bias, *statistics, training=training)

    def native(*args):
        os.environ['SN_BACKEND'] = 'native'
        try:
            return sn(*args)
        finally:
            del os.environ['SN_BACKEND']

    found = {'BatchNorm': batch_norm, 'GroupNorm(32)': group_norm, 'SN': sn}
    if not compiled:
        return {**found, 'SN native': native}
    torch._dynamo.reset()
    return {**found, 'SN compiled': torch.compile(sn, fullgraph=True)}


def step(function: Callable, x: Tensor, dy: Tensor) -> Callable[[], dict[str, float]]:
    """A training step and an evaluation: seconds on the device, and on the host, by phase."""
    channels, cuda = x.shape[1], x.is_cuda
    weight, bias, *logits = (torch.ones(n, device=x.device, requires_grad=True) for n in (channels, channels, 3, 3))
    statistics = [torch.zeros(channels, device=x.device), torch.ones(channels, device=x.device)]
    memory = torch.empty(FLUSHED if cuda else 0, dtype=torch.uint8, device=x.device)

    def measure(*works: Callable) -> list[tuple[float, float]]:
        """Seconds on the device and on the host of each of ``works``, which get what the one before returned."""
        events, times, result = [], [time.perf_counter()], None
        if cuda:
            memory.zero_()
            torch.cuda._sleep(CYCLES)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(len(works) + 1)]
            events[0].record()
            times = [time.perf_counter()]
        for i, work in enumerate(works):
            result = work(result)
            times.append(time.perf_counter())
            if cuda:
                events[i + 1].record()
        host = [b - a for a, b in zip(times, times[1:])]
        if not cuda:
            return list(zip(host, host))
        torch.cuda.synchronize()
        return [(a.elapsed_time(b) / 1e3, seconds) for a, b, seconds in zip(events, events[1:], host)]

    def run() -> dict[str, float]:
        inputs = weight, bias, logits, statistics
        forward, backward = measure(
            lambda _: function(x, *inputs, True),
            lambda y: torch.autograd.grad(y, [x, weight, bias, *logits], dy, allow_unused=True),
        )
        with torch.no_grad():
            (evaluation,) = measure(lambda _: function(x, *inputs, False))
        both = tuple(map(sum, zip(forward, backward)))
        phases = dict(forward=forward, backward=backward, both=both, eval=evaluation)
        device = {phase: times[0] for phase, times in phases.items()}
        return {**device, **{f'{phase} on host': times[1] for phase, times in phases.items()}}

    return run


def bench(part: str, device: torch.device, shapes: dict[str, tuple], seconds: float) -> dict:
    """Time all candidates that run: ratios are of medians, to ``F.batch_norm``."""
    dtype, layout, *compiled = part.split()
    rows = []
    for title, shape in shapes.items():
        generator = torch.Generator().manual_seed(0)
        x, dy = (torch.randn(shape, generator=generator).to(device, getattr(torch, dtype)) for _ in range(2))
        if layout == 'channels_last':
            x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        x.requires_grad_()
        runs = {}
        for name, function in candidates(bool(compiled)).items():
            run = step(function, x, dy)
            try:
                run()
                runs[name] = run
            except Exception as error:  # one that does not run is to leave the others
                print(f'{title}: {name} failed: {type(error).__name__}: {error}', flush=True)
        times = compare(runs, seconds)
        for name, phases in times.items():
            for phase, summary in phases.items():
                ratio = summary['median'] / times['BatchNorm'][phase]['median']
                rows.append(dict(shape=shape, provider=name, phase=phase, ratio=ratio, **summary))
        for phase in 'both', 'both on host', 'eval', 'eval on host':
            found = [row for row in rows if row['phase'] == phase and row['shape'] == shape]
            line = '  '.join(f'{row["provider"]} {row["ratio"]:.2f}' for row in found)
            print(f'{title} {"x".join(map(str, shape))}, {phase}: {line}', flush=True)
    return dict(environment(device), dtype=dtype, layout=layout, compiled=bool(compiled), names=list(shapes), rows=rows)


def run_parts(parts: dict[str, list[str]], limits: dict[str, int], folder: Path, out: Path) -> dict[str, str]:
    """Run each command, whatever becomes of the others; what each printed goes to a file of its own.

    Returns:
        {part: 'ok', or what went wrong}
    """
    results = {}
    for part, command in parts.items():
        start, log = time.perf_counter(), out / f'gpu_{part.replace(" ", "_")}.log'
        print(f'{part}, at most {limits[part]} s: {log}', flush=True)
        with log.open('w') as file:
            try:
                done = subprocess.run(command, cwd=folder, stdout=file, stderr=file, timeout=limits[part])
                results[part] = 'ok' if done.returncode == 0 else f'ended with {done.returncode}'
            except subprocess.TimeoutExpired:
                results[part] = f'took longer than {limits[part]} s'
            except OSError as error:
                results[part] = f'could not be started: {error}'
        lines = log.read_text(errors='replace').splitlines()
        print('\n'.join(f'    {line}' for line in lines[-12:]), flush=True)
        print(f'{part}: {results[part]} ({time.perf_counter() - start:.0f} s)', flush=True)
        write('gpu', dict(parts=results), out)  # after each, so that it is there if the machine is taken away
    return results


def make_bare(folder: Path) -> None:
    """A checkout in which the package is ops alone, which imports without mmengine."""
    (folder / 'sn_openmmlab').mkdir()
    (folder / 'tests').mkdir()
    (folder / 'sn_openmmlab/__init__.py').touch()
    for path in 'sn_openmmlab/ops', 'sn_openmmlab/version.py', 'tests/test_ops', 'benchmarks':
        (folder / path).symlink_to(ROOT / path)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, run the parts, and end with 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder of the result files')
    parser.add_argument(
        '--only', nargs='+', choices=LIMITS, default=list(LIMITS), help='the parts to run', metavar='PART'
    )
    parser.add_argument('--seconds', type=float, default=1, help='about this long for each shape')
    parser.add_argument('--here', action='store_true', help=argparse.SUPPRESS)  # one part, in this process
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit('benchmarks.gpu needs a CUDA device, and torch sees none; on the CPU run benchmarks.bench_switch_norm')
    if args.here:
        (part,) = args.only
        result = bench(part, torch.device('cuda'), SHAPES, args.seconds)
        print('wrote', write(f'gpu_{part.replace(" ", "_")}', result, args.out))
        return
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = {}
    for part in args.only:
        if part == 'tests':
            command = ['pytest', '-q', '-m', 'not slow', '-p', 'no:cacheprovider', *_PARALLEL]
            command += [f'tests/test_ops/{test}' for test in TESTS]
        else:
            command = ['benchmarks.gpu', '--here', '--only', part, '--out', str(out), '--seconds', str(args.seconds)]
        parts[part] = [sys.executable, '-m', *command]
    with tempfile.TemporaryDirectory() as folder:
        make_bare(Path(folder))
        results = run_parts(parts, LIMITS, Path(folder), out)
    print(json.dumps(results, indent=1))
    sys.exit(any(result != 'ok' for result in results.values()))


if __name__ == '__main__':
    main()
