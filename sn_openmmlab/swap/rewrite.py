"""Swap the norm layers of a config.

A walk through ``cfg.model`` finds and rewrites every dict that builds a norm, and the norms that classes build by
default. The package ``convert`` does the same to a built model.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import mmengine.registry
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, Registry
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import SwitchNorm, SyncSN
from ..norms import is_batch_norm, is_switchable, part_of
from .build import Norm, build, compare, scope_of

PARTS = ('backbone', 'neck', 'head')
TARGETS = ('SN', 'SyncSN', 'GN', 'BN', 'SyncBN')
STATISTICS = ('train', 'frozen', 'synced')
SMALL_BATCH = 4  # up to so many images a process, a checkpoint has better statistics than a batch
KEPT = ('eps', 'affine', 'requires_grad', '_scope_')  # arguments that every norm layer has
KEPT_BY = {
    'SN': ('momentum', 'normalizers', 'init_ratios', 'correction'),
    'SyncSN': ('momentum', 'normalizers', 'init_ratios', 'correction', 'group_size'),
    'GN': ('num_groups',),
    'BN': ('momentum',),
    'SyncBN': ('momentum',),
}


@dataclass
class Swap:
    """A swapped config, and what became of its norm layers.

    Attributes:
        config (Config): The config after the swap.
        changed (list[Norm]): The layers that changed.
        left (list[Norm]): Layers of the chosen parts that keep their norm, because their class takes no norm, or
            refuses the new one.
        other (list[Norm]): Layers of the chosen parts that no swap changes: others than BN, SyncBN, GN, IN and SN, such
            as LayerNorm.
        refused (dict[str, str]): Why places in ``model`` keep their norm.
    """

    config: Config
    changed: list[Norm] = field(default_factory=list)
    left: list[Norm] = field(default_factory=list)
    other: list[Norm] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def swap_norm(
    cfg: Config,
    to: str = 'SN',
    parts: Collection[str] = PARTS,
    statistics: str | None = None,
    init_ratios: Sequence[float] | None = None,
) -> Config:
    """Copy a config, with another norm in its model.

    SN is set up by the recipe of docs/finetuning.md. If the backbone starts from a BatchNorm checkpoint, and a process
    has up to 4 images a step, the backbone's statistics are frozen. SN layers that load BatchNorm weights start near
    BatchNorm.

    Every dict of ``cfg.model`` that names a class is compared with the arguments of the class. So norms are found under
    any key, and also if the class has one by default, which is then written out. The models before and after are built
    (without memory for weights, and without loading any) and compared: only norm layers may differ. Places whose class
    refuses the new norm keep theirs; :func:`plan_swap` lists them.

    Args:
        cfg (Config): Config of mmdet, mmseg or another OpenMMLab library, with ``model`` and ``default_scope``.
        to (str): 'SN', 'SyncSN', 'GN' (with 32 groups, unless it was GN), 'BN' or 'SyncBN'. It replaces BN, SyncBN,
            MMSyncBN, GN, IN and SN in 1, 2 and 3 dimensions. ``eps``, ``momentum``, ``affine`` and ``requires_grad``
            stay. Defaults to 'SN'.
        parts (Collection[str]): Which of 'backbone', 'neck' and 'head' to change. Defaults to all.
        statistics (str, optional): Batch statistics of the new layers. 'train': of the batch (``norm_eval=False``, and
            ``requires_grad=True`` where it was False). 'frozen': in the backbone those of the checkpoint
            (``norm_eval=True``). 'synced': as 'train', over all processes (SyncSN or SyncBN). Defaults to None: for SN
            and SyncSN 'frozen' if the backbone starts from a BatchNorm checkpoint, has ``norm_eval``, and had it set or
            gets up to 4 images a process, else 'train'; for other norms what ``cfg`` says.
        init_ratios (Sequence[float], optional): Importance ratios of IN, LN and BN to start from; ``(0, 0, 1)`` is
            BatchNorm. Defaults to None: near BatchNorm if its weights are loaded, else equal ratios.

    Returns:
        Config: The changed copy, with ``custom_imports`` of this package for SN.

    Raises:
        ValueError: If an argument is wrong, or there is no norm to swap.
        RuntimeError: If the model cannot be built before or after.

    Examples:
        >>> from mmengine.hub import get_config
        >>> from sn_openmmlab import swap_norm
        >>> cfg = swap_norm(get_config('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'))
        >>> cfg.model.bbox_head.norm_cfg
        {'type': 'SN', 'requires_grad': True}
    """
    swap = plan_swap(cfg, to, parts, statistics, init_ratios)
    if not swap.changed:
        raise ValueError(
            f'nothing changes: no norm layer of the parts {parts} can become {to} ({len(swap.left)} are hard-coded, '
            f'{len(swap.other)} LayerNorm and the like)'
        )
    return swap.config


def plan_swap(
    cfg: Config,
    to: str = 'SN',
    parts: Collection[str] = PARTS,
    statistics: str | None = None,
    init_ratios: Sequence[float] | None = None,
) -> Swap:
    """Swap as :func:`swap_norm` does, and list what changes and what does not; it is no error if nothing changes."""
    parts = (parts,) if isinstance(parts, str) else tuple(parts)
    parts = PARTS if parts == ('all',) else parts
    _check_arguments(cfg, to, parts, statistics, init_ratios)
    if statistics == 'synced':
        to = {'SN': 'SyncSN', 'BN': 'SyncBN'}.get(to, to)
    norm_eval = None if statistics is None else statistics == 'frozen'
    recipe = statistics is None and to in ('SN', 'SyncSN')

    def rewrite_model(refused: Collection[str] = (), added: Collection[str] = ()) -> tuple[Any, _Walk]:
        walk = _Walk(to, parts, norm_eval, init_ratios, refused, added, learns=recipe or norm_eval is False)
        with DefaultScope.overwrite_default_scope(scope_of(cfg)):
            return walk.visit(cfg.model), walk

    def compare_with(*places: Collection[str]) -> list[Norm]:
        return compare(before, build(cfg, rewrite_model(*places)[0]))

    try:
        before = build(cfg)
    except Exception as error:
        raise RuntimeError(f'the model cannot be built as it is: {_describe_error(error)}') from error
    if recipe:
        norm_eval = 'backbone' in parts and _prefers_frozen(cfg, before)
    _, walk = rewrite_model()
    if norm_eval and walk.places and not walk.frozen:
        if not recipe:
            raise ValueError("statistics='frozen' sets norm_eval, which the backbone of this model does not have")
        norm_eval = False
        _, walk = rewrite_model()
    places, unresolved = walk.places, walk.unresolved
    refused = {place: 'is of a trained teacher' for place in places if place.startswith('teacher_')}
    places = [place for place in places if place not in refused]
    try:
        norms = compare_with(refused)
    except Exception as error:  # a class refuses: try the places one by one
        refused.update(dict.fromkeys(places, _describe_error(error)))
        for place in places:
            reason = refused.pop(place)
            try:
                compare_with(refused)
            except Exception as error:
                refused[place] = reason if len(places) == 1 else _describe_error(error)
        norms = compare_with(refused)
    swap = _make_swap(cfg, rewrite_model(refused)[0], to, parts, norms, refused)
    if swap.left:
        added: list[str] = []
        for place in unresolved:  # arguments of an unknown class: does it take a norm?
            with contextlib.suppress(Exception):
                more = compare_with(refused, [*added, place])
                if sum(norm.changes for norm in more) > sum(norm.changes for norm in norms):
                    norms, added = more, [*added, place]
        for place in places:  # does the class ignore the new norm?
            if place not in refused and compare_with({*refused, place}, added) == norms:
                refused[place] = 'has no effect, its class builds its norms by itself'
        swap = _make_swap(cfg, rewrite_model(refused, added)[0], to, parts, norms, refused)
    return swap


class _Walk:
    """A walk through a model's config that rewrites norms, and records where."""

    def __init__(
        self,
        to: str,
        parts: Collection[str],
        norm_eval: bool | None = None,
        init_ratios: Sequence[float] | None = None,
        refused: Collection[str] = (),
        added: Collection[str] = (),
        learns: bool = False,
    ) -> None:
        self.to, self.parts, self.norm_eval, self.init_ratios = to, parts, norm_eval, init_ratios
        self.refused, self.added = refused, added
        self.learns = learns  # whether new norms are trained, also where the old were not
        self.places: list[str] = []
        self.unresolved: list[str] = []  # dicts of arguments for a class that no registry knows
        self.frozen = False  # whether some backbone has norm_eval

    def visit(self, node: Any, place: str = '', scope: str | None = None) -> Any:
        """Return ``node`` with its norms rewritten, or ``node`` itself where nothing changes."""
        if isinstance(node, (list, tuple)):
            items = [self.visit(item, f'{place}.{i}', scope) for i, item in enumerate(node)]
            return type(node)(items) if any(a is not b for a, b in zip(items, node)) else node
        if not isinstance(node, dict):
            return node
        scope = node.get('_scope_') or scope
        cls: Any = _find_class(node['type'], scope) if 'type' in node else None
        if _is_swappable(cls):
            return self.rewrite(node, cls, place.lstrip('.'))
        accepted = _list_arguments(cls) if cls else {}
        new = {
            key: self.visit(value, f'{place}.{key}', scope)
            for key, value in {**accepted, **node}.items()
            if isinstance(value, (dict, list, tuple))
        }
        changed = {key: value for key, value in new.items() if value is not (node if key in node else accepted)[key]}
        if 'type' in node:  # of a table inside a class (pathways of mmaction's SlowFast), or no model at all
            unknown = cls is None and not _in_another_registry(str(node['type']))
        else:
            unknown = place.endswith('_cfg')
        if unknown and 'norm_cfg' not in node and part_of(place) in self.parts:
            self.unresolved.append(place)
            if place in self.added:
                old = dict(type='BN', requires_grad=True)
                changed['norm_cfg'] = self.rewrite(old, nn.BatchNorm2d, f'{place}.norm_cfg'.lstrip('.'))
        if not changed:
            return node
        if ('norm_eval' in accepted or 'norm_eval' in node) and self.norm_eval is not None:
            if node.get('norm_eval', accepted.get('norm_eval')) and not self.norm_eval:
                changed['norm_eval'] = False
            elif self.norm_eval and part_of(place) == 'backbone':
                self.frozen = changed['norm_eval'] = True
        return type(node)({**node, **changed})

    def rewrite(self, norm: dict, cls: type, place: str) -> dict:
        """Return the new norm, or ``norm`` itself if this place is to keep it."""
        if part_of(place) not in self.parts or place in self.refused:
            return norm
        if self.to == 'BN' and _is_type(cls, 'BN'):
            return norm  # BN1d and the like too
        new = {'type': self.to, **{k: v for k, v in norm.items() if k in KEPT + KEPT_BY[self.to]}}
        if self.to == 'GN':
            new.setdefault('num_groups', 32)
        if self.learns and new.get('requires_grad') is False:
            new['requires_grad'] = True
        if self.init_ratios is not None:
            new['init_ratios'] = tuple(self.init_ratios)
        if new == dict(norm):
            return norm
        self.places.append(place)
        return type(norm)(new)


