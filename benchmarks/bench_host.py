"""What a norm layer costs the host on a GPU: microseconds of Python, autograd and launching, with a GPU or without.

    python -m benchmarks.bench_host [--rounds 60]

writes ``benchmarks/results/host_time_cuda.json`` where there is a GPU, and elsewhere ``host_time.json``: then Triton
compiles and launches as ever, through a driver whose launch does nothing; torch's own operations run on CPU tensors of
a pixel or two. So CUDA's own part of a launch is missing for all, which is 2 to 3 microseconds each for SN's three or
four and for the one or two of torch's norms.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.harness import RESULTS, environment, write
from sn_openmmlab import SwitchNorm
from sn_openmmlab.ops import backends

CHANNELS = 256
LAYERS = 20
LAYER_TYPES = {
    'BatchNorm': lambda: nn.BatchNorm2d(CHANNELS),
    'GroupNorm(32)': lambda: nn.GroupNorm(32, CHANNELS),
    'SN': lambda: SwitchNorm(CHANNELS),
}


class NothingToLaunch:
    """The part of Triton's driver that is C: it takes all arguments and starts nothing."""

    def launch(self, *args):
        pass

    def build_signature_metadata(self, signature):
        return b''

    def load_binary(self, name, kernel, shared, device):
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, device):
        return dict(max_shared_mem=232448, multiprocessor_count=132)


class Driver:
    """As much of a driver as compiling and launching ask for."""

    utils = NothingToLaunch()

    def __init__(self) -> None:
        from triton.backends.nvidia.driver import CudaLauncher

        self.launcher_cls = CudaLauncher

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget('cuda', 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device):
        return 9, 0


def pretend_to_have_a_gpu() -> None:
    """Let Triton compile for one, and SN's kernels be launched on CPU tensors; before anything imports Triton."""
    os.environ['SN_BACKEND'] = 'triton'
    os.environ.pop('TRITON_INTERPRET', None)
    import triton.backends.nvidia.driver as nvidia
    from triton.runtime import driver

    from sn_openmmlab.ops.backends import triton_kernels

    nvidia.PyKernelArg = lambda **kwargs: None
    driver.set_active(Driver())
    backends._triton = lambda device, dtype: (triton_kernels, None)


def microseconds(net: nn.Sequential, x: torch.Tensor) -> dict[str, float]:
    """Of one layer in a chain, by phase: a chain, since autograd's engine takes its time to start."""
    # autograd runs backward on a GPU in a thread of its own
    now = time.perf_counter_ns if x.is_cuda else time.thread_time_ns

    def clock(function) -> tuple[float, object]:
        if x.is_cuda:
            torch.cuda.synchronize()  # few launches wait to be started, so that none waits for room
        start = now()
        result = function()
        return (now() - start) / len(net) / 1e3, result

    net.train()
    forward, y = clock(lambda: net(x))
    total = y.sum()
    backward, _ = clock(total.backward)
    for p in (x, *net.parameters()):
        p.grad = None
    net.eval()
    with torch.no_grad():
        evaluation, _ = clock(lambda: net(x))
    return dict(forward=forward, backward=backward, eval=evaluation)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, measure, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=60)
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder of the result file')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if device.type == 'cpu':
        pretend_to_have_a_gpu()
    rows = []
    for samples in 2, 256:
        x = torch.randn(samples, CHANNELS, 1, 2, device=device, requires_grad=True)
        nets = {name: nn.Sequential(*(make() for _ in range(LAYERS))).to(device) for name, make in LAYER_TYPES.items()}
        times = {name: [] for name in nets}
        for _ in range(args.rounds + 5):
            for name, net in nets.items():
                times[name].append(microseconds(net, x))
        for name, runs in times.items():
            for phase in runs[0]:
                values = [run[phase] for run in runs[5:]]
                row = dict(samples=samples, name=name, phase=phase, best=min(values), median=statistics.median(values))
                rows.append(row)
            line = '  '.join(f'{row["phase"]} {row["best"]:.1f} ({row["median"]:.1f})' for row in rows[-3:])
            print(f'({samples}, {CHANNELS}) {name}: {line}', flush=True)
    result = dict(environment(device), layers=LAYERS, channels=CHANNELS, rows=rows)
    print('wrote', write('host_time' + '_cuda' * (device.type == 'cuda'), result, args.out))


if __name__ == '__main__':
    main()
