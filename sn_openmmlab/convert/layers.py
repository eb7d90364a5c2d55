"""Convert the norm layers of a built model to Switchable Normalization, and back to BatchNorm.

Weights, biases and running statistics stay; only the kind of layer changes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from ..layers import SparseSwitchNorm, SwitchNorm, SwitchNorm1d, SwitchNorm3d, SyncSN
from ..layers.batch_statistics import is_synchronised
from ..layers.state_dict import log_starts
from ..norms import is_mmcv_sync_bn, is_switchable, own_modules

_Layer = TypeVar('_Layer', bound=nn.Module)

ONE_HOT = 1 - 1e-6  # a smaller importance ratio of BN is not BatchNorm


def convert_switch_norm(
    model: nn.Module,
    to: str = 'SN',
    init_ratios: Sequence[float] | None = None,
    inplace: bool = True,
    correction: bool = True,
) -> nn.Module:
    r"""Replace every BatchNorm, SyncBatchNorm, GroupNorm and InstanceNorm of a model by Switchable Normalization.

    Modules keep their names. ``weight`` and ``bias`` remain the same parameters, so an optimizer of the old model still
    holds them; it does not know the new ``mean_weight`` and ``var_weight``. BatchNorm's running statistics,
    ``momentum`` and training mode go to the child ``bn``. GroupNorm and InstanceNorm have no batch statistics, so their
    child starts at mean 0 and variance 1.

    What was BatchNorm starts near it, so that the model answers as before: at importance ratios of (0.001, 0.001,
    0.998), with weight and bias corrected for the rest (:func:`~sn_openmmlab.layers.start.correct_for_blend`). With
    ``init_ratios=(0, 0, 1)`` it computes exactly what it did, in training and evaluation mode, and the ratios do not
    learn. What was GroupNorm or InstanceNorm starts at equal ratios.

    SN layers, LayerNorms and all other modules are left alone. BatchNorm1d and BatchNorm3d become ``SN1d`` and
    ``SN3d``; everything else becomes ``SN``, which takes any number of dimensions. timm's norms with an activation
    (``BatchNormAct2d``) keep it, in a hook of the new layer. A layer with a weight and no bias gets a bias that is 0
    and does not learn.

    Args:
        model (nn.Module): The model; mmcv's ``SyncBatchNorm`` (``MMSyncBN``) counts as SyncBatchNorm.
        to (str): 'SN', whose batch statistics are those of one process, also for what was SyncBatchNorm; 'SyncSN', with
            those of all processes; 'SSN', which ends in one normalizer; or 'BN', which turns SN layers with all
            importance on BN back into BatchNorm2d (SN1d and SN3d into BatchNorm1d and 3d, those with synchronised
            statistics into SyncBatchNorm). Defaults to 'SN'.
        init_ratios (Sequence[float], optional): Importance ratios of IN, LN and BN that all new layers start from.
            Defaults to None: near BN for what was BatchNorm, equal ones for the others.
        inplace (bool): Whether to change ``model`` itself; otherwise a deep copy is changed. Defaults to True.
        correction (bool): Whether weight and bias of what was BatchNorm are corrected, in place. Defaults to True.

    Returns:
        nn.Module: The converted model. If ``model`` itself is a norm layer, this is a new object, also in place.

    Raises:
        ValueError: If an argument is wrong; if a BatchNorm has no running statistics, or an InstanceNorm has some; if a
            layer does more than to normalize (its class has a ``forward`` of its own, or children); or, to 'BN', if
            the ratios of a layer are not one-hot on BN. The message names the layers, and the model is unchanged.

    Examples:
        >>> from torch import nn
        >>> from sn_openmmlab import convert_switch_norm
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> model = convert_switch_norm(model, init_ratios=(0, 0, 1))  # exactly the same function
        >>> type(model[1])
        <class 'sn_openmmlab.layers.switch_norm.SwitchNorm'>
        >>> type(convert_switch_norm(model, to='BN')[1])
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    if to not in ('SN', 'SyncSN', 'SSN', 'BN'):
        raise ValueError(f"to must be 'SN', 'SyncSN', 'SSN' or 'BN', got {to!r}")
    if to == 'BN' and init_ratios is not None:
        raise ValueError(f"init_ratios={init_ratios!r} is for SN layers, and to='BN' makes none; leave it out")
    if to == 'BN':
        _check_one_hot(_find_switch_norms(model))
    else:
        _check_convertible(_find_other_norms(model))
    if not inplace:
        model = copy.deepcopy(model)
    new: Mapping[Any, nn.Module]
    if to == 'BN':
        new = {layer: make_batch_norm(layer) for layer in _find_switch_norms(model).values()}
    else:
        like = next(model.parameters(), torch.empty(0))  # dtype and device for layers without tensors
        args = dict(init_ratios=init_ratios, correction=correction)
        new = layers = {layer: _make_switch_norm(layer, to, args, like) for layer in _find_other_norms(model).values()}
        for old, layer in layers.items():  # after all checks, as this changes weights of the model
            if _is_batch_norm(old):
                start = layer.start_from(layer.weight, layer.bias, layer.bn.running_mean, layer.bn.running_var, new)
                for name, value in start.items():
                    getattr(layer, name).data.copy_(value)
        log_starts()
    replace(model, new)
    return new.get(model, model)


