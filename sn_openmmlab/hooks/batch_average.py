"""Batch average during training: evaluate with statistics that are estimated again."""

from __future__ import annotations

import functools
from collections.abc import Callable

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.runner.base_loop import BaseLoop
from torch import Tensor

from ..running_statistics import average_runner_statistics, check_num_batches, statistics_layers


@HOOKS.register_module()
class SNBatchAverageHook(Hook):
    """Evaluate with batch averages in place of moving averages (Luo et al., ICLR 2019, section 3.1).

    :func:`~sn_openmmlab.average_statistics` says what is averaged. The hook builds a train dataloader of its own and
    takes the first batches: of the dataset as training has it by then, with another sampler and other workers. So the
    training goes on as without the hook. Batches pass in the precision of the weights, also if the training uses mixed
    precision.

    Args:
        num_batches (int): Number of training batches, in each process, to take the statistics of.
        when (str): With 'val' or 'test', validation or test uses the averaged statistics (of the EMA model, if there is
            one), and the moving ones are back before a checkpoint is saved. With 'epoch', the averaged statistics
            replace the moving ones at the end of each training epoch, and get into checkpoints. Defaults to 'val'.

    Raises:
        ValueError: If an argument is wrong, ``num_batches`` is more than an epoch, the model has no SN or BN layer, or
            ``when='epoch'`` meets a training without epochs.
        TypeError: If the runner's ``train_dataloader`` is no config from which the hook could build its own.

    Examples:
        >>> import sn_openmmlab
        >>> custom_hooks = [dict(type='SNBatchAverageHook', num_batches=200, when='val')]
    """

    # Averaging waits for the first iteration of an evaluation, when EMAHook has swapped its weights in. This priority
    # undoes it before EMAHook swaps back and CheckpointHook saves.
    priority = 'ABOVE_NORMAL'

    def __init__(self, num_batches: int, when: str = 'val') -> None:
        if not isinstance(num_batches, int) or num_batches < 1:
            raise ValueError(f'num_batches must be a whole number of at least 1, got {num_batches!r}')
        if when not in ('val', 'test', 'epoch'):
            raise ValueError(f"when must be 'val', 'test' or 'epoch', got {when!r}")
        self.num_batches = num_batches
        self.when = when
        self._moving: list[tuple[Tensor, Tensor]] = []

    def before_run(self, runner: Runner) -> None:
        """Refuse a model without statistics; restore the moving averages after every evaluation, also a failed one."""
        statistics_layers(runner.model)
        for loop in runner._val_loop, runner._test_loop:
            if isinstance(loop, BaseLoop):
                loop.run = self._put_back_after(loop.run)

    def before_train(self, runner: Runner) -> None:
        """Refuse what would fail only later."""
        if self.when == 'epoch' and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ValueError(
                "SNBatchAverageHook(when='epoch') needs epochs, and this training counts iterations; take when='val', "
                'or tools/average_stats.py on its checkpoints'
            )
        check_num_batches(self.num_batches, len(runner.train_dataloader))

    def after_train_epoch(self, runner: Runner) -> None:
        """Replace the moving averages."""
        if self.when == 'epoch':
            average_runner_statistics(runner, self.num_batches)

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Average before the first batch."""
        if self.when == 'val' and batch_idx == 0:
            self._average(runner)

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Average before the first batch."""
        if self.when == 'test' and batch_idx == 0:
            self._average(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Bring the moving averages back."""
        self._put_back()

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Bring the moving averages back."""
        self._put_back()

    def _average(self, runner: Runner) -> None:
        self._put_back()
        layers = statistics_layers(runner.model).values()
        moving = [(b, b.clone()) for layer in layers for b in (layer.running_mean, layer.running_var)]
        average_runner_statistics(runner, self.num_batches)
        self._moving = moving

    def _put_back_after(self, run: Callable[..., object]) -> Callable[..., object]:
        """Make ``run`` restore the moving averages, also if it fails or is interrupted, when no hook is called."""

        @functools.wraps(run)
        def wrapper(*args: object, **kwargs: object) -> object:
            try:
                return run(*args, **kwargs)
            finally:
                self._put_back()

        return wrapper

    def _put_back(self) -> None:
        for buffer, value in self._moving:
            buffer.copy_(value)
        self._moving = []
