"""Convert checkpoints of the authors' SN models, and of BatchNorm models, for models of OpenMMLab with SN.

:func:`convert_checkpoint` converts a dict of tensors. Wherever a config names a checkpoint, ``switchnorm://PATH`` does
the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor

from ..layers import SwitchNorm
from ..layers.state_dict import AUTHORS_NAMES
from . import names
from .read import MapLocation, find_oddity, find_state_dict, read_checkpoint

SCHEME = 'switchnorm://'
TARGETS = ('mmdet', 'mmseg', 'mmpretrain')
RULES = {'bn': names.batch_norm, 'switchnorm': names.switch_norm, 'detectron': names.detectron}
_LOGITS = ('mean_weight', 'var_weight')
_STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')


@dataclass
class Report:
    """What became of the keys of a checkpoint.

    Attributes:
        source (str): Kind of the checkpoint: 'bn', 'switchnorm' or 'detectron'.
        mapped (dict[str, str]): The new name of each key that was converted.
        skipped (dict[str, str]): Why each of the other keys was not.
        missing (list[str]): New names that a model will look for, and that the checkpoint lacks.
        notes (list[str]): How to build the model, and what looks wrong.
    """

    source: str
    mapped: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f'{self.source} checkpoint: {len(self.mapped)} keys mapped, {len(self.skipped)} skipped, '
            f'{len(self.missing)} missing'
        ]
        for reason in dict.fromkeys(self.skipped.values()):
            lines.append(f'skipped {_list_first(key for key, why in self.skipped.items() if why == reason)}: {reason}')
        if self.missing:
            lines.append(f'missing {_list_first(self.missing)}')
        return '\n  '.join([*lines, *(f'note: {note}' for note in self.notes)])


def convert_checkpoint(
    state_dict: Mapping[str, Tensor],
    source: str = 'auto',
    target: str | None = None,
    init_ratios: Sequence[float] | None = None,
    prefix: str | None = None,
) -> tuple[dict[str, Tensor], Report]:
    """Rename the keys of a checkpoint, and reshape and reorder its tensors, for a model of OpenMMLab with SN.

    SN tensors become what :class:`~sn_openmmlab.SwitchNorm` stores: weight, bias and running statistics of shape
    *(C,)*, the statistics in the child ``bn``. The logits of the importance ratios stay as they are, in the order IN,
    LN, BN, or IN, LN.

    Args:
        state_dict (Mapping[str, Tensor]): The tensors by name. The prefixes of torch's wrappers, ``module.`` and
            ``_orig_mod.``, are removed.
        source (str): 'switchnorm' for the authors' ImageNet ResNets, and for their segmentation encoder, decoder or
            both in one dict; 'detectron' for their detectors; 'bn' for a BatchNorm model of torchvision or OpenMMLab;
            'auto' to tell by the names. Defaults to 'auto'.
        target (str, optional): 'mmdet', 'mmseg' or 'mmpretrain'. A backbone alone gets bare names for the first two, as
            torchvision's, and ``backbone.`` and ``head.fc.`` for the third. Defaults to None: 'mmseg' for a decoder,
            else 'mmdet'.
        init_ratios (Sequence[float], optional): For 'bn': importance ratios of IN, LN and BN to store, with weights and
            biases corrected for them (for the usual eps, 1e-5). Defaults to None: none are stored, and layers start as
            from any BatchNorm checkpoint.
        prefix (str, optional): For 'bn': a prefix to remove from the names, such as ``encoder_q.``; names without it
            are skipped. Defaults to None: names stay, and it is an error if all have a prefix that no model has; ''
            allows that.

    Returns:
        tuple[dict[str, Tensor], Report]: The new state dict, and what became of the keys.

    Raises:
        ValueError: If an argument is wrong, the checkpoint is of another kind, or the target cannot compute what it
            holds.
    """
    wrapped = {names.strip_wrappers(key): key for key in state_dict}
    state_dict = {name: state_dict[key] for name, key in wrapped.items()}
    _check_memory(state_dict)
    source = _find_source(state_dict, source)
    if prefix is not None and source != 'bn':
        raise ValueError(f'prefix={prefix!r} is for BatchNorm checkpoints; the names of this {source} one are known')
    front = names.strip_wrappers(f'{prefix.rstrip(".")}.') if prefix else ''
    outside = {key: f'not under {front}' for key in state_dict if not key.startswith(front)}
    if len(outside) == len(state_dict):
        raise ValueError(f'none of its names begins with prefix={prefix!r}; they are {_list_first(state_dict)}')
    state_dict = {key[len(front) :]: value for key, value in state_dict.items() if key not in outside}
    modules: names.Modules = {}
    for key, value in state_dict.items():
        module, _, name = key.rpartition('.')
        modules.setdefault(module, {})[name] = value
    target = _find_target(modules, source, target)
    if init_ratios is not None and source != 'bn':
        raise ValueError(f'init_ratios={init_ratios} is for BatchNorm checkpoints; this {source} one has its own')
    if source != 'bn':
        _refuse_pre_activation(modules)

    if source == 'bn' and prefix is None:
        _refuse_foreign_names(modules, wrapped)

    result, report = {}, Report(source, skipped=outside)
    rules = RULES[source](modules, target)
    for module, tensors in modules.items():
        keys = {name: front + f'{module}.{name}'.lstrip('.') for name in tensors}
        new = names.rename(module, rules)
        if new is None:
            raise ValueError(f'{target} has no part that is known to compute what {_list_first(keys.values())} do')
        if new.startswith(names.SKIP):
            report.skipped.update(dict.fromkeys(keys.values(), new[len(names.SKIP) :]))
            continue
        if 'mean_weight' in tensors:
            renamed = _convert_switch_norm(module, tensors, report)
        elif source == 'bn' and 'running_mean' in tensors:
            if init_ratios is not None:
                started = _start_from_batch_norm(module, tensors, init_ratios)
                result.update({f'{new}.{name}': started.pop(name) for name in _LOGITS})
                tensors = {**tensors, **started}
            renamed = {name: (_rename_tensor(name), value) for name, value in tensors.items()}
        else:
            values = _reorder_outputs(new, tensors, modules, report) if source == 'detectron' else tensors
            renamed = {name: (name, value) for name, value in values.items()}
        for name, (place, value) in renamed.items():
            key = f'{new}.{place}'.replace('..', '.').lstrip('.')
            if key in result:
                raise ValueError(f'{keys[name]} and another key would both become {key}')
            result[key] = value
            report.mapped[keys[name]] = key
    if source != 'bn':
        report.missing += _find_missing(result, source)
    report.notes += _write_notes(result, modules, source)
    return result, report


def load_from_switchnorm(filename: str, map_location: MapLocation = None) -> dict[str, Any]:
    """Read and convert ``switchnorm://PATH``, and log what became of the keys."""
    try:
        content = read_checkpoint(re.sub(f'^{SCHEME}', '', filename), map_location)
        state_dict, report = convert_checkpoint(find_state_dict(content))
    except ValueError as error:
        raise ValueError(f'{filename}: {error}') from error
    print_log(str(report), logger='current')
    return dict(state_dict=state_dict, meta=describe_data(content))


