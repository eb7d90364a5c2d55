"""Fixtures of the tests of checkpoints."""

import pytest
import torch

from test_checkpoint.cases import backbone, save


@pytest.fixture
def command(import_tool):
    """The command's main function."""
    return lambda *argv: import_tool('convert_checkpoint').main([str(arg) for arg in argv])


@pytest.fixture
def resnet18(seed, tmp_path):
    """A network with BatchNorm, and the file of its checkpoint, with a classifier."""
    net = backbone(depth=18, base_channels=8, norm_cfg=dict(type='BN'))
    state = net.state_dict()
    for value in state.values():
        if value.dim() == 1:
            value.uniform_(0.5, 1.5)
    return net, save({**state, 'fc.weight': torch.rand(10, 64), 'fc.bias': torch.rand(10)}, tmp_path / 'r18.pth')
