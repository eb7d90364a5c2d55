"""Log the importance ratios of all SN layers during training."""

from __future__ import annotations

from collections import defaultdict

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from ..layers import SwitchNorm
from ..norms import part_name, unwrap

FILE = 'importance_ratios.json'  # LocalVisBackend writes it into WORK_DIR/TIMESTAMP/vis_data
KINDS = ('mean', 'var')


@HOOKS.register_module()
class SNRatioHook(Hook):
    r"""Log the importance ratios of every SN layer, and their mean in each part of the model.

    They go to the runner's visualizer, and so to all of its backends (TensorBoard, WandB, local files, ...): before
    training, at every interval, and after training. The step is the number of iterations done. Names are

    - ``sn_parts/PART/KIND_NORMALIZER``, the mean over the layers of a part: ``sn_parts/backbone/mean_in``;
    - ``sn_PART/LAYER/KIND_NORMALIZER``: ``sn_box_head/roi_head.bbox_head.shared_convs.0.bn/var_ln``;

    where KIND is ``mean`` for the ratios of the means, :math:`\mathrm{softmax}(\text{mean\_weight})`, and ``var`` for
    those of the variances, and PART is ``backbone``, ``neck`` or the name of a head. A normalizer that a layer does not
    have is not logged, and counts as 0 in the mean of its part.

    Args:
        interval (int): Number of epochs or iterations between two records. Defaults to 1.
        by_epoch (bool): Whether ``interval`` counts epochs; must be False in a training loop by iterations. Defaults to
            True.

    Raises:
        ValueError: If ``interval`` is below 1. When training starts: if the model has no SN layer, or ``by_epoch`` is
            True in a training loop by iterations.

    Examples:
        >>> custom_hooks = [dict(type='SNRatioHook', interval=500, by_epoch=False)]
    """

    def __init__(self, interval: int = 1, by_epoch: bool = True) -> None:
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f'interval must be a whole number of at least 1, got {interval!r}')
        self.interval = interval
        self.by_epoch = by_epoch
        self._logged: int | None = None

    def before_train(self, runner: Runner) -> None:
        """Refuse a model or training loop that cannot be logged, and log the ratios at the start."""
        if not _find_layers(runner.model):
            raise ValueError(
                f'SNRatioHook: {type(unwrap(runner.model)).__name__} has no SN layer, and so no importance ratios. '
                "Set norm_cfg=dict(type='SN') in the parts of the model (tools/swap_norm.py CONFIG writes such a "
                'config), or remove the hook from custom_hooks'
            )
        if self.by_epoch and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ValueError(
                f'SNRatioHook(interval={self.interval}, by_epoch=True): the training loop goes by iterations; set '
                'by_epoch=False and interval to a number of iterations'
            )
        self._log(runner, runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        """Log at an interval of iterations."""
        if not self.by_epoch and self.every_n_train_iters(runner, self.interval):
            self._log(runner, runner.iter + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        """Log at an interval of epochs."""
        if self.by_epoch and self.every_n_epochs(runner, self.interval):
            self._log(runner, runner.iter)

    def after_train(self, runner: Runner) -> None:
        """Log the final ratios, unless they are logged already."""
        if self._logged != runner.iter:
            self._log(runner, runner.iter)

    @master_only
    def _log(self, runner: Runner, step: int) -> None:
        runner.visualizer.add_scalars(named_ratios(runner.model), step=step, file_path=FILE)
        self._logged = step


def named_ratios(model: nn.Module) -> dict[str, float]:
    """Importance ratios of a model by the names that :class:`SNRatioHook` logs: means of parts, then layers."""
    layers = _find_layers(model)
    ratios: dict[str, float] = {}
    sums: dict[tuple[str, str], float] = defaultdict(float)
    sizes: dict[str, int] = defaultdict(int)
    for name, layer in layers.items():
        part = part_name(name).replace(' ', '_')
        sizes[part] += 1
        for kind, values in zip(KINDS, layer.importance_ratios.tolist()):
            for normalizer, value in zip(layer.normalizers, values):
                ratios[f'sn_{part}/{name}/{kind}_{normalizer}'] = value
                sums[part, f'{kind}_{normalizer}'] += value
    means = {f'sn_parts/{part}/{what}': total / sizes[part] for (part, what), total in sums.items()}
    return {**means, **ratios}


def _find_layers(model: nn.Module) -> dict[str, SwitchNorm]:
    named = unwrap(model).named_modules()
    return {name: module for name, module in named if isinstance(module, SwitchNorm)}
