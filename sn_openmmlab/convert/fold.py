"""Fold SN layers that compute BatchNorm into the convolutions before them, for evaluation."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers import SwitchNorm
from .layers import find_additions, is_foldable, keep_activation, make_batch_norm, replace

_Conv = Union[nn.Conv1d, nn.Conv2d, nn.Conv3d]


@torch.no_grad()
def fold_batch_norm(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    r"""Fold every SN layer with all importance on BN, in means and variances, into the convolution before it.

    In evaluation mode such a layer is an affine map of each channel,
    :math:`y = \gamma_c (x - \mu_c) / \sqrt{\sigma_c^2 + \epsilon} + \beta_c` with BN's running moments. The convolution
    takes it into its weight and bias (:func:`torch.nn.utils.fusion.fuse_conv_bn_eval`), and an ``nn.Identity`` replaces
    the layer. A forward pass finds the convolution: an ``nn.Conv1d``, ``2d`` or ``3d`` whose output goes, unchanged, to
    this layer only. Layers without one become BatchNorm, as by :func:`convert_switch_norm`. All other layers stay,
    BatchNorms too (mmcv's ``fuse_conv_bn`` folds these). So do layers without running statistics, and what hooks,
    methods or tensors were added to. The model is changed in place, and is for evaluation only from then on.

    Args:
        model (nn.Module): The model, in evaluation mode.
        *args: What to call the model with, for the forward pass.
        **kwargs: Likewise.

    Returns:
        int: The number of layers that were folded.

    Raises:
        ValueError: If a layer is in training mode.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from sn_openmmlab import SwitchNorm, fold_batch_norm
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), SwitchNorm(8, init_ratios=(0, 0, 1)), nn.ReLU()).eval()
        >>> fold_batch_norm(model, torch.randn(1, 3, 8, 8))
        1
    """
    training = [name or 'the model' for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f'folding is for evaluation; call model.eval() first ({training[0]} is in training mode)')
    layers = [m for m in model.modules() if isinstance(m, SwitchNorm) and is_foldable(m)]
    norms = {layer: make_batch_norm(layer) for layer in layers}
    new: dict[nn.Module, nn.Module] = dict(norms.items())
    convs = _find_convs_before(model, layers, args, kwargs)
    for layer, conv in convs.items():
        new[conv] = fuse_conv_bn_eval(conv, norms[layer])
        new[layer] = keep_activation(layer, nn.Identity()).eval()
    replace(model, new)
    return len(convs)


def _find_convs_before(
    model: nn.Module, layers: Sequence[SwitchNorm], args: tuple, kwargs: dict[str, Any]
) -> dict[SwitchNorm, _Conv]:
    """For each layer the convolution whose every output goes, unchanged, to this layer as its only input."""
    calls: Counter[_Conv] = Counter()
    sources: defaultdict[SwitchNorm, list[_Conv | None]] = defaultdict(list)
    last: Tensor | None = None
    conv_of_last: _Conv | None = None
    version = 0

    def after_conv(conv: _Conv, _: object, output: Tensor) -> None:
        nonlocal last, conv_of_last, version
        calls[conv] += 1
        last, conv_of_last, version = output, conv, output._version

    def before_layer(layer: SwitchNorm, inputs: tuple[Tensor]) -> None:
        unchanged = inputs[0] is last and inputs[0]._version == version  # not so after ReLU(inplace=True)
        sources[layer].append(conv_of_last if unchanged else None)

    # exact types: derived ones may change their weight first, as may hooks
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    plain = [m for m in model.modules() if type(m) in kinds and not find_additions(m)]
    hooks = [conv.register_forward_hook(after_conv) for conv in plain]
    hooks += [layer.register_forward_pre_hook(before_layer) for layer in layers]
    try:
        model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    convs = {}
    for layer, (first, *others) in sources.items():
        if first is not None and [first, *others] == [first] * calls[first]:
            convs[layer] = first
    return convs
