"""Convert the norm layers of a built model to Switchable Normalization, and back to BatchNorm.

Weights, biases and running statistics stay; only the kind of layer changes.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from mmengine.logging import print_log
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from ..layers import SparseSwitchNorm, SwitchNorm, SwitchNorm1d, SwitchNorm3d, SyncSN
from ..layers.batch_statistics import is_synchronised
from ..layers.state_dict import log_starts
from ..norms import is_mmcv_sync_bn, is_norm, is_switchable, own_modules

_Layer = TypeVar('_Layer', bound=nn.Module)
_STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')
_TENSORS = ('weight', 'bias', 'mean_weight', 'var_weight', 'radius', *_STATISTICS)
_ACTIVATING = ('BatchNormAct2d', 'SyncBatchNormAct', 'GroupNormAct', 'GroupNorm1Act')
_OF_TIMM = (*_ACTIVATING, 'GroupNorm', 'GroupNorm1')  # the last two only have a kernel of their own

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

    SN layers, LayerNorms and all other modules are left alone. A warning names BatchNorms that are frozen by their
    class (``FrozenBatchNorm2d`` of torchvision, detectron2 and timm), which stay too, and says if there is no layer to
    convert. BatchNorm1d and BatchNorm3d become ``SN1d`` and ``SN3d``; everything else becomes ``SN``, which takes any
    number of dimensions. timm's norms with an activation (``BatchNormAct2d``) keep it, in a hook of the new layer. A
    layer with a weight and no bias gets a bias that is 0 and does not learn.

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
            layer does more than to normalize (its class has a ``forward`` of its own, or children; or hooks, methods
            or tensors were added to it); or, to 'BN', if the ratios of a layer are not one-hot on BN, or
            its statistics are frozen for good. The message names the layers, and the model is unchanged.

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
        _check_revertible(_find_switch_norms(model))
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
        _warn_of_what_stays(model, new)
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


def _warn_of_what_stays(model: nn.Module, new: Mapping[Any, nn.Module]) -> None:
    """Warn of BatchNorms that are frozen by their class, and of a model in which no layer can be converted."""
    others = [m for _, m in own_modules(model) if not isinstance(m, SwitchNorm) and not is_switchable(type(m))]
    frozen = Counter(type(m).__name__ for m in others if _has_statistics(m))
    if frozen:
        message = (
            f'leaves BatchNorms that are frozen by their class: {_count(frozen)}. Build the model with BatchNorm2d in '
            'their place (norm_layer= of backbones in torchvision) to convert them too.'
        )
    elif not new and not _find_switch_norms(model):
        norms = Counter(type(m).__name__ for m in others if is_norm(m))
        message = (
            'changes nothing: the model has no BatchNorm, SyncBatchNorm, GroupNorm or InstanceNorm but '
            f'{_count(norms) or "no norm at all"}.'
        )
    else:
        return
    print_log(f'convert_switch_norm {message}', logger='current', level=logging.WARNING)


def _count(kinds: Counter) -> str:
    return ', '.join(f'{n} {kind}' for kind, n in kinds.items())


def _check_revertible(found: dict[str, SwitchNorm]) -> None:
    other = [
        f'{name or "the model"} ({_format_ratios(layer)})' for name, layer in found.items() if not is_one_hot(layer)
    ]
    if other:
        raise ValueError(
            f'{len(other)} of {len(found)} SN layers are no BatchNorm: their importance ratios (of the means; of '
            f'the variances) are not one-hot on BN: {", ".join(other)}. Layers that started from '
            'init_ratios=(0, 0, 1) can go back'
        )
    _check_plain(found)
    frozen = [
        f'{name or "the model"} ({type(bn).__name__})'
        for name, bn in ((name, layer._find_statistics()) for name, layer in found.items())
        if not hasattr(bn, 'momentum')
    ]
    if frozen:
        raise ValueError(
            'the statistics of these layers stay in training mode too, as something has replaced their child bn, and '
            f"BatchNorm's do not: {', '.join(frozen)}; undo it first (timm.utils.unfreeze)"
        )


def _check_convertible(found: dict[str, nn.Module]) -> None:
    lazy = [name for name, layer in found.items() if isinstance(layer, _LazyNormBase)]
    if lazy:
        raise ValueError(f'these layers do not know their number of channels before a first forward: {", ".join(lazy)}')
    _check_plain(found)
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


def _check_plain(found: Mapping[str, nn.Module]) -> None:
    """Check that layers do nothing but normalize, and activate as timm's."""
    more = [
        f'{name or "the model"} ({type(layer).__name__})'
        for name, layer in found.items()
        if not _only_normalizes(layer)
    ]
    if more:
        raise ValueError(
            'these layers have children, or are of classes with a forward or __call__ of their own, and would lose '
            f'what they do beside normalizing: {", ".join(more)}; replace them by hand'
        )
    changed = {name or 'the model': find_additions(layer) for name, layer in found.items()}
    listed = [f'{name} ({", ".join(additions)})' for name, additions in changed.items() if additions]
    if listed:
        raise ValueError(
            'hooks, methods or tensors were added to these layers, and new layers would lack them: '
            f'{", ".join(listed)}; take them away (by the handle of a hook, prune.remove, remove_weight_norm), '
            'convert, and add them to the new layers'
        )


