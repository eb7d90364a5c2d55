"""Synchronised SN in whole networks over real processes: DistributedDataParallel, Runner, RTMDet, RoI heads."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.model import BaseModel, MMDistributedDataParallel, convert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import DATASETS, MODEL_WRAPPERS, MODELS, init_default_scope
from mmengine.runner import Runner
from processes import counting
from torch import nn

from sn_openmmlab import SwitchNorm

# after several steps of momentum, through 20 layers
TOLERANCE = dict(rtol=1e-10, atol=1e-10)
EVEN, UNEVEN, EMPTY_RANK = [(2, 2)] * 4, [(1, 3), (2, 1), (3, 1), (1, 1)], [(2, 0), (0, 1), (1, 2), (2, 0)]


@MODELS.register_module()
class Net(BaseModel):
    """A slim ResNet-18 of mmdet with a loss that is a sum over images."""

    def __init__(self, norm='SN', with_cp=False, norm_eval=False):
        super().__init__()
        init_default_scope('mmdet')
        import mmdet.models  # noqa: F401

        torch.manual_seed(0)
        self.backbone = MODELS.build(
            dict(
                type='mmdet.ResNet', depth=18, base_channels=4, stem_channels=4, norm_cfg=dict(type=norm),
                with_cp=with_cp, norm_eval=norm_eval, zero_init_residual=False,
            )
        ).double()  # fmt: skip
        for p in self.backbone.parameters():
            p.data.add_(torch.randn_like(p) * 0.05)

    def init_weights(self):
        """Stays as it was built, in all processes."""

    def forward(self, inputs, share=None, mode='tensor'):
        y = self.backbone(inputs)[-1]
        weights = torch.linspace(-1, 2, y[0].numel() if len(y) else 1, dtype=y.dtype)
        losses = (y.flatten(1) * weights).sum(1) + y.pow(2).flatten(1).sum(1)
        return dict(loss=losses.sum() * (1 / len(inputs) if share is None else share))


@MODEL_WRAPPERS.register_module()
class CpuDistributedDataParallel(MMDistributedDataParallel):
    """Takes torch's SyncBatchNorm, which it refuses on the CPU since that runs on GPUs only, in place of a GPU."""

    def _passing_sync_batchnorm_handle(self, module):
        pass


def images(sizes):
    """One tensor for each iteration and rank."""
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(n, 3, 32, 32, generator=generator, dtype=torch.float64) * (i + 1) for i, n in enumerate(ns)]
        for ns in sizes
    ]


def steps(model, data, accumulate, rank=None):
    """Train on each rank's images, or in one process on all of them."""
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), accumulative_counts=accumulate)
    optimizer.initialize_count_status(model, 0, len(data))
    model.train()
    for ranks in data:
        total = sum(map(len, ranks))
        # DistributedDataParallel averages the ranks' gradients
        inputs, share = (torch.cat(ranks), 1 / total) if rank is None else (ranks[rank], len(ranks) / total)
        model.train_step(dict(inputs=inputs, share=share), optimizer)


def train(norm, sizes, accumulate=1, with_cp=False, norm_eval=False, broadcast_buffers=False, convert=None):
    net = Net(norm, with_cp, norm_eval)
    if convert:
        net = convert_sync_batchnorm(net, convert)
    wrapper = CpuDistributedDataParallel if convert == 'torch' else MMDistributedDataParallel
    model = wrapper(net, broadcast_buffers=broadcast_buffers)
    with counting() as sent:
        steps(model, images(sizes), accumulate, dist.get_rank())
    assert len({type(m.bn) for m in net.modules() if isinstance(m, SwitchNorm)}) == 1
    return net.state_dict(), len(sent)


def assert_equals_one_process(results, sizes, accumulate=1, **kwargs):
    net = Net('SN', **kwargs)
    start = copy.deepcopy(net.state_dict())
    steps(net, images(sizes), accumulate)
    expected = net.state_dict()
    assert any(not torch.equal(start[k], expected[k]) for k in expected if 'mean_weight' in k)
    for state, _ in results:
        assert len(state) == len(expected)
        for name, value in expected.items():
            torch.testing.assert_close(state[name.replace('module.', '')], value, **TOLERANCE, msg=name)