def describe_data(content: object) -> dict[str, object]:
    """What a checkpoint tells of its training data: names and colours of the classes."""
    meta = content.get('meta') if isinstance(content, Mapping) else None
    meta = meta if isinstance(meta, Mapping) else {}
    return {name: meta[name] for name in ('dataset_meta', 'CLASSES', 'PALETTE') if name in meta}


# -- what it is -----------------------------------------------------------------------------------------------------


def _find_source(state_dict: Mapping[str, Tensor], source: str) -> str:
    if source not in ('auto', *RULES):
        raise ValueError(f'source must be auto, {", ".join(RULES)}, got {source!r}')
    layers = [key for key in state_dict if key.endswith('mean_weight')]
    if layers and not any(AUTHORS_NAMES.search(key) for key in layers):
        raise ValueError(f'its SN layers have names of OpenMMLab ({layers[0]}): load it as it is')
    if layers:
        found = 'detectron' if any(key.startswith('Conv_Body.') for key in state_dict) else 'switchnorm'
    elif any(key.endswith('running_mean') for key in state_dict):
        found = 'bn'
    else:
        raise ValueError(f'there is neither an SN nor a BatchNorm layer among its keys {_list_first(state_dict)}')
    if source not in ('auto', found):
        raise ValueError(f'by its keys {_list_first(state_dict)} it is a {found} checkpoint, not a {source} one')
    return found


def _find_target(modules: names.Modules, source: str, target: str | None) -> str:
    if target not in (None, *TARGETS):
        raise ValueError(f'target must be {", ".join(TARGETS)}, got {target!r}')
    decoder = source == 'switchnorm' and names.has_decoder(modules)
    only, what = ('mmdet', 'detector') if source == 'detectron' else ('mmseg', 'decoder') if decoder else (None, None)
    if only and target not in (None, only):
        raise ValueError(f'it holds a {what}, which is for {only}, not for {target}')
    return target or only or 'mmdet'


