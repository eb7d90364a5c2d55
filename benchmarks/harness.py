"""Timing that can be trusted: candidates alternate in one process, and medians are compared.

A candidate is a function without arguments that returns the seconds of each of its phases. Each candidate runs once a
round, so that all of them meet a drift of the machine's speed.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / 'results'
SHAPES = {  # the first five are those of the published comparison in this project's goal, the others come on top
    'R-50-FPN stem': (2, 64, 200, 336),
    'R-50-FPN stage 1, FPN': (2, 256, 100, 168),
    'R-50-FPN stage 2': (2, 512, 50, 84),
    'R-50-FPN stage 4': (2, 2048, 13, 21),
    'box head': (256, 256, 7, 7),
    'mask head': (64, 256, 14, 14),
    'dilated R-50 stage 4': (2, 2048, 64, 64),
}
MAPPED_ALONE = 2**25  # from so many bytes on, glibc maps a block by itself once it has adapted to a program


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory, as in a training that has settled. Return whether glibc accepts this.

    By default glibc hands memory back when much of it is free at the end of the heap. The next candidate then pays for
    mapping it again, 2 microseconds a page, and ratios change threefold from run to run. Blocks above 32 MiB are mapped
    anew for every candidate, as in any process.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    m_trim_threshold, m_mmap_threshold = -1, -3
    return bool(mallopt and mallopt(m_mmap_threshold, MAPPED_ALONE) and mallopt(m_trim_threshold, 2**31 - 1))


class Stopwatch:
    """Measures seconds between calls of :meth:`lap`: by CUDA events, or by the wall clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == 'cuda'
        self.laps = []
        if self.cuda:
            torch.cuda.synchronize()
        self.lap()

    def lap(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.laps.append(event)
        else:
            self.laps.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """One number for each interval between two laps."""
        if not self.cuda:
            return [b - a for a, b in zip(self.laps, self.laps[1:])]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self.laps, self.laps[1:])]


def compare(candidates: dict[str, Callable[[], dict[str, float]]], seconds: float = 10.0, rounds: int = 7) -> dict:
    """Run the candidates in turn for about ``seconds``, at least ``rounds`` times, after two rounds of warm-up.

    Returns:
        {candidate: {phase: {'median', 'p20', 'p80' (seconds), 'runs'}}}
    """
    for _ in range(2):
        for run in candidates.values():
            run()
    times = {name: [] for name in candidates}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < rounds or time.perf_counter() - start < seconds:
        for name, run in candidates.items():
            times[name].append(run())
    return {name: {phase: _summary([run[phase] for run in runs]) for phase in runs[0]} for name, runs in times.items()}


def _summary(seconds: list[float]) -> dict:
    p20, _, _, p80 = statistics.quantiles(seconds, n=5)
    return dict(median=statistics.median(seconds), p20=p20, p80=p80, runs=len(seconds))


def kept_bytes(forward: Callable[[], object], parameters: list[torch.Tensor]) -> int:
    """Count the bytes that autograd keeps between forward and backward: each storage once, without parameters."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storages.values())


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Measure the peak of allocated bytes during ``step``, above those before it."""
    if device.type == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == '[memory]':
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def environment(device: torch.device) -> dict:
    """Describe what measurements depend on."""
    return dict(
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else _cpu_name(),
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0],
        torch=torch.__version__,
        python=platform.python_version(),
        date=datetime.date.today().isoformat(),
        commit=_git('describe', '--always')
        + ('-dirty' if _git('status', '--short', '--untracked-files=no', ':/', ':(exclude)*.json') else ''),
    )


def _git(*args: str) -> str:
    if shutil.which('git') is None:
        return 'unknown'
    return subprocess.run(['git', *args], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()


def _cpu_name() -> str:
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor()


def write(name: str, result: dict, folder: Path = RESULTS) -> Path:
    """Write a result file."""
    return write_whole(folder / f'{name}.json', (json.dumps(result, indent=1) + '\n').encode())


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all, and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name}.partial')
    partial.write_bytes(content)
    partial.replace(path)
    return path
