"""Evaluation written for graphs: what ONNX, torch.export and TorchScript runtimes execute, operation by operation.

The same function as :mod:`.reference`, in fewer operations than exporters make of that: four over the maps find their
moments and two apply the rest, all of which is of size (N, C) or constant.
"""

from __future__ import annotations

from torch import Tensor

from .reference import moments_dtype


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
    shift, var = None, eps
    if 'bn' in normalizers:
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
