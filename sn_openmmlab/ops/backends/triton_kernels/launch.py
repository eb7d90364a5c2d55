"""Starting kernels in few microseconds: what is known of a call is looked up once."""

# no `from __future__ import annotations`: Triton 3.0 takes tl.constexpr for what it is only where it is evaluated

from operator import itemgetter
from typing import Any, Callable

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
        self.compiled: dict = {}
        self.joining: Any = None  # of the moments of parts
        self.adding: Any = None  # of the sums of parts


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


class Chain:
    """Kernels that are started one after the other, on tensors of which, from run to run, only the addresses change.

    Args:
        names: Names of the tensors, and of a number, if there is one, at the end, in the order in which :meth:`run`
            gets them. ``none`` is one more.
    """

    def __init__(self, names: str) -> None:
        self._names = [*names.split(), 'none']
        self._links: list = []
        self._known: Any = None

    def add(self, kernel, plan: Plan, names: str, *numbers) -> None:
        """One kernel more; its arguments are those named, the numbers, and the plan's."""
        self._links.append((kernel, plan, itemgetter(*map(self._names.index, names.split())), numbers))

    def run(
        self, device: torch.device, addresses: 'list[int]', aligned: bool, tensors: Callable, *number: float
    ) -> None:
        """Start all.

        Args:
            device: Where the tensors are, which need not be the current one.
            addresses: Theirs.
            aligned: Whether they all are multiples of 16.
            tensors: Gives them themselves, as Triton wants them the first time.
            *number: What comes last.
        """
        if device.type != 'cuda' and INTERPRETED:
            self._start(tensors, number)
            return
        current = driver.active.get_current_device()
        if device.index is not None and device.index != current:
            with torch.cuda.device(device):
                self.run(device, addresses, aligned, tensors, *number)
        elif not aligned or VERSION < (3, 3):  # compiled otherwise, or taking other arguments
            self._start(tensors, number)
        elif self._known is None:
            self._known = self._start(tensors, number)
        else:
            # what Triton does after its own look-up, which takes ten times as long; hooks of its profiler see the first
            values, stream = (*addresses, *number, None), driver.active.get_current_stream(current)
            for run, programs, function, metadata, pick, tail in self._known:
                run(programs, 1, 1, stream, function, metadata, None, None, None, *pick(values), *tail)

    def _start(self, tensors: Callable, number: tuple) -> list:
        """Start all by Triton's look-up; what it leads to."""
        values, found = (*tensors(), *number, None), []
        for kernel, plan, pick, numbers in self._links:
            chosen = pick(values)
            compiled = _run(kernel, plan, chosen, numbers)
            tail = *numbers, *(plan.arguments[name] for name in kernel.arg_names[len(chosen) + len(numbers) :])
            if compiled is not None:  # not under the interpreter
                found.append((compiled.run, plan.programs, compiled.function, compiled.packed_metadata, pick, tail))
        return found


def _run(kernel, plan: Plan, tensors: tuple, numbers: tuple):
    return kernel[(plan.programs,)](
        *tensors, *numbers, **plan.arguments, num_warps=plan.num_warps, enable_fp_fusion=True
    )


@triton.jit
def _nothing():
    pass


INTERPRETED = not isinstance(_nothing, triton.JITFunction)
