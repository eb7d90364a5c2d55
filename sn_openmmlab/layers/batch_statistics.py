"""The child ``bn`` of an SN layer: it holds the batch statistics, and third parties treat it as any BatchNorm.

A third party may put another class in its place. The layer therefore reads only: the buffers ``running_mean``,
``running_var`` and ``num_batches_tracked``; ``training``, ``track_running_stats``, ``momentum`` and ``eps``; the
process group, if it is synchronised; and its hooks, which run around the layer's own computation. Its ``forward`` is
never called.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


class BatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm that holds an SN layer's batch statistics, and no parameters of its own.

    Its ``weight`` and ``bias`` stand for the layer's. Code that loops over the BatchNorms of a model can fill them,
    replace them, freeze them or put them into a loss, and the layer's change. Freezing the weight also freezes the
    logits of the importance ratios. Both are views of the layer's and no parameters, so that no optimizer and no
    checkpoint gets these twice.
    """

    def belong_to(self, layer: nn.Module) -> None:
        """Take a layer's weight and bias as own ones."""
        self.__dict__['_layer'] = weakref.ref(layer)  # a strong reference would keep dead models in memory

    @property
    def weight(self) -> Tensor | None:  # type: ignore[override]  # torch annotates an attribute
        """The layer's weight."""
        layer = self._owner()
        return _share(layer.weight, layer.mean_weight, layer.var_weight)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The layer's bias."""
        return _share(self._owner().bias)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; a weight or bias becomes the layer's."""
        if name in ('weight', 'bias') and (param is not None or '_layer' in self.__dict__):
            setattr(self._owner(), name, param)
        else:
            super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Reset the statistics, and the layer's weight to 1 and bias to 0."""
        super().reset_parameters()
        if '_layer' in self.__dict__:
            for shared, value in (self.weight, 1), (self.bias, 0):
                if shared is not None:
                    nn.init.constant_(shared, value)

    def requires_grad_(self, requires_grad: bool = True) -> BatchNorm2d:
        """Freeze the layer's parameters, or let them learn."""
        for shared in self.weight, self.bias:
            if shared is not None:
                shared.requires_grad_(requires_grad)
        return self

    def _owner(self) -> Any:
        """The SN layer that this belongs to."""
        layer = self.__dict__.get('_layer', lambda: None)()
        if layer is None:  # torch then looks up the parameter, which is None
            raise AttributeError('this BatchNorm2d belongs to no SwitchNorm')
        return layer

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != '_layer'}


class _Shared(Tensor):
    """A view of a parameter, whose data, gradient and ``requires_grad`` are this parameter's.

    ``requires_grad`` is set for other parameters too.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's Parameter

    _parameters: tuple[nn.Parameter, ...]

    @property
    def data(self) -> Tensor:
        return self._parameters[0].data

    @data.setter
    def data(self, value: Tensor) -> None:
        self._parameters[0].data = value

    @property
    def grad(self) -> Tensor | None:
        return self._parameters[0].grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self._parameters[0].grad = value

    @property
    def requires_grad(self) -> bool:
        return self._parameters[0].requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        for parameter in self._parameters:
            parameter.requires_grad = value

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        self.requires_grad = requires_grad
        return self

    def __deepcopy__(self, memo: dict) -> nn.Parameter:
        return copy.deepcopy(self._parameters[0], memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._parameters[0].__reduce_ex__(protocol)


def _share(parameter: nn.Parameter | None, *others: nn.Parameter) -> Tensor | None:
    if type(parameter) is not nn.Parameter:  # None; or a DTensor, whose memory cannot be shared
        return parameter
    with torch.enable_grad():
        shared = parameter.view_as(parameter).as_subclass(_Shared)
    shared._parameters = parameter, *others
    return shared


def adopt(layer: nn.Module, bn: Any) -> Any:
    """Make what is put in the place of a layer's child belong to the layer.

    An ordinary BatchNorm, as of ``timm.utils.unfreeze`` or of who reverts SyncBatchNorms, becomes a
    :class:`BatchNorm2d` with its statistics and settings: parameters of its own would learn nothing. Of other classes
    only the statistics are read.

    Raises:
        RuntimeError: If it has none, or is an InstanceNorm.
    """
    if isinstance(bn, _BatchNorm) and type(bn).forward is _BatchNorm.forward and not bn._modules:
        if not isinstance(bn, BatchNorm2d):
            own = BatchNorm2d.__new__(BatchNorm2d)
            own.__dict__.update(bn.__dict__, affine=False, _parameters=dict(weight=None, bias=None))
            bn = own
        bn.belong_to(layer)
    elif bn is not None:
        if isinstance(bn, _InstanceNorm):
            _refuse(bn)
        find_holder(bn)
    return bn


def find_holder(bn: nn.Module) -> Any:
    """Find the module with the running statistics: ``bn`` itself, or the one that a wrapper such as FSDP's holds."""
    module: Any = bn
    while 'running_mean' not in module._buffers:
        if len(module._modules) != 1:  # what does more than to wrap is none of its kind
            _refuse(bn)
        (module,) = module._modules.values()
    return module


def _refuse(bn: nn.Module) -> NoReturn:
    raise RuntimeError(
        f"{type(bn).__name__} takes the place of an SN layer's bn, and is no BatchNorm. To change norm layers, replace "
        'the SwitchNorm as a whole, and leave its child alone'
    )


def read_statistics(bn: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool, float | None]:
    """Read running statistics, number of batches, ``training`` and ``momentum``, as :func:`.switch_norm` takes them."""
    # FrozenBatchNorm2d of torchvision, detectron2 and timm follow the training mode of the model, but have no momentum
    training = bn.training and hasattr(bn, 'momentum')
    buffers = bn._buffers
    if training and not bn.track_running_stats:
        return None, None, None, True, bn.momentum
    mean, var = buffers['running_mean'], buffers['running_var']
    if not training:
        return mean, var, None, False, 0.0
    return mean, var, buffers.get('num_batches_tracked'), True, bn.momentum


def get_group(bn: nn.Module) -> torch.distributed.ProcessGroup | None:
    """The process group that ``bn`` synchronises over; None for all processes, and if it does not synchronise."""
    return getattr(bn, 'process_group', None)


def is_synchronised(bn: nn.Module) -> bool:
    """Whether ``bn`` has become a SyncBatchNorm: torch's has a ``process_group``, and mmcv's a ``group``."""
    return hasattr(bn, 'process_group') or hasattr(bn, 'group')


def has_hooks(bn: nn.Module) -> bool:
    """Whether a hook waits for ``bn`` to be called."""
    backward_pre_hooks = getattr(bn, '_backward_pre_hooks', None)  # from torch 2 on
    return bool(bn._forward_pre_hooks or bn._forward_hooks or bn._backward_hooks or backward_pre_hooks)


def call_with_hooks(bn: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
    """Call ``bn`` with its hooks, but with another ``forward``."""
    before = bn.__dict__.get('forward')
    bn.__dict__['forward'] = forward
    try:
        return bn(x)
    finally:
        del bn.__dict__['forward']
        if before is not None:
            bn.__dict__['forward'] = before
