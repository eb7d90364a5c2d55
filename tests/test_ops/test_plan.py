"""What is found out once for calls that are alike: no call may be taken for another."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from sn_openmmlab import SparseSwitchNorm, SwitchNorm
from sn_openmmlab.ops import plan, switch_norm
from sn_openmmlab.ops.torch_versions import VERSION


def made_anew(function):
    plan._plans.clear()
    return function()


def step(layer, x):
    """Output, gradients and statistics of one step, which is then undone."""
    before = [b.clone() for b in layer.buffers()]
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    results = [
        y.detach(),
        *torch.autograd.grad(y.float().square().sum(), leaves),
        *(b.clone() for b in layer.buffers()),
    ]
    for buffer, old in zip(layer.buffers(), before):
        buffer.copy_(old)
    return results


def as_views(layer):
    for p in layer.parameters():
        p.data = torch.stack([p.data, p.data], 1)[:, 0]


def as_view_of_one_number(layer):
    layer.weight.data = layer.weight.data[:1].expand(6)  # the same address, shape and dtype


def replace_child(layer):
    layer.bn = nn.BatchNorm2d(6, momentum=0.5, affine=False)


CHANGES = {
    'nothing': lambda layer: None,
    'half precision': lambda layer: layer.bfloat16(),
    'double precision': lambda layer: layer.double(),
    'views': as_views,
    'a view of one number': as_view_of_one_number,
    'another weight': lambda layer: setattr(layer, 'weight', nn.Parameter(torch.full((6,), 3.0))),
    'evaluation': lambda layer: layer.eval(),
    'norm_eval': lambda layer: layer.bn.eval(),
    'no statistics': lambda layer: setattr(layer.bn, 'track_running_stats', False),
    'frozen': lambda layer: layer.requires_grad_(False),
    'frozen logits': lambda layer: (layer.mean_weight.requires_grad_(False), layer.var_weight.requires_grad_(False)),
    'eps': lambda layer: setattr(layer, 'eps', 0.5),
    'momentum': lambda layer: setattr(layer, 'momentum', 1.0),
    'average': lambda layer: setattr(layer, 'momentum', None),
    'another child': replace_child,
    'pruned': lambda layer: prune.l1_unstructured(layer, 'weight', 2),
}


each_layout = pytest.mark.parametrize('channels_last', [False, True], ids=['contiguous', 'channels last'])
each_backend = pytest.mark.parametrize('backend', ['', 'native', 'reference'])


def used_layer(channels_last):
    """A layer away from its start, and an input that it has had, in training and without gradients."""
    torch.manual_seed(0)
    layer, x = SwitchNorm(6), torch.randn(3, 6, 5, 4)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    for p in layer.parameters():
        nn.init.normal_(p)
    step(layer, x)
    with torch.no_grad():
        layer(x)
    return layer, x


@pytest.mark.parametrize('change', CHANGES)
@each_layout
@each_backend
def test_a_layer_that_was_changed_computes_as_a_new_one(change, channels_last, backend, monkeypatch):
    monkeypatch.setenv('SN_BACKEND', backend)
    layer, x = used_layer(channels_last)
    CHANGES[change](layer)
    x = x.double() if 'double' in change else x
    x = x.bfloat16() if 'half' in change else x
    got = step(layer, x), step(layer, x), step(layer, x)
    expected = made_anew(lambda: step(layer, x))
    for each in got:
        assert len(each) == len(expected) and all(map(torch.equal, each, expected))
    monkeypatch.setenv('SN_BACKEND', 'reference')
    tolerance = dict(rtol=0.1, atol=0.1) if x.dtype == torch.bfloat16 else dict(rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got[0], step(layer, x), **tolerance)


@each_layout
@each_backend
def test_statistics_in_another_precision_are_refused_each_time(channels_last, backend, monkeypatch):
    monkeypatch.setenv('SN_BACKEND', backend)
    layer, x = used_layer(channels_last)
    layer.bn.double()
    for _ in range(2):
        with pytest.raises(TypeError, match=r'running_mean is torch\.float64'):
            layer(x)


@pytest.mark.parametrize('make', [SwitchNorm, SparseSwitchNorm])
def test_parameters_may_be_computed(make):
    """They are then no parameters of the layer, which looks for these first."""
    layer, x = make(6), torch.randn(3, 6, 5, 4)
    expected = layer(x)
    parametrizations.weight_norm(layer, 'weight') if VERSION >= (2, 1) else nn.utils.weight_norm(layer, 'weight')
    torch.testing.assert_close(layer(x), expected)


WRONG = {
    'a shorter weight': dict(weight=torch.ones(5)),
    'a longer weight': dict(weight=torch.ones(7)),
    'a weight of whole numbers': dict(weight=torch.ones(6, dtype=torch.int64)),
    'a weight in double precision': dict(weight=torch.ones(6).double()),
    'a weight without values': dict(weight=torch.ones(6, device='meta')),
    'a weight with one axis more': dict(weight=torch.ones(6, 1)),
    'no weight': dict(weight=None),
    'fewer logits': dict(mean_weight=torch.ones(2)),
    'fewer running means': dict(running_mean=torch.ones(5)),
    'no running mean': dict(running_mean=None),
    'no count to average by': dict(num_batches_tracked=None, momentum=None),
    'whole numbers': dict(x=torch.ones(2, 6, 5, 4, dtype=torch.int64)),
    'more channels': dict(x=torch.ones(2, 7, 5, 4)),
    'fewer channels': dict(x=torch.ones(2, 5, 5, 4)),
    'other normalizers': dict(normalizers=('in', 'ln')),
}


@pytest.mark.parametrize('change', WRONG)
@pytest.mark.parametrize('in_place', [False, True], ids=['another tensor', 'the same tensor'])
def test_wrong_input_is_refused_after_right_input(change, in_place):
    right = dict(
        x=torch.ones(2, 6, 5, 4), mean_weight=torch.ones(3), var_weight=torch.ones(3), weight=torch.ones(6),
        bias=torch.ones(6), running_mean=torch.ones(6), running_var=torch.ones(6),
        num_batches_tracked=torch.tensor(0), normalizers=('in', 'ln', 'bn'), momentum=0.1,
    )  # fmt: skip
    for training in True, False:
        switch_norm(**right, training=training)
    for name, value in WRONG[change].items():
        if in_place and isinstance(value, torch.Tensor):
            if value.is_meta:
                pytest.skip('torch does not let a tensor become another kind of tensor')
            right[name].data = value
        else:
            right[name] = value
    for training in True, False:
        if change == 'no count to average by' or training:
            with pytest.raises((TypeError, ValueError)):
                switch_norm(**right, training=training)


def test_plans_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(plan, '_MOST', 8)
    logits = torch.ones(3)
    for size in range(1, 30):
        switch_norm(torch.randn(1, 2, size), logits, logits)
        assert len(plan._plans) <= 8
