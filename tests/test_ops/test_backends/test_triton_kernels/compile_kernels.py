"""Compile every Triton kernel for a GPU, which takes none, and print what came of it as JSON.

    python compile_kernels.py                   # for Hopper, of a few shapes: {kernel: [PTX]}
    python compile_kernels.py 80 [shape ...]    # for that architecture, of the shapes of real networks: rows of a table

The interpreter knows neither types nor layouts; the compiler does. A program of its own, as Triton decides between the
two when it is imported.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sn_openmmlab.ops import NORMALIZERS
from sn_openmmlab.ops.backends import triton_kernels
from sn_openmmlab.ops.backends.interface import Parameters, Setting, Statistics
from sn_openmmlab.ops.backends.triton_kernels import algebra, passes

ARCHITECTURE = int(sys.argv[1]) if len(sys.argv) > 1 else 90
SHAPES = {
    '2x64x400x672': (2, 64, 268800),  # detection, from the first norm
    '2x64x200x336': (2, 64, 67200),
    '2x256x100x168': (2, 256, 16800),
    '2x512x50x84': (2, 512, 4200),
    '2x2048x13x21': (2, 2048, 273),
    '256x256x7x7': (256, 256, 49),  # heads
    '1024x256x7x7': (1024, 256, 49),
    '1024x256x14x14': (1024, 256, 196),
    '32x64x112x112': (32, 64, 12544),  # classification
    '32x256x56x56': (32, 256, 3136),
    '32x2048x7x7': (32, 2048, 49),
}


class Device:
    """As much of a driver as compiling asks for."""

    def get_current_target(self):
        return GPUTarget('cuda', ARCHITECTURE, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(kernel, plan, tensors, *numbers):
    compiled = kernel.warmup(
        *tensors, *numbers, grid=(plan.programs,), num_warps=plan.num_warps, enable_fp_fusion=True, **plan.arguments
    )
    made.append((kernel.__name__, plan.num_warps, compiled))


def describe(compiled):
    """Registers and bytes of spilled ones of a thread, and how many bits it loads and stores at once at most."""
    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        usage = subprocess.run([tool, '-res-usage', file.name], check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf'{name}:(\d+)', usage)[1]) for name in ('REG', 'STACK', 'LOCAL'))
    widths = {'ld': 0, 'st': 0}
    for access, vector, bits in re.findall(r'(ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)', compiled.asm['ptx']):
        widths[access] = max(widths[access], int(vector or 1) * int(bits))
    for size in re.findall(r'cp\.async\S+\.global \[[^]]*\], \[[^]]*\], 0x(\w+)', compiled.asm['ptx']):  # ahead
        widths['ld'] = max(widths['ld'], 8 * int(size, 16))
    return dict(registers=registers, spilled=stack + local, load=widths['ld'], store=widths['st'])


def maps(n, c, size, dtype, channels_last):
    if channels_last:
        return torch.empty(n, size, c, dtype=dtype, device='meta').mT
    return torch.empty(n, c, size, dtype=dtype, device='meta')


def run(x, names, synchronised):
    """What the op calls, forward and backward."""
    n, c, size = x.shape
    logits, channel = torch.empty(len(names), device='meta'), torch.empty(c, dtype=x.dtype, device='meta')
    parameters, setting = Parameters(logits, logits, channel, channel), Setting(names, 1e-5, 'bn' not in names)
    statistics = None
    if 'bn' in names:
        statistics = Statistics(channel, channel, torch.empty((), dtype=torch.int64, device='meta'), 0.1)
    moments = triton_kernels.moments(x)
    shared = triton_kernels.pool(moments, size) if synchronised else None
    coefficients, joint = triton_kernels.coefficients(moments, size, shared, parameters, statistics, setting)
    triton_kernels.affine(x, moments, coefficients)
    sums = triton_kernels.reduce(x, x, moments)
    if synchronised:
        shared = triton_kernels.pool_gradients(sums, moments, joint, parameters, setting)
    coefficients, _ = triton_kernels.gradients(sums, moments, joint, size, shared, parameters, setting)
    triton_kernels.combine(x, x, moments, coefficients)


made = []
driver.set_active(Device())
passes.launch = algebra.launch = compile_only
if len(sys.argv) == 1:
    run(maps(2, 64, 268800, torch.float16, False), NORMALIZERS, False)
    run(maps(2, 64, 16800, torch.float16, True), NORMALIZERS, True)
    run(maps(300, 256, 49, torch.float32, False), ('in', 'ln'), False)
    ptx = {}
    for name, _, compiled in made:
        ptx.setdefault(name, []).append(compiled.asm['ptx'])
    print(json.dumps(ptx))
else:
    rows, known = [], {}
    dtypes = torch.float32, torch.float16, torch.bfloat16
    for shape, dtype, channels_last in itertools.product(sys.argv[2:] or SHAPES, dtypes, (False, True)):
        made.clear()
        run(maps(*SHAPES[shape], dtype, channels_last), NORMALIZERS, False)
        for name, warps, compiled in made:
            if compiled.hash not in known:
                known[compiled.hash] = describe(compiled)
            layout = 'NHWC' if channels_last else 'NCHW'
            row = dict(shape=shape, dtype=str(dtype)[6:], layout=layout, kernel=name, warps=warps)
            rows.append({**row, **known[compiled.hash]})
    print(json.dumps(rows))
