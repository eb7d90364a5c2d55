"""The child that holds batch statistics: whose it is, and what may stand in its place; also test_third_parties.py."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sn_openmmlab import SwitchNorm


def test_the_childs_weight_is_no_parameter():
    """Optimizers that collect ``m.weight`` of norms and of BatchNorms get the layer's once."""
    layer = SwitchNorm(4)
    assert [*layer.bn.parameters()] == [] and not isinstance(layer.bn.weight, nn.Parameter)
    assert not [key for key in layer.state_dict() if key.startswith('bn.') and key.endswith(('weight', 'bias'))]
    optimizer = torch.optim.SGD([layer.weight, layer.bn.weight, layer.bn.bias], lr=1.0)
    layer(torch.randn(2, 4, 5, 5)).pow(3).sum().backward()
    expected = layer.weight.detach() - layer.weight.grad
    optimizer.step()
    assert torch.equal(layer.weight, expected)
    assert SwitchNorm(4, affine=False).bn.weight is None


@pytest.mark.parametrize(
    'make', [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=['deepcopy', 'pickle']
)
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


@pytest.mark.parametrize(
    'other', [lambda c: nn.GroupNorm(1, c), lambda c: nn.Identity()], ids=['GroupNorm', 'Identity']
)
def test_a_child_without_statistics_is_refused(other):
    layer = SwitchNorm(4)
    layer.bn = other(4)
    with pytest.raises(
        RuntimeError, match='(GroupNorm|Identity) has taken the place of .* replace the SwitchNorm as a whole'
    ):
        layer(torch.randn(2, 4, 5, 5))


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
