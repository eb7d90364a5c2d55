"""Messages of SN layers while a checkpoint is loaded: how they start, and what they cannot use."""

from __future__ import annotations

import logging
import re
from collections import Counter

import torch
from mmengine.logging import print_log
from torch import Tensor

# Names of logits in the authors' ResNets, detectors and decoders; no norm layer of OpenMMLab has such a name.
AUTHORS_NAMES = re.compile(
    r'(?:(?:^|\.)sn\d+|^(?:module\.)?(?:Conv_Body|Box_Head|Mask_Head|cbr|cbr_deepsup|conv_last|ppm)\..+)\.mean_weight$'
)
_NORMALIZERS_BY_SIZE = {2: "normalizers=('in', 'ln')", 3: "normalizers=('in', 'ln', 'bn'), the default"}
_starts: Counter = Counter()  # of the load at hand: how many layers start in which way
_load: object = None
_warned: object = None


def is_computable(*values: object) -> bool:
    """Whether values of a checkpoint are dense float tensors on one device. Of others torch says what is wrong."""
    dense = [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.layout == torch.strided]
    return len(dense) == len(values) and not any(v.is_nested for v in dense) and len({v.device for v in dense}) < 2


def note_start(
    load: object, normalizers: tuple[str, ...], ratios: tuple[float, ...], named: bool, corrected: bool
) -> None:
    """Remember that a layer took a BatchNorm's weights, to log one line for all layers of a load.

    ``load`` is an object that all layers of a load share, such as the list of missing keys. No layer sees the end of
    the load. So the line is logged when a model next enters a mode (``train()``, ``eval()``), or another load begins.
    """
    global _load
    if load is not _load:
        log_starts()
        _load = load
    text = ', '.join(f'{name.upper()} {ratio:.3g}' for name, ratio in zip(normalizers, ratios))
    text = f'at the importance ratios that init_ratios names ({text})' if named else f'near it ({text})'
    _starts[text + (', weight and bias corrected' if corrected else '')] += 1


def log_starts() -> None:
    """Log what :func:`note_start` remembered, if anything."""
    global _load
    _load = None
    if not _starts:
        return
    starts = '; '.join(f'{n} layer{"s" * (n > 1)} {text}' for text, n in _starts.items())
    _starts.clear()
    print_log(
        'SwitchNorm layers take weight, bias and statistics from BatchNorm and start, without learned importance '
        f'ratios: {starts}. Another start: norm_cfg=dict(..., init_ratios=...), (1/3, 1/3, 1/3) for equal ones.',
        logger='current',
    )


def refuse_authors_names(unexpected_keys: list[str]) -> None:
    """Stop a load in which a layer gets nothing, because the checkpoint has the authors' names.

    Such a checkpoint would fill the convolutions and leave the norm layers at their start. torch and mmengine load
    parents first, so ``unexpected_keys`` already has the names that the layer's parents do not know.
    """
    found = next((key for key in unexpected_keys if AUTHORS_NAMES.search(key) or key == 'model'), None)
    if found:
        what = "its weights in 'model', as Detectron.pytorch" if found == 'model' else f"the authors' name {found!r}"
        raise RuntimeError(
            f'This checkpoint has {what}, and this model has not: SN layers would keep their starting values. '
            "Name it 'switchnorm://PATH' in init_cfg, pretrained= or load_from, or convert it: "
            'python tools/convert_checkpoint.py PATH NEW_PATH'
        )


def warn_of_no_statistics(load: object, layer: str) -> None:
    """Warn, once a load, that a layer finds weight and bias of another norm but no statistics to start from.

    This is no error: torch and mmengine list what is missing, and raise if they are told to be strict.
    """
    global _warned
    if load is not _warned:
        _warned = load
        print_log(
            f'{layer or "The SwitchNorm layer"}: the checkpoint has weight and bias but no running statistics, as '
            'of GroupNorm, or of BatchNorm with track_running_stats=False. SwitchNorm layers start from a BatchNorm '
            'with its statistics; without them they keep their own, and their importance ratios, and do not compute '
            'what the checkpoint did.',
            logger='current',
            level=logging.WARNING,
        )


def explain_sizes(logits: list[Tensor], normalizers: tuple[str, ...], error_msgs: list[str]) -> None:
    """Say, once a load and before torch lists sizes that differ, what to do if the normalizers differ."""
    sizes = {value.numel() for value in logits} - {len(normalizers)}
    start = 'SwitchNorm layers of other normalizers: '
    if sizes and not any(message.startswith(start) for message in error_msgs):
        wanted = ' or '.join(_NORMALIZERS_BY_SIZE.get(size, f'{size} normalizers') for size in sizes)
        error_msgs.append(
            f"{start}this checkpoint's were trained with {wanted}, and the model is built with {normalizers}; logits "
            "that do not fit are not loaded. Build it with norm_cfg=dict(type='SN', normalizers=...) to match."
        )
