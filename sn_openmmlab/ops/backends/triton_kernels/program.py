"""The whole op as a chain of launches each way, for tensors that look alike: all but addresses is known beforehand."""

# no `from __future__ import annotations`: Triton 3.0 takes tl.constexpr for what it is only where it is evaluated

import torch
from torch import Tensor

from ...formula import moments_dtype
from ..interface import Parameters, Setting, Statistics, kept_sizes
from . import algebra, passes
from .launch import Chain

_ARGUMENTS = 'x mean_weight var_weight weight bias running_mean running_var tracked'
_FORWARD = f'{_ARGUMENTS} y moments joint coefficients parts momentum'
_BACKWARD = 'dy x moments mean_weight var_weight weight joint dx small coefficients sums rows parts'


def prepare(x: Tensor, parameters: Parameters, statistics: 'Statistics | None', setting: Setting) -> 'Program | None':
    """The whole op, where the kernels can do it without any conversion."""
    given = [t for t in (*parameters, *(statistics or ())[:3]) if t is not None]
    if (
        max(x.shape[:2]) > algebra._LONGEST
        or not (x.is_contiguous() or x.movedim(1, -1).is_contiguous())
        or not all(t.is_contiguous() for t in given)
        or not (statistics is None or setting.frozen or algebra.can_move(statistics, moments_dtype(x.dtype)))
    ):
        return None
    return Program(x, parameters, statistics, setting)


class Program:
    """Two chains of launches, and the sizes of the memory between them."""

    def __init__(self, x: Tensor, parameters: Parameters, statistics: 'Statistics | None', setting: Setting) -> None:
        self._device, self._dtype, self._itemsize = x.device, moments_dtype(x.dtype), x.element_size()
        sizes = n, c, pixels, *_ = passes.sizes(x)
        reduction, mapping = passes.reduction_plan(*sizes), passes.map_plan(*sizes)
        blends, parts = algebra.plans(n, c, setting), reduction.arguments['parts']
        maps, split, several = n * c * torch.finfo(self._dtype).bits // 8, parts > 1, len(blends) > 1

        moments, joint = kept_sizes(n, c, x.dtype)
        self._joint, self._kept, self._small = 8 * moments, moments + joint, 2 * (c + len(setting.normalizers))
        self._forward_memory = _Memory(2 * maps, 16 * n * c * parts * split)
        self._backward_memory = _Memory(3 * maps, 2 * maps, 48 * n * several, 2 * maps * parts * split)

        weight, bias = ('none', 'none') if parameters.weight is None else ('weight', 'bias')
        running = 'none none' if statistics is None else 'running_mean running_var'
        moved = statistics is not None and not setting.frozen and statistics.num_batches_tracked is not None
        tracked, rows = 'tracked' if moved else 'none', 'rows' if several else 'none'

        self._forward, self._backward = Chain(_FORWARD), Chain(_BACKWARD)
        self._forward.add(passes._moments_kernel, reduction, f'x {"parts" if split else "moments"} moments')
        self._backward.add(passes._reduce_kernel, reduction, f'dy x moments {"parts" if split else "sums"}')
        if split:
            self._forward.add(passes._join_kernel, reduction.joining, 'parts moments')
            self._backward.add(passes._add_kernel, reduction.adding, 'parts sums')
        for plan in blends:
            self._forward.add(
                algebra._coefficients_kernel,
                plan,
                f'moments none mean_weight var_weight {weight} {bias} {running} {tracked} coefficients joint momentum',
                pixels,
            )
            self._backward.add(
                algebra._gradients_kernel,
                plan,
                f'sums moments joint none mean_weight var_weight {weight} coefficients small {rows}',
                pixels,
            )
        self._forward.add(passes._combine_kernel, mapping, 'x moments coefficients none y')
        self._backward.add(passes._combine_kernel, mapping, 'x moments coefficients dy dx')

    def forward(
        self, arguments: tuple, addresses: 'list[int]', momentum: 'float | None', keep: bool
    ) -> 'tuple[Tensor, Tensor]':
        """See :class:`..interface.Program`."""
        x, memory, room = arguments[0], self._forward_memory, 0 if keep else -(-self._kept // 2) * 16
        y, work = torch.empty_like(x), x.new_empty((room + memory.size) // self._itemsize)
        start = work.data_ptr() + room
        kept = torch.empty(self._kept, dtype=torch.float64, device=self._device) if keep else work
        moments = kept.data_ptr()
        inner = [y.data_ptr(), moments, moments + self._joint, *memory.addresses(start)]
        a, b, c, d, e, f, g, h = addresses
        aligned = (a | b | c | d | e | f | g | h | inner[0] | moments | start) % 16 == 0

        def tensors() -> list:
            parts = memory.tensors(work.view(torch.uint8)[room:], self._dtype, torch.float64)
            doubles = kept.view(torch.float64)
            return [*arguments, y, doubles.view(self._dtype), doubles[self._joint // 8 :], *parts]

        self._forward.run(self._device, addresses + inner, aligned, tensors, float(momentum or 0))
        return y, kept

    def backward(self, tensors: tuple, addresses: 'list[int]') -> 'tuple[Tensor, Tensor]':
        """See :class:`..interface.Program`."""
        dx, memory = torch.empty_like(tensors[1]), self._backward_memory
        small = torch.empty(self._small, dtype=self._dtype, device=self._device)
        work = dx.new_empty(memory.size // self._itemsize)
        dy, x, moments, a, b, c = addresses
        inner = [moments + self._joint, dx.data_ptr(), small.data_ptr(), *memory.addresses(work.data_ptr())]
        aligned = (dy | x | moments | a | b | c | inner[1] | inner[2] | inner[3]) % 16 == 0

        def all_tensors() -> list:
            (dy, x, kept, *learned), dtype = tensors, self._dtype
            parts = memory.tensors(work.view(torch.uint8), dtype, dtype, torch.float64, dtype)
            return [dy, x, kept.view(dtype), *learned, kept[self._joint // 8 :], dx, small, *parts]

        self._backward.run(self._device, addresses + inner, aligned, all_tensors)
        return dx, small


class _Memory:
    """Room for several tensors in one, each at a multiple of 16 bytes, which kernels read at once."""

    def __init__(self, *sizes: int) -> None:
        self._offsets, self.size = [], 0
        for size in sizes:
            self._offsets.append(self.size)
            self.size += -(-size // 16) * 16

    def addresses(self, start: int) -> 'list[int]':
        """Where they lie."""
        return [start + offset for offset in self._offsets]

    def tensors(self, memory: Tensor, *dtypes: torch.dtype) -> 'list[Tensor]':
        """They themselves."""
        ends = [*self._offsets[1:], self.size]
        return [memory[a:b].view(dtype) for a, b, dtype in zip(self._offsets, ends, dtypes)]
