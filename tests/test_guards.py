"""What OpenMMLab does to foreign norm layers, by its own functions: SN comes out right."""

import copy

import pytest
import torch
from mmcv.cnn import ConvModule, build_norm_layer, is_norm
from mmcv.cnn import get_model_complexity_info as mmcv_complexity
from mmcv.cnn.utils import fuse_conv_bn
from mmdet.engine.hooks import MeanTeacherHook, SyncNormHook
from mmengine.hooks import EMAHook, SyncBuffersHook
from mmengine.model import BaseModel, ExponentialMovingAverage, convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmseg.engine.optimizers import ForceDefaultOptimWrapperConstructor
from test_distributed_models import Images, Net
from torch import nn
from torch.optim.swa_utils import update_bn

from sn_openmmlab import SwitchNorm

OWN = {'weight', 'bias', 'mean_weight', 'var_weight'}


@pytest.fixture(autouse=True)
def scope():
    torch.manual_seed(0)
    init_default_scope('mmdet')


@pytest.fixture
def net():
    """A ResNet-18 whose parameters and statistics are away from their start."""
    net = Net()
    for m in layers(net):
        m.bn.running_mean.normal_()
        m.bn.running_var.uniform_(0.5, 2)
    return net


def layers(net):
    return [m for m in net.modules() if isinstance(m, SwitchNorm)]


def assert_same_state(net, other):
    state, expected = net.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []


def outputs(net):
    generator = torch.Generator().manual_seed(5)
    return net.backbone(torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64))[-1]


def run(net, tmp_path, hook, by_epoch=False, iters=2):
    """Train for some iterations of two images with a hook."""
    train_cfg = dict(by_epoch=True, max_epochs=1) if by_epoch else dict(by_epoch=False, max_iters=iters)
    data = dict(dataset=Images(), batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False))
    runner = Runner(
        net, str(tmp_path), {**data, 'collate_fn': dict(type='default_collate')}, train_cfg=train_cfg,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3, momentum=0.9)), custom_hooks=[hook],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=iters)),
        experiment_name=tmp_path.name, log_level='ERROR', default_scope='mmdet',
    )  # fmt: skip
    runner.train()
    return runner


# -- folding a norm into the convolution before it: never, since SN is no affine map ----------------------------------


def test_fuse_conv_bn_leaves_sn_alone(net):
    net.eval()
    expected = outputs(net)
    fused = fuse_conv_bn(copy.deepcopy(net))
    assert len(layers(fused)) == 20 and torch.equal(outputs(fused), expected)