@pytest.mark.parametrize('broadcast_buffers', [False, True])
@pytest.mark.parametrize('sizes', [EVEN, UNEVEN, EMPTY_RANK], ids=['even', 'uneven', 'empty rank'])
@pytest.mark.parametrize('how', [('SyncSN',), ('SN', 'torch'), ('SN', 'mmcv')], ids=lambda how: ' '.join(how))
def test_training_equals_one_process_on_the_joined_batch(two, how, sizes, broadcast_buffers):
    norm, convert = (*how, None)[:2]
    results = two(train, norm, sizes, 1, False, False, broadcast_buffers, convert)
    assert_equals_one_process(results, sizes)
    assert {count for _, count in results} == {len(sizes) * 20 * 2}  # 20 layers, one forward, one backward


def test_gradient_accumulation(two):
    """Two iterations a step; the first of each does not average gradients (no_sync), but synchronises statistics."""
    results = two(train, 'SyncSN', UNEVEN, 2)
    assert_equals_one_process(results, UNEVEN, accumulate=2)
    assert {count for _, count in results} == {len(UNEVEN) * 20 * 2}


def test_activation_checkpointing(two):
    """The blocks run forward twice, and so do their 19 layers' all-reduces and updates, as BatchNorm's do."""
    results = two(train, 'SyncSN', UNEVEN, 1, True)
    assert_equals_one_process(results, UNEVEN, with_cp=True)
    assert {count for _, count in results} == {len(UNEVEN) * (20 + 19 + 20)}
    state, tracked = results[0][0], 'bn.num_batches_tracked'
    assert state[f'backbone.bn1.{tracked}'] == 4 and state[f'backbone.layer1.0.bn1.{tracked}'] == 8


def test_frozen_statistics(two):
    results = two(train, 'SyncSN', UNEVEN, 1, False, True)
    assert_equals_one_process(results, UNEVEN, norm_eval=True)
    assert {count for _, count in results} == {0}


# -- mmengine's Runner ------------------------------------------------------------------------------------------------


@DATASETS.register_module()
class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(inputs=images(EVEN)[index // 2 % 4][index % 2][0])


def run(norm, work_dir, config):
    os.environ['LOCAL_RANK'] = '0'
    runner = Runner.from_cfg(
        Config(
            dict(
                model=dict(type='Net', norm=norm), work_dir=work_dir, launcher='pytorch', **config,
                train_dataloader=dict(
                    dataset=dict(type='Images'), batch_size=1, num_workers=0,
                    sampler=dict(type='DefaultSampler', shuffle=False), collate_fn=dict(type='default_collate'),
                ),
                train_cfg=dict(by_epoch=False, max_iters=4),
                optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3, momentum=0.9)),
                default_hooks=dict(checkpoint=None, logger=None, runtime_info=None), log_level='ERROR',
            )
        )
    )  # fmt: skip
    runner.train()
    return runner.model.module.state_dict(), [type(m.bn).__name__ for m in runner.model.modules() if hasattr(m, 'bn')]


@pytest.mark.parametrize('norm, sync_bn, child', [
    ('SyncSN', None, 'BatchNorm2d'), ('SN', 'torch', 'SyncBatchNorm'), ('SN', 'mmcv', 'SyncBatchNorm'),
])  # fmt: skip
def test_runner(two, tmp_path, norm, sync_bn, child):
    wrapper = 'CpuDistributedDataParallel' if sync_bn == 'torch' else 'MMDistributedDataParallel'
    config = dict(sync_bn=sync_bn, model_wrapper_cfg=dict(type=wrapper, device_ids=None, broadcast_buffers=False))
    results = two(run, norm, str(tmp_path), config)
    assert {name for _, children in results for name in children} == {child}
    data = [Images()[i]['inputs'][None] for i in range(8)]
    net = Net('SN')
    steps(net, [data[i : i + 2] for i in (0, 2, 4, 6)], 1)
    for state, _ in results:
        for name, value in net.state_dict().items():
            torch.testing.assert_close(state[name], value, **TOLERANCE, msg=name)


def refused(work_dir):
    config = dict(sync_bn='torch', model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None))
    with pytest.raises(ValueError, match='SyncBatchNorm layers only work with GPU modules'):
        run('SN', work_dir, config)


def test_torchs_sync_batch_norm_needs_gpus(two, tmp_path):
    """Of BatchNorm as of SN: the error is torch's own."""
    two(refused, str(tmp_path))


