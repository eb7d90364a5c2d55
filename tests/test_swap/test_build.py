"""Models that are built to look at them, and compared."""

import pytest
import torch
from mmengine.config import ConfigDict
from torch import nn

from sn_openmmlab.swap import plan_swap
from sn_openmmlab.swap.build import build, compare
from test_swap.cases import FCOS, config


class Downloads(nn.Module):
    """A neck that loads when it is made, as timm's backbones do."""

    def __init__(self, pretrained):
        super().__init__()
        assert pretrained is False, 'there is no network'
        self.norm = nn.BatchNorm2d(256)


def test_nothing_is_loaded_to_look_at_a_model():
    cfg = config(FCOS)
    cfg.model.neck = [cfg.model.neck, dict(type=Downloads, pretrained=True)]
    swap = plan_swap(cfg)
    assert [norm.name for norm in swap.left] == ['neck.1.norm'] and swap.config.model.neck[1].pretrained is True


@pytest.mark.parametrize(
    'other',
    [
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(9), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU()),
    ],
)
def test_models_that_differ_in_more_than_norms(other):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    assert [norm.changes for norm in compare(model, model)] == [False]
    with pytest.raises(RuntimeError, match='not only norms|another size'):
        compare(model, other)


def test_building_to_look_at_leaves_no_trace():
    cfg, state = config(FCOS), torch.get_rng_state()
    model = build(cfg)
    assert torch.equal(torch.get_rng_state(), state) and not torch.distributed.is_initialized()
    assert all(p.is_meta for m in model.modules() if isinstance(m, nn.Conv2d) for p in m.parameters())
    assert isinstance(cfg.model, ConfigDict)
