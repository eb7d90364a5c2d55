"""What an SN layer says while a checkpoint is loaded that it can use in part or not at all."""

import re

import torch
from mmengine.logging import print_log
from torch import Tensor

from ..ops import sparsestmax

# the logits of the authors' ResNets, detectors and decoders; no norm layer of OpenMMLab has such a name
AUTHORS_NAMES = re.compile(
    r'(?:(?:^|\.)sn\d+|^(?:module\.)?(?:Conv_Body|Box_Head|Mask_Head|cbr|cbr_deepsup|conv_last|ppm)\..+)\.mean_weight$'
)
_BUILT = {2: "normalizers=('in', 'ln')", 3: "normalizers=('in', 'ln', 'bn'), the default"}
_told: list | None = None


def tell_of_batch_norm(load: list) -> None:
    """Say once a load (the list of missing keys is one object throughout) that BatchNorm weights were taken."""
    global _told
    if load is not _told:
        _told = load
        print_log(
            'SwitchNorm layers take weight, bias and statistics from BatchNorm keys; their mean_weight and var_weight '
            'are not in the checkpoint and keep their values.',
            logger='current',
        )


def refuse_authors_names(unexpected_keys: list[str]) -> None:
    """Stop a load in which a layer gets nothing since the checkpoint has the authors' names.

    ``unexpected_keys`` already has those of the layer's parents, which torch and mmengine load first. Loaded as it is,
    such a checkpoint would fill the convolutions and leave the norm layers at their start.
    """
    found = next((key for key in unexpected_keys if AUTHORS_NAMES.search(key) or key == 'model'), None)
    if found:
        what = "its weights in 'model', as Detectron.pytorch" if found == 'model' else f"the authors' name {found!r}"
        raise RuntimeError(
            f'This checkpoint has {what}, and this model has not: SN layers would keep their starting values. '
            "Name it 'switchnorm://PATH' in init_cfg, pretrained= or load_from, or convert it: "
            'python tools/convert_checkpoint.py PATH NEW_PATH'
        )


def explain_sizes(logits: list[Tensor], normalizers: tuple[str, ...], error_msgs: list[str]) -> None:
    """Say once a load, before torch's list of sizes that differ, what to do about layers of other normalizers."""
    sizes = {value.numel() for value in logits} - {len(normalizers)}
    start = 'SwitchNorm layers of other normalizers: '
    if sizes and not any(message.startswith(start) for message in error_msgs):
        wanted = ' or '.join(_BUILT.get(size, f'{size} normalizers') for size in sizes)
        error_msgs.append(
            f"{start}this checkpoint's were trained with {wanted}, and the model is built with {normalizers}; logits "
            "that do not fit are not loaded. Build it with norm_cfg=dict(type='SN', normalizers=...) to match."
        )


def softmax_of_sparsestmax(logits: Tensor, radius: Tensor | float) -> Tensor:
    """Logits whose softmax, which is all that SN and its backends know, gives the ratios of SSN's logits."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # log(tiny) in place of log(0) is finite, its softmax nothing beside 1, and its gradient 0, as it is to be
    return sparsestmax(logits, radius).clamp(min=torch.finfo(torch.float32).tiny).log()
