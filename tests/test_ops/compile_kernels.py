"""Compile every Triton kernel for a Hopper GPU, which takes no GPU, and print their PTX as JSON.

The interpreter knows neither types nor layouts; the compiler does. A program of its own, as Triton decides between the
two when it is imported.
"""

import json

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sn_openmmlab.ops import NORMALIZERS
from sn_openmmlab.ops.backends.triton_kernels import algebra as triton_algebra
from sn_openmmlab.ops.backends.triton_kernels import passes


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self):
        return GPUTarget('cuda', 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(kernel, plan, *args, **kwargs):
    compiled = kernel.warmup(*args, grid=(plan.programs,), **kwargs, **plan.arguments)
    ptx.setdefault(kernel.__name__, []).append(compiled.asm['ptx'])


def maps(n, c, size, dtype, channels_last):
    if channels_last:
        return torch.empty(n, size, c, dtype=dtype, device='meta').mT
    return torch.empty(n, c, size, dtype=dtype, device='meta')


def run(x, names):
    """What the op calls, forward and backward."""
    n, c, size = x.shape
    logits, channel = torch.empty(len(names), device='meta'), torch.empty(c, dtype=x.dtype, device='meta')
    mean, var = passes.moments(x)
    a, s, saved, count = triton_algebra.forward(
        mean, var, None, None, logits, logits, channel, channel, names, 1e-5, size, None
    )
    passes.affine(x, mean, a, s)
    sums = passes.reduce(x, x, mean)
    a, b1, b0, *_ = triton_algebra.backward(*sums, saved, logits, logits, channel, names, 1e-5, size, count, None)
    passes.combine(x, x, mean, a, b1, b0)


ptx = {}
driver.set_active(Hopper())
passes.launch = triton_algebra.launch = compile_only
run(maps(2, 64, 268800, torch.float16, False), NORMALIZERS)
run(maps(2, 64, 16800, torch.float16, True), NORMALIZERS)
run(maps(300, 256, 49, torch.float32, False), ('in', 'ln'))
print(json.dumps(ptx))
