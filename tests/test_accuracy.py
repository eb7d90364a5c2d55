"""Accuracy cells: each task trains with each norm, and one that was stopped ends as if it had not been."""

import copy
import hashlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.accuracy import release, report, run  # noqa: E402

SMALL = {
    'train_dataloader.dataset.pipeline.2.scale': (64, 48),
    'val_dataloader.dataset.pipeline.1.scale': (64, 48),
    'model.train_cfg.rcnn.sampler.num': 8,
}
CELL = run.Cell('bccd', 'SN', images=2, seed=3, lr=0.01, epochs=2, variant='small', options=SMALL)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """The folder of a data set of BCCD's layout, with four training and two validation images of bright ellipses."""
    root = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)
    for split, count in ('train', 4), ('val', 2):
        (root / 'bccd' / split).mkdir(parents=True)
        (root / 'bccd/annotations').mkdir(exist_ok=True)
        images, annotations = [], []
        for i in range(1, count + 1):
            picture = rng.integers(0, 60, (96, 128, 3), dtype=np.uint8)
            for _ in range(3):
                w, h = (int(v) for v in rng.integers(10, 20, 2) * 2)
                x, y = int(rng.integers(0, 128 - w)), int(rng.integers(0, 96 - h))
                cv2.ellipse(picture, (x + w // 2, y + h // 2), (w // 2, h // 2), 0, 0, 360, (90, 60, 220), -1)
                box = dict(bbox=[x, y, w, h], area=w * h, iscrowd=0, category_id=int(rng.integers(1, 4)))
                annotations.append(dict(id=len(annotations) + 1, image_id=i, **box))
            cv2.imwrite(str(root / f'bccd/{split}/{i}.jpg'), picture)
            images.append(dict(id=i, file_name=f'{i}.jpg', height=96, width=128))
        categories = [dict(id=i, name=name) for i, name in enumerate(('RBC', 'WBC', 'Platelets'), 1)]
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / f'bccd/annotations/{split}.json').write_text(json.dumps(content))
    (root / 'cifar10').mkdir()
    for split, count in ('train', 128), ('test', 10):
        pictures = rng.integers(0, 255, (count, 32, 32, 3), dtype=np.uint8)
        jpeg = [cv2.imencode('.jpg', picture)[1].ravel() for picture in pictures]
        end = np.cumsum([len(file) for file in jpeg])
        np.savez(root / f'cifar10/{split}.npz', jpeg=np.concatenate(jpeg), end=end, label=rng.integers(0, 10, count))
    (root / 'modelnet10').mkdir()
    splits = dict(train=64, test=10)
    bits = {f'{split}_bits': rng.integers(0, 256, (n, 4096), dtype=np.uint8) for split, n in splits.items()}
    labels = {f'{split}_label': rng.integers(0, 10, n) for split, n in splits.items()}
    np.savez(root / 'modelnet10/modelnet10_32.npz', **bits, **labels)
    return root


@pytest.fixture(autouse=True)
def root(data, monkeypatch):
    monkeypatch.setenv('SN_DATA_ROOT', str(data))


def train(cell, folder):
    return run.run_cell(cell, folder / 'work', folder / 'results')


def weights(cell, folder):
    path = folder / 'work' / cell.name / f'epoch_{cell.epochs}.pth'
    return torch.load(path, weights_only=False)['state_dict']  # our own


@pytest.fixture(scope='module')
def straight(data, tmp_path_factory):
    """A cell trained without a stop."""
    folder = tmp_path_factory.mktemp('straight')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SN_DATA_ROOT', str(data))
        result = train(CELL, folder)
    return folder, result


def test_a_cell_records_what_it_was_and_did(straight):
    folder, result = straight
    assert result == json.loads((folder / f'results/{CELL.name}.json').read_text())
    assert (result['task'], result['norm'], result['images'], result['seed']) == ('bccd', 'SN', 2, 3)
    assert result['config']['randomness']['seed'] == 3
    assert result['config']['optim_wrapper']['optimizer']['lr'] == 0.01
    assert str(folder.parent) not in json.dumps(result)
    assert result['iterations'] == 4 and result['seconds'] > 0
    assert [row['epoch'] for row in result['curve']] == [1, 2]
    assert all(np.isfinite(row['loss']) and 'coco/bbox_mAP' in row['metrics'] for row in result['curve'])
    assert {*result['final']} == {'moving average', 'batch average'}
    assert result['final']['moving average'] == result['curve'][-1]['metrics']
    [environment] = result['environments']
    assert environment['torch'] == torch.__version__
    assert len(result['importance_ratios']) == 20 + 8 + 4


def test_a_trained_cell_is_not_trained_again(straight, monkeypatch):
    monkeypatch.setattr(run, 'Runner', None)
    assert train(CELL, straight[0]) == straight[1]


def test_released_files_give_the_result_again(straight, tmp_path, monkeypatch):
    """By the config and the weights alone. Neither names a folder of this machine, nor does the card."""
    folder, result = straight
    monkeypatch.setenv('SN_OPENMMLAB_HOME', 'https://example.org/sn/')
    path = release.release(CELL.name, folder / 'work', folder / 'results', tmp_path)
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem[-8:])
    assert release.release(CELL.name, folder / 'work', folder / 'results', tmp_path) == path
    config, card = tmp_path / f'{CELL.name}.py', (tmp_path / f'{CELL.name}.md').read_text()
    assert sorted(tmp_path.iterdir()) == sorted([path, config, tmp_path / f'{CELL.name}.md'])
    assert str(folder.parent) not in config.read_text() + card
    assert f'(https://example.org/sn/releases/download/v{release.__version__}/{path.name})' in card and 'MIT' in card

    cfg = Config.fromfile(config)
    cfg.merge_from_dict(dict(work_dir=str(tmp_path), load_from=str(path)))
    tested = Runner.from_cfg(cfg).test()
    assert tested == result['final']['moving average']


