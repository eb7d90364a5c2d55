"""What third parties do to each BatchNorm2d of a model does to SN what it does to BatchNorm.

Each action is done to a network with BatchNorm and to the same one with SN whose importance is all on BN; then both
have to compute the same, in training and in evaluation, with the same running statistics and the same gradients.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from sn_openmmlab import SparseSwitchNorm, SwitchNorm, SyncSN
from sn_openmmlab.ops.torch_versions import VERSION

DOCS = Path(__file__).parents[2] / 'docs/third_parties.md'
CLOSE = dict(rtol=1e-9, atol=1e-9)


def network(norm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 5, 3), norm(5)).double()
    for p in net.parameters():
        if p.requires_grad and p.shape != (3,):
            p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    for m in batch_norms(net):
        m.running_mean.copy_(torch.linspace(-1, 1, m.num_features))
        m.running_var.copy_(torch.linspace(0.5, 2, m.num_features))
    return net


def batch_norms(net):
    return [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]


def norms(net):
    return [net[1], net[4]]


def batches(n=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64) * (i + 1) + i for i in range(n)]


def statistics(net):
    """Of the children, if there are any, whatever their class."""
    layers = [m for m in net.modules() if 'running_mean' in m._buffers and not isinstance(m, SwitchNorm)]
    return [b.clone() for m in layers for b in (m.running_mean, m.running_var) if b is not None]


def outcome(net, modes=(True, False)):
    """Outputs, running statistics and gradients of the norms' weights and biases, in both modes and without setting."""
    seen = []
    for mode in (None, *modes):
        if mode is not None:
            net.train(mode)
        net.zero_grad()
        y = net(batches()[0])
        if y.requires_grad:
            y.pow(3).sum().backward()
        seen += [y.detach(), *statistics(net)]
        for m in norms(net):
            seen += [getattr(getattr(m, name, None), 'grad', None) for name in ('weight', 'bias')]
    return seen


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's and detectron2's; torchvision has no build for the CPU beside every torch, as timm wants it."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name, value in dict(weight=1, bias=0, running_mean=0, running_var=1).items():
            self.register_buffer(name, torch.full((num_features,), float(value)))

    def forward(self, x):
        scale = (self.weight * (self.running_var + self.eps).rsqrt())[:, None, None]
        return x * scale + (self.bias[:, None, None] - self.running_mean[:, None, None] * scale)


def freeze_by_replacement(module):
    """As timm's ``freeze_batch_norm_2d`` and detectron2's ``convert_frozen_batchnorm``."""
    if not isinstance(module, nn.BatchNorm2d):
        for name, child in module.named_children():
            module.add_module(name, freeze_by_replacement(child))
        return module
    frozen = FrozenBatchNorm2d(module.num_features, module.eps)
    if module.affine:
        frozen.weight.data, frozen.bias.data = module.weight.data.clone(), module.bias.data.clone()
    frozen.running_mean.data, frozen.running_var.data = module.running_mean.data, module.running_var.data
    return frozen


def timm_freeze(net):
    """As ``timm.utils.freeze``: parameters, then the replacement."""
    for p in net.parameters():
        p.requires_grad = False
    freeze_by_replacement(net)


def timm_unfreeze(net):
    """As ``timm.utils.freeze`` and then ``unfreeze``: a new BatchNorm in the place of each frozen one."""
    timm_freeze(net)
    net.requires_grad_(True)
    for parent in [*net.modules()]:
        for name, frozen in parent.named_children():
            if isinstance(frozen, FrozenBatchNorm2d):
                norm = nn.BatchNorm2d(frozen.num_features, frozen.eps).to(frozen.running_mean.dtype)
                norm.load_state_dict(frozen.state_dict(), strict=False)
                parent.add_module(name, norm)


def to_each(action):
    def act(net):
        for m in batch_norms(net):
            action(m)

    return act


def set_each(**values):
    return to_each(lambda m: [setattr(m, name, value) for name, value in values.items()])


def freeze(m):
    m.eval()
    m.weight.requires_grad = False
    m.bias.requires_grad = False


def freeze_in_place(m):
    m.weight.requires_grad_(False)
    m.bias.requires_grad_(False)


def freeze_module(m):
    m.requires_grad_(False)


def freeze_and_let_learn(m):
    freeze(m)
    m.requires_grad_(True)
    m.train()


