"""The child that holds batch statistics: whose it is, and what may stand in its place; also test_third_parties.py."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from mmengine.model import revert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sn_openmmlab import SwitchNorm

COPIES = [
    pytest.param(copy.deepcopy, id='deepcopy'),
    pytest.param(lambda value: pickle.loads(pickle.dumps(value)), id='pickle'),
]


def test_the_childs_weight_is_no_parameter():
    """Optimizers and checkpoints that collect those of all modules get the layer's once."""
    layer = SwitchNorm(4)
    assert [*layer.bn.parameters()] == [] and not isinstance(layer.bn.weight, nn.Parameter)
    assert not [key for key in layer.state_dict() if key.startswith('bn.') and key.endswith(('weight', 'bias'))]
    assert SwitchNorm(4, affine=False).bn.weight is None


@pytest.mark.parametrize('make', COPIES)
def test_a_copy_of_the_childs_weight_is_a_parameter(make):
    layer = SwitchNorm(4)
    other = make(layer.bn.weight)
    assert type(other) is nn.Parameter and torch.equal(other, layer.weight) and other is not layer.weight


def test_taking_weight_and_bias_away():
    layer, plain = SwitchNorm(4, init_ratios=(0, 0, 1)), nn.BatchNorm2d(4)
    for m in layer.bn, plain:
        m.weight, m.bias = None, None
    assert layer.weight is None and [name for name, _ in layer.named_parameters()] == ['mean_weight', 'var_weight']
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize('make', COPIES)
def test_the_child_of_a_copy_is_the_copys(make):
    layer = SwitchNorm(4)
    other = make(layer)
    nn.init.constant_(other.bn.weight, 3)
    other.bn.bias.requires_grad = False
    assert other.weight.eq(3).all() and layer.weight.eq(1).all()
    assert layer.bias.requires_grad and not other.bias.requires_grad


def test_a_layer_is_freed_at_once():
    layer = SwitchNorm(4)
    layer(torch.randn(2, 4, 5, 5))
    gone = weakref.ref(layer)
    gc.disable()
    try:
        del layer
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize('set_child', [setattr, nn.Module.add_module], ids=['setattr', 'add_module'])
@pytest.mark.parametrize(
    'other',
    [
        nn.GroupNorm(1, 4),
        nn.Identity(),
        nn.InstanceNorm2d(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_child_that_is_no_batch_norm_is_refused(other, set_child):
    """By who puts it there; and the layer runs on as it was."""
    layer = SwitchNorm(4)
    set_child = type(layer).add_module if set_child is not setattr else setattr
    with pytest.raises(
        RuntimeError, match=f'{type(other).__name__} takes the place of .* replace the SwitchNorm as a whole'
    ):
        set_child(layer, 'bn', other)
    assert layer(torch.randn(2, 4, 5, 5)).isfinite().all()
    layer._modules['bn'] = nn.Identity()
    with pytest.raises(RuntimeError, match='Identity takes the place of .* replace the SwitchNorm as a whole'):
        layer(torch.randn(2, 4, 5, 5))


def reverted(layer):
    """As sync_bn makes one, and mmengine or mmcv take it back in a single process."""
    return revert_sync_batchnorm(nn.SyncBatchNorm.convert_sync_batchnorm(layer)).bn


@pytest.mark.parametrize(
    'make',
    [
        lambda layer: nn.BatchNorm2d(4, eps=0.1, momentum=0.3),
        lambda layer: nn.BatchNorm3d(4),
        lambda layer: copy.deepcopy(layer.bn),
        lambda layer: SwitchNorm(4).bn,
        reverted,
    ],
    ids=['BatchNorm2d', 'BatchNorm3d', 'deepcopy', "another layer's", 'reverted SyncBatchNorm'],
)
def test_a_new_child_belongs_to_the_layer(make):
    """It has no parameters that learn nothing, and stands for the layer's."""
    layer = SwitchNorm(4)
    layer(torch.randn(2, 4, 5, 5))
    before, new = copy.deepcopy(layer), make(layer)
    expected = copy.deepcopy(new).eval()
    layer.bn = new.eval()
    assert layer.state_dict().keys() == before.state_dict().keys() and not layer.bn.training
    assert torch.equal(layer.bn.running_mean, expected.running_mean)
    assert (layer.eps, layer.momentum) == (expected.eps, expected.momentum)
    nn.init.constant_(layer.bn.weight, 3)
    layer.bn.bias.requires_grad = False
    assert layer.weight.eq(3).all() and not layer.bias.requires_grad


def test_what_a_frozen_child_had_besides_is_no_obstacle():
    """torchvision's FrozenBatchNorm2d has weight and bias as buffers, which a checkpoint then holds."""
    layer, frozen = SwitchNorm(4), nn.Module()
    for name in 'weight', 'bias', 'running_mean', 'running_var':
        frozen.register_buffer(name, torch.full((4,), 2.0))
    layer.bn = frozen
    state = layer.state_dict()
    assert 'bn.weight' in state
    other = SwitchNorm(4)
    other.load_state_dict({**state, 'bn.num_batches_tracked': torch.tensor(0)})
    assert other.bn.running_mean.eq(2).all() and other.weight.eq(1).all()


@pytest.mark.parametrize(
    'wrap', [nn.Sequential, lambda m: nn.ModuleDict(dict(module=m)), getattr(torch, 'compile', nn.Sequential)]
)
def test_wrappers_are_looked_through(wrap):
    """As FSDP puts them around each BatchNorm: with real processes in tests/test_engines.py."""
    layer, plain, x = SwitchNorm(4), SwitchNorm(4), torch.randn(2, 4, 5, 5)
    layer.bn = wrap(layer.bn)
    assert torch.equal(layer(x), plain(x))
    for module in layer.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    plain.bn.eval()
    before = [b.clone() for b in plain.buffers()]
    assert torch.equal(layer(x), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), before))


def test_a_failing_hook_leaves_the_child_as_it_was():
    layer = SwitchNorm(4)

    def fail(*_):
        raise ValueError('a hook')

    hook = layer.bn.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match='a hook'):
        layer(torch.randn(2, 4, 5, 5))
    hook.remove()
    assert 'forward' not in vars(layer.bn) and layer(torch.randn(2, 4, 5, 5)).isfinite().all()
