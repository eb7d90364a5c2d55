"""Starting kernels in few microseconds: what is known of a call is looked up once."""

# no `from __future__ import annotations`: Triton 3.0 takes tl.constexpr for what it is only where it is evaluated

import torch
import triton
from triton.runtime import driver

VERSION = tuple(map(int, triton.__version__.split('.')[:2]))


class Plan:
    """How many programs of a kernel to start, and those of its arguments that follow from sizes.

    Args:
        programs: Their number.
        num_warps: Warps of each.
        **arguments: The kernel's last arguments, in its order.
    """

    def __init__(self, programs: int, num_warps: int = 4, **arguments) -> None:
        self.programs = programs
        self.num_warps = num_warps
        self.arguments = arguments
        self.compiled = {}


def launch(kernel, plan: Plan, tensors: tuple, *numbers) -> None:
    """Run a kernel on the device of its first tensor, which need not be the current one.

    Multiplications and additions may be fused, whatever Triton's default: the passes are bound by memory, and repeat
    bit for bit either way.

    Args:
        kernel: The kernel, whose arguments are those that follow.
        plan: With the last ones.
        tensors: The first ones; None for those that take no part.
        *numbers: Those between them.
    """
    device = tensors[0].device
    if device.type != 'cuda' and INTERPRETED:
        _run(kernel, plan, tensors, numbers)
        return
    index, current = device.index, driver.active.get_current_device()
    if index is not None and index != current:
        with torch.cuda.device(device):
            _run(kernel, plan, tensors, numbers)
        return
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    for pointer in pointers:
        if pointer is not None and pointer % 16:  # compiled otherwise
            _run(kernel, plan, tensors, numbers)
            return
    key = kernel.__name__, current, *[None if t is None else t.dtype for t in tensors]
    known = plan.compiled.get(key)
    if known is None:
        compiled = _run(kernel, plan, tensors, numbers)
        if VERSION >= (3, 3):  # before, a compiled kernel takes other arguments
            tail = tuple(plan.arguments[name] for name in kernel.arg_names[len(tensors) + len(numbers) :])
            plan.compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, tail
        return
    # what Triton does after its own look-up, which takes ten times as long; hooks of its profiler see the first call
    run, function, metadata, tail = known
    stream = driver.active.get_current_stream(current)
    run(plan.programs, 1, 1, stream, function, metadata, None, None, None, *pointers, *numbers, *tail)


def _run(kernel, plan: Plan, tensors: tuple, numbers: tuple):
    return kernel[(plan.programs,)](
        *tensors, *numbers, **plan.arguments, num_warps=plan.num_warps, enable_fp_fusion=True
    )


@triton.jit
def _nothing():
    pass


INTERPRETED = not isinstance(_nothing, triton.JITFunction)
