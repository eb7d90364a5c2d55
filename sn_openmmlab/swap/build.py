"""Models built to look at: without memory for most weights and without loading any, and compared norm by norm."""

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

GENERIC = ('torch.', 'mmcv.cnn.bricks.', 'mmengine.')  # where layers come from that only do what their owner says


class Norm(NamedTuple):
    """A norm layer before and after.

    Attributes:
        name (str): Its name in the model afterwards.
        part (str): 'backbone', 'neck' or 'head'.
        old (type): What it was.
        new (type): What it is.
        owner (str): The class that put it there.
        changes (bool): Whether the two differ, if only in an argument.
    """

    name: str
    part: str
    old: type
    new: type
    owner: str
    changes: bool


def build(cfg: Config, model: dict | None = None) -> nn.Module:
    """Build ``model`` (default: the config's) to look at; its weights are meaningless."""
    model = _bare(copy.deepcopy(cfg.model if model is None else model))
    with ExitStack() as stack:
        stack.enter_context(DefaultScope.overwrite_default_scope(scope_of(cfg)))
        stack.enter_context(_one_process())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_Hollow())
        return MODELS.build(model)


def compare(before: nn.Module, after: nn.Module) -> list[Norm]:
    """The norm layers of two models that differ in nothing else; an error if they do."""
    old, new = own_modules(before), own_modules(after)
    if len(old) != len(new):
        raise RuntimeError(f'not only norms change: the model gets {len(new)} modules in place of {len(old)}')
    norms = []
    for (was, a), (name, b) in zip(old, new):
        if is_norm(a) and is_norm(b):
            if was.rpartition('.')[0] != name.rpartition('.')[0] or _channels(a) != _channels(b):
                raise RuntimeError(f'the norm layer {was} became {name} of another size or place')
            changes = type(a) is not type(b) or a.extra_repr() != b.extra_repr()
            norms.append(Norm(name, part_of(name), type(a), type(b), _owner(after, name), changes))
        elif type(a) is not type(b) or was != name or _weights(a) != _weights(b):
            raise RuntimeError(f'not only norms change: {was} ({type(a).__name__}) became {name} ({type(b).__name__})')
    return norms


def scope_of(cfg: Config) -> str:
    """The library whose registry the config's models are in."""
    return cfg.get('default_scope') or 'mmengine'


class _LanguageModel(nn.Module):
    """In place of GLIP's and GroundingDINO's BERT: what they ask it for while they are built."""

    def __init__(self) -> None:
        super().__init__()
        body: Any = nn.Module()
        body.language_dim = 768
        self.language_backbone = nn.Module()
        self.language_backbone.body = body


# what loads weights, or needs another package or file, while it is built, and has no norm that this config chooses
BARE = {
    'language_model': dict(type=_LanguageModel),
    'num_cp': 0,  # activation checkpointing by fairscale
    'postprocess_model': None,  # of trackers
    'teacher_ckpt': None,
    'teacher_config': dict(model=dict(type='ReLU')),
    'tracker': None,
}


def _bare(node: Any) -> Any:
    if isinstance(node, dict):
        bare = {key: copy.deepcopy(BARE[key]) if key in BARE else _bare(v) for key, v in node.items()}
        if bare.get('pretrained') is True:  # timm's backbones load while they are built
            bare['pretrained'] = False
        return type(node)(bare)
    return type(node)(map(_bare, node)) if isinstance(node, (list, tuple)) else node


def _owner(model: nn.Module, name: str) -> str:
    while name:
        name = name.rpartition('.')[0]
        cls = type(model.get_submodule(name))
        if not cls.__module__.startswith(GENERIC):
            return cls.__name__
    return type(model).__name__


def _channels(norm: nn.Module) -> object:
    sizes = (getattr(norm, name, None) for name in ('num_features', 'num_channels', 'normalized_shape'))
    return next((size for size in sizes if size is not None), None)


def _weights(module: nn.Module) -> list[tuple[str, torch.Size, bool]]:
    return [(name, p.shape, p.requires_grad) for name, p in module.named_parameters(recurse=False)]


class _Hollow(TorchFunctionMode):
    """Within it ``torch.empty``, which torch's layers make their weights with, takes no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs['device'] = 'meta'
        return func(*args, **kwargs)


@contextmanager
def _one_process() -> Iterator[None]:
    """A group of this process alone, which mmcv's SyncBatchNorm asks for when it is made, if there is none."""
    if not dist.is_available() or dist.is_initialized():
        yield
        return
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