def fill(m):
    nn.init.constant_(m.weight, 0.5)
    nn.init.constant_(m.bias, 2)


def set_data(m):
    m.weight.data, m.bias.data = torch.full_like(m.weight, 0.5), torch.full_like(m.bias, 2)


def from_vector(m):
    nn.utils.vector_to_parameters(torch.full((2 * m.num_features,), 0.5, dtype=torch.float64), [m.weight, m.bias])


def prune_by_size(m):
    m.weight.data.mul_((m.weight.data.abs() > 0.5).double())


def assign(m):
    m.weight = nn.Parameter(torch.full_like(m.weight, 0.5))
    m.bias = nn.Parameter(torch.full_like(m.bias, 2))


def forget(m):
    """As TENT, which adapts at test time by each batch's own moments."""
    m.requires_grad_(True)
    m.track_running_stats, m.running_mean, m.running_var = False, None, None


def shift_the_input(m):
    m.register_forward_pre_hook(lambda m, args: (args[0] * 2 + 1,))


def scale_the_output(m):
    m.register_forward_hook(lambda m, args, y: y * 2)


def train_on(net, data):
    net.train()
    for x in data:
        net(x)


def precise(net):
    tool = pytest.importorskip('fvcore.nn.precise_bn', reason='fvcore is in requirements/dev.txt')
    tool.update_bn_stats(net.train(), batches(), 3)


ACTIONS = dict(
    nothing=lambda net: None,
    eval=to_each(lambda m: m.eval()),
    freeze=to_each(freeze),
    freeze_in_place=to_each(freeze_in_place),
    freeze_module=to_each(freeze_module),
    freeze_and_let_learn=to_each(freeze_and_let_learn),
    frozen_batch_norm=freeze_by_replacement,
    timm_freeze=timm_freeze,
    stop_tracking=set_each(track_running_stats=False),
    eps=set_each(eps=1.0),
    momentum=set_each(momentum=0.7),
    momentum_none=set_each(momentum=None),
    running_mean=to_each(lambda m: setattr(m, 'running_mean', m.running_mean + 1)),
    reset_running_stats=to_each(lambda m: m.reset_running_stats()),
    timm_unfreeze=timm_unfreeze,
    reset_parameters=to_each(lambda m: m.reset_parameters()),
    fill=to_each(fill),
    set_data=to_each(set_data),
    from_vector=to_each(from_vector),
    prune_by_size=to_each(prune_by_size),
    assign=to_each(assign),
    tent=to_each(forget),
    **(dict(functorch=torch.func.replace_all_batch_norm_modules_) if VERSION >= (2, 0) else {}),
    pre_hook=to_each(shift_the_input),
    hook=to_each(scale_the_output),
    update_bn=lambda net: update_bn(batches(), net),
    precise_bn=precise,
)


@pytest.mark.parametrize('kind', [SwitchNorm, SyncSN, SparseSwitchNorm], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize('action', ACTIONS)
def test_what_is_done_to_each_batch_norm(action, kind):
    expected, got = network(nn.BatchNorm2d), network(lambda c: kind(c, init_ratios=(0, 0, 1)))
    if kind is SparseSwitchNorm:
        for m in norms(got):
            m.radius.fill_(1)
    untouched = outcome(copy.deepcopy(expected))
    for net in expected, got:
        ACTIONS[action](net)
    if action == 'frozen_batch_norm':  # has BN's weight and bias as buffers; SN's are its own and learn on
        expected.requires_grad_(False), got.requires_grad_(False)
    results = outcome(expected), outcome(got)
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, **CLOSE)
    if action not in ('nothing', 'freeze_and_let_learn', 'timm_unfreeze'):  # the comparison sees it
        differ = [a is None or b is None or not torch.equal(a, b) for a, b in zip(results[0], untouched)]
        assert len(results[0]) != len(untouched) or any(differ)


