"""Batch averages by the hook and the tool, in real trainings; what they are: test_running_statistics.py."""

import copy
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.runner import Runner
from torch import nn

from sn_openmmlab import SwitchNorm

EXACT = dict(rtol=1e-12, atol=1e-12)


def pixel_moments(maps):
    pixels = torch.cat([m.movedim(1, 0).flatten(1) for m in maps], 1)
    return pixels.mean(1), pixels.var(1)


# -- trainings ----------------------------------------------------------------------------------------------------


@DATASETS.register_module(name='BatchAveragePictures')
class Pictures(torch.utils.data.Dataset):
    def __init__(self, noise):
        self.images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 1
        self.noise = noise

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        x = self.images[i]
        if self.noise:  # by all three generators
            x = x * (0.5 + random.random()) + np.random.rand() + torch.rand(3, 1, 1)
        return x, i % 2


@MODELS.register_module(name='BatchAverageNet')
class Net(BaseModel):
    def __init__(self, norm):
        super().__init__()
        norm = dict(SN=SwitchNorm, BN=nn.BatchNorm2d, IN=nn.InstanceNorm2d)[norm]
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), norm(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3), norm(4)
        self.dropout, self.fc = nn.Dropout(0.2), nn.Linear(4, 2)

    def forward(self, x, label, mode):
        x = self.bn1(self.conv1(x)).relu()
        y = self.fc(self.bn2(self.conv2(self.dropout(x))).relu().mean((2, 3)))
        return dict(loss=F.cross_entropy(y, label)) if mode == 'loss' else list(y.argmax(1))


@METRICS.register_module(name='BatchAverageCount')
class Count(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(len(data_samples))

    def compute_metrics(self, results):
        return dict(count=sum(results))


class Spy(Hook):
    """Keeps the statistics that evaluation takes."""

    priority = 'LOWEST'

    def __init__(self):
        self.seen = []

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        self.seen.append(statistics(runner.model.state_dict()))

    before_test_iter = before_val_iter


def config(folder, *hooks, iters=False, noise=True, norm='SN', **more):
    loader = dict(dataset=dict(type='BatchAveragePictures', noise=noise), batch_size=2, num_workers=0)
    sampler = dict(type='InfiniteSampler' if iters else 'DefaultSampler', shuffle=True)
    evaluation = dict(
        loader, dataset=dict(type='BatchAveragePictures', noise=False), sampler=dict(type='DefaultSampler')
    )
    loader.update(sampler=sampler, collate_fn=dict(type='default_collate'))
    evaluation.update(collate_fn=dict(type='default_collate'), batch_size=8)
    return dict(
        model=dict(type='BatchAverageNet', norm=norm),
        work_dir=str(folder),
        train_dataloader=loader,
        val_dataloader=evaluation,
        test_dataloader=evaluation,
        train_cfg=dict(by_epoch=False, max_iters=6, val_interval=3) if iters else dict(by_epoch=True, max_epochs=2),
        val_cfg=dict(),
        test_cfg=dict(),
        val_evaluator=dict(type='BatchAverageCount'),
        test_evaluator=dict(type='BatchAverageCount'),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=not iters, interval=3 if iters else 1)),
        custom_hooks=list(hooks),
        randomness=dict(seed=0),
        log_level='WARNING',
        default_scope='mmengine',
        experiment_name=str(folder).replace('/', '_'),
        **more,
    )


def train(folder, *hooks, **options):
    runner = Runner(**config(folder, *hooks, **options))
    runner.train()
    return runner


def statistics(state_dict):
    return {k: v.clone() for k, v in state_dict.items() if 'running' in k}


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def batch_average(when, num_batches=4):
    return dict(type='SNBatchAverageHook', num_batches=num_batches, when=when)


EMA = dict(type='EMAHook', update_buffers=True)


