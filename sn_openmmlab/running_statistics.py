"""Batch average: estimate the running statistics of a model again, with its weights held fixed."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Dict, Tuple, Union

import numpy as np
import torch
import torch.distributed as dist
from mmengine.dist import is_main_process
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop
from mmengine.utils import track_iter_progress
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .norms import is_batch_norm, unwrap
from .ops.formula import moments_dtype

_Moments = Tuple[int, Union[Tensor, float], Union[Tensor, float]]  # number of pixels, mean (C,), biased variance (C,)
_Seen = Dict[nn.Module, _Moments]


@torch.no_grad()
def average_statistics(model: nn.Module, batches: Iterable, num_batches: int | None = None) -> list[str]:
    r"""Replace running statistics by those of training batches, with the weights held fixed.

    The *batch average* of Luo et al. (ICLR 2019, section 3.1), for the ``bn`` of SN layers, and for the model's
    BatchNorm and SyncBatchNorm layers. The batches pass as in training: augmented, with dropout, up to the loss, and
    each layer normalizes by the moments of the batch at hand. A layer's statistics become the moments of all
    :math:`n = \sum_b n_b` pixels that reach it, in all calls, batches and processes,

    .. math::
        \mu = \frac{1}{n} \sum_b n_b \mu_b, \quad
        \sigma^2 = \frac{1}{n} \sum_b n_b \left( \sigma^2_b + (\mu_b - \mu)^2 \right),

    by the law of total variance. ``running_var`` stores the unbiased :math:`\sigma^2 n / (n - 1)`, as BatchNorm does.

    For the same pixels the split into batches and processes does not matter. But the pixels behind a layer that
    normalizes by the batch's moments depend on the batches themselves. They stay the same if each batch is split over
    processes with synchronised statistics.

    ``model.train()`` sets the modes, so layers that ``frozen_stages`` or ``norm_eval`` freezes keep their statistics.
    Modes, all other buffers and the random number generators are restored afterwards; if it fails, the statistics too.

    Args:
        model (nn.Module): mmengine's ``BaseModel``, or a wrapper of one. In distributed work every process calls, with
            the same number of batches.
        batches (Iterable): Batches as the train dataloader yields them.
        num_batches (int, optional): Number of batches to take. Defaults to None: all, if ``batches`` has a length.

    Returns:
        list[str]: The names of the modules whose ``running_mean`` and ``running_var`` were replaced.

    Raises:
        ValueError: If the model has no such layer, all are frozen, there are fewer batches than ``num_batches``, or it
            is None and the batches have no length.
        RuntimeError: If no pixel came to any of the layers.

    Examples:
        >>> from sn_openmmlab import average_statistics
        >>> average_statistics(runner.model, runner.train_dataloader, 200)  # doctest: +SKIP
    """
    base_model = unwrap(model)
    available = len(batches) if isinstance(batches, Sized) else num_batches
    if available is None:
        raise ValueError(f'a {type(batches).__name__} has no length: say in num_batches how many batches to take')
    num_batches = available if num_batches is None else num_batches
    check_num_batches(num_batches, available)
    layers = statistics_layers(base_model)
    with _restore_afterwards(base_model), contextlib.ExitStack() as hooks:
        base_model.train()
        layers = {name: layer for name, layer in layers.items() if layer.training}
        if not layers:
            raise ValueError('all SN and BN layers of the model are frozen (norm_eval, frozen_stages): none to average')
        seen: _Seen = dict.fromkeys(layers.values(), (0, 0.0, 0.0))
        for layer in layers.values():  # SN calls the hooks of its bn with its own input
            hook = layer.register_forward_pre_hook(lambda layer, args: _add_moments(seen, layer, args[0]))
            hooks.callback(hook.remove)
        count = 0
        batches = itertools.islice(batches, num_batches)
        for batch in track_iter_progress((batches, num_batches)) if is_main_process() else batches:
            base_model._run_forward(base_model.data_preprocessor(batch, True), mode='loss')
            count += 1
        if count < num_batches:
            raise ValueError(f'num_batches={num_batches}, but there are {count} batches')
    return _write_statistics(layers, seen)


def average_runner_statistics(runner: Runner, num_batches: int) -> list[str]:
    """Call :func:`average_statistics` for a runner's model, with a train dataloader that is built for this.

    Batches of the runner's own dataloader would be missing in the training, whose sampler and workers go on from there.
    """
    config = runner._train_dataloader
    if isinstance(config, DataLoader) or config is None:
        raise TypeError(
            'batch averages need train_dataloader as a config (a dict), to build a dataloader apart from the '
            f"training's; got {config if config is None else type(config).__name__}"
        )
    config = copy.copy(config)
    if isinstance(runner._train_loop, BaseLoop):  # build_dataloader copies the dataset, with its state
        config['dataset'] = runner._train_loop.dataloader.dataset
    config['persistent_workers'] = False
    with _restore_random_states():
        different = runner._randomness_cfg.get('diff_rank_seed', False)
        loader = runner.build_dataloader(config, seed=runner.seed, diff_rank_seed=different)
        names = average_statistics(runner.model, loader, num_batches)
    runner.logger.info(f'statistics of {len(names)} layers are now the average of {num_batches} batches')
    return names


def statistics_layers(model: nn.Module) -> dict[str, Any]:
    """The modules that hold running statistics, by name: the ``bn`` of SN layers, and BatchNorms of any class.

    Raises:
        ValueError: If there are none.
    """
    layers = {
        name: m for name, m in unwrap(model).named_modules() if is_batch_norm(type(m)) and m.running_mean is not None
    }
    if not layers:
        raise ValueError('the model has no SN layer with BN, and no BatchNorm: there are no statistics to average')
    return layers


def check_num_batches(num_batches: int, available: int) -> None:
    """Refuse more batches than an epoch has."""
    if not 1 <= num_batches <= available:
        raise ValueError(f'num_batches must be from 1 to {available}, the batches of an epoch, got {num_batches}')


def _add_moments(seen: _Seen, layer: nn.Module, x: Tensor) -> None:
    """Join the moments of an input with those of the layer's earlier inputs."""
    n = x.numel() // x.shape[1]
    if n == 0:
        return
    zeros = x.new_zeros(x.shape[1], dtype=moments_dtype(x.dtype))
    # given running statistics, torch computes float32 moments of half-precision input; they are not used otherwise
    mean, var = torch.batch_norm_update_stats(x, zeros, zeros.clone(), 0.0)
    before, mean_before, var_before = seen[layer]
    share, distance = n / (before + n), mean - mean_before
    seen[layer] = (
        before + n,
        mean_before + share * distance,
        (1 - share) * var_before + share * var + share * (1 - share) * distance.square(),
    )


