"""The layer: arguments, modes and state dicts."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sn_openmmlab import SparseSwitchNorm, SwitchNorm, SwitchNorm1d, SwitchNorm2d, SwitchNorm3d, SyncSN, switch_norm

THIRD = [1 / 3] * 3


@pytest.mark.parametrize(
    'name, cls', [('SN', SwitchNorm), ('SN1d', SwitchNorm1d), ('SN2d', SwitchNorm2d), ('SN3d', SwitchNorm3d)]
)
def test_registered_in_the_root_registry(name, cls):
    assert MODELS.get(name) is cls and type(MODELS.build(dict(type=name, num_features=4))) is cls


def test_sync_sn_is_registered_and_holds_a_plain_batch_norm():
    """DistributedDataParallel refuses torch's SyncBatchNorm on the CPU, and some backbones freeze BatchNorm2d only."""
    layer = MODELS.build(dict(type='SyncSN', num_features=4, group_size=2))
    assert isinstance(layer, SyncSN) and isinstance(layer.bn, nn.BatchNorm2d)


@pytest.mark.parametrize(
    'cls, ranks', [(SwitchNorm, {2, 3, 4, 5}), (SwitchNorm1d, {2, 3}), (SwitchNorm2d, {4}), (SwitchNorm3d, {5})]
)
def test_ranks(cls, ranks):
    layer = cls(3)
    for rank in range(1, 7):
        x = torch.randn(2, 3, 4, 4, 4, 4)[(..., *[0] * (6 - rank))]
        if rank in ranks:
            assert layer(x).shape == x.shape
        else:
            with pytest.raises(ValueError, match=rf'{cls.__name__} expects .*-D input, got shape'):
                layer(x)


