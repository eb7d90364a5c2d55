"""Trainings that log importance ratios, and what these have to be."""

import json
from pathlib import Path

import numpy as np
import torch
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from sn_openmmlab import SwitchNorm

NAMES = ['backbone.1', 'backbone.3', 'neck.1', 'roi_head.bbox_head.bn', 'roi_head.mask_head.0.bn']


PARTS = ['backbone', 'backbone', 'neck', 'box head', 'mask head']


class Net(BaseModel):
    """Five SN layers with names as in Mask R-CNN; the neck's has no BN, and the box head's no LN."""

    def __init__(self, norm=SwitchNorm):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.Conv2d(6, 6, 3), norm(6))
        self.neck = nn.Sequential(nn.Conv2d(6, 6, 1), norm(6))
        heads = dict(
            bbox_head=nn.ModuleDict(dict(bn=norm(6))), mask_head=nn.ModuleList([nn.ModuleDict(dict(bn=norm(6)))])
        )
        self.roi_head = nn.ModuleDict(heads)
        if norm is SwitchNorm:
            self.neck[1] = norm(6, normalizers=('in', 'ln'))
            self.roi_head['bbox_head']['bn'] = norm(6, normalizers=('in', 'bn'))
        self.logits = [p for name, p in self.named_parameters() if name.endswith(('mean_weight', 'var_weight'))]
        for p in self.logits:
            p.data.normal_()

    def forward(self, inputs, mode='tensor'):
        x = self.neck(self.backbone(inputs))
        for head in self.roi_head['bbox_head'], self.roi_head['mask_head'][0]:
            x = head['bn'](x.relu() + inputs.mean())
        return dict(loss=(x - torch.arange(6).view(-1, 1, 1) * inputs[:, :1, 4:, 4:]).square().mean())


def train(work_dir, hook, iterations=5, epochs=None, model=None, launcher='none', **config):
    """Train on 4 batches an epoch, by iterations, or by epochs where these are given; returns the model."""
    torch.manual_seed(1)
    model = model or Net()
    images = [dict(inputs=torch.randn(3, 12, 12) * (i + 1)) for i in range(8)]
    runner = Runner(
        model,
        str(work_dir),
        train_dataloader=DataLoader(images, batch_size=2),
        train_cfg=dict(by_epoch=True, max_epochs=epochs) if epochs else dict(by_epoch=False, max_iters=iterations),
        optim_wrapper=OptimWrapper(torch.optim.SGD(model.logits or model.parameters(), lr=10)),
        default_hooks=dict(checkpoint=CheckpointHook(interval=2, by_epoch=bool(epochs))),
        custom_hooks=[hook],
        launcher=launcher,
        # mmengine keeps visualizers by this name and the second of their start
        experiment_name=f'{Path(work_dir).name}{" resumed" * config.get("resume", False)}',
        log_level='ERROR',
        **config,
    )
    runner.train()
    return model


def records(work_dir, name='importance_ratios.json'):
    [path] = Path(work_dir).glob(f'*/vis_data/{name}')
    return [json.loads(line) for line in path.read_text().splitlines()]


def learned(model):
    """Ratios by layer as two dicts by normalizer, from the logits by hand."""
    ratios = {}
    for name in NAMES:
        layer = model.get_submodule(name)
        logits = layer.mean_weight.tolist(), layer.var_weight.tolist()
        powers = [np.exp(values) / np.exp(values).sum() for values in logits]
        ratios[name] = [dict(zip(layer.normalizers, values)) for values in powers]
    return ratios


def array(pair):
    return np.array([[ratios.get(normalizer, np.nan) for normalizer in ('in', 'ln', 'bn')] for ratios in pair])
