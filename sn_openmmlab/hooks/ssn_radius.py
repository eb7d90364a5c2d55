"""Let the radius of SSN layers grow during training, so that they choose a normalizer."""

from __future__ import annotations

from numbers import Real

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..layers import SparseSwitchNorm
from ..norms import unwrap


@HOOKS.register_module()
class SSNRadiusHook(Hook):
    r"""Let the ``radius`` of SSN layers grow from 0, free ratios, to 1, one-hot ones.

    .. math::
        \rho(t) = \min(1, \max(0, (t / T - \text{begin}) / (\text{end} - \text{begin})))

    at iteration :math:`t` of :math:`T`, linearly as in *SSN* (Shao et al., CVPR 2019). It depends on the iteration
    only, so a resumed training continues it. Layers with frozen logits (``frozen_stages``, ``requires_grad=False``)
    keep their radius and compute what they did.

    Args:
        begin (float): Fraction of the training after which the radius leaves 0. Defaults to 0.0.
        end (float): Fraction of the training after which it is 1. The rest of the training adapts weights and
            statistics to the chosen normalizers. Defaults to 0.8, this project's choice.

    Raises:
        ValueError: If an argument is wrong, or the model has no SSN layer that learns.

    Examples:
        >>> import sn_openmmlab
        >>> custom_hooks = [dict(type='SSNRadiusHook')]
    """

    priority = 'ABOVE_NORMAL'  # before EMAHook copies the radius and CheckpointHook saves it

    begin: float
    end: float
    _layers: list[SparseSwitchNorm]

    def __init__(self, begin: float = 0.0, end: float = 0.8) -> None:
        if not (isinstance(begin, Real) and isinstance(end, Real) and 0 <= begin < end <= 1):
            raise ValueError(
                f'begin and end must be fractions of the training, 0 <= begin < end <= 1, got {begin!r}, {end!r}'
            )
        self.begin = begin
        self.end = end

    def before_train(self, runner: Runner) -> None:
        """Find the layers that learn their ratios, and set their radius."""
        found = [m for m in unwrap(runner.model).modules() if isinstance(m, SparseSwitchNorm)]
        self._layers = [m for m in found if m.mean_weight.requires_grad or m.var_weight.requires_grad]
        if not self._layers:
            raise ValueError(
                f"none of the model's {len(found)} SSN layers learns its ratios; SSNRadiusHook is for models with "
                "norm_cfg=dict(type='SSN') in parts that are not frozen"
            )
        if len(self._layers) < len(found):
            runner.logger.info(
                f'{len(found) - len(self._layers)} of {len(found)} SSN layers are frozen and do not choose'
            )
        self._set_radius(runner.iter / runner.max_iters)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        """Set the radius for the next iteration; a checkpoint or validation before it has this radius too."""
        self._set_radius((runner.iter + 1) / runner.max_iters)

    def _set_radius(self, progress: float) -> None:
        radius = min(1.0, max(0.0, (progress - self.begin) / (self.end - self.begin)))
        for layer in self._layers:
            layer.radius.fill_(radius)