def test_only_a_cell_that_was_trained_here_is_released(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match='train the cell'):
        release.release('nothing', results=tmp_path)
    (tmp_path / f'{CELL.name}.json').write_text(json.dumps(asdict(CELL)))
    with pytest.raises(FileNotFoundError, match='epoch_2.pth does not exist; remove'):
        release.release(CELL.name, tmp_path, tmp_path)
    with pytest.raises(SystemExit):
        release.main(['nothing'])
    assert 'nothing.json does not exist' in capsys.readouterr().err


@pytest.mark.parametrize(
    'hook, iterations',
    [('before_train_iter', 3), ('before_val_epoch', 2), ('before_save_checkpoint', 4), ('after_train', 4)],
)
def test_a_stopped_cell_ends_as_one_straight_through(hook, iterations, straight, tmp_path, monkeypatch):
    """Stopped in an epoch, in an evaluation, before a checkpoint and after the last epoch. Bitwise equal."""

    def stop(record, runner, *args, **kwargs):
        if runner.iter == iterations:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.Record, hook, stop)
        with pytest.raises(KeyboardInterrupt):
            train(CELL, tmp_path)
    assert not (tmp_path / 'results').exists()
    result = train(CELL, tmp_path)
    assert len(result['environments']) == 2
    for key in 'final', 'importance_ratios', 'config', 'iterations':
        assert result[key] == straight[1][key], key
    for row, other in zip(result['curve'], straight[1]['curve']):
        assert {**row, 'seconds': 0} == {**other, 'seconds': 0}
    resumed, expected = weights(CELL, tmp_path), weights(CELL, straight[0])
    assert resumed.keys() == expected.keys()
    assert [key for key in resumed if not torch.equal(resumed[key], expected[key])] == []


@pytest.mark.parametrize('norm', [norm for norm in run.NORMS if norm != 'SN'])
def test_the_other_norms_train_the_same_network(norm, tmp_path, straight):
    cell = replace(CELL, norm=norm, epochs=1)
    result = train(cell, tmp_path)
    assert np.isfinite(result['curve'][0]['loss'])
    assert ('batch average' in result['final']) == (norm == 'BN')
    own = ('mean_weight', 'var_weight', 'running_mean', 'running_var', 'num_batches_tracked')
    shapes = [
        {
            k: v.shape
            for k, v in weights(c, f).items()
            if k.split('.')[-1] not in own and '.gn' not in k and '.bn' not in k
        }
        for c, f in ((cell, tmp_path), (CELL, straight[0]))
    ]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 40


