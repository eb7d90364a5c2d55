"""One training step of whole networks whose norm layers are BN, GN(32), SN, and SN by its textbook formula.

    python -m benchmarks.bench_models [--device cpu] [--seconds 60] [--models resnet50 fcn faster-rcnn]

writes ``benchmarks/results/models_DEVICE.json``. Needs mmdet and mmsegmentation.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import mmdet
import mmseg
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import nn

import sn_openmmlab  # noqa: F401  (registers SN)
from benchmarks.harness import RESULTS, Stopwatch, compare, environment, keep_freed_memory, peak_bytes, write

NORMS = {
    'BN': dict(type='BN'),
    'GN': dict(type='GN', num_groups=32),
    'SN': dict(type='SN'),
    'SN textbook': dict(type='SN'),
}
SIZES = {  # (images, height, width), on the CPU and on a GPU
    'resnet50': dict(cpu=(2, 192, 192), cuda=(32, 224, 224)),
    'fcn': dict(cpu=(2, 128, 128), cuda=(4, 512, 512)),
    'faster-rcnn': dict(cpu=(2, 192, 256), cuda=(2, 800, 1344)),
}


def steps(model: str, norm: str, size: tuple[int, int, int], device: torch.device) -> Callable[[], object]:
    """A function that makes one training step: forward, loss, backward, SGD."""
    torch.manual_seed(0)
    images, height, width = size
    if model == 'resnet50':
        return _resnet50_step(NORMS[norm], size, device)
    name = (
        'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
        if model == 'faster-rcnn'
        else ('fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py')
    )
    package = mmdet if model == 'faster-rcnn' else mmseg
    config = Config.fromfile(Path(package.__file__).parent / '.mim/configs' / name)
    cfg = config.model
    cfg.backbone.norm_cfg = NORMS[norm]
    cfg.backbone.norm_eval = False
    if model == 'faster-rcnn':
        cfg.backbone.update(init_cfg=None, frozen_stages=-1)
        cfg.neck.norm_cfg = NORMS[norm]
        cfg.roi_head.bbox_head.update(type='Shared4Conv1FCBBoxHead', conv_out_channels=256, norm_cfg=NORMS[norm])
        data = demo_mm_inputs(images, [[3, height, width]] * images, num_items=[5] * images, num_classes=80)
    else:
        cfg.pretrained = None
        cfg.data_preprocessor.size = (height, width)
        cfg.decode_head.norm_cfg = cfg.auxiliary_head.norm_cfg = NORMS[norm]
        data = dict(inputs=[], data_samples=[])
        for _ in range(images):
            sample = SegDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)))
            sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, height, width)))
            data['inputs'].append(torch.randint(0, 256, (3, height, width), dtype=torch.uint8))
            data['data_samples'].append(sample)
    init_default_scope(config.default_scope)
    net = MODELS.build(cfg).to(device)
    net.train()
    wrapper = build_optim_wrapper(net, config.optim_wrapper)
    return lambda: net.train_step(data, wrapper)


def _resnet50_step(norm_cfg, size, device):
    init_default_scope('mmdet')
    net = MODELS.build(dict(type='mmdet.ResNet', depth=50, norm_cfg=norm_cfg, norm_eval=False, out_indices=(3,)))
    net.train()
    net = nn.Sequential(net, _Classifier()).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    x = torch.randn(size[0], 3, *size[1:], device=device)
    target = torch.randint(0, 1000, (size[0],), device=device)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), target).backward()
        optimizer.step()

    return step


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2048, 1000)

    def forward(self, features):
        return self.fc(features[-1].mean((2, 3)))


@contextlib.contextmanager
def formula(norm: str):
    """Have SN take its textbook formula, if that is what is measured."""
    if norm == 'SN textbook':
        os.environ['SN_BACKEND'] = 'reference'
    try:
        yield
    finally:
        os.environ.pop('SN_BACKEND', None)


def timed(norm: str, step: Callable[[], object], device: torch.device) -> Callable[[], dict[str, float]]:
    """The step as a candidate of :func:`benchmarks.harness.compare`."""

    def run() -> dict[str, float]:
        with formula(norm):
            watch, cpu = Stopwatch(device), time.process_time()
            step()
            watch.lap()
        # of all threads and of the system, which maps memory: on a busy machine the better measure
        return dict(step=watch.seconds()[0], cpu=time.process_time() - cpu)

    return run


def main(argv: list[str] | None = None) -> None:
    """Read the command line, measure, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--seconds', type=float, default=60, help='about this long for each model')
    parser.add_argument('--default-allocator', action='store_true', help='leave freed memory to glibc, as users do')
    parser.add_argument('--models', nargs='+', default=list(SIZES), choices=list(SIZES))
    parser.add_argument('--norms', nargs='+', default=list(NORMS), choices=list(NORMS), help='BN first')
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder of the result file')
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    result = dict(environment(device), keeps_freed_memory=not args.default_allocator and keep_freed_memory(), rows=[])
    for model in args.models:
        size = SIZES[model][device.type]
        candidates = {norm: timed(norm, steps(model, norm, size, device), device) for norm in args.norms}
        times = compare(candidates, args.seconds, rounds=5)
        for norm, phases in times.items():
            summary = phases['step']
            ratio = summary['median'] / times[args.norms[0]]['step']['median']
            peak, cpu = peak_bytes(candidates[norm], device), phases['cpu']['median']
            row = dict(model=model, size=size, norm=norm, ratio=ratio, peak_bytes=peak, cpu=cpu, **summary)
            result['rows'].append(row)
            print(
                f'{model} {size} {norm}: {summary["median"]:.3f} s, {ratio:.2f} of {args.norms[0]}, '
                f'{cpu:.3f} s of CPUs, {peak / 2**20:.0f} MiB',
                flush=True,
            )
    print('wrote', write(f'models_{device.type}' + '_default_allocator' * args.default_allocator, result, args.out))


if __name__ == '__main__':
    main()
