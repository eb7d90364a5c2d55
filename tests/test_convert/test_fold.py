"""What is folded into convolutions; exported networks: test_export.py."""

import pytest
import torch
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from support import randomized, scatter
from torch import nn
from torch.nn.utils import prune

from sn_openmmlab import (
    SparseSwitchNorm,
    SwitchNorm,
    SyncSN,
    fold_batch_norm,
)

pytestmark = pytest.mark.usefixtures('seed')


def one_hot(channels=4, **kwargs):
    return SwitchNorm(channels, init_ratios=(0, 0, 1), **kwargs)


class Shared(nn.Module):
    """One convolution for two levels, each with a norm of its own, as in RTMDet's head."""

    def __init__(self):
        super().__init__()
        self.conv, self.norms = nn.Conv2d(3, 4, 3), nn.ModuleList([one_hot(), one_hot()])

    def forward(self, x):
        return tuple(norm(self.conv(x)) for norm in self.norms)


class ReLUBetween(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), one_hot(), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.norm(self.relu(self.conv(x)))


NORM_FIRST = dict(order=('norm', 'act', 'conv'), norm_cfg=dict(type='SN', init_ratios=(0, 0, 1)))


@pytest.mark.parametrize('make, folded, left', [
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), one_hot(), nn.ReLU()), 1, nn.Identity),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), one_hot(affine=False)), 1, nn.Identity),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), SwitchNorm(4, normalizers=('bn',))), 1, nn.Identity),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), SyncSN(4, init_ratios=(0, 0, 1))), 1, nn.Identity),
    (lambda: nn.Sequential(one_hot(3), nn.Conv2d(3, 4, 3)), 0, nn.BatchNorm2d),
    (lambda: nn.Sequential(ConvWS2d(3, 4, 3), one_hot()), 0, nn.BatchNorm2d),  # its weight is no weight of a sum
    (lambda: ConvModule(3, 3, 3, **NORM_FIRST), 0, nn.BatchNorm2d),
    (Shared, 0, nn.BatchNorm2d),
    (ReLUBetween, 0, nn.BatchNorm2d),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), SwitchNorm(4)), 0, SwitchNorm),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 0, nn.BatchNorm2d),
], ids=['conv', 'no-bias', 'only', 'SyncSN', 'none', 'ConvWS', 'first', 'shared', 'relu', 'SN', 'BN'])  # fmt: skip
def test_what_is_folded(make, folded, left):
    model, x = randomized(make()).eval(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert fold_batch_norm(model, x) == folded
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert left in {type(m) for m in model.modules()}
    assert not any(m.training or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


ADDITIONS = {
    'hook': lambda m: m.register_forward_hook(lambda m, a, y: y.relu()),
    'pre-hook': lambda m: m.register_forward_pre_hook(lambda m, a: (a[0] + 1,)),
    'forward': lambda m: setattr(m, 'forward', lambda x: type(m).forward(m, x).relu()),
    'prune': lambda m: prune.l1_unstructured(m, 'weight', amount=0.5),
    'weight_norm': lambda m: nn.utils.weight_norm(m, dim=None),
}


@pytest.mark.parametrize(
    'addition, place, left',
    [(name, '0', nn.BatchNorm2d) for name in ADDITIONS]
    + [(name, '1', SwitchNorm) for name in ADDITIONS]
    + [(name, '1.bn', SwitchNorm) for name in ('hook', 'pre-hook')],
)
def test_what_was_added_to_a_layer_keeps_it_from_being_folded(addition, place, left):
    """The layer stays as it is; where it hangs on the convolution, the layer becomes BatchNorm."""
    model, x = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), one_hot())).eval(), torch.randn(2, 3, 8, 8)
    ADDITIONS[addition](model.get_submodule(place))
    expected = model(x)
    assert fold_batch_norm(model, x) == 0 and type(model[1]) is left
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_without_statistics_is_no_map_of_channels():
    model, x = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), one_hot())).eval(), torch.randn(2, 3, 8, 8)
    model[1].bn.running_mean = model[1].bn.running_var = None
    expected = model(x)
    assert fold_batch_norm(model, x) == 0 and torch.equal(model(x), expected)


def test_folding_is_for_evaluation():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), one_hot()).eval()
    model[1].bn.train()
    with pytest.raises(ValueError, match=r'model.eval\(\) first \(1.bn is in training mode\)'):
        fold_batch_norm(model, torch.randn(2, 3, 8, 8))


def test_sparse_sn_that_has_chosen_bn_is_folded():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), SparseSwitchNorm(4), nn.Conv2d(4, 4, 3), SparseSwitchNorm(4))
    scatter(model)
    for layer, logits in (model[1], [0.1, 0.2, 0.7]), (model[3], [0.7, 0.2, 0.1]):
        layer.radius.fill_(1.0)
        for parameter in layer.mean_weight, layer.var_weight:
            parameter.data.copy_(torch.tensor(logits))
    model.eval()  # looks up what is chosen
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = model(x)
        assert fold_batch_norm(model, x) == 1
        assert isinstance(model[1], nn.Identity) and isinstance(model[3], SparseSwitchNorm)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