def _refuse_foreign_names(modules: names.Modules, wrapped: Mapping[str, str]) -> None:
    """Refuse a BatchNorm checkpoint with names that no model has. No rule would notice, as such names stay."""
    norms = [module for module, tensors in modules.items() if 'running_mean' in tensors]
    prefixes = names.find_foreign_prefixes(norms)
    if prefixes:
        first = prefixes[0]
        norm = next(norm for norm in norms if norm.startswith(first))
        of_torch: Any = re.match(names.OF_TORCH, wrapped[f'{norm}.running_mean'])  # which mmengine leaves
        as_saved = of_torch[0] + first
        raise ValueError(
            f'its names, such as {norm}, have {" or ".join(map(repr, prefixes))} in front, which no backbone or model '
            f'of OpenMMLab has. Take it away with {" or ".join(f"--prefix {prefix}" for prefix in prefixes)} '
            f"(prefix={first!r} in Python), or leave it with --prefix ''; without conversion, "
            f"init_cfg=dict(type='Pretrained', checkpoint=PATH, prefix={as_saved[:-1]!r}) loads it"
        )


def _check_memory(state_dict: Mapping[str, Tensor]) -> None:
    for key, value in state_dict.items():
        kind = find_oddity(value)
        if kind:
            raise ValueError(f'{key} is a {kind} tensor; only those that hold numbers one by one can be converted')


def _refuse_pre_activation(modules: names.Modules) -> None:
    for module, tensors in modules.items():
        conv = re.sub(r'(^|\.)sn(\d)$', r'\1conv\2', module)
        if conv != module and 'weight' in tensors and 'weight' in modules.get(conv, {}):
            channels, outputs = tensors['weight'].numel(), len(modules[conv]['weight'])
            if channels != outputs:
                raise ValueError(
                    f'{module} has {channels} channels where {conv} puts out {outputs}: it is a ResNet v2, which '
                    "normalises before each convolution. OpenMMLab's ResNets do so after it and cannot compute it"
                )


# -- tensors --------------------------------------------------------------------------------------------------------


def _rename_tensor(name: str) -> str:
    return f'bn.{name}' if name in _STATISTICS else name


def _start_from_batch_norm(module: str, tensors: dict[str, Tensor], init_ratios: Sequence[float]) -> dict[str, Tensor]:
    """Compute logits, weight and bias of a layer that starts from a BatchNorm's tensors."""
    sizes = {
        name: tensors[name].numel() for name in ('running_mean', 'running_var', 'weight', 'bias') if name in tensors
    }
    if 'running_var' not in sizes or len(set(sizes.values())) > 1:
        raise ValueError(
            f'{module} has values {sizes}; a BatchNorm has as many of running_mean as of running_var, weight and bias'
        )
    layer = SwitchNorm(tensors['running_mean'].numel(), init_ratios=init_ratios)
    mean, var = tensors['running_mean'], tensors['running_var']
    return layer.start_from(tensors.get('weight'), tensors.get('bias'), mean, var)


def _convert_switch_norm(module: str, tensors: dict[str, Tensor], report: Report) -> dict[str, tuple[str, Tensor]]:
    """Convert a layer of the authors, with tensors (1, C, 1, 1) and (1, C, 1), to our names and values (C,)."""
    sizes = [tensors[name].numel() for name in _LOGITS if name in tensors]
    if sizes[0] not in (2, 3) or sizes[-1] != sizes[0]:
        raise ValueError(f'{module} has {sizes} logits; an SN layer has 3 (IN, LN, BN) or 2 (IN, LN) of both kinds')
    renamed = {}
    for name, value in tensors.items():
        if name in _STATISTICS and sizes[0] == 2:
            report.skipped[f'{module}.{name}'] = 'statistics of the batch, in a layer without BN (2 logits)'
            continue
        if name in ('weight', 'bias', 'running_mean', 'running_var'):
            if value.numel() != tensors.get('weight', value).numel():
                raise ValueError(f'{module}.{name} has {value.numel()} values, its weight {tensors["weight"].numel()}')
            value = value.reshape(-1)
        elif name not in (*_LOGITS, 'num_batches_tracked'):
            raise ValueError(f'{module}.{name} is nothing that an SN layer has')
        renamed[name] = (_rename_tensor(name), value)
    return renamed


