"""Switchable Normalization with the batch statistics of all processes: ``norm_cfg=dict(type='SyncSN')``."""

from __future__ import annotations

from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from mmengine.registry import MODELS
from torch import nn

from . import batch_statistics
from .switch_norm import SwitchNorm

# of each world, its groups by size: a group that outlives destroy_process_group may abort the process at its end
_SUBGROUPS: WeakKeyDictionary[dist.ProcessGroup, dict[int, dist.ProcessGroup]] = WeakKeyDictionary()


@MODELS.register_module()
class SyncSN(SwitchNorm):
    """:class:`SwitchNorm` whose batch statistics are those of all processes, weighted by their number of pixels.

    It costs one all-reduce of 2C + 1 numbers forward and one of 2C backward. Every process has to call it, also with an
    empty batch, and to use its output in the loss. In evaluation mode, and with one process, it is
    :class:`SwitchNorm`. Its ``bn`` is a plain ``BatchNorm2d``, so that whatever freezes BatchNorms freezes it.

    Args:
        num_features (int): Number of channels C.
        *args: As :class:`SwitchNorm`'s.
        group_size (int, optional): Number of processes with neighbouring ranks that share statistics. It must divide
            the world size. Defaults to None: all processes.
        **kwargs: As :class:`SwitchNorm`'s; ``normalizers`` must contain 'bn'.

    Raises:
        ValueError: If an argument is wrong, or ``group_size`` does not divide the world size.
    """

    def __init__(self, num_features: int, *args: Any, group_size: int | None = None, **kwargs: Any) -> None:
        if group_size is not None and not (isinstance(group_size, Integral) and group_size >= 1):
            raise ValueError(f'group_size must be a whole number of at least 1, or None for all, got {group_size!r}')
        self.group_size = group_size
        super().__init__(num_features, *args, **kwargs)
        if self.bn is None:
            raise ValueError(f"SyncSN synchronises batch statistics, but normalizers={self.normalizers}; use type='SN'")
        self._find_group(self.bn)  # all processes must make a group together, and all of them build the layer

    def _find_group(self, bn: nn.Module) -> dist.ProcessGroup | None:
        group = self._find_own_group(bn)
        if group is None or self.group_size is None or batch_statistics.get_group(bn) is not None:
            return group
        return _get_subgroup(self.group_size, group) if self.group_size > 1 else None

    def extra_repr(self) -> str:
        """The arguments."""
        return f'{super().extra_repr()}, group_size={self.group_size}'


def _get_subgroup(group_size: int, world: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group of this rank and its neighbours. All layers share it, since each group holds a communicator."""
    groups = _SUBGROUPS.setdefault(world, {})
    if group_size not in groups:
        size = dist.get_world_size(world)
        if size % group_size:
            raise ValueError(f'group_size={group_size} does not divide the world size {size}')
        # like dist.new_subgroups, which in torch 1.13 works for CUDA only
        made = [dist.new_group(list(range(first, first + group_size))) for first in range(0, size, group_size)]
        groups[group_size] = made[dist.get_rank() // group_size]
    return groups[group_size]
