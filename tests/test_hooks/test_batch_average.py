"""Batch averages: what they are, that nothing else is touched, and the hook and the tool in real trainings."""

import copy
import importlib
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.runner import Runner
from torch import nn

from sn_openmmlab import SwitchNorm, SyncSN, average_statistics

TOOLS = Path(__file__).parents[2] / 'tools'
EXACT = dict(rtol=1e-12, atol=1e-12)


class OneLayer(BaseModel):
    """A norm, and another behind it."""

    def __init__(self, norm, second=None):
        super().__init__()
        self.norm, self.second = norm, second or nn.Identity()
        self.double()

    def forward(self, *xs, mode):
        assert mode == 'loss' and not torch.is_grad_enabled()
        return [self.second(self.norm(x).relu()) for x in xs]


def pictures(seed=0):
    """Twelve images of one size and six of another, of large and unequal means and variances."""
    g = torch.Generator().manual_seed(seed)
    sizes = [(3, 4, 5)] * 12 + [(3, 2, 2)] * 6
    return [torch.randn(s, generator=g, dtype=torch.float64) * (i + 1) + 50 * i for i, s in enumerate(sizes)]


def split(images, *sizes):
    """Batches of as many images as ``sizes`` say; those of one shape stand together."""
    images = iter(images)
    return [[torch.stack([next(images) for _ in range(n)])] for n in sizes]


def pixel_moments(maps):
    pixels = torch.cat([m.movedim(1, 0).flatten(1) for m in maps], 1)
    return pixels.mean(1), pixels.var(1)


@pytest.mark.parametrize('norm', [SwitchNorm, nn.BatchNorm2d, lambda c: SwitchNorm(c, momentum=None)])
@pytest.mark.parametrize('sizes', [(12, 6), (1,) * 18, (5, 4, 3, 1, 5), (2, 10, 6)])
def test_a_layer_gets_the_moments_of_all_pixels_however_they_are_split(norm, sizes):
    model = OneLayer(norm(3))
    assert average_statistics(model, split(pictures(), *sizes)) == ['norm.bn' if hasattr(model.norm, 'bn') else 'norm']
    stats = getattr(model.norm, 'bn', model.norm)
    mean, var = pixel_moments([x[None] for x in pictures()])
    torch.testing.assert_close(stats.running_mean, mean, **EXACT)
    torch.testing.assert_close(stats.running_var, var, **EXACT)


def test_a_layer_that_is_called_several_times_gets_the_pixels_of_all_calls():
    model = OneLayer(SwitchNorm(3))
    average_statistics(model, [[x[None] for x in pictures()] + [torch.empty(0, 3, 7, 7, dtype=torch.float64)]])
    torch.testing.assert_close(model.norm.bn.running_var, pixel_moments([x[None] for x in pictures()])[1], **EXACT)


def test_deeper_layers_get_the_pixels_that_the_batches_moments_make_of_them():
    model = OneLayer(SwitchNorm(3), SwitchNorm(3))
    seen = []
    model.second.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batches = split(pictures(), 3, 9, 6)
    average_statistics(model, batches, 3)
    expected = pixel_moments(seen)
    own = copy.deepcopy(model.norm).train()
    assert torch.equal(seen[0], own(batches[0][0]).relu())  # with the batch's moments, not the running ones
    torch.testing.assert_close((model.second.bn.running_mean, model.second.bn.running_var), expected, **EXACT)
    average_statistics(model, batches[::-1])
    torch.testing.assert_close((model.second.bn.running_mean, model.second.bn.running_var), expected, **EXACT)