def replace(model: nn.Module, new: Mapping[Any, nn.Module]) -> None:
    """Replace modules by new ones, in all places that a module has in the model."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):  # named_children() leaves out the second name of a child
            if child is not None and child in new:
                setattr(module, name, new[child])


def _find_switch_norms(model: nn.Module) -> dict[str, SwitchNorm]:
    """Find the SN layers by name, each once."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SwitchNorm)}


def _find_other_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Find the layers by name, each once, that SN can replace; without the children of SN layers."""
    return {name: layer for name, layer in own_modules(model) if is_switchable(type(layer))}


def _check_one_hot(found: dict[str, SwitchNorm]) -> None:
    other = [
        f'{name or "the model"} ({_format_ratios(layer)})' for name, layer in found.items() if not is_one_hot(layer)
    ]
    if other:
        raise ValueError(
            f'{len(other)} of {len(found)} SN layers are no BatchNorm: their importance ratios (of the means; of '
            f'the variances) are not one-hot on BN: {", ".join(other)}. Layers that started from '
            'init_ratios=(0, 0, 1) can go back'
        )


def _check_convertible(found: dict[str, nn.Module]) -> None:
    lazy = [name for name, layer in found.items() if isinstance(layer, _LazyNormBase)]
    if lazy:
        raise ValueError(f'these layers do not know their number of channels before a first forward: {", ".join(lazy)}')
    more = [
        f'{name or "the model"} ({type(layer).__name__})'
        for name, layer in found.items()
        if not _only_normalizes(layer) and not _has_activation(layer)
    ]
    if more:
        raise ValueError(
            'these layers are of classes with a forward or with children of their own, and would lose what they do '
            f'beside normalizing: {", ".join(more)}; replace them by hand'
        )
    frozen = [name for name, layer in found.items() if not _is_batch_norm(layer) and _has_statistics(layer)]
    if frozen:
        raise ValueError(
            'these InstanceNorms keep running statistics (track_running_stats=True) for evaluation only, which no SN '
            f'layer does: {", ".join(frozen)}'
        )
    lacking = [name for name, layer in found.items() if _is_batch_norm(layer) and not _has_statistics(layer)]
    if lacking:
        raise ValueError(
            f'these BatchNorms keep no running statistics (track_running_stats=False), which SN needs in evaluation: '
            f'{", ".join(lacking)}'
        )


def _only_normalizes(layer: nn.Module) -> bool:
    """Whether a layer does nothing but normalize, as far as its class can tell."""
    if _is_of_timm(layer, 'GroupNorm', 'GroupNorm1'):  # which only has a kernel of its own
        return True
    bases: list[Any] = [_BatchNorm, nn.SyncBatchNorm, _InstanceNorm, nn.GroupNorm]
    bases += filter(is_mmcv_sync_bn, type(layer).__mro__)
    return type(layer).forward in [base.forward for base in bases] and not [*layer.children()]


def _has_activation(layer: nn.Module) -> bool:
    """Whether a layer is a norm of timm's with dropout and activation, or was converted from one."""
    return _activate in layer._forward_hooks.values() or _is_of_timm(
        layer, 'BatchNormAct2d', 'SyncBatchNormAct', 'GroupNormAct', 'GroupNorm1Act'
    )


