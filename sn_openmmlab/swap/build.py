"""Build models only to look at them, and compare two of them norm by norm.

No weights are loaded, and most take no memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.overrides import TorchFunctionMode

from ..norms import is_norm, own_modules, part_of

# Modules of these packages choose no norm; the class that uses them does.
GENERIC_PACKAGES = ('torch.', 'mmcv.cnn.bricks.', 'mmengine.')


class Norm(NamedTuple):
    """A norm layer before and after.

    Attributes:
        old_name (str): Its name in the model before.
        name (str): Its name afterwards.
        part (str): 'backbone', 'neck' or 'head'.
        old (type): What it was.
        new (type): What it is.
        owner (str): The class that put it there.
        changes (bool): Whether the two differ, if only in an argument.
    """

    old_name: str
    name: str
    part: str
    old: type
    new: type
    owner: str
    changes: bool


def build(cfg: Config, model: dict | None = None) -> nn.Module:
    """Build ``model``, by default the config's; its weights are meaningless."""
    model = _put_stubs(copy.deepcopy(cfg.model if model is None else model))
    with ExitStack() as stack:
        stack.enter_context(DefaultScope.overwrite_default_scope(scope_of(cfg)))
        stack.enter_context(_join_group_of_one())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_AllocateNothing())
        return MODELS.build(model)


def compare(before: nn.Module, after: nn.Module) -> list[Norm]:
    """List the norm layers of two models, in pairs. Raise RuntimeError if the models differ in anything else."""
    old, new = own_modules(before), own_modules(after)
    if len(old) != len(new):
        raise RuntimeError(f'not only norms change: the model gets {len(new)} modules in place of {len(old)}')
    norms = []
    for (old_name, a), (name, b) in zip(old, new):
        if is_norm(a) and is_norm(b):
            if old_name.rpartition('.')[0] != name.rpartition('.')[0] or _get_size(a) != _get_size(b):
                raise RuntimeError(f'the norm layer {old_name} became {name} of another size or place')
            changes = type(a) is not type(b) or a.extra_repr() != b.extra_repr()
            norms.append(Norm(old_name, name, part_of(name), type(a), type(b), _find_owner(after, name), changes))
        elif type(a) is not type(b) or old_name != name or _list_parameters(a) != _list_parameters(b):
            old_kind, kind = type(a).__name__, type(b).__name__
            raise RuntimeError(f'not only norms change: {old_name} ({old_kind}) became {name} ({kind})')
    return norms


def scope_of(cfg: Config) -> str:
    """The library whose registry the config's models are in."""
    return cfg.get('default_scope') or 'mmengine'


class _LanguageModel(nn.Module):
    """A stub for the BERT of GLIP and GroundingDINO, with the one attribute that they read while they are built."""

    def __init__(self) -> None:
        super().__init__()
        body: Any = nn.Module()
        body.language_dim = 768
        self.language_backbone = nn.Module()
        self.language_backbone.body = body


# Keys of a model's config, and what replaces their values. While they are built, the values would load weights or need
# another package or file, and they hold no norm that the config chooses.
STUBS = {
    'language_model': dict(type=_LanguageModel),
    'num_cp': 0,  # activation checkpointing by fairscale
    'postprocess_model': None,  # of trackers
    'teacher_ckpt': None,
    'teacher_config': dict(model=dict(type='ReLU')),
    'tracker': None,
}


def _put_stubs(node: Any) -> Any:
    """Copy a config with its ``STUBS`` in place."""
    if isinstance(node, dict):
        new = {key: copy.deepcopy(STUBS[key]) if key in STUBS else _put_stubs(v) for key, v in node.items()}
        if new.get('pretrained') is True:  # timm's backbones load while they are built
            new['pretrained'] = False
        return type(node)(new)
    return type(node)(map(_put_stubs, node)) if isinstance(node, (list, tuple)) else node


def _find_owner(model: nn.Module, name: str) -> str:
    """Name the class that chose the norm ``name``: the innermost around it that is not generic."""
    while name:
        name = name.rpartition('.')[0]
        cls = type(model.get_submodule(name))
        if not cls.__module__.startswith(GENERIC_PACKAGES):
            return cls.__name__
    return type(model).__name__


def _get_size(norm: nn.Module) -> object:
    sizes = (getattr(norm, name, None) for name in ('num_features', 'num_channels', 'normalized_shape'))
    return next((size for size in sizes if size is not None), None)


def _list_parameters(module: nn.Module) -> list[tuple[str, torch.Size, bool]]:
    return [(name, p.shape, p.requires_grad) for name, p in module.named_parameters(recurse=False)]


class _AllocateNothing(TorchFunctionMode):
    """A mode in which ``torch.empty``, with which torch's layers make their weights, allocates no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs['device'] = 'meta'
        return func(*args, **kwargs)


@contextmanager
def _join_group_of_one() -> Iterator[None]:
    """Form a process group of this process alone, if there is none: mmcv's SyncBatchNorm needs one to be built."""
    if not dist.is_available() or dist.is_initialized():
        yield
        return
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
