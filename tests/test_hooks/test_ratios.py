"""Importance ratios in the logs of real trainings."""

import os

import pytest
import torch
from ratio_trainings import NAMES, PARTS, Net, learned, records, train
from torch import nn

from sn_openmmlab import SNRatioHook


def test_what_is_logged(trained):
    """Every layer's ratios, and the means of the parts, at the start, every 2 iterations, and at the end."""
    model, work_dir = trained
    log = records(work_dir)
    assert [record['step'] for record in log] == [0, 2, 4, 5]
    expected = {}
    for (name, pair), part in zip(learned(model).items(), PARTS):
        for kind, ratios in zip(('mean', 'var'), pair):
            for normalizer, ratio in ratios.items():
                expected[f'sn_{part.replace(" ", "_")}/{name}/{kind}_{normalizer}'] = ratio
    for kind in 'mean', 'var':
        for normalizer in 'in', 'ln', 'bn':
            of = '/{}/' + f'{kind}_{normalizer}'
            both = [expected['sn_backbone' + of.format(name)] for name in NAMES[:2]]
            expected[f'sn_parts/backbone/{kind}_{normalizer}'] = sum(both) / 2
            for part, name in zip(('neck', 'box_head', 'mask_head'), NAMES[2:]):
                if f'sn_{part}' + of.format(name) in expected:
                    expected[f'sn_parts/{part}/{kind}_{normalizer}'] = expected[f'sn_{part}' + of.format(name)]
    start, last = log[0], log[-1]
    assert all(abs(start[name] - last[name]) > 1e-4 for name in start if name != 'step')  # they do learn
    assert last.pop('step') == 5
    assert last == pytest.approx(expected, abs=1e-6) and len(last) == 2 * (13 + 10)
    # all that goes to the visualizer's scalars, beside the losses
    assert [r for r in records(work_dir, 'scalars.json') if 'sn_neck/neck.1/mean_in' in r][-1] == {
        **last,
        'step': 5,
    }


def test_the_log_agrees_with_the_checkpoint(trained):
    model, work_dir = trained
    then = Net()
    then.load_state_dict(torch.load(work_dir / 'iter_2.pth', weights_only=False)['state_dict'])
    _, record, *_ = records(work_dir)
    for name, part in zip(NAMES, PARTS):
        for kind, ratios in zip(('mean', 'var'), learned(then)[name]):
            for normalizer, ratio in ratios.items():
                assert record[f'sn_{part.replace(" ", "_")}/{name}/{kind}_{normalizer}'] == pytest.approx(
                    ratio, abs=1e-6
                )


@pytest.mark.parametrize('interval, steps', [(1, [0, 4, 8, 12]), (2, [0, 8, 12])])
def test_by_epoch(tmp_path, interval, steps):
    train(tmp_path, SNRatioHook(interval), epochs=3)
    assert [record['step'] for record in records(tmp_path)] == steps


def test_two_processes(two, tmp_path):
    """One of them writes, and wrapped models have the same names."""
    results = two(train_wrapped, str(tmp_path))
    assert results[0] == results[1]
    log = records(tmp_path)
    assert [record['step'] for record in log] == [0, 2, 3]
    last = {name: log[-1][f'sn_mask_head/{NAMES[4]}/{name}'] for name in ('mean_in', 'mean_ln', 'mean_bn')}
    assert list(last.values()) == pytest.approx(results[0], abs=1e-6)


def test_a_model_without_sn_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"Net has no SN layer.*norm_cfg=dict\(type='SN'\).*swap_norm.*custom_hooks"):
        train(tmp_path, SNRatioHook(), epochs=1, model=Net(nn.BatchNorm2d))


def test_epochs_in_a_loop_by_iterations_are_an_error(tmp_path):
    with pytest.raises(ValueError, match='by_epoch=False and interval'):
        train(tmp_path, SNRatioHook())


def test_interval():
    with pytest.raises(ValueError, match='interval must be a whole number of at least 1, got 0'):
        SNRatioHook(interval=0)


def train_wrapped(work_dir):
    os.environ['LOCAL_RANK'] = '0'
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None)
    hook = SNRatioHook(interval=2, by_epoch=False)
    model = train(work_dir, hook, 3, launcher='pytorch', cfg=dict(model_wrapper_cfg=wrapper))
    return [*learned(model)[NAMES[4]][0].values()]