@pytest.mark.parametrize('iters, others', [(False, []), (True, [EMA])], ids=['epochs', 'iterations and EMA'])
def test_validation_takes_them_and_training_goes_on_as_without(tmp_path, iters, others):
    plain, spy = Spy(), Spy()
    without = train(tmp_path / 'without', *others, plain, iters=iters)
    runner = train(tmp_path / 'with', *others, batch_average('val'), spy, iters=iters)
    assert len(spy.seen) == len(plain.seen) == 2
    assert not any(torch.equal(a[k], b[k]) for a, b in zip(spy.seen, plain.seen) for k in a)
    assert same(runner.model.state_dict(), without.model.state_dict())
    names = ['iter_3.pth', 'iter_6.pth'] if iters else ['epoch_1.pth', 'epoch_2.pth']
    for name in names:  # moving averages, of EMA's model too
        one, other = (torch.load(tmp_path / d / name, weights_only=False) for d in ('with', 'without'))
        assert same(one['state_dict'], other['state_dict'])
        assert same(one.get('ema_state_dict', {}), other.get('ema_state_dict', {}))


def test_the_test_takes_them_and_they_are_gone_after_it(tmp_path):
    spy = Spy()
    runner = train(tmp_path, batch_average('test'), spy)
    trained = copy.deepcopy(runner.model.state_dict())
    assert all(same(seen, statistics(trained)) is (i == 1) for i, seen in enumerate(spy.seen))  # validation: the moving
    assert runner.test() == dict(count=8)
    assert len(spy.seen) == 3 and not same(spy.seen[2], statistics(trained))
    assert same(runner.model.state_dict(), trained)


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('when', ['val', 'test'])
def test_an_evaluation_that_fails_leaves_the_moving_averages(tmp_path, when, error):
    """So that whatever saves the model then, a notebook or a handler of signals, does not save the others."""

    class Fails(Spy):
        def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            raise error('no more')

        after_test_iter = after_val_iter

    spy = Fails()
    runner = Runner(**config(tmp_path, batch_average(when), spy))
    before = statistics(runner.model.state_dict())
    with pytest.raises(error, match='no more'):
        getattr(runner, when)()
    assert len(spy.seen) == 1 and not same(spy.seen[0], before)
    assert same(statistics(runner.model.state_dict()), before)
    runner.save_checkpoint(str(tmp_path), 'emergency.pth', save_optimizer=False, save_param_scheduler=False)
    assert same(statistics(torch.load(tmp_path / 'emergency.pth', weights_only=False)['state_dict']), before)


@pytest.fixture(scope='module')
def averaged(tmp_path_factory):
    """A training without noise, whose epochs end with batch averages."""
    folder = tmp_path_factory.mktemp('averaged')
    spy = Spy()
    return train(folder, batch_average('epoch'), spy, noise=False), spy, folder


