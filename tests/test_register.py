"""What importing the package changes in mmengine."""

from mmengine.analysis import get_model_complexity_info
from torch import nn

from sn_openmmlab import SwitchNorm


def flops(norm, training=True):
    net = nn.Sequential(nn.Conv2d(3, 16, 3), norm).train(training)
    return get_model_complexity_info(net, (3, 34, 34), show_table=False, show_arch=False)['flops']


def test_mmengines_flops_count_sn_as_the_other_norms():
    """5 an element, plus 5 for each map mean that LN, and in training BN, take their moments from."""
    conv = 16 * 27 * 32 * 32
    assert flops(nn.Identity()) == conv
    assert flops(nn.InstanceNorm2d(16, affine=True)) == conv + 5 * 16 * 32 * 32
    assert flops(SwitchNorm(16)) == conv + 5 * 16 * 32 * 32 + 2 * 5 * 16
    assert flops(SwitchNorm(16), training=False) == conv + 5 * 16 * 32 * 32 + 5 * 16
    assert flops(SwitchNorm(16, normalizers=('in', 'ln'))) == conv + 5 * 16 * 32 * 32 + 5 * 16
