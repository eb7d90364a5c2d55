"""Switchable Normalization written down as the paper defines it, in differentiable PyTorch.

:func:`switch_norm_reference` is the oracle of every test, and the path that is taken where autograd must see through
the layer: tracing, ``torch.func``, double backward, older ``torch.compile``. :func:`switch_norm_graph` is the same
function for graphs, which ONNX, torch.export and TorchScript runtimes execute operation by operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NORMALIZERS = ('in', 'ln', 'bn')


def moments_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of moments and of the algebra on them: float64 for float64 input, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def switch_norm_reference(
    x: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_bn: Tensor | None,
    var_bn: Tensor | None,
    normalizers: tuple[str, ...],
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    r"""Switchable Normalization, formula by formula (Luo et al., ICLR 2019, Eqs. 2 to 5).

    .. math::
        y = \gamma_c \frac{x - \sum_k w_k \mu_k}{\sqrt{\sum_k w'_k \sigma^2_k + \epsilon}} + \beta_c,
        \quad w = \mathrm{softmax}(\lambda), \; w' = \mathrm{softmax}(\lambda'), \; k \in \{in, ln, bn\}

    All variances are biased. Those of LN and BN follow from the IN moments by the law of total variance,
    :math:`\sigma^2_{ln} = E_c[\sigma^2_{in}] + Var_c[\mu_{in}]`, which unlike the paper's difference of squares does
    not cancel.

    Args:
        x: Input of shape (N, C, \*), floating point.
        mean_weight: Logits of the means' importance ratios, one for each of ``normalizers``.
        var_weight: Logits of the variances' importance ratios, likewise.
        weight: Scale of shape (C,), or None.
        bias: Shift of shape (C,), or None.
        mean_bn: Batch means of shape (C,) to use in place of this batch's own (frozen statistics), or None.
        var_bn: Batch variances of shape (C,), likewise.
        normalizers: Which of 'in', 'ln' and 'bn' take part.
        eps: Added to the variance.

    Returns:
        The output, in the shape and dtype of ``x``, and the batch means and variances that were used, of shape (C,)
        (None where 'bn' takes no part).
    """
    dtype = moments_dtype(x.dtype)
    h = x.to(dtype) if x.dim() > 2 else x.to(dtype).unsqueeze(2)
    pixels = tuple(range(2, h.dim()))
    channels = (-1, *[1] * len(pixels))  # the shape that (C,) broadcasts from
    w = dict(zip(normalizers, mean_weight.to(dtype).softmax(0)))
    v = dict(zip(normalizers, var_weight.to(dtype).softmax(0)))

    if h.numel() == 0:  # no pixel has no moments; every argument stays in the graph, with gradient zero
        y = h + 0 * (mean_weight.sum() + var_weight.sum())
        zeros = x.new_zeros(x.shape[1], dtype=dtype)
        used: Any = (zeros, zeros) if 'bn' in normalizers else (None, None)
    else:
        var_in, mean_in = torch.var_mean(h, pixels, correction=0, keepdim=True)  # (N, C, 1, ...)
        # means enter by their distance from the IN mean: the ratios sum to 1, and large means do not cancel
        shift: Any = 0.0
        var: Any = 0.0
        used = None, None
        if 'in' in normalizers:
            shift, var = 0 * w['in'], v['in'] * var_in
        if 'ln' in normalizers:
            between, mean_ln = torch.var_mean(mean_in, 1, correction=0, keepdim=True)  # (N, 1, 1, ...)
            shift = shift + w['ln'] * (mean_ln - mean_in)
            var = var + v['ln'] * (var_in.mean(1, keepdim=True) + between)
        if 'bn' in normalizers:
            if mean_bn is None or var_bn is None:
                between, mean_bn = torch.var_mean(mean_in, 0, correction=0)
                mean_bn, var_bn = mean_bn.flatten(), (var_in.mean(0) + between).flatten()
            used = mean_bn, var_bn
            shift = shift + w['bn'] * (mean_bn.to(dtype).view(channels) - mean_in)
            var = var + v['bn'] * var_bn.to(dtype).view(channels)
        y = (h - mean_in - shift) * torch.rsqrt(var + eps)

    if weight is not None and bias is not None:
        y = y * weight.to(dtype).view(channels) + bias.to(dtype).view(channels)
    y = y.to(x.dtype)
    return y if x.dim() > 2 else y.squeeze(2), *used


def switch_norm_graph(
    x: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_bn: Tensor | None,
    var_bn: Tensor | None,
    normalizers: tuple[str, ...],
    eps: float,
) -> Tensor:
    """Switchable Normalization whose BN moments, if BN takes part, are given: no size enters the graph.

    In fewer operations than exporters make of the reference: four over the maps find their moments and two apply the
    rest, all of which is of size (N, C) or constant.

    Args:
        x: Input of shape (N, C, \\*), floating point.
        mean_weight: Logits of the means' importance ratios, one for each of ``normalizers``.
        var_weight: Logits of the variances' importance ratios, likewise.
        weight: Scale of shape (C,), or None.
        bias: Shift of shape (C,), or None.
        mean_bn: Running mean of shape (C,); None without 'bn'.
        var_bn: Running variance of shape (C,), likewise.
        normalizers: Which of 'in', 'ln' and 'bn' take part.
        eps: Added to the variance.

    Returns:
        The output, in the shape and dtype of ``x``.
    """
    dtype = moments_dtype(x.dtype)
    h = x if x.dim() > 2 else x.unsqueeze(2)
    h = h if h.dtype == dtype else h.to(dtype)
    pixels = tuple(range(2, h.dim()))
    channels = (-1, *[1] * len(pixels))  # the shape that (C,) broadcasts from
    mean_bn, var_bn, weight, bias = (
        None if t is None else (t if t.dtype == dtype else t.to(dtype)).view(channels)
        for t in (mean_bn, var_bn, weight, bias)
    )
    ratios = mean_weight.softmax(0, dtype), var_weight.softmax(0, dtype)
    # indexing is what exporters evaluate beforehand, unlike unbind and iteration
    w, v = ({name: ratio[k] for k, name in enumerate(normalizers)} for ratio in ratios)

    mean_in = h.mean(pixels, keepdim=True)
    centred = h - mean_in
    var_in = centred.square().mean(pixels, keepdim=True)
    # means enter by their distance from the IN mean, so that large ones do not cancel; constants are added up first
    shift: Any = None
    var: Any = eps
    if mean_bn is not None and var_bn is not None and 'bn' in normalizers:
        shift = w['bn'] * (mean_in - mean_bn)
        var = var + v['bn'] * var_bn
    if 'ln' in normalizers:
        distance = mean_in - mean_in.mean(1, keepdim=True)
        shift = w['ln'] * distance if shift is None else shift + w['ln'] * distance
        var = var + v['ln'] * (var_in + distance.square()).mean(1, keepdim=True)
    if 'in' in normalizers:
        var = var + v['in'] * var_in
    a = 1 / var.sqrt() if weight is None else weight / var.sqrt()
    s = bias
    if shift is not None:
        s = shift * a if bias is None else shift * a + bias
    y = centred * a if s is None else centred * a + s
    y = y if y.dtype == x.dtype else y.to(x.dtype)
    return y if x.dim() > 2 else y.squeeze(2)