def test_epochs_end_with_them_and_checkpoints_hold_them(averaged):
    runner, spy, folder = averaged
    for i, seen in enumerate(spy.seen):
        assert same(seen, statistics(torch.load(folder / f'epoch_{i + 1}.pth', weights_only=False)['state_dict']))
    runner.model.dropout.p = 0.0
    conv = runner.model.conv1(Pictures(False).images)  # all of the data: 4 batches of 2
    mean, var = pixel_moments([conv.detach()])
    torch.testing.assert_close(runner.model.bn1.bn.running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(runner.model.bn1.bn.running_var, var, rtol=1e-5, atol=1e-6)
    assert runner.model.bn1.bn.num_batches_tracked == 8  # training's own


@pytest.mark.parametrize(
    'hook, options, message',
    [
        (batch_average('always'), {}, "when must be 'val', 'test' or 'epoch', got 'always'"),
        (batch_average('val', 0), {}, 'num_batches must be a whole number of at least 1, got 0'),
        (batch_average('val', '3'), {}, "num_batches must be .* got '3'"),
        (batch_average('val', 2.5), {}, r'num_batches must be .* got 2\.5'),
        (batch_average('val', 5), {}, 'num_batches must be from 1 to 4, the batches of an epoch, got 5'),
        (
            batch_average('epoch'),
            dict(iters=True),
            "needs epochs, and this training counts iterations; take when='val'",
        ),
        (batch_average('val'), dict(norm='IN'), 'the model has no SN layer with BN'),
    ],
)
def test_errors_come_before_the_training(tmp_path, hook, options, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, hook, **options)
    assert not list(tmp_path.glob('*.pth'))


def test_a_dataloader_that_is_no_config(tmp_path):
    settings = config(tmp_path, batch_average('val'))
    settings['train_dataloader'] = Runner.build_dataloader(settings['train_dataloader'])
    with pytest.raises(TypeError, match='need train_dataloader as a config .a dict.*got DataLoader'):
        Runner(**settings).train()


# -- the tool -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tool(import_tool, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return import_tool('average_stats').main


def write_config(path, **options):
    settings = config('work', noise=False, **options)
    path.write_text('\n'.join(f'{k} = {v!r}' for k, v in settings.items()))
    return str(path)


def test_the_tool_writes_them_and_keeps_everything_else(averaged, tool, tmp_path):
    runner = train(tmp_path / 'moving', noise=False)
    source = tmp_path / 'moving/epoch_2.pth'
    before = source.read_bytes()
    cfg = write_config(tmp_path / 'net.py')
    tool([cfg, str(source), 'out.pth', '--num-batches', '4'])
    assert source.read_bytes() == before and not list(tmp_path.glob('*.part'))
    old, new = (torch.load(p, weights_only=False) for p in (source, 'out.pth'))
    mean, var = pixel_moments([runner.model.conv1(Pictures(False).images).detach()])
    torch.testing.assert_close(new['state_dict']['bn1.bn.running_mean'], mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(new['state_dict']['bn1.bn.running_var'], var, rtol=1e-5, atol=1e-6)
    moved = {k for k, v in old['state_dict'].items() if not torch.equal(v, new['state_dict'][k])}
    assert moved == statistics(old['state_dict']).keys()
    assert old.keys() == new.keys() and old['meta'] == new['meta']
    assert same(old['optimizer']['state'][0], new['optimizer']['state'][0])
    assert old['message_hub'].keys() == new['message_hub'].keys()

    with pytest.raises(SystemExit):
        tool([cfg, str(source), 'out.pth', '--num-batches', '4'])
    tool([cfg, str(source), 'out.pth', '--num-batches', '1', '--force'])
    assert not same(statistics(torch.load('out.pth', weights_only=False)['state_dict']), statistics(new['state_dict']))


@pytest.mark.parametrize(
    'args, message',
    [
        (['none.pth', 'out.pth', '--num-batches', '4'], "checkpoint 'none.pth' is no file"),
        (['broken.pth', 'out.pth', '--num-batches', '4'], 'broken.pth: it is no file that torch.save wrote'),
        (
            ['bn.pth', 'out.pth', '--num-batches', '4'],
            r'has no bn1\.bn\.running_mean \(and 1 others\), which the model',
        ),
        (['good.pth', 'good.pth', '--num-batches', '4', '--force'], 'is the checkpoint to read'),
        (['good.pth', 'out.pth', '--num-batches', '0'], '--num-batches must be at least 1, got 0'),
        (['good.pth', 'out.pth', '--num-batches', '5'], 'from 1 to 4, the batches of an epoch, got 5'),
        (['good.pth', 'out.pth', '--num-batches', '4', '--cfg-options', 'model.norm=IN'], 'the model has no SN layer'),
        (
            ['good.pth', 'out.pth', '--num-batches', '4', '--cfg-options', 'train_dataloader=None'],
            'no train_dataloader',
        ),
    ],
)
def test_errors_of_the_tool(tool, tmp_path, capsys, args, message):
    torch.save(dict(state_dict=Net('SN').state_dict()), 'good.pth')
    torch.save(dict(state_dict=Net('BN').state_dict()), 'bn.pth')
    Path('broken.pth').write_bytes(b'no checkpoint')
    with pytest.raises(SystemExit) as error:
        tool([write_config(tmp_path / 'net.py'), *args])
    text = capsys.readouterr().err + str(error.value)
    assert re.search(message, text), text
    assert not Path('out.pth').exists()
