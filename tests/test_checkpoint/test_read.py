"""Checkpoints read as data: all that mmengine saves is read and goes on, and nothing that a file asks for is run."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import tarfile

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import CheckpointLoader, Runner
from torch import nn
from torch.utils.data import DataLoader, Dataset

from sn_openmmlab import SparseSwitchNorm
from sn_openmmlab.checkpoint import read as module
from sn_openmmlab.checkpoint.read import HARMLESS, TRUST, is_trusted, read_checkpoint, read_checkpoints_as_data
from sn_openmmlab.ops.torch_versions import VERSION

# -- what mmengine saves ----------------------------------------------------------------------------------------------


class Images(Dataset):
    """Eight inputs, and a description of them that is of all kinds that data sets have."""

    metainfo = dict(
        classes=('a', 'b'),
        palette=[[0, 0, 0], [1, 2, 3]],
        groups=ConfigDict(animals=dict(names=['a'], weights=(1.0, None))),
        sigmas=np.array([0.5, 0.25], np.float32),
        names=np.array(['left', 'right']),
        empty=np.zeros((0, 3)),
        scale=np.float64(0.1),
    )

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return dict(inputs=torch.linspace(-1, 1, 6).view(2, 3) * (i + 1))


class Net(BaseModel):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv1d(2, 4, 1), SparseSwitchNorm(4))

    def forward(self, inputs, mode='tensor'):
        return dict(loss=(self.net(inputs).tanh() - inputs.mean()).square().mean())

    def val_step(self, data):
        return [self.net(data['inputs'])]


class TwoOptimizers(Net):
    def train_step(self, data, optim_wrapper):
        for wrapper in optim_wrapper.values():
            self.zero_grad()
            wrapper.update_params(self(**data, mode='loss')['loss'])
        return dict(loss=torch.zeros(()))


class Score:
    """A metric that gets worse, and beside it an array, as a confusion matrix."""

    dataset_meta = None

    def __init__(self):
        self.score = 1.0

    def process(self, **_):
        pass

    def evaluate(self, _):
        self.score *= 0.5
        return dict(score=self.score, matrix=np.eye(2))


def train(work_dir, epochs, make=Net, optim_wrapper=None, load_from=None, **config):
    """Train ``epochs`` epochs of two steps, or from a checkpoint on until then; returns the last checkpoint."""
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1, save_best='score', rule='less', max_keep_ckpts=4))
    optimizer = dict(type='SGD', lr=0.1, momentum=0.9)
    wrapper = optim_wrapper(model := make()) if callable(optim_wrapper) else optim_wrapper
    runner = Runner(
        model if callable(optim_wrapper) else make(),
        str(work_dir),
        train_dataloader=DataLoader(Images(), 2),
        val_dataloader=DataLoader(Images(), 2),
        val_evaluator=[],
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        val_cfg={},
        optim_wrapper=wrapper or dict(optimizer=optimizer),
        default_hooks=hooks,
        experiment_name=f'{work_dir.parent.name} {work_dir.name}',
        log_level='ERROR',
        load_from=load_from,
        resume=load_from is not None,
        **config,
    )
    runner.val_loop.evaluator = Score()
    runner.train()
    return torch.load(work_dir / f'epoch_{epochs}.pth', weights_only=False)  # our own


SCHEDULERS = {
    'Constant': dict(factor=0.5, end=3),
    'CosineAnnealing': dict(T_max=4),
    'CosineRestart': dict(periods=[2, 2], restart_weights=[1, 0.5], eta_min=0),
    'Exponential': dict(gamma=0.5),
    'Linear': dict(start_factor=0.5, end=4),
    'MultiStep': dict(milestones=[1, 3]),
    'OneCycle': dict(eta_max=0.2, total_steps=9),
    'OneCycle linear': dict(eta_max=0.2, total_steps=9, anneal_strategy='linear', three_phase=True),
    'Poly': dict(power=0.9, end=4),
    'ReduceOnPlateau': dict(monitor='score', rule='greater', patience=0),
    'Step': dict(step_size=2),
}
SCHEDULED = [
    (kind, what) for kind in SCHEDULERS for what in ('LR', 'Momentum') if (kind[:3], what) != ('One', 'Momentum')
]
OPTIMIZERS = 'Adadelta Adagrad Adam AdamW Adamax ASGD NAdam RAdam RMSprop Rprop SGD'.split()


def two_optimizers(model):
    conv, norm = (torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in model.net)
    return OptimWrapperDict(conv=OptimWrapper(conv), norm=OptimWrapper(norm))


TRAININGS = {
    **{
        f'{kind}{what}': dict(param_scheduler=[dict(type=kind.split()[0] + what, **SCHEDULERS[kind])])
        for kind, what in SCHEDULED
    },
    **{
        name: dict(
            optim_wrapper=dict(optimizer=dict(type=name, lr=0.01), accumulative_counts=2, clip_grad=dict(max_norm=1))
        )
        for name in OPTIMIZERS
        if hasattr(torch.optim, name)
    },
    'rules': dict(
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.1, amsgrad=True),
            paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys={'net.0': dict(lr_mult=0.1)}),
        )
    ),
    'OptimWrapperDict': dict(make=TwoOptimizers, optim_wrapper=two_optimizers, param_scheduler=dict(conv=[], norm=[])),
    **{
        name: dict(custom_hooks=[dict(type='EMAHook', ema_type=name, update_buffers=True)])
        for name in ('ExponentialMovingAverage', 'MomentumAnnealingEMA', 'StochasticWeightAverage')
    },
    'EarlyStoppingHook': dict(custom_hooks=[dict(type='EarlyStoppingHook', monitor='score', rule='less', patience=9)]),
    'hooks of this package': dict(custom_hooks=[dict(type='SSNRadiusHook'), dict(type='SNRatioHook')]),
}


def test_every_scheduler_of_mmengine_is_in_the_list():
    known = {name for name in PARAM_SCHEDULERS.module_dict if name.endswith(('LR', 'Momentum'))}
    assert known - {f'{kind}{what}' for kind, what in SCHEDULED} <= {'QuadraticWarmupLR', 'QuadraticWarmupMomentum'}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(np.all(a == b))


@pytest.mark.parametrize('name', TRAININGS)
def test_a_training_goes_on_from_what_mmengine_saves(name, tmp_path):
    """As one straight through: weights, optimizer, schedulers, averages, and the data set's description."""
    read_checkpoints_as_data()
    straight = train(tmp_path / 'straight', 4, **TRAININGS[name])
    resumed = train(tmp_path / 'resumed', 4, load_from=str(tmp_path / 'straight/epoch_2.pth'), **TRAININGS[name])
    assert ('param_schedulers' in straight) == ('param_scheduler' in TRAININGS[name])
    assert ('ema_state_dict' in straight) == name.endswith(('Average', 'EMA'))
    for part in straight.keys() - {'meta', 'message_hub'}:
        assert same(straight[part], resumed[part]), part
    for part in straight['meta']['dataset_meta'], resumed['message_hub']['runtime_info']['dataset_meta']:
        assert same(part, Images.metainfo) and type(part['groups']) is ConfigDict
    assert b'sn_openmmlab' not in pickle.dumps(resumed['message_hub'])  # which could be read with it only


