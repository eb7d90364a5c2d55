"""What tests of the operator share; imports where the package is ops alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sn_openmmlab
from sn_openmmlab.ops import NORMALIZERS, switch_norm
from sn_openmmlab.ops.backends import cpp

needs_library = pytest.mark.skipif(
    not cpp.runs_on(torch.device('cpu'), torch.float32), reason='the installation found no C++ compiler'
)
CPP = pytest.param('cpp', marks=needs_library)
BACKENDS = ['reference', 'native']  # for input in any dtype


def each_set(sets):
    """Parametrize a test by ``names`` of normalizers, and by whether statistics are ``frozen``, where BN has any."""
    return pytest.mark.parametrize(
        'names, frozen',
        [(names, frozen) for names in sets for frozen in (False, True) if 'bn' in names or not frozen],
        ids=lambda value: '-'.join(value) if isinstance(value, tuple) else 'frozen' if value else 'batch',
    )


def rand(*shape, seed=0, dtype=torch.float64, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)


def laid_out(x, layout):
    if layout == 'transposed':
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == 'channels_last':
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x


def arguments(channels, names=NORMALIZERS, dtype=torch.float64, stats=False):
    """Parameters away from their identity values."""
    args = [rand(len(names), seed=1), rand(len(names), seed=2), rand(channels, seed=3, shift=1), rand(channels, seed=4)]
    args = [a.to(dtype) for a in args]
    if stats and 'bn' in names:
        args += [rand(channels, seed=5, dtype=dtype), rand(channels, seed=6, dtype=dtype).square() + 0.5]
    return args


def run(x, args, stats, dy, **kwargs):
    """The output, and the gradients w.r.t. x and args."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, *args)]
    y = switch_norm(*leaves, *(s.clone() for s in stats), **kwargs)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def alone(*command, **kwargs):
    """What Python prints in a process of its own, which has the tests' package and none of their settings."""
    env = {k: v for k, v in os.environ.items() if k not in ('TRITON_INTERPRET', 'SN_BACKEND')}
    # benchmarks.gpu does not install it, and a script has its own folder in its path, not the current one
    path = str(Path(sn_openmmlab.__file__).parents[1]), env.get('PYTHONPATH')
    env['PYTHONPATH'] = os.pathsep.join(filter(None, path))
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


# of SparsestMax: logits, rho, and the ratios by hand: u + r * d/|d|, with r = rho * sqrt(2/3)
POINTS = dict(
    inside=((0.5, 0.3, 0.2), 0.2, (0.5, 0.3, 0.2)),  # |p0 - u| = 0.216 is above r = 0.163
    circle=((0.36, 0.32, 0.32), 0.3, (8 / 15, 7 / 30, 7 / 30)),  # d/|d| = (2, -1, -1) / sqrt(6)
    edge=((0.9, 0.5, -0.7), 0.6, (0.7, 0.3, 0.0)),
    edge_of_the_circle=((0.5, 0.45, 0.05), 0.7, (0.5 + 0.2 * 2**0.5, 0.5 - 0.2 * 2**0.5, 0.0)),  # r^2 - 1/6 = 0.4^2
    vertex=((2.0, 0.0, -1.0), 0.3, (1.0, 0.0, 0.0)),
    end=((0.34, 0.35, 0.31), 1.0, (0.0, 1.0, 0.0)),
    centre=((1.0, 1.0, 1.0), 0.5, (1 / 3, 1 / 3, 1 / 3)),
    tie_at_the_end=((1.0, 1.0, 0.0), 1.0, (1.0, 0.0, 0.0)),
)


def double(values, **kwargs):
    return torch.tensor(values, dtype=torch.float64, **kwargs)