def test_fuse_conv_bn_still_folds_batch_norm():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), SwitchNorm(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = net(x)
    assert [type(m) for m in fuse_conv_bn(net)] == [nn.Conv2d, SwitchNorm, nn.Conv2d, nn.Identity]
    torch.testing.assert_close(net(x), expected)


def test_build_norm_layer():
    name, layer = build_norm_layer(dict(type='SN', requires_grad=False), 64, postfix=1)
    assert name == 'bn1' and isinstance(layer, SwitchNorm)
    assert not any(p.requires_grad for p in layer.parameters())
    assert {n for n, _ in layer.named_parameters()} == {'weight', 'bias', 'mean_weight', 'var_weight'}


def test_conv_module_takes_it_and_drops_the_bias():
    module = ConvModule(3, 8, 3, norm_cfg=dict(type='SN'))
    assert isinstance(module.bn, SwitchNorm) and module.conv.bias is None


@pytest.mark.parametrize('name', ['SN', 'SN1d', 'SN2d', 'SN3d', 'SyncSN', 'SSN'])
def test_mmcvs_is_norm(name):
    assert is_norm(MODELS.build(dict(type=name, num_features=4)))


def test_efficient_conv_bn_eval_of_mmcv():
    modules = [ConvModule(3, 4, 3, norm_cfg=dict(type='SN'), efficient_conv_bn_eval=e).eval() for e in (False, True)]
    modules[1].load_state_dict(modules[0].state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(modules[1](x), modules[0](x))


def test_efficient_conv_bn_eval_of_mmengine(net):
    """It traces the backbone; SN is a leaf of the trace, so that it follows train() and eval() afterwards."""
    traced = copy.deepcopy(net)
    turn_on_efficient_conv_bn_eval(traced, 'backbone')
    for training in True, False, True:
        net.train(training), traced.train(training)
        assert torch.equal(outputs(traced), outputs(net))
    assert_same_state(net, traced)


# -- conversion to synchronised norms and back, in one process; with several: test_layers/test_sync.py ----------------


@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
def test_conversion_keeps_the_layer_and_its_statistics(net, convert):
    plain = copy.deepcopy(net)
    for training in False, True:
        converted = convert(copy.deepcopy(net).train(training))
        assert [type(m.bn) for m in layers(converted)] == [nn.SyncBatchNorm] * 20
        assert converted.state_dict().keys() == net.state_dict().keys()
        reverted = revert_sync_batchnorm(copy.deepcopy(converted))
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in reverted.modules()) and len(layers(reverted)) == 20
        expected = outputs(plain.train(training))
        for other in converted, reverted:
            assert torch.equal(outputs(other.train(training)), expected)
            assert_same_state(other, plain)


# -- averages of weights and statistics -------------------------------------------------------------------------------


@pytest.mark.parametrize('update_buffers', [False, True])
def test_ema_averages_parameters_and_takes_or_averages_statistics(net, update_buffers):
    ema = ExponentialMovingAverage(net, momentum=0.1, update_buffers=update_buffers)
    ema.update_parameters(net)
    start = copy.deepcopy(net.state_dict())
    for m in layers(net):
        for t in (*m.parameters(), m.bn.running_mean, m.bn.running_var):
            t.data.add_(1)
        m.bn.num_batches_tracked += 1
    ema.update_parameters(net)
    names = {n for n, _ in net.named_parameters()}
    for name, value in ema.module.state_dict().items():
        averaged = name in names or (update_buffers and value.is_floating_point())
        tracked = start[name] if update_buffers else net.state_dict()[name]
        expected = 0.9 * start[name] + 0.1 * net.state_dict()[name] if averaged else tracked
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize('update_buffers', [False, True])
def test_ema_hook(net, tmp_path, update_buffers):
    """EMAHook saves the average as the model's weights; it loads strictly and computes what the average does."""
    hook = EMAHook(momentum=0.1, update_buffers=update_buffers)
    runner = run(net, tmp_path, hook)
    saved = torch.load(tmp_path / 'iter_2.pth', weights_only=False)  # written above
    fresh = Net()
    fresh.load_state_dict(saved['state_dict'])
    assert torch.equal(outputs(fresh.eval()), outputs(hook.ema_model.module.eval()))
    assert not torch.equal(outputs(fresh), outputs(runner.model.eval()))
    assert all('module.backbone.bn1.' + key in saved['ema_state_dict'] for key in (*OWN, 'bn.running_mean'))


class Pair(BaseModel):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = Net(), Net(norm_eval=True)
        self.teacher.requires_grad_(False)

    def forward(self, inputs, mode):
        with torch.no_grad():
            self.teacher(inputs)
        return self.student(inputs, mode=mode)


@pytest.mark.parametrize('skip_buffer', [True, False])
def test_mean_teacher(tmp_path, skip_buffer):
    """The hook averages the logits too; the teacher's statistics, skipped by default, stay what they were."""
    pair = Pair()
    before = copy.deepcopy(pair.teacher.state_dict())
    run(pair, tmp_path, MeanTeacherHook(momentum=0.1, skip_buffer=skip_buffer))
    after, student = pair.teacher.state_dict(), pair.student.state_dict()
    for name in OWN:
        assert not torch.equal(after[f'backbone.bn1.{name}'], before[f'backbone.bn1.{name}']), name
        assert not torch.equal(after[f'backbone.bn1.{name}'], student[f'backbone.bn1.{name}']), name
    for name in 'running_mean', 'running_var':
        key = f'backbone.bn1.bn.{name}'
        assert torch.equal(after[key], before[key]) == skip_buffer
    assert pair.teacher.backbone.bn1.bn.num_batches_tracked == 0  # nor did the teacher's own forward move them


# -- statistics computed or exchanged outside of training steps -------------------------------------------------------


def moments(net, batches):
    """What the stem's BN statistics are if all batches weigh the same; unbiased variances, as BatchNorm stores them."""
    maps = [net.backbone.conv1(x).movedim(1, 0).flatten(1) for x in batches]
    return torch.stack([m.mean(1) for m in maps]).mean(0), torch.stack([m.var(1) for m in maps]).mean(0)


def test_torchs_update_bn(net):
    batches = list(torch.randn(3, 2, 3, 32, 32, dtype=torch.float64))
    update_bn(batches, net)
    bn = net.backbone.bn1.bn
    for actual, expected in zip((bn.running_mean, bn.running_var), moments(net, batches)):
        torch.testing.assert_close(actual, expected)
    assert {m.momentum for m in layers(net)} == {0.1}


def test_precise_bn_hook(net, tmp_path):
    hooks = pytest.importorskip('mmpretrain.engine.hooks', reason='PreciseBNHook is part of mmpretrain')
    run(net, tmp_path, hooks.PreciseBNHook(num_samples=8), by_epoch=True)
    data = [torch.stack([Images()[i + j]['inputs'] for j in (0, 1)]) for i in (0, 2, 4, 6)]
    bn = net.backbone.bn1.bn
    for actual, expected in zip((bn.running_mean, bn.running_var), moments(net, data)):
        torch.testing.assert_close(actual, expected)
    assert {m.momentum for m in layers(net)} == {0.1}


def exchange(hook):
    rank = torch.distributed.get_rank()
    net = Net()
    for p in layers(net)[0].bn.buffers():
        p.fill_(2 * rank + 1)
    runner = type('Runner', (), dict(model=net))
    (SyncNormHook if hook == 'SyncNormHook' else SyncBuffersHook)().before_val_epoch(runner)
    bn = layers(net)[0].bn
    return bn.running_mean.tolist(), bn.running_var.tolist(), bn.num_batches_tracked.item(), net.state_dict()


@pytest.mark.parametrize('hook', ['SyncNormHook', 'SyncBuffersHook'])
def test_hooks_that_average_statistics_over_processes(two, hook):
    results = two(exchange, hook)
    assert [r[:3] for r in results] == [([2.0] * 4, [2.0] * 4, 2)] * 2  # of 1 and 3
    untouched = Net().state_dict()
    for *_, state in results:
        for name in OWN:
            torch.testing.assert_close(state[f'backbone.bn1.{name}'], untouched[f'backbone.bn1.{name}'])


# -- optimizer rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('constructor', [DefaultOptimWrapperConstructor, ForceDefaultOptimWrapperConstructor])
def test_optimizer_rules_treat_sn_as_a_norm(constructor):
    """No decay of weight, bias and logits by norm_decay_mult; bias_lr_mult is for convolutions, not for norms."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), SwitchNorm(4))
    optimizer = dict(type='SGD', lr=0.1, weight_decay=0.01)
    rules = dict(norm_decay_mult=0.0, bias_lr_mult=2.0, bias_decay_mult=0.5)
    wrapper = constructor(dict(optimizer=optimizer), rules)(net)
    by_id = {id(g['params'][0]): (g['lr'], g['weight_decay']) for g in wrapper.optimizer.param_groups}
    for name, p in net[1].named_parameters():
        assert by_id[id(p)] == (0.1, 0.0), name
    assert by_id[id(net[0].weight)] == (0.1, 0.01) and by_id[id(net[0].bias)] == (0.2, 0.005)


def test_mmcvs_flops_pass_over_sn():
    """mmcv counts modules of types that it lists, and lets nobody add to the list; the rest of the model is right."""
    counts = []
    for norm in SwitchNorm(16), nn.Identity():
        net = nn.Sequential(nn.Conv2d(3, 16, 3), norm)
        counts.append(mmcv_complexity(net, (3, 34, 34), print_per_layer_stat=False, as_strings=False)[0])
    assert counts[0] == counts[1] > 0