@pytest.mark.parametrize('way', ['loss', 'gradient'])
def test_penalties_of_each_batch_norms_weight(way):
    """As network slimming has them: in the loss, or added to the gradient."""
    grads = []
    for kind in nn.BatchNorm2d, lambda c: SwitchNorm(c, init_ratios=(0, 0, 1)):
        net = network(kind)
        loss = net(batches()[0]).pow(2).sum()
        if way == 'loss':
            loss = loss + sum(m.weight.abs().sum() + m.bias.pow(2).sum() for m in batch_norms(net))
        loss.backward()
        if way == 'gradient':
            for m in batch_norms(net):
                m.weight.grad.add_(m.weight.data.sign())
                m.bias.grad = m.bias.grad + 2 * m.bias.data
        grads.append([p.grad for m in norms(net) for p in (m.weight, m.bias)])
    for a, b in zip(*grads):
        torch.testing.assert_close(b, a, **CLOSE)


@pytest.mark.parametrize('action', ['freeze', 'freeze_in_place', 'freeze_module'])
def test_importance_ratios_freeze_with_the_weight(action):
    """As in convert_switch_norm: nothing of a norm that somebody has frozen learns."""
    net = network(SwitchNorm)
    ACTIONS[action](net)
    assert not any(p.requires_grad for m in norms(net) for p in m.parameters())
    assert all(p.requires_grad for p in net[0].parameters())


def test_hooks_see_what_they_see_of_a_batch_norm():
    """Input, output, gradients, each once a call; as losses on statistics (DeepInversion) and recorders want them."""
    seen = {}
    for name, norm in dict(bn=nn.BatchNorm2d, sn=lambda c: SwitchNorm(c, init_ratios=(0, 0, 1))).items():
        net, shapes = network(norm), []
        for m in batch_norms(net):
            m.register_forward_pre_hook(lambda m, args, s=shapes: s.append(('pre', args[0].shape)))
            m.register_forward_hook(lambda m, args, y, s=shapes: s.append(('after', args[0].shape, y.sum().item())))
            m.register_full_backward_hook(lambda m, dx, dy, s=shapes: s.append(('backward', dx[0].shape)))
        net(batches()[0].requires_grad_()).pow(2).sum().backward()
        seen[name] = shapes
    assert len(seen['bn']) == len(seen['sn']) == 6
    for a, b in zip(seen['bn'], seen['sn']):
        assert a[:2] == b[:2] and a[2:] == pytest.approx(b[2:], abs=1e-9)


# -- symbolic traces --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', [nn.BatchNorm2d, SwitchNorm, SparseSwitchNorm], ids=lambda kind: kind.__name__)
def test_cleaning_a_symbolic_trace_takes_nothing_away(kind, tmp_path):
    """Nor of the model that it was taken of; and the trace follows train() and eval()."""
    net = network(kind)
    names, plain = net.state_dict().keys(), copy.deepcopy(net)
    traced = torch.fx.symbolic_trace(net)
    traced.delete_all_unused_submodules()
    assert traced.state_dict().keys() == net.state_dict().keys() == names
    for mode in True, False:
        traced.train(mode), plain.train(mode)
        assert torch.equal(traced(batches()[0]), plain(batches()[0]))
    assert all(torch.equal(a, b) for a, b in zip(traced.buffers(), plain.buffers()))
    traced.to_folder(tmp_path, 'Traced')


@pytest.mark.filterwarnings('ignore')  # torch.ao says that it moves to torchao
@pytest.mark.parametrize('norm', [lambda c: nn.GroupNorm(1, c), SwitchNorm, SparseSwitchNorm], ids=['GN', 'SN', 'SSN'])
@pytest.mark.parametrize('training', [False, True], ids=['after training', 'aware training'])
def test_quantization(norm, training):
    """The layers around SN are quantized, SN stays as it is."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

    net = network(norm).float().train(training)
    x = batches()[0].float()
    prepare, mapping = prepare_fx, get_default_qconfig_mapping('x86')
    if training:
        prepare, mapping = prepare_qat_fx, get_default_qat_qconfig_mapping('x86')
    prepared = prepare(copy.deepcopy(net), mapping, (x,))
    for batch in batches():
        prepared(batch.float())
        net(batch.float())
    y = convert_fx(prepared.eval())(x)
    exact = net.eval()(x)
    assert (y - exact).norm() / exact.norm() < 0.05


# -- optimizer rules --------------------------------------------------------------------------------------------------


def detectron2_rule(net):
    """As ``get_default_optimizer_params``: the classes that it lists."""
    types = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.InstanceNorm1d,
             nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm, nn.LocalResponseNorm)  # fmt: skip
    return {id(p) for m in net.modules() if isinstance(m, types) for p in m.parameters(recurse=False)}


def ultralytics_rule(net):
    """As ``build_optimizer``: whatever is in what torch.nn calls a Norm."""
    types = tuple(v for k, v in vars(nn).items() if 'Norm' in k)
    return {id(p) for m in net.modules() if isinstance(m, types) for p in m.parameters(recurse=False)}


def torchvision_rule(net):
    """As ``set_weight_decay`` of torchvision's references."""
    types = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.LocalResponseNorm)
    return {id(p) for m in net.modules() if isinstance(m, types) for p in m.parameters(recurse=False)}