# -- mmdet ------------------------------------------------------------------------------------------------------------


def rtmdet():
    config = get_config('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py')
    init_default_scope('mmdet')
    model = config.model
    model.backbone.update(widen_factor=0.125, init_cfg=None)
    model.neck.update(in_channels=[32, 64, 128], out_channels=16)
    model.bbox_head.update(in_channels=16, feat_channels=16)
    for part in model.backbone, model.neck, model.bbox_head:
        part.norm_cfg = dict(type='SN')
    torch.manual_seed(0)
    return MODELS.build(model).double().train()


def rtmdet_forward(sizes):
    model = rtmdet()
    layers = [m for m in model.modules() if isinstance(m, SwitchNorm)]
    assert layers and all(type(m.bn) is nn.SyncBatchNorm for m in layers)
    with counting() as sent:
        outputs = model(images(sizes)[0][dist.get_rank()], mode='tensor')
    sum(y.sum() for scale in outputs for y in scale).backward()
    assert len(sent) > 50
    return [y.detach() for scale in outputs for y in scale], dict(model.named_buffers())


@pytest.mark.parametrize('sizes', [[(1, 3)], [(2, 0)]], ids=['uneven', 'empty rank'])
def test_rtmdet_converts_itself(two, sizes):
    results = two(rtmdet_forward, sizes)
    model = rtmdet()
    assert not any(isinstance(m.bn, nn.SyncBatchNorm) for m in model.modules() if isinstance(m, SwitchNorm))
    outputs = model(torch.cat(images(sizes)[0]), mode='tensor')
    for i, y in enumerate(y for scale in outputs for y in scale):
        torch.testing.assert_close(torch.cat([ys[i] for ys, _ in results]), y, **TOLERANCE)
    for _, buffers in results:
        for name, value in model.named_buffers():
            torch.testing.assert_close(buffers[name], value, **TOLERANCE, msg=name)


def roi_losses(proposals):
    """Rank 1 has no objects, so that no RoI of its is positive; nor, without proposals, any RoI at all."""
    from mmdet.testing import demo_mm_inputs
    from mmengine.structures import InstanceData

    rank = dist.get_rank()
    config = get_config('mmdet::_base_/models/mask-rcnn_r50_fpn.py')
    init_default_scope('mmdet')
    head = config.model.roi_head
    norm_cfg = dict(type='SyncSN')
    head.bbox_roi_extractor.out_channels = head.mask_roi_extractor.out_channels = 8
    head.bbox_head.update(
        type='Shared4Conv1FCBBoxHead', in_channels=8, conv_out_channels=8, fc_out_channels=8, norm_cfg=norm_cfg
    )
    head.mask_head.update(in_channels=8, conv_out_channels=8, norm_cfg=norm_cfg)
    torch.manual_seed(0)
    head = MODELS.build(
        {**head, **{f'{stage}_cfg': config.model[f'{stage}_cfg'].rcnn for stage in ('train', 'test')}}
    ).train()

    data = demo_mm_inputs(1, [[3, 64, 64]], num_items=[2 * (1 - rank)], num_classes=80, with_mask=True)
    boxes = torch.rand(20 if rank == 0 or proposals else 0, 4) * 32
    boxes[:, 2:] += boxes[:, :2]
    maps = [torch.randn(1, 8, 64 // s, 64 // s, requires_grad=True) for s in (4, 8, 16, 32)]
    proposals = InstanceData(bboxes=boxes, scores=torch.rand(len(boxes)), labels=torch.zeros(len(boxes)).long())
    with counting() as sent:
        losses = head.loss(maps, [proposals], data['data_samples'])
        sum(v for k, v in losses.items() if 'loss' in k).backward()
    mask = head.mask_head
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mask.convs.parameters())
    return len(sent), {k: v for k, v in head.named_buffers()}


@pytest.mark.parametrize('proposals', [True, False])
def test_a_rank_without_rois_takes_part(two, proposals):
    (count, buffers), (other_count, others) = two(roi_losses, proposals, timeout=60)
    assert count == other_count == (4 + 4) * 2
    assert len(buffers) == (4 + 4) * 3
    for name, value in buffers.items():
        assert torch.equal(value, others[name]) and value.isfinite().all(), name
        assert value == 1 if name.endswith('tracked') else value.unique().numel() > 1