def test_wrong_number_of_channels():
    with pytest.raises(ValueError, match=r'num_features=3.*\(2, 4, 5, 5\) has 4 channels'):
        SwitchNorm(3)(torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(normalizers=()), r"normalizers must be a tuple of one or more of \('in', 'ln', 'bn'\).*got \(\)"),
        (dict(normalizers=('in', 'gn')), r"normalizers must be.*'gn'"),
        (dict(normalizers=('bn', 'in')), 'in this order'),
        (dict(normalizers=('in', 'in')), 'each once'),
        (dict(init_ratios=(0.5, 0.4, 0.2)), r'3 non-negative numbers that sum to 1.*0\.4'),
        (dict(init_ratios=(0.5, 0.5)), '3 non-negative'),
        (dict(init_ratios=(1.5, -0.5, 0)), 'non-negative'),
        (dict(init_ratios=(float('nan'), 0.5, 0.5)), 'sum to 1'),
        (dict(momentum=1.5), 'momentum must be None or between 0 and 1.*got 1.5'),
        (dict(eps=-1), 'eps must be .* at least 0, got -1'),
        (dict(eps=float('nan')), 'eps must be .* got nan'),
        (dict(eps=float('inf')), 'eps must be a finite number .* got inf'),
        (dict(eps='1e-5'), "eps must be .* got '1e-5'"),
        (dict(num_features='4'), "num_features must be a whole number of at least 1, got '4'"),
        (dict(num_features=None), 'num_features must be .* got None'),
        (dict(num_features=4.0), r'num_features must be .* got 4\.0'),
        (dict(momentum='0.1'), "momentum must be None or between 0 and 1.*got '0.1'"),
        (dict(momentum=float('nan')), 'momentum must be None .*got nan'),
        (dict(affine='no'), "affine must be True or False, got 'no'"),
        (dict(correction='no'), "correction must be True or False, got 'no'"),
        (dict(normalizers=None), 'normalizers must be a tuple of one or more of .*got None'),
        (dict(normalizers={'in', 'bn'}), 'normalizers must be a tuple of one or more of .*got {'),
        (dict(init_ratios=('a', 'b', 'c')), "init_ratios must be 3 non-negative numbers.*'a'"),
        (dict(init_ratios=dict(bn=1)), "init_ratios must be 3 non-negative numbers.*{'bn': 1}"),
        (dict(init_ratios=1.0), r'init_ratios must be 3 non-negative numbers.*got 1\.0'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SwitchNorm(**{'num_features': 3, **kwargs})


def test_bad_sync_arguments():
    with pytest.raises(ValueError, match="normalizers=\\('in', 'ln'\\); use type='SN'"):
        SyncSN(3, normalizers=('in', 'ln'))
    for group_size in 0, -2, 2.5, '2', float('nan'):
        with pytest.raises(ValueError, match=f'group_size must be a whole number of at least 1.*got {group_size!r}'):
            SyncSN(3, group_size=group_size)


def test_init_ratios_are_what_was_asked_for():
    torch.testing.assert_close(SwitchNorm(3).importance_ratios, torch.tensor([THIRD, THIRD]))
    assert SwitchNorm(3).mean_weight.tolist() == SwitchNorm(3, init_ratios=THIRD).var_weight.round(decimals=5).tolist()
    layer = SwitchNorm(3, init_ratios=(0.2, 0.3, 0.5))
    torch.testing.assert_close(layer.importance_ratios, torch.tensor([[0.2, 0.3, 0.5]] * 2))
    assert SwitchNorm(3, normalizers=('in', 'ln'), init_ratios=(0.25, 0.75)).importance_ratios.shape == (2, 2)


def test_ratios_on_bn_alone_are_batch_norm():
    layer, bn, x = SwitchNorm(3, init_ratios=(0, 0, 1)), nn.BatchNorm2d(3), torch.randn(4, 3, 6, 6) * 5 + 2
    assert layer.mean_weight.isfinite().all() and layer.importance_ratios[:, 2].eq(1).all()
    torch.testing.assert_close(layer(x), bn(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.eval()(x), bn.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('ratios, is_felt', [(None, True), ((0, 0, 1), False)])
def test_padding_is_in_the_statistics_of_a_single_image(ratios, is_felt):
    layer, x = SwitchNorm(3, init_ratios=ratios).eval(), torch.randn(2, 3, 8, 8)
    padded = layer(nn.functional.pad(x, (0, 4)))[..., :8]
    assert torch.allclose(padded, layer(x), rtol=0, atol=0.01) != is_felt


def test_repr_shows_the_arguments():
    layer = SyncSN(3, eps=1e-3, momentum=0.2, init_ratios=(0, 0, 1), group_size=2)
    for text in 'eps=0.001', 'momentum=0.2', "('in', 'ln', 'bn')", 'init_ratios=(0, 0, 1)', 'group_size=2':
        assert text in repr(layer)


def test_without_bn_there_is_no_child_and_no_buffer():
    layer = SwitchNorm(3, normalizers=('in', 'ln'))
    assert layer.bn is None and layer.momentum is None and not list(layer.buffers())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(layer(x), layer.eval()(x))
    assert torch.equal(layer(x)[:1], layer(x[:1]))  # no sample sees another


def test_the_mode_of_bn_is_what_counts():
    """norm_eval and frozen_stages put the child into evaluation mode; IN and LN still come from the sample."""
    layer, x = SwitchNorm(3), torch.randn(4, 3, 6, 6) * 3 + 1
    layer(x)
    layer.bn.eval()
    before = copy.deepcopy(layer.bn.state_dict())
    y = layer(x)
    assert all(torch.equal(before[k], v) for k, v in layer.bn.state_dict().items())
    assert torch.equal(y, layer.eval()(x))
    expected = switch_norm(
        x, layer.mean_weight, layer.var_weight, layer.weight, layer.bias, layer.bn.running_mean, layer.bn.running_var
    )
    assert torch.equal(y, expected)


@pytest.mark.parametrize('name, value', [('momentum', 0.3), ('eps', 1e-2)])
def test_momentum_and_eps_are_the_childs(name, value):
    layer = SwitchNorm(3, **{name: value})
    assert getattr(layer, name) == getattr(layer.bn, name) == value
    setattr(layer, name, value / 2)
    assert getattr(layer.bn, name) == value / 2
    setattr(layer.bn, name, value / 4)
    assert getattr(layer, name) == value / 4


@pytest.mark.parametrize('kind', [SwitchNorm, SparseSwitchNorm])
def test_torch_calls_the_input_input(kind):
    layer, x = kind(3).eval(), torch.randn(2, 3, 4, 4)
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize('momentum', [0.1, None])
def test_running_statistics_equal_batch_norms(momentum):
    layer, bn = SwitchNorm(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    for i in range(10):
        x = torch.randn(2, 3, 5, 5) * (i + 1) + i
        layer(x), bn(x)
    for name, value in bn.named_buffers():
        torch.testing.assert_close(layer.bn.get_buffer(name), value, rtol=1e-6, atol=1e-6)


def test_empty_batch_leaves_the_statistics_alone():
    layer = SwitchNorm(4)
    layer(torch.randn(2, 4, 7, 7))
    before = copy.deepcopy(layer.state_dict())
    assert layer(torch.empty(0, 4, 7, 7)).shape == (0, 4, 7, 7)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_reset_parameters_restores_the_start():
    layer = SwitchNorm(3, init_ratios=(0.2, 0.3, 0.5))
    start = copy.deepcopy(layer.state_dict())
    layer(torch.randn(2, 3, 4, 4) + 5)
    for p in layer.parameters():
        nn.init.normal_(p)
    layer.reset_parameters()
    assert all(torch.equal(start[k], v) for k, v in layer.state_dict().items())


def test_device_and_dtype_arguments():
    layer = SwitchNorm(3, device='meta', dtype=torch.float64)
    assert {(t.device.type, t.dtype) for t in layer.parameters()} == {('meta', torch.float64)}
    assert layer.bn.running_mean.is_meta


def test_copies_and_pickles():
    layer, x = SwitchNorm(3), torch.randn(2, 3, 4, 4)
    assert torch.equal(copy.deepcopy(layer)(x), layer.eval()(x)) is False  # training and evaluation differ
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


# -- state dicts --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), norm(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3), norm(5)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


@pytest.fixture
def bn_net():
    net = Net(nn.BatchNorm2d)
    for _ in range(3):
        net(torch.randn(4, 3, 12, 12))
    for p in net.parameters():
        nn.init.normal_(p)
    return net.eval()


@pytest.mark.parametrize('path', ['native', 'mmengine', 'without num_batches_tracked'])
def test_batch_norm_keys_load_everywhere(bn_net, path, tmp_path):
    sn_net = Net(lambda c: SwitchNorm(c, init_ratios=(0, 0, 1)))
    logits = sn_net.bn1.mean_weight.clone()
    state = bn_net.state_dict()
    if path == 'without num_batches_tracked':  # as checkpoints from before torch 0.4.1
        state = {k: v for k, v in state.items() if 'num_batches' not in k}
    if path == 'mmengine':
        torch.save(state, tmp_path / 'bn.pth')
        load_checkpoint(sn_net, str(tmp_path / 'bn.pth'), strict=True)
    else:
        sn_net.load_state_dict(state, strict=True)
    for i, (a, b) in enumerate([(bn_net.bn1, sn_net.bn1), (bn_net.bn2, sn_net.bn2)]):
        assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias), i
        assert torch.equal(a.running_mean, b.bn.running_mean) and torch.equal(a.running_var, b.bn.running_var), i
    assert torch.equal(logits, sn_net.bn1.mean_weight)
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(sn_net.eval()(x), bn_net(x), rtol=1e-4, atol=1e-4)


def test_loading_batch_norm_keys_says_one_line():
    script = (
        f'import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); from {__name__} import *;'
        'net = Net(SwitchNorm); state = Net(nn.BatchNorm2d).state_dict();'
        'net.load_state_dict(state); net.load_state_dict(state); net.load_state_dict(net.state_dict()); net.eval()'
    )
    out = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True)
    lines = [
        line for line in (out.stdout + out.stderr).splitlines() if 'weight, bias and statistics from BatchNorm' in line
    ]
    assert len(lines) == 2  # one for each of the two loads, none for the SN state dict


def test_switch_norm_state_round_trips_strictly(tmp_path):
    net, other = Net(SwitchNorm), Net(SwitchNorm)
    net(torch.randn(2, 3, 12, 12))
    for p in net.parameters():
        nn.init.normal_(p)
    torch.save(net.state_dict(), tmp_path / 'sn.pth')
    other.load_state_dict(torch.load(tmp_path / 'sn.pth', weights_only=True), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values()))


def test_the_authors_flat_keys_and_shapes_load():
    layer, flat = SwitchNorm(4), SwitchNorm(4)
    for p in layer.parameters():
        nn.init.normal_(p)
    layer(torch.randn(2, 4, 5, 5))
    state = dict(
        weight=layer.weight.view(1, 4, 1, 1),
        bias=layer.bias.view(1, 4, 1, 1),
        mean_weight=layer.mean_weight,
        var_weight=layer.var_weight,
        running_mean=layer.bn.running_mean.view(1, 4, 1),
        running_var=layer.bn.running_var.view(1, 4, 1),
    )
    flat.load_state_dict(state, strict=True)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(flat.eval()(x), layer.eval()(x))


def test_group_norm_keys_are_not_taken_for_batch_norms():
    result = Net(SwitchNorm).load_state_dict(Net(lambda c: nn.GroupNorm(1, c)).state_dict(), strict=False)
    assert {'bn1.mean_weight', 'bn1.bn.running_mean'} <= set(result.missing_keys)


def test_wrong_shapes_are_still_errors(bn_net):
    state = bn_net.state_dict()
    state['bn1.running_mean'] = torch.zeros(7)
    with pytest.raises(RuntimeError, match=r'size mismatch for bn1\.bn\.running_mean'):
        Net(SwitchNorm).load_state_dict(state)


def test_torchs_conversion_makes_it_synchronised():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(Net(SwitchNorm))
    assert isinstance(net.bn1, SwitchNorm) and isinstance(net.bn1.bn, nn.SyncBatchNorm)
    assert [type(m) for m in net.modules() if isinstance(m, _BatchNorm)] == [nn.SyncBatchNorm] * 2
    assert net(torch.randn(2, 3, 12, 12)).isfinite().all()  # one process: nothing to synchronise


def test_without_mmengine_the_import_says_what_to_install():
    code = (
        'import importlib.util as u; real = u.find_spec;'
        'u.find_spec = lambda n, *a: None if n == "mmengine" else real(n, *a); import sn_openmmlab'
    )
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.returncode and 'pip install' in out.stderr and 'mmengine' in out.stderr
