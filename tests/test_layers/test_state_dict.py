"""Loading checkpoints: what is said, and values that are not what they should be."""

import functools
import logging

import pytest
import torch
from mmengine.logging import MMLogger
from torch import nn

from sn_openmmlab import SparseSwitchNorm, SwitchNorm, convert_switch_norm
from sn_openmmlab.layers.state_dict import log_starts

EQUAL = (1 / 3, 1 / 3, 1 / 3)


# -- what is said ---------------------------------------------------------------------------------------------------


class Lines(logging.Handler):
    """What this package says in mmengine's log."""

    def __init__(self):
        super().__init__()
        log_starts()  # of what other tests loaded
        self.lines = []
        MMLogger.get_current_instance().addHandler(self)

    def emit(self, record):
        if 'SwitchNorm' in record.getMessage():
            self.lines.append(record.getMessage())

    def __enter__(self):
        return self.lines

    def __exit__(self, *_):
        MMLogger.get_current_instance().removeHandler(self)


def test_one_line_says_how_many_layers_start_how():
    net = nn.Sequential(SwitchNorm(4), SwitchNorm(4), SwitchNorm(4, init_ratios=EQUAL, correction=False), SwitchNorm(4))
    state = nn.Sequential(*[nn.BatchNorm2d(4) for _ in range(4)]).state_dict()
    with Lines() as lines:
        net.load_state_dict(state)
        net.eval().train()
        net.load_state_dict(net.state_dict())
        net.eval()
        assert len(lines) == 1
        assert '3 layers near it (IN 0.001, LN 0.001, BN 0.998), weight and bias corrected' in lines[0]
        assert '1 layer at the importance ratios that init_ratios names (IN 0.333, LN 0.333, BN 0.333).' in lines[0]
        assert 'init_ratios=' in lines[0]
    with Lines() as lines:
        convert_switch_norm(nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(1, 4), nn.BatchNorm2d(4)))
        assert len(lines) == 1 and '2 layers near it' in lines[0]
    with Lines() as lines:
        convert_switch_norm(nn.GroupNorm(1, 4))
        assert not lines


def test_a_batch_norm_without_statistics_is_said():
    net = nn.Sequential(SwitchNorm(4), SwitchNorm(4))
    state = nn.Sequential(*[nn.BatchNorm2d(4, track_running_stats=False) for _ in range(2)]).state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key.*0\.mean_weight'), Lines() as lines:
        net.load_state_dict(state)
    assert len(lines) == 1 and lines[0].startswith('0: the checkpoint has weight and bias but no running statistics')
    with pytest.raises(ValueError, match='keep no running statistics.*0'):
        convert_switch_norm(nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)))


# -- values that are not what they should be --------------------------------------------------------------------------


def torch_refuses_empty():
    """Older torch ends in an IndexError where an empty tensor is in the place of BatchNorm's num_batches_tracked."""
    with pytest.raises((IndexError, RuntimeError)) as error:
        nn.BatchNorm2d(4).load_state_dict(dict(num_batches_tracked=torch.ones(0)))
    return error.type is RuntimeError


WRONG = dict(
    text='x',
    nothing=None,
    number=3,
    list=[1.0],
    scalar=torch.tensor(1.0),
    long=torch.ones(7),
    **(dict(empty=torch.ones(0)) if torch_refuses_empty() else {}),
    complex=torch.ones(4, dtype=torch.complex64),
    integers=torch.ones(3, dtype=torch.long),
    sparse=torch.ones(4).to_sparse(),
    meta=torch.ones(4, device='meta'),
    quantized=torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
)
KEYS = [f'{prefix}{name}' for prefix in ('', 'bn.') for name in ('running_mean', 'running_var', 'num_batches_tracked')]
KINDS = dict(
    BN=nn.BatchNorm2d,
    SN=SwitchNorm,
    SSN=SparseSwitchNorm,
    without_bn=functools.partial(SwitchNorm, normalizers=('in', 'ln')),
)


@pytest.mark.parametrize('key', ['weight', 'bias', 'mean_weight', 'var_weight', 'radius', *KEYS])
@pytest.mark.parametrize('kind', KINDS)
def test_of_wrong_values_torch_says_what_is_wrong(kind, key):
    """By its own error, as of BatchNorm's: each in the place of one value of each kind of checkpoint, and alone."""
    refused = 0
    for whole in [{}, *(make(4).state_dict() for make in KINDS.values())]:
        for value in WRONG.values():
            for strict in True, False:
                try:
                    KINDS[kind](4).load_state_dict({**whole, key: value}, strict=strict)
                except RuntimeError as error:
                    assert 'Error(s) in loading state_dict' in str(error)
                    refused += 1
    assert refused >= 5 * len(WRONG)  # one alone is not enough to be strict


def test_a_radius_that_belongs_to_no_logits_is_named():
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "radius"'):
        SwitchNorm(4).load_state_dict({**nn.BatchNorm2d(4).state_dict(), 'radius': torch.tensor(0.5)})
    keys = SwitchNorm(4).load_state_dict({'radius': torch.tensor(0.5)}, strict=False)
    assert keys.unexpected_keys == ['radius'] and 'mean_weight' in keys.missing_keys
