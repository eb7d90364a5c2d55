"""Every tool that reads checkpoints, given files that would run code, or crash the process, if they were unpickled."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
from pathlib import Path

import hostile
import pytest
import torch
from support import TOOLS, call
from torch import nn

CONFIG = """
custom_imports = dict(imports=['toy'])
model = dict(type='Toy')
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(type='Noise'), sampler=dict(type='DefaultSampler'),
                        collate_fn=dict(type='default_collate'))
test_dataloader = train_dataloader
test_evaluator = dict(type='Nothing')
train_cfg = dict(by_epoch=True, max_epochs=1)
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
log_level = 'ERROR'
"""

# a model, as mmdet's KnowledgeDistillationSingleStageDetector loads its teacher; the rest is what a Runner needs
TOY = """
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.runner import load_checkpoint
from torch import nn

@MODELS.register_module(force=True)
class Toy(BaseModel):
    def __init__(self, teacher_ckpt=None, **kwargs):
        super().__init__(**kwargs)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), MODELS.build(dict(type='SN', num_features=4)))
        if teacher_ckpt is not None:
            load_checkpoint(self, teacher_ckpt, map_location='cpu')

    def forward(self, inputs, mode='tensor'):
        y = self.net(inputs)
        return dict(loss=y.square().mean()) if mode == 'loss' else [y] if mode == 'predict' else y

@DATASETS.register_module(force=True)
class Noise(torch.utils.data.Dataset):
    metainfo = dict(classes=('a', 'b'))

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return dict(inputs=torch.ones(3, 8, 8) * i)

@METRICS.register_module(force=True)
class Nothing(BaseMetric):
    def process(self, *_):
        self.results.append(0)

    def compute_metrics(self, _):
        return dict(nothing=0)
"""


WORK = ['--work-dir', 'work']
LOADS = [
    'load_from=FILE',
    'model.init_cfg.type=Pretrained',
    'model.init_cfg.checkpoint=FILE',
    'model.teacher_ckpt=FILE',
]
EXPORTED = ['new.pt2', '--shape', '8', '8', '--force']
OF_BATCH_NORM = {'convert': ['convert_checkpoint', 'FILE', 'new.pth', '--force']}
OF_THE_TOY = {
    'plot': ['plot_ratios', 'FILE', '--format', 'csv', '--force'],
    'average': ['average_stats', 'config.py', 'FILE', 'new.pth', '--num-batches', '1', '--force', *WORK],
    'export': ['export', 'config.py', 'FILE', *EXPORTED],
    'export, teacher': ['export', 'config.py', 'good.pth', *EXPORTED, '--cfg-options', LOADS[3]],
    'test': ['test', 'config.py', 'FILE', *WORK],
    'resume': ['train', 'config.py', '--resume', 'FILE', *WORK],
    'load_from': ['train', 'config.py', *WORK, '--cfg-options', LOADS[0]],
    'init_cfg': ['train', 'config.py', *WORK, '--cfg-options', *LOADS[1:3]],
    'teacher': ['train', 'config.py', *WORK, '--cfg-options', LOADS[3]],
    'address': ['train', 'config.py', *WORK, '--cfg-options', 'load_from=switchnorm://FILE'],
}


@pytest.fixture(scope='module')
def said(tmp_path_factory):
    """What became of the files, by the way that they took into a tool."""
    toy, batch_norm = tmp_path_factory.mktemp('toy'), tmp_path_factory.mktemp('batch_norm')
    (toy / 'config.py').write_text(CONFIG)
    (toy / 'toy.py').write_text(TOY)
    call(
        toy,
        'env',
        f'PYTHONPATH={toy}{os.pathsep}{os.environ.get("PYTHONPATH", "")}',
        sys.executable,
        TOOLS / 'train.py',
        'config.py',
        '--work-dir',
        'work',
    )
    (toy / 'work/epoch_1.pth').rename(toy / 'good.pth')
    torch.save(dict(state_dict=nn.Sequential(nn.BatchNorm2d(2)).state_dict(), meta={}), batch_norm / 'good.pth')
    said = {}
    for folder, ways in (toy, OF_THE_TOY), (batch_norm, OF_BATCH_NORM):
        # a value that is none of those that torch takes for trust, and turned the protection off
        command = ['env', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=0', sys.executable, '-W', 'ignore', Path(hostile.__file__)]
        out = call(folder, *command, json.dumps(ways))
        for way in ways:
            said[way] = re.findall(rf'^{way}: (.*)', out, re.M)
    return said


@pytest.mark.parametrize('way', [*OF_BATCH_NORM, *OF_THE_TOY])
def test_nothing_runs(way, said):
    """What is data alone is taken, and nothing else."""
    assert said[way][-1] == f'{2 * len(hostile.CONTENTS) + len(hostile.CONTAINERS) + 5} files'
    if way == 'address':  # for which not even the good one is good, since SN needs no conversion
        assert not any('RAN' in line or 'accepted' in line for line in said[way])
    else:
        assert said[way][:-1] == ['good was accepted', 'config was accepted']


# each in a process of its own, which may end as it likes
UNPICKLE = """
import json, os, pickle, sys, torch
from multiprocessing import get_context

def unpickle(path):
    os.chdir(os.path.dirname(path))
    with open(path, 'rb') as file:
        x = pickle.load(file)
    repr((x, hasattr(x, 'dtype') and x['a']))

codes = []
for path in sys.argv[1:]:
    process = get_context('fork').Process(target=unpickle, args=[path])
    process.start()
    process.join()
    codes.append(process.exitcode)
print(json.dumps(codes))
"""


def test_each_would_do_harm_if_it_were_unpickled(tmp_path):
    """Else the test above would be of nothing: it runs, or reaches what no data needs, or crashes, or fails.

    The two that are left out hold one of the others.
    """
    kinds = [kind for kind in hostile.CONTENTS if kind not in ('in a history', 'in a config')]
    files = [tmp_path / str(i) / 'file.pkl' for i in range(len(kinds))]
    for kind, file in zip(kinds, files):
        file.parent.mkdir()
        file.write_bytes(pickle.dumps(hostile.CONTENTS[kind](), 2))
    codes = json.loads(call(tmp_path, sys.executable, '-c', UNPICKLE, *files).splitlines()[-1])
    assert len(codes) == len(kinds) > 10
    for kind, file, code in zip(kinds, files, codes):
        harmed = (file.parent / hostile.FOLDER).exists() or code != 0
        assert harmed or kind.startswith('getattr'), kind