def _is_of_timm(layer: nn.Module, *names: str) -> bool:
    return type(layer).__module__.startswith('timm.') and type(layer).__name__ in names


def keep_activation(old: nn.Module, new: _Layer) -> _Layer:
    """Let dropout and activation that follow ``old``, if any, follow ``new``; return ``new``."""
    if _has_activation(old):
        new.drop, new.act = old.drop, old.act
        new.register_forward_hook(_activate)
    return new


def _activate(layer: Any, _: object, output: torch.Tensor) -> torch.Tensor:
    return layer.act(layer.drop(output))


def _is_batch_norm(layer: nn.Module) -> bool:
    return not isinstance(layer, (nn.GroupNorm, _InstanceNorm))


def _has_statistics(layer: nn.Module) -> bool:
    return getattr(layer, 'running_mean', None) is not None


def is_one_hot(layer: SwitchNorm) -> bool:
    return layer.bn is not None and bool((layer.importance_ratios[:, -1] >= ONE_HOT).all())


def _format_ratios(layer: SwitchNorm) -> str:
    names = '/'.join(layer.normalizers)
    return f'{names} ' + '; '.join(' '.join(f'{r:.3g}' for r in row) for row in layer.importance_ratios.tolist())


def _make_switch_norm(old: Any, to: str, args: dict[str, Any], like: torch.Tensor) -> SwitchNorm:
    """Make an SN layer with the weight, bias, statistics and mode of ``old``."""
    cls: type[SwitchNorm] = SwitchNorm
    if to != 'SN':
        cls = SyncSN if to == 'SyncSN' else SparseSwitchNorm
    elif isinstance(old, (nn.BatchNorm1d, nn.BatchNorm3d)):
        cls = SwitchNorm1d if isinstance(old, nn.BatchNorm1d) else SwitchNorm3d
    channels = old.num_channels if isinstance(old, nn.GroupNorm) else old.num_features
    momentum = dict(momentum=old.momentum) if _is_batch_norm(old) else {}
    like = next((t for t in (*old.parameters(), *old.buffers()) if t.is_floating_point()), like)
    new = cls(channels, old.eps, affine=old.affine, device=like.device, dtype=like.dtype, **momentum, **args)
    if old.affine:
        new.weight, new.bias = old.weight, _get_bias(old)
        for logits in new.mean_weight, new.var_weight:  # frozen with the rest of the layer
            logits.requires_grad = old.weight.requires_grad
    if _is_batch_norm(old):
        _move_statistics(old, new.bn)
    if isinstance(new, SyncSN) and getattr(old, 'process_group', None) is not None:
        new.bn.process_group = old.process_group
    return keep_activation(old, new).train(old.training)


def make_batch_norm(old: SwitchNorm) -> _BatchNorm:
    """Make the BatchNorm that computes what an SN layer with all importance on BN computes."""
    bn = old._find_statistics()
    synced = old.group_size != 1 if isinstance(old, SyncSN) else is_synchronised(bn)
    cls: type[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm] = nn.BatchNorm2d
    if synced:
        cls = nn.SyncBatchNorm
    elif isinstance(old, (SwitchNorm1d, SwitchNorm3d)):
        cls = nn.BatchNorm1d if isinstance(old, SwitchNorm1d) else nn.BatchNorm3d
    like = bn.running_mean
    new = cls(old.num_features, old.eps, old.momentum, old.affine, device=like.device, dtype=like.dtype)
    if old.affine:
        new.weight, new.bias = old.weight, old.bias
    _move_statistics(bn, new)
    if isinstance(new, nn.SyncBatchNorm):
        new.process_group = old._find_group(bn)
    return keep_activation(old, new.train(bn.training))


def _get_bias(old: Any) -> nn.Parameter:
    """The bias of a layer; for one with bias=False, a bias that is 0 and does not learn."""
    return nn.Parameter(torch.zeros_like(old.weight), requires_grad=False) if old.bias is None else old.bias


def _move_statistics(old: nn.Module, new: nn.Module) -> None:
    for name in 'running_mean', 'running_var', 'num_batches_tracked':
        setattr(new, name, getattr(old, name))