def _write_statistics(layers: dict[str, Any], seen: _Seen) -> list[str]:
    """Join the moments of all processes, in float64, and write them into the layers; return the names of these."""
    sizes = [layer.num_features for layer in layers.values()]
    device = next(iter(layers.values())).running_mean.device
    rows = [
        [torch.as_tensor(t, dtype=torch.float64, device=device).expand(layer.num_features) for t in seen[layer]]
        for layer in layers.values()
    ]
    count, mean, var = map(torch.cat, zip(*rows))
    total, joint = _sum_over_ranks(torch.stack([count, count * mean]))
    joint = joint / total.clamp(min=1)
    (square,) = _sum_over_ranks((count * (var + (mean - joint).square()))[None])
    unbiased = square / (total - 1).clamp(min=1)
    names = []
    for (name, layer), n, mean, var in zip(layers.items(), *(t.split(sizes) for t in (total, joint, unbiased))):
        if n[0] > 0:
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)
            names.append(name)
    if not names:
        raise RuntimeError('the training batches came to none of the SN and BN layers; a compiled model hides them')
    return names


def _sum_over_ranks(t: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(t)
    return t


@contextlib.contextmanager
def _restore_afterwards(model: nn.Module) -> Iterator[None]:
    """Restore, at the end, what training batches change: modes, buffers, and random number generators."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    try:
        with _restore_random_states():
            yield
    finally:
        for m, mode in modes:
            m.training = mode
        for m, name, buffer, value in buffers:
            m._buffers[name] = buffer.copy_(value)


@contextlib.contextmanager
def _restore_random_states() -> Iterator[None]:
    """Restore, at the end, the random number generators of Python, NumPy and torch."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
