"""The radius of SSN in real trainings."""

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from sn_openmmlab import SparseSwitchNorm, SSNRadiusHook
from sn_openmmlab.checkpoint.read import read_checkpoints_as_data


class Net(BaseModel):
    def __init__(self, frozen=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), SparseSwitchNorm(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3), SparseSwitchNorm(4, init_ratios=(0.2, 0.3, 0.5))
        self.fc = nn.Linear(4, 2)
        if frozen:
            self.bn2.requires_grad_(False)

    def forward(self, x, label, mode):
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return dict(loss=F.cross_entropy(self.fc(x.mean((2, 3))), label))


class Radii(Hook):
    priority = 'LOWEST'

    def __init__(self):
        self.seen = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.seen.append(round(runner.model.bn1.radius.item(), 6))


def train(folder, spy, frozen=False, resume=None, **options):
    data = [(torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)), i % 2) for i in range(8)]
    runner = Runner(
        model=Net(frozen),
        work_dir=str(folder),
        train_dataloader=dict(
            dataset=data, batch_size=4, sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=5),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        custom_hooks=[dict(type='SSNRadiusHook', **options), dict(type='EMAHook'), spy],
        load_from=resume,
        resume=resume is not None,
        randomness=dict(seed=0),
        log_level='WARNING',
        default_scope='mmengine',
        experiment_name=str(folder).replace('/', '_'),
    )  # fmt: skip
    runner.train()
    return runner


def test_a_training_ends_one_hot_and_can_be_resumed(tmp_path):
    torch.manual_seed(0)
    spy = Radii()
    runner = train(tmp_path / 'a', spy, begin=0.2)  # of 10 iterations: from 2 to 8
    assert spy.seen == [0, 0, 0] + [round(i / 6, 6) for i in range(1, 6)] + [1, 1]
    for layer in runner.model.bn1, runner.model.bn2:
        assert layer.importance_ratios.sort(1).values.tolist() == [[0, 0, 1]] * 2
    saved = torch.load(tmp_path / 'a/epoch_5.pth', weights_only=False)
    assert saved['state_dict']['bn1.radius'] == saved['ema_state_dict']['module.bn1.radius'] == 1
    fresh = Net()
    fresh.load_state_dict(torch.load(tmp_path / 'a/epoch_3.pth', weights_only=False)['state_dict'])
    assert fresh.bn1.radius == torch.tensor(4 / 6)  # what iteration 6 takes

    read_checkpoints_as_data()  # upstream's mmengine cannot resume by itself from torch 2.6 on
    again = Radii()
    resumed = train(tmp_path / 'b', again, begin=0.2, resume=str(tmp_path / 'a/epoch_3.pth'))
    assert again.seen == spy.seen[6:]
    assert all(torch.equal(v, resumed.model.state_dict()[k]) for k, v in runner.model.state_dict().items())


def test_frozen_layers_keep_what_they_compute(tmp_path):
    runner = train(tmp_path, Radii(), frozen=True, end=1.0)
    assert runner.model.bn1.radius == 1 and runner.model.bn2.radius == 0
    torch.testing.assert_close(runner.model.bn2.importance_ratios, torch.tensor([[0.2, 0.3, 0.5]] * 2))


@pytest.mark.parametrize('begin, end', [(-0.1, 0.5), (0.5, 0.5), (0.0, 1.1)])
def test_bad_arguments_of_the_hook(begin, end):
    with pytest.raises(ValueError, match=rf'0 <= begin < end <= 1, got {begin}, {end}'):
        SSNRadiusHook(begin, end)


def test_a_model_without_layers_that_learn(tmp_path, monkeypatch):
    monkeypatch.setattr(Net, 'init_weights', lambda net: [m.requires_grad_(False) for m in (net.bn1, net.bn2)])
    with pytest.raises(ValueError, match="none of the model's 2 SSN layers learns its ratios.*type='SSN'"):
        train(tmp_path, Radii())
