"""How an SN layer starts from a BatchNorm, and what it says of checkpoints that it can use in part or not at all."""

from __future__ import annotations

import logging
import re
from collections import Counter

import torch
from mmengine.logging import print_log
from torch import Tensor

from ..ops import sparsestmax

# the logits of the authors' ResNets, detectors and decoders; no norm layer of OpenMMLab has such a name
AUTHORS_NAMES = re.compile(
    r'(?:(?:^|\.)sn\d+|^(?:module\.)?(?:Conv_Body|Box_Head|Mask_Head|cbr|cbr_deepsup|conv_last|ppm)\..+)\.mean_weight$'
)
_BUILT = {2: "normalizers=('in', 'ln')", 3: "normalizers=('in', 'ln', 'bn'), the default"}
NEAR = 0.001  # the ratio of each normalizer beside BN in layers that start near BatchNorm
_starts: Counter = Counter()  # layers by what is to be said of their start, of one load
_load: object = None
_warned: object = None


def equal_ratios(normalizers: tuple[str, ...]) -> tuple[float, ...]:
    """Importance ratios of a layer that starts from scratch."""
    return (1 / len(normalizers),) * len(normalizers)


def start_ratios(normalizers: tuple[str, ...], init_ratios) -> tuple[float, ...]:
    """Importance ratios of a layer whose weights come from a BatchNorm: those named, else near BatchNorm's.

    So near that the network answers as it did with BatchNorm. Without 'bn' there is nothing near it: equal ones.
    """
    if init_ratios is not None:
        return tuple(init_ratios)
    if 'bn' not in normalizers:
        return equal_ratios(normalizers)
    others = len(normalizers) - 1
    return (NEAR,) * others + (1 - others * NEAR,)


def correct_for_blend(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, ratios: dict[str, float], eps: float
) -> tuple[Tensor | None, Tensor | None]:
    r"""Weight and bias with which SN gives on average what BatchNorm gave, from BatchNorm's statistics alone.

    BatchNorm's running moments :math:`\mu_c, \sigma_c^2` say what the other moments of a sample are on average, for all
    pixels of all images weigh the same in each:

    .. math::
        E[\mu^{in}_c] = \mu_c, \quad
        \mu^{ln} = \frac1C \sum_c \mu_c, \quad
        \sigma^2_{ln} = \frac1C \sum_c \sigma_c^2 + \frac1C \sum_c (\mu_c - \mu^{ln})^2

    the last by the law of total variance. With importance ratios :math:`w` of the means and :math:`v` of the variances
    (here one triple for both) SN then subtracts :math:`\mu_c - w_{ln} (\mu_c - \mu^{ln})` and divides by the root of
    :math:`b_c + \epsilon`, where :math:`b_c = (v_{in} + v_{bn}) \sigma_c^2 + v_{ln} \sigma^2_{ln}`. Setting
    :math:`\gamma'_c (x - \mu_c + w_{ln} (\mu_c - \mu^{ln})) / \sqrt{b_c + \epsilon} + \beta'_c` equal to BatchNorm's
    :math:`\gamma_c (x - \mu_c) / \sqrt{\sigma_c^2 + \epsilon} + \beta_c` for every x gives

    .. math::
        \gamma'_c = \gamma_c \sqrt{\frac{b_c + \epsilon}{\sigma_c^2 + \epsilon}}, \quad
        \beta'_c = \beta_c - \gamma'_c w_{ln} \frac{\mu_c - \mu^{ln}}{\sqrt{b_c + \epsilon}}

    Not in it is that IN's variance is smaller than :math:`\sigma_c^2` by the variance of its means over the samples, of
    which the running statistics say nothing.

    Args:
        weight (Tensor, optional): BatchNorm's :math:`\gamma` (C,); None for 1.
        bias (Tensor, optional): BatchNorm's :math:`\beta` (C,); None for 0.
        mean (Tensor): Its running mean (C,).
        var (Tensor): Its running variance (C,).
        ratios (dict[str, float]): Importance ratio by normalizer.
        eps (float): Added to the variance.

    Returns:
        tuple[Tensor, Tensor]: :math:`\gamma', \beta'` in the dtypes of weight and bias; themselves where LN has no
        importance.
    """
    ln = ratios.get('ln', 0.0)
    if ln == 0 or weight is None or bias is None:
        return weight, bias
    mean, var = mean.double(), var.double()
    mean_ln = mean.mean()
    var_ln = var.mean() + (mean - mean_ln).square().mean()
    blend = (1 - ln) * var + ln * var_ln
    scale = like(((blend + eps) / (var + eps)).sqrt(), weight)
    shift = like(ln * (mean - mean_ln) / (var + eps).sqrt(), weight)
    wide = weight.double()
    return (wide * scale).to(weight.dtype), (bias.double() - wide * shift).to(bias.dtype)


def like(value: Tensor, other: Tensor) -> Tensor:
    """``value``, split over processes as ``other`` is where that is a DTensor."""
    if hasattr(other, 'placements'):  # FSDP2's; running statistics are whole in every process
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, other.device_mesh, other.placements)
    return value


def note_start(load: object, normalizers: tuple[str, ...], ratios: tuple[float, ...], named: bool, corrected: bool):
    """Remember that a layer took a BatchNorm's weights, to be said once a load, of all its layers.

    ``load`` is one object throughout a load, such as the list of missing keys. A layer does not see the end of the load
    that it is part of. So the line comes when a model is next put into a mode (``train()``, ``eval()``), or another
    load begins.
    """
    global _load
    if load is not _load:
        tell_starts()
        _load = load
    text = ', '.join(f'{name.upper()} {ratio:.3g}' for name, ratio in zip(normalizers, ratios))
    text = f'at the importance ratios that init_ratios names ({text})' if named else f'near it ({text})'
    _starts[text + (', weight and bias corrected' if corrected else '')] += 1


def tell_starts() -> None:
    """Say what :func:`note_start` remembered, if anything."""
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


def warn_of_no_statistics(load: object, layer: str) -> None:
    """Say once a load that a layer finds weight and bias of another norm, and no statistics to start from.

    No error, for torch and mmengine list what is missing, and raise where they are to be strict.
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
