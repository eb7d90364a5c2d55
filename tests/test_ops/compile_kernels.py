"""Compile every Triton kernel for a Hopper GPU, which takes no GPU, and print their PTX as JSON.

The interpreter knows neither types nor layouts; the compiler does. A program of its own, as Triton decides between the
two when it is imported.
"""

import json

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sn_openmmlab.ops import NORMALIZERS
from sn_openmmlab.ops.backends import triton_kernels
from sn_openmmlab.ops.backends.interface import Parameters, Setting, Statistics
from sn_openmmlab.ops.backends.triton_kernels import algebra, passes


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self):
        return GPUTarget('cuda', 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(kernel, plan, tensors, *numbers):
    compiled = kernel.warmup(
        *tensors, *numbers, grid=(plan.programs,), num_warps=plan.num_warps, enable_fp_fusion=True, **plan.arguments
    )
    ptx.setdefault(kernel.__name__, []).append(compiled.asm['ptx'])


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


ptx = {}
driver.set_active(Hopper())
passes.launch = algebra.launch = compile_only
run(maps(2, 64, 268800, torch.float16, False), NORMALIZERS, False)
run(maps(2, 64, 16800, torch.float16, True), NORMALIZERS, True)
run(maps(300, 256, 49, torch.float32, False), ('in', 'ln'), False)
print(json.dumps(ptx))