def timm_rule(net):
    """As ``param_groups_weight_decay``: whatever has one dimension."""
    return {id(p) for p in net.parameters() if p.ndim <= 1}


@pytest.mark.parametrize('kind', [nn.BatchNorm2d, SwitchNorm, SyncSN, SparseSwitchNorm], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize('rule', [detectron2_rule, ultralytics_rule, torchvision_rule, timm_rule])
def test_rules_that_spare_norms_weight_decay_spare_all_of_sn(rule, kind):
    net = network(kind)
    assert {id(p) for m in norms(net) for p in m.parameters()} <= rule(net)
    assert id(net[0].weight) not in rule(net)


def split_normalization_params(net):
    """As torchvision's: whatever has children is no norm."""
    norm_params, other_params = [], []
    types = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.LocalResponseNorm)
    for m in net.modules():
        leaf = next(m.children(), None) is None
        (norm_params if leaf and isinstance(m, types) else other_params).extend(m.parameters(recurse=False))
    return norm_params, other_params


def yolov5_rule(net):
    """As ``smart_optimizer`` of YOLOv5 and v7: of a norm what is called weight, and every bias."""
    spared, others = [], []
    types = tuple(v for k, v in vars(nn).items() if 'Norm' in k)
    for m in net.modules():
        for name, p in m.named_parameters(recurse=False):
            (spared if name == 'bias' or (name == 'weight' and isinstance(m, types)) else others).append(p)
    return spared, others


def yolox_rule(net):
    """As ``get_optimizer`` of YOLOX: the weight of BatchNorms and of what is called bn, other weights, and biases."""
    spared, others = [], []
    for name, m in net.named_modules():
        if isinstance(getattr(m, 'bias', None), nn.Parameter):
            spared.append(m.bias)
        if isinstance(m, nn.BatchNorm2d) or 'bn' in name:
            spared.append(m.weight)
        elif isinstance(getattr(m, 'weight', None), nn.Parameter):
            others.append(m.weight)
    return spared, others


@pytest.mark.parametrize('rule', [split_normalization_params, yolov5_rule, yolox_rule])
def test_rules_that_miss_some_of_sn(rule):
    """And the remedy of docs/third_parties.md: all of SN goes into the group without decay."""
    net = network(nn.BatchNorm2d)
    spared, others = rule(net)
    assert {id(p) for m in norms(net) for p in m.parameters()} <= {*map(id, spared)}
    assert {*map(id, spared + others)} == {*map(id, net.parameters())}
    net = network(SwitchNorm)
    spared, others = rule(net)
    of_sn = [p for m in norms(net) for p in m.parameters()]
    assert not {*map(id, of_sn)} <= {*map(id, spared)}
    code = re.search(
        r'norm_params, other_params = .*?\n(norm_params = .*?\n)optimizer = ', DOCS.read_text(), re.S
    ).group(1)
    scope = dict(model=net, norm_params=spared, other_params=others, SwitchNorm=SwitchNorm)
    exec(code, scope)
    spared, others = scope['norm_params'], scope['other_params']
    assert {*map(id, of_sn)} <= {*map(id, spared)}
    assert sorted(map(id, spared + others)) == sorted(map(id, net.parameters()))
    torch.optim.SGD([dict(params=spared), dict(params=others)], lr=1.0)


def test_an_optimizer_refuses_what_only_stands_for_a_parameter():
    """As YOLOX's rule gives it the weights of all BatchNorms: it would move nothing."""
    net = network(SwitchNorm)
    with pytest.raises(ValueError, match='non-leaf'):
        torch.optim.SGD([m.weight for m in batch_norms(net)], lr=1.0)