@pytest.mark.parametrize('task, norm', [('cifar10', 'SN-b16'), ('cifar10', 'GN'), ('modelnet10', 'SN-b8')])
def test_a_cell_of_classification(task, norm, tmp_path):
    module = run.load_task(task)
    result = train(run.Cell(task, norm, module.IMAGES, 0, module.LR, epochs=1), tmp_path)
    assert result['iterations'] == 2 and np.isfinite(result['curve'][0]['loss'])
    assert {*result['final']} == {'moving average', *(['batch average'] if norm != 'GN' else [])}
    assert all(metrics['accuracy'] % 10 == 0 for metrics in result['final'].values())  # of ten samples
    assert len(result['importance_ratios']) == dict(cifar10=19, modelnet10=12)[task] * (norm != 'GN')


def test_shifted_images_have_no_black_in_their_statistics():
    from benchmarks.accuracy.cifar10 import Augment

    images = torch.randint(0, 256, (32, 1, 1, 1), dtype=torch.uint8).expand(32, 3, 32, 32)  # each of one grey
    (as_they_are, shifted, on_black) = (
        Augment(border)(dict(inputs=images), training=training)['inputs']
        for border, training in (('reflect', False), ('reflect', True), ('constant', True))
    )
    assert torch.equal(shifted, as_they_are) and not torch.equal(on_black, as_they_are)


@pytest.mark.parametrize('kind, rank', [('BN', 4), ('SN', 4), ('SN3d', 5)])
def test_chunks_are_normalized_as_by_processes_of_their_own(kind, rank):
    from benchmarks.accuracy.classify import norm_layer

    x = torch.randn(6, 4, *[5] * (rank - 2))
    chunked, alone = norm_layer(dict(type=kind, images=2), 4), norm_layer(dict(type=kind), 4)
    processes = [copy.deepcopy(alone) for _ in range(3)]
    y = chunked(x)
    torch.testing.assert_close(y, torch.cat([layer(part) for layer, part in zip(processes, x.split(2))]))
    y.square().sum().backward()
    for layer, part in zip(processes, x.split(2)):
        layer(part).square().sum().backward()
    gradients = zip(chunked.parameters(), *(layer.parameters() for layer in processes))
    for ours, *theirs in gradients:
        torch.testing.assert_close(ours.grad, sum(p.grad for p in theirs))
    alone(x[:2])
    ours, first = getattr(chunked.norm, 'bn', chunked.norm), getattr(alone, 'bn', alone)
    torch.testing.assert_close([ours.running_mean, ours.running_var], [first.running_mean, first.running_var])
    torch.testing.assert_close(chunked.eval()(x), alone.eval()(x))
    assert chunked.norm.momentum == 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_graph_is_the_same_training_on_a_gpu(monkeypatch):
    from benchmarks.accuracy.cifar10 import CIFARResNet

    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    losses = [[], []]
    batch = dict(inputs=torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), labels=torch.arange(8))
    for graph, found in enumerate(losses):
        torch.manual_seed(0)
        net = CIFARResNet(dict(type='SN', images=2), 'reflect', depth=8).cuda().train()
        if not graph:
            net._graph.append(net.network)
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        for _ in range(4):
            optimizer.zero_grad()
            loss = net(**net.data_preprocessor(batch, training=True), mode='loss')['loss']
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(set(losses[1])) == 4


def test_the_figure_of_batch_sizes_has_every_cell():
    task = run.load_task('cifar10')

    def cell(norm, seed, accuracy):
        final = {'moving average': dict(accuracy=accuracy)}
        ratios = {'1': [[0.2, 0.3, 0.5], [0.1, 0.3, 0.6]]} if norm.startswith('SN') else {}
        made = run.Cell('cifar10', norm, task.IMAGES, seed, task.LR, task.EPOCHS)
        return {**vars(made), 'final': final, 'importance_ratios': ratios}

    assert report.draw_sizes([]) is None
    cells = [cell('SN-b64', 0, 60), cell('SN-b64', 1, 70), cell('SN-b2', 0, 50), cell('GN', 0, 55)]
    accuracy, means, variances = report.draw_sizes(cells).axes
    lines = {c.get_label(): c[0].get_xydata().tolist() for c in accuracy.containers}
    assert lines == {'SN, moving average': [[64, 65], [2, 50]], 'GN': [[64, 55], [2, 55]]}
    assert [[*line.get_ydata()] for line in means.lines] == [[0.2] * 2, [0.3] * 2, [0.5] * 2]
    assert [[*line.get_ydata()] for line in variances.lines] == [[0.1] * 2, [0.3] * 2, [0.6] * 2]


