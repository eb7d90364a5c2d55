"""Starting kernels: which are compiled, how many, and that each is looked up once."""

import importlib.util
import json
import random
import re
from pathlib import Path

import pytest

from sn_openmmlab.ops import NORMALIZERS
from sn_openmmlab.ops.backends.interface import Setting
from test_ops.cases import alone
from test_ops.test_backends.test_triton_kernels.cases import algebra, passes

ROOT = Path(__file__).parents[4]


def test_kernels_compile_and_load_16_bytes_at_once():
    ptx = json.loads(alone('-W', 'ignore', str(Path(__file__).with_name('compile_kernels.py'))).splitlines()[-1])
    kernels = {k.__name__ for m in (passes, algebra) for k in vars(m).values() if hasattr(k, 'arg_names')}
    assert set(ptx) == {k for k in kernels if k.endswith('_kernel')}
    wide = re.compile(r'ld\.global\S*\.v4\.b32|cp\.async\S+\.global \[[^]]*\], \[[^]]*\], 0x10')
    for name in '_moments_kernel', '_reduce_kernel', '_combine_kernel':
        assert all(map(wide.search, ptx[name][:2])), name


SMALL = '2x2048x13x21', '32x2048x7x7', '256x256x7x7', '1024x256x7x7', '1024x256x14x14'  # in lines that begin anywhere


@pytest.mark.slow
@pytest.mark.parametrize('architecture', [80, 90], ids='sm_{}'.format)
def test_kernels_of_real_shapes_keep_their_numbers_in_registers(architecture):
    """And load and store 16 bytes at once where maps allow it; prints the table (pytest -s)."""
    script = str(Path(__file__).with_name('compile_kernels.py'))
    rows = json.loads(alone('-W', 'ignore', script, str(architecture)).splitlines()[-1])
    print('| ' + ' | '.join(rows[0]) + ' |')
    for row in rows:
        print('| ' + ' | '.join(map(str, row.values())) + ' |')
    assert len({(row['shape'], row['dtype'], row['layout']) for row in rows}) == 11 * 3 * 2
    for row in rows:
        assert row['spilled'] == 0, row
        maps = row['kernel'] in ('_moments_kernel', '_reduce_kernel', '_combine_kernel')
        if maps and (row['layout'] == 'NHWC' or row['shape'] not in SMALL):
            assert row['load'] == 128, row
            assert row['store'] == 128 or row['kernel'] != '_combine_kernel', row


def list_kernels(n, c, size, channels_last, itemsize):
    """What distinguishes those of one layer: their names, and the arguments that they are compiled for."""
    sizes = n, c, size, channels_last, itemsize, 132
    reduction, mapping = passes.reduction_plan(*sizes), passes.map_plan(*sizes)
    split = reduction.arguments['parts'] > 1
    launches = [('moments', reduction, split), ('reduce', reduction), ('affine', mapping), ('combine', mapping)]
    launches += [('join', reduction.joining), ('add', reduction.adding)] * split
    for made in algebra.plans(n, c, Setting(NORMALIZERS, 1e-5, False)):
        launches += [('coefficients', made), ('gradients', made)]
    for name, made, *more in launches:
        constants = (item for item in made.arguments.items() if item[0].isupper() and item[0] not in 'NC')
        yield name, made.num_warps, (*constants, *more)


@pytest.mark.parametrize(
    'itemsize, channels_last, most', [(4, False, 86), (4, True, 55), (2, False, 106), (2, True, 55)]
)
def test_a_training_compiles_few_kernels(itemsize, channels_last, most):
    """500 steps of Mask R-CNN R-50 FPN, whose images and RoIs have other sizes and numbers each time."""
    choose = random.Random(0)
    images = [
        (480, 640),
        (427, 640),
        (640, 480),
        (425, 640),
        (500, 375),
        (333, 500),
        (612, 612),
        (360, 640),
        (428, 640),
    ]
    kernels, first = set(), None
    for _ in range(500):
        height = width = 0
        for h, w in choose.choices(images, k=2):
            scale = min(1333 / max(h, w), choose.choice((640, 672, 704, 736, 768, 800)) / min(h, w))
            height, width = max(height, round(h * scale)), max(width, round(w * scale))
        height, width = (-(-side // 32) * 32 for side in (height, width))
        layers = [(64, 2)]  # channels, and the stride of the maps
        for channels, stride in (64, 4), (128, 8), (256, 16), (512, 32):
            layers += [(channels, max(stride // 2, 4)), (channels, stride), (4 * channels, stride), (256, stride)]
        layers = [(2, c, (height // stride) * (width // stride)) for c, stride in layers]
        masks = min(max(round(choose.lognormvariate(4, 1)), 1), 256)
        for layer in [*layers, (1024, 256, 49), (masks, 256, 196)]:
            kernels.update(list_kernels(*layer, channels_last, itemsize))
        first = first or len(kernels)
    print(f'{first} kernels in the first step, {len(kernels)} in 500')
    assert 20 < first < len(kernels) <= most


# -- what is known of a call, with a GPU that benchmarks.bench_host pretends to have ----------------------------------


starts_kernels = pytest.mark.skipif(
    passes.VERSION < (3, 3) or importlib.util.find_spec('mmengine') is None,
    reason='older Triton than 3.3 starts kernels otherwise, and benchmarks.bench_host needs mmengine',
)

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


@starts_kernels
def test_kernels_are_looked_up_once():
    """Triton's own look-up costs ten times a launch; after the first step none is left."""
    assert alone('-c', COUNT_LOOK_UPS, cwd=ROOT).split() == ['6', '5']  # combine serves forward and backward


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


@starts_kernels
def test_launches_of_a_chain_are_those_of_triton():
    """To the argument: after the first run a chain starts compiled kernels itself."""
    assert int(alone('-c', COMPARE_LAUNCHES, cwd=ROOT)) > 100
