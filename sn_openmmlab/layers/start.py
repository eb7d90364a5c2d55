"""How an SN layer starts: its importance ratios, and its weight and bias where they come from a BatchNorm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

NEAR = 0.001  # the ratio of each normalizer beside BN in layers that start near BatchNorm


def equal_ratios(normalizers: tuple[str, ...]) -> tuple[float, ...]:
    """Importance ratios of a layer that starts from scratch."""
    return (1 / len(normalizers),) * len(normalizers)


def start_ratios(normalizers: tuple[str, ...], init_ratios: Sequence[float] | None) -> tuple[float, ...]:
    """Importance ratios of a layer whose weights come from a BatchNorm: ``init_ratios``, else nearly all on BN.

    Then the network answers as it did with BatchNorm. Without 'bn' among the normalizers the ratios are equal.
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
    r"""Weight and bias with which SN gives on average what BatchNorm gave, computed from BatchNorm's statistics.

    BatchNorm's running moments :math:`\mu_c, \sigma_c^2` tell the average of a sample's other moments, since every
    pixel has the same weight in all of them:

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

    One effect is left out: IN's variance is smaller than :math:`\sigma_c^2` by the variance of its means over the
    samples, which the running statistics do not tell.

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
    scale = distribute_like(((blend + eps) / (var + eps)).sqrt(), weight)
    shift = distribute_like(ln * (mean - mean_ln) / (var + eps).sqrt(), weight)
    wide = weight.double()
    return (wide * scale).to(weight.dtype), (bias.double() - wide * shift).to(bias.dtype)


def distribute_like(value: Tensor, other: Any) -> Tensor:
    """Split ``value`` over processes as ``other`` is split, if that is a DTensor."""
    if hasattr(other, 'placements'):  # a DTensor of FSDP2; running statistics are whole in every process
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, other.device_mesh, other.placements)
    return value