def find_additions(layer: nn.Module) -> list[str]:
    """Find what was added to a built layer, by the names of its attributes: hooks, methods and tensors.

    Of an SN layer's child only hooks count, which run around the layer's computation.
    """
    tensors = [*layer._parameters, *layer._buffers]
    found = _find_hooks(layer)
    found += [name for name in vars(layer) if callable(getattr(type(layer), name, None)) or name in _TENSORS]
    found += [name for name in tensors if name not in _TENSORS]
    if isinstance(layer, SwitchNorm) and layer.bn is not None:
        found += [f'bn.{name}' for name in _find_hooks(layer._find_statistics())]
    return found


def _find_hooks(module: nn.Module) -> list[str]:
    found = []
    for name, hooks in vars(module).items():
        if name.endswith('_hooks') and isinstance(hooks, dict):
            found += [name] if any(hook is not _activate for hook in hooks.values()) else []
    return found


def _only_normalizes(layer: nn.Module) -> bool:
    """Whether a layer does nothing but normalize, and activate as timm's, as far as its class can tell."""
    bases: list[Any] = [_BatchNorm, nn.SyncBatchNorm, _InstanceNorm, nn.GroupNorm, SwitchNorm]
    bases += filter(is_mmcv_sync_bn, type(layer).__mro__)
    known = type(layer).forward in [base.forward for base in bases] or _is_of_timm(layer, *_OF_TIMM)
    children = {'drop', 'act'} if _has_activation(layer) else set()
    if isinstance(layer, SwitchNorm):
        children.add('bn')
    return known and type(layer).__call__ is nn.Module.__call__ and layer._modules.keys() <= children


def _has_activation(layer: nn.Module) -> bool:
    """Whether a layer is a norm of timm's with dropout and activation, or was converted from one."""
    return _activate in layer._forward_hooks.values() or _is_of_timm(layer, *_ACTIVATING)


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
    return all(getattr(layer, name, None) is not None for name in ('running_mean', 'running_var'))


def is_one_hot(layer: SwitchNorm) -> bool:
    return layer.bn is not None and bool((layer.importance_ratios[:, -1] >= ONE_HOT).all())


def is_foldable(layer: SwitchNorm) -> bool:
    """Whether a layer in evaluation mode is an affine map of each channel, and nothing hangs on it."""
    plain = is_one_hot(layer) and _only_normalizes(layer) and not find_additions(layer)
    return plain and _has_statistics(layer._find_statistics())


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
    first = old.bias if old.weight is None else old.weight  # None without both, which affine does not always tell
    affine = first is not None
    new = cls(channels, old.eps, affine=affine, device=like.device, dtype=like.dtype, **momentum, **args)
    if affine:
        new.weight, new.bias = _get_parameter(old.weight, 1, first), _get_parameter(old.bias, 0, first)
        for logits in new.mean_weight, new.var_weight:  # frozen with the rest of the layer
            logits.requires_grad = first.requires_grad
    if _is_batch_norm(old):
        _move_statistics(old, new.bn)
    if isinstance(new, SyncSN) and getattr(old, 'process_group', None) is not None:
        new.bn.process_group = old.process_group
    return keep_activation(old, new.train(old.training))


def make_batch_norm(old: SwitchNorm) -> _BatchNorm:
    """Make the BatchNorm that computes what an SN layer with all importance on BN computes."""
    bn = old._find_statistics()
    synced = old.group_size != 1 if isinstance(old, SyncSN) else is_synchronised(bn)
    cls: type[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm] = nn.BatchNorm2d
    if synced:
        cls = nn.SyncBatchNorm
    elif isinstance(old, (SwitchNorm1d, SwitchNorm3d)):
        cls = nn.BatchNorm1d if isinstance(old, SwitchNorm1d) else nn.BatchNorm3d
    like, affine = old.mean_weight, old.weight is not None or old.bias is not None
    new = cls(old.num_features, old.eps, old.momentum, affine, device=like.device, dtype=like.dtype)
    if affine:
        new.weight, new.bias = old.weight, old.bias
    _move_statistics(bn, new)
    if isinstance(new, nn.SyncBatchNorm):
        new.process_group = old._find_group(bn)
    return keep_activation(old, new.train(bn.training))


def _get_parameter(own: nn.Parameter | None, value: float, like: torch.Tensor) -> nn.Parameter:
    """A layer's weight or bias; where it lacks this one alone, one that changes nothing and does not learn."""
    return nn.Parameter(torch.full_like(like, value), requires_grad=False) if own is None else own


def _move_statistics(old: nn.Module, new: nn.Module) -> None:
    """Move what a BatchNorm knows of its statistics; a frozen one of timm's lacks part of it."""
    for name in (*_STATISTICS, 'track_running_stats'):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