def _check_arguments(
    cfg: Config, to: str, parts: tuple[str, ...], statistics: str | None, init_ratios: Sequence[float] | None
) -> None:
    if to not in TARGETS:
        raise ValueError(f'to must be one of {TARGETS}, got {to!r}')
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f'parts must be some of {PARTS}, got {parts!r}')
    if statistics not in (None, *STATISTICS):
        raise ValueError(f'statistics must be one of {STATISTICS}, got {statistics!r}')
    if not isinstance(cfg.get('model'), dict):
        raise ValueError('the config has no model')
    if init_ratios is not None:
        if to not in ('SN', 'SyncSN'):
            raise ValueError(f'init_ratios={init_ratios!r} is for SN and SyncSN, not for {to}')
        SwitchNorm(1, init_ratios=init_ratios)  # raises if they are no ratios
    if statistics is not None and to == 'GN':
        raise ValueError(f'statistics={statistics!r} is about batch statistics, and GN has none')
    if statistics == 'frozen' and 'backbone' not in parts:
        raise ValueError("statistics='frozen' freezes those of a pretrained backbone, which is not among the parts")


def _make_swap(
    cfg: Config, model: dict, to: str, parts: tuple[str, ...], norms: list[Norm], refused: dict[str, str]
) -> Swap:
    """Put the rewritten model into a copy of the config, and sort the layers by what became of them."""
    swap = Swap(copy.deepcopy(cfg), refused=refused)
    for norm in norms:
        if norm.part not in parts:
            if norm.changes:
                raise RuntimeError(f'{norm.name} would change, but is in the {norm.part}, not in {"+".join(parts)}')
        elif norm.changes:
            swap.changed.append(norm)
        elif not issubclass(norm.new, SwitchNorm) and not is_switchable(norm.new):
            swap.other.append(norm)
        elif not _is_type(norm.new, to):
            swap.left.append(norm)
    if not swap.left:
        swap.refused = {}  # no layer was built from these places
    swap.config.model = copy.deepcopy(model)
    if set(parts) == set(PARTS):  # also variables such as norm_cfg, which were copied into the model
        walk = _Walk(to, PARTS)
        with DefaultScope.overwrite_default_scope(scope_of(cfg)):
            for key, value in cfg.items():
                if isinstance(value, dict) and 'norm' in key:
                    swap.config[key] = walk.visit(value)
    if to in ('SN', 'SyncSN'):
        imports = cfg.get('custom_imports') or dict(imports=[], allow_failed_imports=False)
        names = [imports['imports']] if isinstance(imports['imports'], str) else list(imports['imports'])
        if 'sn_openmmlab' not in names:
            swap.config.custom_imports = {**imports, 'imports': [*names, 'sn_openmmlab']}
    return swap


