"""One norm layer: forward, backward and evaluation, of SN and of torch's own norms.

    python -m benchmarks.bench_switch_norm [--device cpu] [--dtype float32] [--layout contiguous] [--seconds 10]

writes ``benchmarks/results/switch_norm_DEVICE_DTYPE_LAYOUT.json``, or, with
``--default-allocator``, a file of that name. Ratios are of medians, to ``nn.BatchNorm2d``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import SHAPES, Stopwatch, compare, environment, keep_freed_memory, kept_bytes, peak_bytes, write
from sn_openmmlab import SwitchNorm
from sn_openmmlab.ops import NORMALIZERS, backends
from sn_openmmlab.ops.backends import cpp
from sn_openmmlab.ops.backends.interface import Parameters, Setting


def on_backend(backend: str) -> Callable[[int], nn.Module]:
    """SN on one backend, whatever would have been chosen."""

    class Layer(SwitchNorm):
        def forward(self, x: Tensor) -> Tensor:
            os.environ['SN_BACKEND'] = backend
            try:
                return super().forward(x)
            finally:
                del os.environ['SN_BACKEND']

    return Layer


def compiled(channels: int) -> nn.Module:
    """SN under torch.compile, which keeps the kernels."""
    torch._dynamo.reset()  # each layer compiles anew, and their number is limited
    layer = SwitchNorm(channels)
    layer.forward = torch.compile(layer.forward, dynamic=True, fullgraph=True)
    return layer


def providers(device: torch.device, dtype: torch.dtype, with_compiled: bool) -> dict[str, Callable[[int], nn.Module]]:
    """Constructors of the layers to compare, by name."""
    makes = {
        'BatchNorm': nn.BatchNorm2d,
        'GroupNorm(32)': lambda c: nn.GroupNorm(32, c),
        'InstanceNorm': lambda c: nn.InstanceNorm2d(c, affine=True),
        'SN textbook': on_backend('reference'),
        'SN native': on_backend('native'),
    }
    if cpp.runs_on(device, dtype):
        makes['SN cpp'] = on_backend('cpp')
    if device.type == 'cuda':
        makes['SN triton'] = on_backend('triton')
    if with_compiled:
        makes['SN compiled'] = compiled
    return makes


def candidate(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], dict[str, float]]:
    """A training step and an evaluation of one layer, timed by phase."""
    inputs = [x, *layer.parameters()]

    def run() -> dict[str, float]:
        layer.train()
        watch = Stopwatch(x.device)
        y = layer(x)
        watch.lap()
        torch.autograd.grad(y, inputs, dy)
        watch.lap()
        forward, backward = watch.seconds()
        del y
        layer.eval()
        with torch.no_grad():
            watch = Stopwatch(x.device)
            layer(x)
            watch.lap()
        return dict(forward=forward, backward=backward, both=forward + backward, eval=watch.seconds()[0])

    return run


def bound(x: Tensor) -> Callable[[], dict[str, float]]:
    """The traffic bound: the bytes of the passes at the speed of a copy (one read, one write) into warm memory."""
    x, y = x.detach(), torch.empty_like(x)

    def run() -> dict[str, float]:
        watch = Stopwatch(x.device)
        torch.add(x, 1, out=y)
        watch.lap()
        copy = watch.seconds()[0] / 2
        return dict(forward=3 * copy, backward=5 * copy, both=8 * copy, eval=3 * copy)

    return run


PASSES = {  # in copies of the map: half of one for what is read or written, None for the algebra on (N, C)
    'moments': 0.5,
    'forward algebra': None,
    'affine': 1,
    'reduce': 1,
    'backward algebra': None,
    'combine': 1.5,
}


def passes(layer: SwitchNorm, x: Tensor, dy: Tensor) -> Callable[[], dict[str, float]]:
    """The four passes and the algebra between them, of the backend that is chosen by itself, one by one."""
    backend, x, size = backends.choose(x.device, x.dtype), x.detach(), x.shape[2:].numel()
    parameters = Parameters(*(p.detach() for p in (layer.mean_weight, layer.var_weight, layer.weight, layer.bias)))
    setting = Setting(NORMALIZERS, layer.eps, False)

    def run() -> dict[str, float]:
        watch = Stopwatch(x.device)
        moments = backend.moments(x)
        watch.lap()
        coefficients, joint = backend.coefficients(moments, size, None, parameters, None, setting)
        watch.lap()
        backend.affine(x, moments, coefficients)
        watch.lap()
        sums = backend.reduce(dy, x, moments)
        watch.lap()
        coefficients, _ = backend.gradients(sums, moments, joint, size, None, parameters, setting)
        watch.lap()
        backend.combine(dy, x, moments, coefficients)
        watch.lap()
        return dict(zip(PASSES, watch.seconds()))

    return run


def bench_shape(shape, dtype, layout, device, makes, seconds) -> tuple[list[dict], list[dict]]:
    """All providers on one shape, one row for each phase; and SN's passes, one row for each."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    if layout == 'channels_last':
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    x.requires_grad_()
    layers = {name: make(shape[1]).to(device) for name, make in makes.items()}
    candidates = {name: candidate(layer, x, dy) for name, layer in layers.items()}
    candidates['traffic bound'] = bound(x)
    candidates['passes'] = passes(SwitchNorm(shape[1]).to(device), x, dy)
    times = compare(candidates, seconds)
    copy = times['traffic bound']['forward']['median'] / 1.5
    parts = [
        dict(shape=shape, name=name, ratio_to_bound=copies and summary['median'] / (copies * copy), **summary)
        for (name, copies), summary in zip(PASSES.items(), times.pop('passes').values())
    ]
    rows = []
    for name, phases in times.items():
        layer = layers.get(name)
        memory = {}
        if layer is not None:
            parameters = list(layer.parameters())
            memory['kept_bytes'] = kept_bytes(lambda layer=layer: layer.train()(x), parameters)
            memory['peak_bytes'] = peak_bytes(lambda run=candidates[name]: run(), x.device)
        for phase, summary in phases.items():
            ratio = summary['median'] / times['BatchNorm'][phase]['median']
            rows.append(dict(shape=shape, provider=name, phase=phase, ratio=ratio, **summary, **memory))
    return rows, parts


def main(argv: list[str] | None = None) -> None:
    """Read the command line, measure, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32', choices=['float32', 'float16', 'bfloat16', 'float64'])
    parser.add_argument('--layout', default='contiguous', choices=['contiguous', 'channels_last'])
    parser.add_argument('--seconds', type=float, default=10, help='about this long for each shape')
    parser.add_argument('--default-allocator', action='store_true', help='leave freed memory to glibc, as users do')
    parser.add_argument('--no-compiled', action='store_true', help='leave out torch.compile')
    args = parser.parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    makes = providers(device, dtype, not args.no_compiled)
    result = dict(
        environment(device),
        keeps_freed_memory=not args.default_allocator and keep_freed_memory(),
        dtype=args.dtype,
        layout=args.layout,
        names=list(SHAPES),
        rows=[],
        passes=[],
    )
    for name, shape in SHAPES.items():
        rows, parts = bench_shape(shape, dtype, args.layout, device, makes, args.seconds)
        result['rows'] += rows
        result['passes'] += parts
        line = '  '.join(f'{r["provider"]} {r["ratio"]:.2f}' for r in rows if r['phase'] == 'both')
        print(f'{name} {"x".join(map(str, shape))}: {line}', flush=True)
    name = f'switch_norm_{device.type}_{args.dtype}_{args.layout}' + '_default_allocator' * args.default_allocator
    print('wrote', write(name, result))


if __name__ == '__main__':
    main()
