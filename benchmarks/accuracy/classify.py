"""What the classification tasks share: samples in memory, a classifier and its accuracy, norms over a part of a batch.

mmengine alone, without mmpretrain: networks of these sizes are in none of its configs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import METRICS
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Chunked(nn.Module):
    """A norm over ``images`` of a batch at a time, which is what as many processes with ``images`` each compute.

    The running statistics are those of the first of them, as the checkpoint of a distributed training has those of the
    first process.

    Args:
        norm (nn.Module): SN or BatchNorm.
        images (int): How many it normalizes together, in training mode.
    """

    def __init__(self, norm: nn.Module, images: int) -> None:
        super().__init__()
        self.norm, self.images = norm, images

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``."""
        if not self.training or len(x) <= self.images:
            return self.norm(x)
        first, *others = x.split(self.images)
        y, momentum = [self.norm(first)], self.norm.momentum
        self.norm.momentum = 0.0  # the running statistics stay
        try:
            y += map(self.norm, others)
        finally:
            self.norm.momentum = momentum
        return torch.cat(y)


def norm_layer(cfg: dict, channels: int) -> nn.Module:
    """A norm of ``cfg``, :class:`Chunked` where it says how many ``images`` to take."""
    cfg = dict(cfg)
    images = cfg.pop('images', None)
    norm = build_norm_layer(cfg, channels)[1]
    return norm if images is None else Chunked(norm, images)


class Classifier(BaseModel):
    """A network, and cross entropy or classes of its output.

    On a GPU it trains as a CUDA graph: norms over parts of a batch are thousands of small kernels, which else wait for
    the host.
    """

    def __init__(self, network: nn.Module, data_preprocessor: nn.Module) -> None:
        super().__init__(data_preprocessor)
        self.network = network
        self._graph: list = []  # not a child of this module

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = 'tensor'):
        """Losses, predictions with the labels, or logits."""
        graphed = mode == 'loss' and inputs.is_cuda and torch.is_grad_enabled()  # else hooks are to see the layers
        if graphed and not self._graph:
            self._graph.append(torch.cuda.make_graphed_callables(nn.Sequential(self.network), (inputs.clone(),)))
        logits = (self._graph[0] if graphed else self.network)(inputs)
        if mode == 'loss':
            return dict(loss=F.cross_entropy(logits, labels))
        return torch.stack([logits.argmax(1), labels], 1).tolist() if mode == 'predict' else logits


@METRICS.register_module()
class ClassAccuracy(BaseMetric):
    """Share of right answers, in %."""

    def process(self, data_batch, data_samples) -> None:
        """Take pairs of a prediction and a label."""
        self.results += [predicted == label for predicted, label in data_samples]

    def compute_metrics(self, results: list) -> dict[str, float]:
        """All answers together."""
        return dict(accuracy=100 * sum(results) / len(results))


class Samples(TensorDataset):
    """Inputs (N, ...) and labels (N,) in memory, as mmengine's collate functions take them."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        inputs, label = super().__getitem__(i)
        return dict(inputs=inputs, labels=label)


def settings(dataset: dict, images: int, lr: float, epochs: int, warmup: int) -> Config:
    """Data, optimizer and schedule: SGD with a cosine, and no decay of norms and biases."""
    loader = dict(num_workers=0, collate_fn=dict(type='default_collate'))
    train, test = dict(dataset, split='train'), dict(dataset, split='test')
    return Config(
        dict(
            default_scope='mmengine',
            train_dataloader=dict(
                loader,
                dataset=train,
                batch_size=images,
                drop_last=True,
                sampler=dict(type='DefaultSampler', shuffle=True),
            ),
            val_dataloader=dict(
                loader, dataset=test, batch_size=200, sampler=dict(type='DefaultSampler', shuffle=False)
            ),
            val_evaluator=dict(type='ClassAccuracy'),
            optim_wrapper=dict(
                type='OptimWrapper',
                optimizer=dict(type='SGD', lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4),
                paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
            ),
            param_scheduler=[
                dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warmup),
                dict(type='CosineAnnealingLR', T_max=epochs, eta_min=0.0, convert_to_iter_based=True),
            ],
        )
    )