# -- and what else is read, or not ------------------------------------------------------------------------------------


@pytest.fixture(params=[(2, 5), (2, 6)], ids=['own unpickler', 'of torch 2.6'])
def read(tmp_path, request, monkeypatch):
    """Write an object as torch.save does, change the bytes, and read it as the tools do."""
    monkeypatch.setattr(module, 'VERSION', min(request.param, VERSION))

    def read(content, old=b'', new=b'', zipped=False):
        path = tmp_path / 'saved.pth'
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        path.write_bytes(re.sub(old, new, path.read_bytes()) if old else path.read_bytes())
        return read_checkpoint(str(path))

    return read


@pytest.mark.parametrize('numpy', [b'numpy.core.', b'numpy._core.'], ids=['numpy 1', 'numpy 2'])
def test_histories_and_arrays_of_both_numpys(read, numpy):
    content = dict(history=HistoryBuffer([0.5, 2.5], [1, 1]), scalar=np.float64(3), ints=np.arange(3))
    loaded = read(content, rb'numpy\._?core\.', numpy)
    assert loaded['history'].mean() == 1.5 and loaded['scalar'] == 3 and loaded['ints'].tolist() == [0, 1, 2]


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize(
    'value',
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(3, dtype='>i4'),
        np.zeros((0, 3)),
        np.array(2.5, np.float16),
        np.arange(2) * 1j,
        np.array([True, False]),
        np.array(['ä', 'bc']),
        np.array([b'a', b'bc']),
        np.float32(0.5),
        np.bool_(True),
        np.str_('ä'),
        b'',
        b'abc',
        argparse.Namespace(lr=0.1, nested=argparse.Namespace(a=1)),
        ConfigDict(a=dict(b=[1, (2, dict(c=3))])),
    ],
    ids=repr,
)
def test_values_come_back_as_they_were_twice(read, value, zipped):
    """And as what they were saved from there, which other programs read."""
    loaded = read(dict(value=value), zipped=zipped)['value']
    again = pickle.loads(pickle.dumps(loaded))
    for back in loaded, again:
        assert type(back) is type(value) or back is loaded
        assert np.array_equal(back, value) if isinstance(value, np.ndarray) else back == value
        if isinstance(value, np.ndarray):
            assert back.dtype == value.dtype.newbyteorder('=') and back.shape == value.shape
            assert back.flags.f_contiguous == value.flags.f_contiguous
    assert isinstance(loaded, type(value))