def is_pretrained(cfg: Config) -> bool:
    """Whether the backbone starts from a checkpoint, its own or the whole model's."""

    def visit(node: Any, place: str) -> bool:
        if isinstance(node, (list, tuple)):
            return any(visit(item, place) for item in node)
        if not isinstance(node, dict):
            return False
        given = node.get('pretrained') or (node.get('type') == 'Pretrained' and node.get('checkpoint'))
        here = part_of(place) == 'backbone' or place in ('', 'init_cfg')
        return bool(given and here) or any(visit(v, f'{place}.{k}'.lstrip('.')) for k, v in node.items())

    return bool(cfg.get('load_from')) or visit(cfg.model, '')


def _prefers_frozen(cfg: Config, model: nn.Module) -> bool:
    """Whether the backbone starts from a BatchNorm checkpoint, whose statistics are better than those of a batch."""
    backbone = [m for name, m in model.named_modules() if part_of(name) == 'backbone']
    if not is_pretrained(cfg) or not any(is_batch_norm(type(m)) for m in backbone):
        return False
    images = (cfg.get('train_dataloader') or {}).get('batch_size', 1)
    return images <= SMALL_BATCH or any(getattr(m, 'norm_eval', False) for m in backbone)


@functools.lru_cache(None)
def _list_arguments(cls: Callable) -> dict[str, Any]:
    """List the arguments of a class, with their defaults: its own, and what ``**kwargs`` hands to its bases."""
    found: dict[str, Any] = {}
    for base in cls.__mro__ if inspect.isclass(cls) else (cls,):
        init = base.__dict__.get('__init__') if inspect.isclass(base) else base
        if init is None:
            continue
        parameters = inspect.signature(init).parameters.values()
        for p in parameters:
            found.setdefault(p.name, None if p.default is p.empty else p.default)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def _is_swappable(cls: Any) -> bool:
    """Whether a ``type`` means SN, or a norm layer that SN can replace."""
    return inspect.isclass(cls) and (is_switchable(cls) or issubclass(cls, SwitchNorm))


