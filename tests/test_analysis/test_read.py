"""Importance ratios, read from what trainings leave behind."""

import json
import shutil

import numpy as np
import pytest
import torch
from ratio_trainings import NAMES, Net, array, learned, train
from torch import nn

from sn_openmmlab import SNRatioHook, SparseSwitchNorm, SwitchNorm, read_ratios
from sn_openmmlab.checkpoint.read import read_checkpoints_as_data


def test_a_work_directory(trained):
    model, work_dir = trained
    run = read_ratios(work_dir)
    assert run.label == 'trained' and [*run.course] == [0, 2, 4, 5]
    assert run.parts == {'backbone': NAMES[:2], 'neck': NAMES[2:3], 'box head': NAMES[3:4], 'mask head': NAMES[4:]}
    for name, pair in learned(model).items():
        np.testing.assert_allclose(run.layers[name], array(pair), atol=1e-6)
        np.testing.assert_allclose(run.course[5][name], array(pair), atol=1e-6)
        np.testing.assert_allclose(run.course[0][name], array(learned(Net())[name]), atol=1e-6)


def test_a_work_directory_that_was_moved(trained, tmp_path):
    model, work_dir = trained
    shutil.copytree(work_dir, tmp_path / 'moved')
    (tmp_path / 'moved/last_checkpoint').write_text('no/such/folder/iter_4.pth')
    run = read_ratios(tmp_path / 'moved')
    np.testing.assert_allclose(run.layers[NAMES[0]], run.course[4][NAMES[0]], atol=1e-6)


def test_a_log_alone(trained, tmp_path):
    """Without a checkpoint, while its last line is being written."""
    model, work_dir = trained
    shutil.copytree(work_dir, tmp_path / 'running', ignore=shutil.ignore_patterns('*.pth', 'last_checkpoint'))
    [log] = (tmp_path / 'running').glob('*/vis_data/importance_ratios.json')
    log.write_text(log.read_text() + '{"sn_parts/back')
    run = read_ratios(tmp_path / 'running')
    assert [*run.course] == [0, 2, 4, 5] and [*run.layers] == NAMES
    np.testing.assert_array_equal(run.layers[NAMES[3]], run.course[5][NAMES[3]])


@pytest.mark.parametrize('cut', ['', '{"sn_parts/back'], ids=['empty', 'half a line'])
def test_a_newest_log_without_a_record_costs_nothing(trained, tmp_path, cut):
    """As that of a training that was resumed, and stopped before its first record."""
    shutil.copytree(trained[1], tmp_path / 'work')
    newest = tmp_path / 'work/20991231_000000/vis_data'
    newest.mkdir(parents=True)
    (newest / 'importance_ratios.json').write_text(cut)
    assert [*read_ratios(tmp_path / 'work').course] == [0, 2, 4, 5]


def test_an_empty_last_checkpoint(trained, tmp_path):
    """As a full disk leaves it: the log is enough."""
    shutil.copytree(trained[1], tmp_path / 'work')
    (tmp_path / 'work/last_checkpoint').write_text('')
    run = read_ratios(tmp_path / 'work')
    np.testing.assert_array_equal(run.layers[NAMES[0]], run.course[5][NAMES[0]])


def test_a_resumed_training(tmp_path):
    """What came after the checkpoint that it went on from no longer counts."""
    read_checkpoints_as_data()  # upstream's mmengine cannot read its own from torch 2.6 on
    train(tmp_path, SNRatioHook(interval=1, by_epoch=False), 3)
    [first] = [log.parent for log in tmp_path.glob('*/vis_data')]
    first.rename(tmp_path / '20000101_000000')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
    train(tmp_path, SNRatioHook(interval=4, by_epoch=False), 6, resume=True)
    assert [*read_ratios(tmp_path).course] == [0, 1, 2, 4, 6]


def test_a_checkpoint(tmp_path):
    """Also one that DistributedDataParallel has prefixed; two logits without batch statistics are IN and LN."""
    model = nn.Sequential(SwitchNorm(4, init_ratios=(0.2, 0.3, 0.5)), SwitchNorm(4, normalizers=('in', 'ln')))
    torch.save({f'module.{k}': v for k, v in model.state_dict().items()}, tmp_path / 'model.pth')
    run = read_ratios(tmp_path / 'model.pth')
    assert run.label == f'{tmp_path.name}/model' and run.course == {}
    np.testing.assert_allclose(run.layers['0'], [[0.2, 0.3, 0.5]] * 2, atol=1e-6)
    np.testing.assert_allclose(run.layers['1'], [[0.5, 0.5, np.nan]] * 2, atol=1e-6)


def test_a_checkpoint_of_sparse_sn(tmp_path):
    net = nn.Sequential(SparseSwitchNorm(4, init_ratios=(0.2, 0.3, 0.5)), SwitchNorm(4))
    net[0].radius.fill_(0.6)
    path = tmp_path / 'ssn.pth'
    torch.save(net.state_dict(), path)
    layers = read_ratios(path).layers
    assert [*layers] == ['0', '1']
    for i, ratios in enumerate(layers.values()):
        np.testing.assert_allclose(ratios, net[i].importance_ratios, atol=1e-7)
    assert (layers['0'][:, 2] > 0.5).all()  # pushed away from its logits by the radius


def test_a_result_of_the_accuracy_comparison(tmp_path):
    ratios = {'backbone.bn1': [[0.2, 0.3, 0.5], [0.1, 0.2, 0.7]], 'decode_head.bn': [[0.4, 0.6], [0.5, 0.5]]}
    (tmp_path / 'cell.json').write_text(json.dumps(dict(importance_ratios=ratios)))
    run = read_ratios(tmp_path / 'cell.json')
    assert run.label == 'cell' and run.parts == {'backbone': ['backbone.bn1'], 'decode head': ['decode_head.bn']}
    np.testing.assert_array_equal(run.layers['decode_head.bn'], [[0.4, 0.6, np.nan], [0.5, 0.5, np.nan]])
