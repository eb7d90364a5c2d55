"""Norm layers of a built model to Switchable Normalization, and back to BatchNorm.

Weights, shifts and running statistics stay; only the kind of layer changes.
"""

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from .layers import SwitchNorm, SwitchNorm1d, SwitchNorm3d, SyncSN

ONE_HOT = 1 - 1e-6  # a smaller importance ratio of BN is not BatchNorm


def convert_switch_norm(model: nn.Module, to: str = 'SN', init_ratios=None, inplace: bool = True) -> nn.Module:
    r"""Replace every BatchNorm, SyncBatchNorm, GroupNorm and InstanceNorm of a model by Switchable Normalization.

    Names of modules stay, and ``weight`` and ``bias`` remain the same parameters, so that an optimizer of the old model
    holds them still (the new ``mean_weight`` and ``var_weight`` it does not know). BatchNorm's running statistics,
    ``momentum`` and training mode go to the child ``bn``; GroupNorm and InstanceNorm have no statistics of the batch,
    and the child starts at mean 0 and variance 1. With ``init_ratios=(0, 0, 1)`` a model with BatchNorm computes after
    the conversion what it did before, in training and in evaluation mode.

    Layers that the model has already as SN, LayerNorms, and all else are left alone. What was BatchNorm1d and
    BatchNorm3d becomes ``SN1d`` and ``SN3d``; everything else ``SN``, which takes any number of dimensions.

    Args:
        model (nn.Module): The model; mmcv's ``SyncBatchNorm`` (``MMSyncBN``) counts as SyncBatchNorm.
        to (str): 'SN'; 'SyncSN' for batch statistics of all processes, which 'SN' does not keep for what was
            SyncBatchNorm; or 'BN', which turns SN layers back into BatchNorm2d (SN1d and SN3d into BatchNorm1d and 3d,
            those with synchronised statistics into SyncBatchNorm) where all importance is on BN. Defaults to 'SN'.
        init_ratios (Sequence[float], optional): Importance ratios of IN, LN and BN to start from. Defaults to None,
            equal ones.
        inplace (bool): Whether to change ``model`` itself; otherwise a deep copy is changed. Defaults to True.

    Returns:
        nn.Module: The converted model, which is a new object also in place where ``model`` is itself a norm layer.

    Raises:
        ValueError: If an argument is wrong, a BatchNorm has no running statistics, or, to 'BN', an importance ratio is
            not one-hot on BN; the message names the layers, and the model is unchanged.

    Examples:
        >>> from torch import nn
        >>> from sn_openmmlab import convert_switch_norm
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> model = convert_switch_norm(model, init_ratios=(0, 0, 1))  # the same function, with BN's statistics
        >>> type(model[1])
        <class 'sn_openmmlab.layers.switch_norm.SwitchNorm'>
        >>> type(convert_switch_norm(model, to='BN')[1])
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    if to not in ('SN', 'SyncSN', 'BN'):
        raise ValueError(f"to must be 'SN', 'SyncSN' or 'BN', got {to!r}")
    if to == 'BN' and init_ratios is not None:
        raise ValueError(f"init_ratios={init_ratios!r} is for SN layers, and to='BN' makes none; leave it out")
    found = dict(_norms(model, to))
    _check(found, to)
    if not inplace:
        model = copy.deepcopy(model)
        found = dict(_norms(model, to))
    if to == 'BN':
        new = {layer: _batch_norm(layer) for layer in found.values()}
    else:
        like = next(model.parameters(), torch.empty(0))  # for layers that hold nothing
        new = {layer: _switch_norm(layer, to, init_ratios, like) for layer in found.values()}
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):  # named_children() leaves out second names of a child
            if child in new:
                setattr(module, name, new[child])
    return new.get(model, model)


def is_mm_sync_bn(cls: type) -> bool:
    """Whether a class is mmcv's own SyncBatchNorm, which derives from none of torch's; without importing mmcv."""
    return any(c.__module__ == 'mmcv.ops.sync_bn' and c.__name__ == 'SyncBatchNorm' for c in cls.__mro__)


def is_switchable(cls: type) -> bool:
    """Whether SN can stand in place of a class of layers: it normalizes maps of shape (N, C, \\*), and is not SN."""
    if issubclass(cls, SwitchNorm):
        return False
    return issubclass(cls, (_BatchNorm, _InstanceNorm, nn.GroupNorm)) or is_mm_sync_bn(cls)


def _norms(model: nn.Module, to: str):
    """Names and layers that are to be replaced, each layer once; not the statistics inside SN layers."""
    inside = {id(layer.bn) for layer in model.modules() if isinstance(layer, SwitchNorm)}
    for name, layer in model.named_modules():
        if isinstance(layer, SwitchNorm) if to == 'BN' else is_switchable(type(layer)) and id(layer) not in inside:
            yield name, layer


def _check(found: dict[str, nn.Module], to: str) -> None:
    if to == 'BN':
        other = [f'{name or "the model"} ({_ratios(layer)})' for name, layer in found.items() if not _is_one_hot(layer)]
        if other:
            raise ValueError(
                f'{len(other)} of {len(found)} SN layers are no BatchNorm: their importance ratios (of the means; of '
                f'the variances) are not one-hot on BN: {", ".join(other)}. Layers that started from '
                'init_ratios=(0, 0, 1) can go back'
            )
        return
    lazy = [name for name, layer in found.items() if isinstance(layer, _LazyNormBase)]
    if lazy:
        raise ValueError(f'these layers do not know their number of channels before a first forward: {", ".join(lazy)}')
    lacking = [name for name, layer in found.items() if _is_batch_norm(layer) and layer.running_mean is None]
    if lacking:
        raise ValueError(
            f'these BatchNorms keep no running statistics (track_running_stats=False), which SN needs in evaluation: '
            f'{", ".join(lacking)}'
        )


def _is_batch_norm(layer: nn.Module) -> bool:
    return not isinstance(layer, (nn.GroupNorm, _InstanceNorm))


def _is_one_hot(layer: SwitchNorm) -> bool:
    return layer.bn is not None and bool((layer.importance_ratios[:, -1] >= ONE_HOT).all())


def _ratios(layer: SwitchNorm) -> str:
    names = '/'.join(layer.normalizers)
    return f'{names} ' + '; '.join(' '.join(f'{r:.3g}' for r in row) for row in layer.importance_ratios.tolist())


def _switch_norm(old: nn.Module, to: str, init_ratios, like: torch.Tensor) -> SwitchNorm:
    """An SN layer with the weight, shift, statistics and mode of ``old``."""
    rank = {nn.BatchNorm1d: SwitchNorm1d, nn.BatchNorm3d: SwitchNorm3d}
    cls = SyncSN if to == 'SyncSN' else next((new for kind, new in rank.items() if isinstance(old, kind)), SwitchNorm)
    channels = old.num_channels if isinstance(old, nn.GroupNorm) else old.num_features
    momentum = dict(momentum=old.momentum) if _is_batch_norm(old) else {}
    like = next((t for t in (*old.parameters(), *old.buffers()) if t.is_floating_point()), like)
    new = cls(
        channels, old.eps, affine=old.affine, init_ratios=init_ratios, device=like.device, dtype=like.dtype, **momentum
    )
    if old.affine:
        new.weight, new.bias = old.weight, old.bias
        for logits in new.mean_weight, new.var_weight:  # frozen with the rest of the layer
            logits.requires_grad = old.weight.requires_grad
    if _is_batch_norm(old):
        _move_statistics(old, new.bn)
    if isinstance(new, SyncSN) and getattr(old, 'process_group', None) is not None:
        new.bn.process_group = old.process_group
    new.train(old.training)
    return new


def _batch_norm(old: SwitchNorm) -> nn.Module:
    """The BatchNorm that an SN layer with all importance on BN is."""
    plain = isinstance(old.bn, _BatchNorm) and not isinstance(old.bn, nn.SyncBatchNorm)
    synced = old.group_size != 1 if isinstance(old, SyncSN) else not plain
    rank = (
        nn.BatchNorm1d if isinstance(old, SwitchNorm1d) else nn.BatchNorm3d if isinstance(old, SwitchNorm3d) else None
    )
    cls = nn.SyncBatchNorm if synced else rank or nn.BatchNorm2d
    like = old.bn.running_mean
    new = cls(old.num_features, old.eps, old.momentum, old.affine, device=like.device, dtype=like.dtype)
    if old.affine:
        new.weight, new.bias = old.weight, old.bias
    _move_statistics(old.bn, new)
    if synced:
        new.process_group = old._group()
    new.train(old.bn.training)
    return new


def _move_statistics(old: nn.Module, new: nn.Module) -> None:
    for name in 'running_mean', 'running_var', 'num_batches_tracked':
        setattr(new, name, getattr(old, name))