def test_another_config_under_the_same_name_is_refused(straight, monkeypatch, tmp_path):
    folder, _ = straight
    other = replace(CELL, options={**SMALL, 'optim_wrapper.clip_grad.max_norm': 1})
    for results in folder / 'results', tmp_path:
        with pytest.raises(ValueError, match='of another config; remove it'):
            run.run_cell(other, folder / 'work', results)
    assert not [*tmp_path.iterdir()]


def test_a_loss_that_is_no_number_ends_the_cell_as_diverged(tmp_path):
    result = train(replace(CELL, lr=1e30), tmp_path)
    assert 'loss' in result['final']['diverged'] and 'iteration' in result['final']['diverged']
    assert result['importance_ratios'] == {}  # they would be no numbers, which JSON has not


def test_missing_data_and_wrong_options_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('SN_DATA_ROOT', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='SN_DATA_ROOT'):
        train(CELL, tmp_path)
    for wrong, said in (['--variant', 'x'], 'belong together'), (['--lr', '0'], 'must be above 0'):
        with pytest.raises(SystemExit):
            run.main(['--task', 'bccd', '--norm', 'SN', *wrong])
        assert said in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_tables_are_generated_from_the_cells():
    report.main(['--check'])


def test_tables_say_how_many_seeds_and_how_far_they_spread():
    task = run.load_task('bccd')

    def cell(norm, seed, values, **changes):
        made = run.Cell('bccd', norm, 2, seed, task.LR, task.EPOCHS)
        final = {name: {'coco/bbox_mAP': value, 'coco/bbox_mAP_50': value + 0.25} for name, value in values.items()}
        env = dict(device='CPU', torch='2', threads=2, date='d', commit='c')
        return {**vars(made), 'final': final, 'seconds': 60, 'iterations': 100, 'environments': [env], **changes}

    results = [
        cell('BN', 0, {}, final=dict(diverged='loss nan in iteration 7')),
        cell('GN', 0, {'moving average': 0.25}),
        cell('SN', 0, {'moving average': 0.5, 'batch average': 0.6}),
        cell('SN', 1, {'moving average': 0.3, 'batch average': 0.4}),
        cell('GN', 0, {'moving average': 0.75}, lr=task.LR / 2),
        cell('BN', 0, {'moving average': 0.125}, lr=task.LR / 2, epochs=3),
        cell('BN', 1, {'moving average': 0.375}, lr=task.LR / 2, epochs=3),
        cell('SN', 0, {'moving average': 0.75}, variant='logits10'),
    ]
    rows = [
        [c.strip() for c in line.split('|')[1:-1]]
        for line in report.tables('bccd', results).splitlines()
        if '|' in line
    ]
    lr, half = f'{task.LR:g}', f'{task.LR / 2:g}'
    assert rows[2][:7] == ['2', half, 'GN', '1', 'box AP', '0.750', '']
    assert rows[4][:7] == ['2', lr, 'BN', '1', 'box AP', 'diverged', '']
    assert rows[6][:7] == ['2', lr, 'GN', '1', 'box AP', '0.250', '']
    sn = ['0.400 ± 0.141 (0.300 to 0.500)', '0.500 ± 0.141 (0.400 to 0.600)']
    assert rows[8][:7] == ['2', lr, 'SN', '2', 'box AP', *sn]
    sn = ['0.650 ± 0.141 (0.550 to 0.750)', '0.750 ± 0.141 (0.650 to 0.850)']
    assert rows[9][:7] == ['', '', '', '', 'box AP50', *sn]
    others = [['BN', '2', half, '3', '', '2', '0.250 ± 0.177 (0.125 to 0.375)']]
    others += [['SN', '2', lr, str(task.EPOCHS), 'logits10', '1', '0.750']]
    assert rows[12:] == others
    rows = [line.split('|')[1:-1] for line in report.summary_by_rate({'bccd': results}).splitlines()]
    assert [[c.strip() for c in row] for row in rows[2:]] == [
        ['BCCD, box AP', half, 'not trained yet', '0.750 (1 seed)', 'not trained yet', 'not trained yet'],
        ['BCCD, box AP', lr, 'diverged (1 seed)', '0.250 (1 seed)', '0.400 ± 0.141 (0.300 to 0.500) (2 seeds)']
        + ['not trained yet'],
    ]