def _reorder_outputs(new: str, tensors: dict[str, Tensor], modules: names.Modules, report: Report) -> dict[str, Tensor]:
    """Put the outputs of predictors into mmdet's order; other tensors stay.

    Detectron's class 0 is the background. mmdet's scores have it last, and its boxes and masks do not have it.
    """

    def size(module: str) -> int:
        return len(modules.get(module, {}).get('weight', ()))

    classes, anchors = size('Box_Outs.cls_score'), size('RPN.RPN_bbox_pred') // 4
    outputs = len(tensors['weight']) if 'weight' in tensors else 0
    if new.endswith('.fc_cls'):
        return {name: torch.cat([value[1:], value[:1]]) for name, value in tensors.items()}
    if new == 'rpn_head.rpn_cls' and outputs == 2 * anchors:  # softmax over (no, yes) equals sigmoid of yes - no
        return {name: value[anchors:] - value[:anchors] for name, value in tensors.items()}
    for predictor, each, option in (
        ('roi_head.bbox_head.fc_reg', 4, 'bbox_head.reg_class_agnostic'),
        ('roi_head.mask_head.conv_logits', 1, 'mask_head.class_agnostic'),
    ):
        if new == predictor and outputs == each:
            report.notes.append(f'one prediction for all classes: build the model with {option}=True')
        elif new == predictor and outputs != each * classes:
            raise ValueError(f'{new} would have {outputs} outputs for {classes} classes, not {each * classes}')
        elif new == predictor:
            return {name: value[each:].clone() for name, value in tensors.items()}
    return tensors


# -- the report -----------------------------------------------------------------------------------------------------


def _find_missing(result: dict[str, Tensor], source: str) -> list[str]:
    """List names that should be there: all of an SN layer, a convolution's norm, earlier blocks, a detector's parts."""
    wanted = []
    for key in result:
        layer = re.sub('mean_weight$', '', key)
        if layer != key:
            statistics = ['bn.running_mean', 'bn.running_var'] if result[key].numel() == 3 else []
            wanted += [layer + name for name in ('weight', 'bias', 'var_weight', *statistics)]
        wanted.append(re.sub(r'(^|\.)conv(\d\.weight)$', r'\1bn\2', key))
        wanted.append(re.sub(r'downsample\.0\.weight$', r'downsample.1.weight', key))
        block = re.fullmatch(r'((?:backbone\.)?layer)(\d)\.(\d+)(\.conv1\.weight)', key)
        if block:
            stage, number = int(block[2]), int(block[3])
            before = f'{stage}.{number - 1}' if number else f'{max(stage - 1, 1)}.0'
            wanted.append(f'{block[1]}{before}{block[4]}')
    missing = [key for key in dict.fromkeys(wanted) if key not in result]
    parts: tuple[str, ...] = (
        'backbone.conv1',
        'rpn_head.rpn_cls',
        'roi_head.bbox_head.fc_cls',
        'roi_head.bbox_head.fc_reg',
    )
    if any(key.startswith('roi_head.mask_head.') for key in result):
        parts += ('roi_head.mask_head.conv_logits',)
    return missing + [f'{part}.weight' for part in parts if source == 'detectron' and f'{part}.weight' not in result]


def _write_notes(result: dict[str, Tensor], modules: names.Modules, source: str) -> list[str]:
    notes = []
    sizes = [value.numel() for key, value in result.items() if key.endswith('mean_weight')]
    if source != 'bn' and 2 in sizes:
        where = 'all' if 3 not in sizes else f'{sizes.count(2)} of {len(sizes)}'
        notes.append(
            f"SN without BN in {where} layers: build them with norm_cfg=dict(type='SN', normalizers=('in', 'ln'))"
        )
    stem = [key for key in result if re.search(r'(^|\.)stem\.', key) and key.endswith('mean_weight')]
    if stem and source != 'bn':
        channels = result[stem[-1].replace('mean_weight', 'weight')].numel()
        notes.append(f"a stem of three convolutions: build backbone.type='ResNetV1c' with stem_channels={channels}")
    affine = [
        m
        for m, t in modules.items()
        if source == 'detectron' and set(t) == {'weight', 'bias'} and t['weight'].dim() == 1
    ]
    if affine:
        notes.append(
            f'{_list_first(affine)}: BatchNorm folded into scale and shift; build these parts with '
            "norm_cfg=dict(type='BN', requires_grad=False), whose statistics start at the 0 and 1 that they need"
        )
    for key, value in result.items():
        once = value[
            tuple(slice(1 if step == 0 else None) for step in value.stride())
        ]  # what an expanded tensor stores
        if not once.isfinite().all():
            notes.append(f'{key} has values that are not finite')
    empty = [key for key, value in result.items() if key.endswith('bn.running_var') and not value.any()]
    if empty:
        notes.append(
            f'{_list_first(empty)}: all 0, as before training; the statistics of the batch are yet to be estimated'
        )
    return notes


def _list_first(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ', '.join(keys[:4]) + (f' and {len(keys) - 4} more' if len(keys) > 4 else '')