def on_two_ranks():
    rank = dist.get_rank()
    alone = OneLayer(SwitchNorm(3))
    average_statistics(alone, split(pictures(), 3, 5, 4)[:: 1 if rank else -1])  # the same on both, in another order
    sets = pictures(), pictures(1)
    model = OneLayer(SwitchNorm(3))
    # unequal shares: 2 and 12 images of the first set, one of them in an empty batch
    mine = split(sets[rank], 2) + [[torch.empty(0, 3, 4, 5, dtype=torch.float64)]] if rank else split(sets[0], 8, 4)
    average_statistics(model, mine)
    mean, var = pixel_moments([torch.stack(sets[0][:12]), torch.stack(sets[1][:2])])
    torch.testing.assert_close(model.norm.bn.running_mean, mean, **EXACT)
    torch.testing.assert_close(model.norm.bn.running_var, var, **EXACT)

    deep = OneLayer(SyncSN(3), SyncSN(3))
    batches = split(sets[0], 4, 8)
    average_statistics(deep, [[b[0][rank::2]] for b in batches])
    whole = OneLayer(SwitchNorm(3), SwitchNorm(3))
    average_statistics(whole, batches)  # twice the same on two ranks: all but the unbiased variance stays
    biased = 239 / 240, 479 / 480
    for name in 'norm', 'second':
        one, both = getattr(whole, name).bn, getattr(deep, name).bn
        torch.testing.assert_close(both.running_mean, one.running_mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(both.running_var * biased[0], one.running_var * biased[1], rtol=1e-10, atol=1e-10)


def test_ranks_do_not_matter_and_neither_do_they_in_depth_with_synchronised_statistics(two):
    two(on_two_ranks)


class Mixed(OneLayer):
    """SN, frozen SN, SN without BN, BatchNorm and dropout; ``train`` freezes as OpenMMLab's backbones do."""

    def __init__(self):
        super().__init__(SwitchNorm(3))
        self.frozen, self.rest = SwitchNorm(3), SwitchNorm(3, normalizers=('in', 'ln'))
        self.plain, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.double()

    def forward(self, x, mode):
        if x.isnan().any():
            raise FloatingPointError('a broken image')
        return self.dropout(self.plain(self.rest(self.frozen(self.norm(x))))) * np.random.rand() * random.random()

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self


def everything(model):
    modes = [m.training for m in model.modules()]
    momenta = [m.momentum for m in model.modules() if hasattr(m, 'momentum')]
    generators = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    return modes, momenta, generators, [len(m._forward_pre_hooks) for m in model.modules()]


def test_nothing_else_changes():
    model = Mixed().eval()
    model.plain.train()
    before, state = everything(model), copy.deepcopy(model.state_dict())
    assert average_statistics(model, split(pictures(), 4, 4), 1) == ['norm.bn', 'plain']
    assert everything(model) == before
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
    assert moved == {f'{m}.{s}' for m in ('norm.bn', 'plain') for s in ('running_mean', 'running_var')}
    assert all(p.grad is None for p in model.parameters())


def test_after_a_failure_not_even_the_statistics_have_changed():
    model = Mixed()
    batches = split(pictures(), 4, 4)
    batches[1][0][0] = float('nan')
    before, state = everything(model), copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match='a broken image'):
        average_statistics(model, batches)
    assert everything(model) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    'norm, batches, number, message',
    [
        (nn.GroupNorm(1, 3), [], 1, 'no SN layer with BN, and no BatchNorm'),
        (SwitchNorm(3, normalizers=('in', 'ln')), [], 1, 'no SN layer with BN'),
        (SwitchNorm(3), [0] * 4, 0, 'num_batches must be from 1 to 4, the batches of an epoch, got 0'),
        (SwitchNorm(3), [0] * 4, 5, 'from 1 to 4, .* got 5'),
        (SwitchNorm(3), iter(split(pictures(), 2, 2)), 3, 'num_batches=3, but there are 2 batches'),
        (SwitchNorm(3), (b for b in split(pictures(), 2, 2)), None, 'a generator has no length: say in num_batches'),
    ],
)
def test_errors(norm, batches, number, message):
    if isinstance(batches, list) and number == 1:
        batches = split(pictures(), 2)
    with pytest.raises(ValueError, match=message):
        average_statistics(OneLayer(norm), batches, number)


def test_a_frozen_model_and_one_that_hides_its_layers():
    model = OneLayer(SwitchNorm(3))
    model.train = lambda mode=True: model.norm.bn.eval()
    with pytest.raises(ValueError, match='frozen .norm_eval, frozen_stages.: none to average'):
        average_statistics(model, split(pictures(), 2))
    hidden = OneLayer(SwitchNorm(3))
    hidden.forward = lambda *xs, mode: None
    with pytest.raises(RuntimeError, match='came to none of the SN and BN layers'):
        average_statistics(hidden, split(pictures(), 2))


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
def tool(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(TOOLS)
    yield importlib.import_module('average_stats').main
    sys.modules.pop('average_stats')


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