def test_all_that_is_allowed_has_a_test_or_is_numpys():
    assert set(HARMLESS) == {
        'argparse.Namespace',
        'builtins.bytes',
        'builtins.getattr',
        'mmengine.config.config.ConfigDict',
        'mmengine.logging.history_buffer.HistoryBuffer',
        'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler',
        'numpy.dtype',
        'numpy.ndarray',
        *(f'numpy.{core}.multiarray.{name}' for core in ('core', '_core') for name in ('_reconstruct', 'scalar')),
    }


@pytest.mark.parametrize(
    'value, said', [(v, v.lower() in ('1', 'y', 'yes', 'true')) for v in '1 y YES True 0 false no n off'.split()]
)
def test_trust_is_read_as_torch_reads_it(value, said, monkeypatch):
    """An ``0`` turned the protection off."""
    monkeypatch.setenv(TRUST, value)
    assert is_trusted() is said
    read_checkpoints_as_data()
    assert (os.environ.get('TORCH_FORCE_WEIGHTS_ONLY_LOAD') == '1') is (not said and VERSION >= (2, 6))


def test_no_trust_without_the_variable(monkeypatch):
    monkeypatch.delenv(TRUST, raising=False)
    assert not is_trusted()
    monkeypatch.setenv(TRUST, '')
    assert not is_trusted()


def test_a_configs_text_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    """mmengine's Runner.resume runs meta['config'] to compare the number of GPUs with its own."""
    monkeypatch.chdir(tmp_path)
    read_checkpoints_as_data()
    train(tmp_path / 'first', 1)
    path = tmp_path / 'first/epoch_1.pth'
    content = torch.load(path, weights_only=False)
    content['meta']['config'] = "import os\nos.mkdir('intruded')\n"
    torch.save(content, path)
    train(tmp_path / 'second', 2, load_from=str(path))
    assert not (tmp_path / 'intruded').exists()
    content = CheckpointLoader.load_checkpoint(str(path))
    assert 'config' not in content['meta'] and content['meta']['epoch'] == 1


def test_a_class_is_not_changed(read):
    class Changer:
        def __reduce__(self):
            return getattr, (HistoryBuffer, 'mean'), (None, {'__doc__': 'changed'})

    with pytest.raises(ValueError):
        read(Changer())
    assert HistoryBuffer.mean.__doc__ != 'changed'


def program(path):
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), path)


def old_archive(path):
    with tarfile.open(path, 'w') as archive:
        archive.addfile(tarfile.TarInfo('storages'))


@pytest.mark.parametrize('write', [program, old_archive])
def test_archives_that_torch_reads_in_other_ways_are_refused(write, read, tmp_path):
    write(tmp_path / 'archive.pth')
    with pytest.raises(ValueError, match='TorchScript archive|legacy .tar format'):
        read_checkpoint(str(tmp_path / 'archive.pth'))
