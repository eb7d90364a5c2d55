"""Which modules are norms, and which part of a model they are in."""

import pytest
from torch import nn

from sn_openmmlab import SparseSwitchNorm, SwitchNorm, SwitchNorm1d, SyncSN
from sn_openmmlab.norms import is_batch_norm, is_norm, is_switchable, own_modules, part_name, part_of, unwrap

BATCH_NORMS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]
OTHER_NORMS = [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, lambda c: nn.GroupNorm(1, c)]
SWITCH_NORMS = [SwitchNorm, SwitchNorm1d, SyncSN, SparseSwitchNorm]


class FrozenBatchNorm2d(nn.Module):
    """Derives from none of torch's, as in torchvision and detectron2."""


class NormedHead(nn.Module):
    """Called as a norm is, and holds one."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)


def kinds(makes):
    """The layer and its answers to: is it a norm, can SN replace it, is it a BatchNorm?"""
    layers = [make(4) for make in makes]
    return {(is_norm(layer), is_switchable(type(layer)), is_batch_norm(type(layer))) for layer in layers}


def test_what_counts_as_which_norm():
    assert kinds(BATCH_NORMS) == {(True, True, True)}
    assert kinds(OTHER_NORMS) == {(True, True, False)}
    assert kinds(SWITCH_NORMS) == {(True, False, False)}
    # of sequences, and a frozen BatchNorm without the class: norms that SN does not replace
    assert kinds([nn.LayerNorm, lambda c: nn.LocalResponseNorm(c), lambda c: FrozenBatchNorm2d()]) == {
        (True, False, False)
    }
    assert kinds([nn.Identity, lambda c: nn.Conv2d(c, c, 1), lambda c: NormedHead()]) == {(False, False, False)}


def test_mmcvs_sync_bn_is_a_batch_norm():
    """And a class of its own that derives from it, but none of that name elsewhere."""
    sync_bn = pytest.importorskip('mmcv.ops.sync_bn', reason='mmcv is not installed').SyncBatchNorm
    assert is_batch_norm(sync_bn) and is_switchable(sync_bn)
    assert is_batch_norm(type('Own', (sync_bn,), {}))
    assert not is_batch_norm(type('SyncBatchNorm', (nn.Module,), {}))


@pytest.mark.parametrize('kind', [SwitchNorm, SyncSN, SparseSwitchNorm], ids=lambda kind: kind.__name__)
def test_the_child_of_a_layer_is_no_module_of_the_model(kind):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ModuleDict(dict(norm=kind(4))), nn.BatchNorm2d(4))
    assert [name for name, _ in own_modules(net)] == ['', '0', '1', '1.norm', '2']
    assert '1.norm.bn' in dict(net.named_modules())
    assert [name for name, _ in own_modules(net[1]['norm'])] == ['']


def test_a_wrapped_model_is_looked_through():
    """DistributedDataParallel, which wants several processes: test_hooks/test_ratios.py."""
    model = nn.Sequential(nn.BatchNorm2d(4))
    assert unwrap(nn.DataParallel(model)) is unwrap(model) is model


@pytest.mark.parametrize(
    'place, part, name',
    [
        ('backbone.layer1.0.bn1', 'backbone', 'backbone'),
        ('detector.backbone.bn1', 'backbone', 'backbone'),
        ('image_encoder.norm', 'backbone', 'backbone'),
        ('img_backbone.bn1', 'backbone', 'backbone'),
        ('neck.lateral_convs.0.bn', 'neck', 'neck'),
        ('pts_neck.bn', 'neck', 'neck'),
        ('backbone.neck.bn', 'backbone', 'backbone'),  # the first says it
        ('roi_head.bbox_head.shared_convs.0.bn', 'head', 'box head'),
        ('roi_head.mask_head.convs.0.bn', 'head', 'mask head'),
        ('decode_head.bottleneck.bn', 'head', 'decode head'),  # no neck
        ('auxiliary_head.0.convs.0.bn', 'head', 'auxiliary head'),
        ('layer1.0.bn1', 'head', 'layer1'),  # of a backbone alone
        ('bn', 'head', 'bn'),
    ],
)
def test_parts_by_name(place, part, name):
    assert (part_of(place), part_name(place)) == (part, name)