def _is_type(cls: type, to: str) -> bool:
    """Whether a class of layers is the norm that ``to`` names, of any number of dimensions."""
    if to == 'BN':
        return issubclass(cls, _BatchNorm) and not issubclass(cls, nn.SyncBatchNorm)
    return issubclass(cls, {'SN': SwitchNorm, 'SyncSN': SyncSN, 'GN': nn.GroupNorm, 'SyncBN': nn.SyncBatchNorm}[to])


def _find_class(kind: Any, scope: str | None) -> Any:
    """Find the class or function of a model that a ``type`` names; None if there is none."""
    if not isinstance(kind, str):
        return kind
    with MODELS.switch_scope_and_registry(scope) as registry:
        return registry.get(kind)


def _in_another_registry(kind: str) -> bool:
    """Whether an imported library knows a ``type`` as something else than a model, such as an assigner."""
    registries = [r for r in vars(mmengine.registry).values() if isinstance(r, Registry) and r is not MODELS]
    registries += [child for registry in registries for child in registry.children.values()]
    return any(kind.rpartition('.')[2] in registry.module_dict for registry in registries)


def _describe_error(error: BaseException) -> str:
    """Describe an error in one line. One without a message, such as an assertion, is described by its line of code."""
    text = str(error).strip() or traceback.extract_tb((error.__context__ or error).__traceback__)[-1].line
    return f'{type(error).__name__}: {text.splitlines()[0] if text else ""}'
