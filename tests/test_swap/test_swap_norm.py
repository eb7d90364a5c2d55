"""tools/swap_norm.py and benchmarks/sweep_configs.py as users run them."""

import json
import re
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.utils import get_installed_path
from support import TOOLS, call
from test_tools import DETECTOR, SEGMENTOR

from test_swap.cases import FCOS, MASK, SN_VARIABLE, fresh


def test_options(tool):
    tool.main([MASK, '--to', 'SyncSN', '--parts', 'head', 'neck', '--init-ratios', '0', '0', '1', '--out', 'own.py'])
    text = Path('own.py').read_text()
    assert "neck_heads_norm_cfg = dict(type='SyncSN'" in text
    cfg = Config.fromfile('own.py')
    assert cfg.model.backbone.norm_cfg.type == 'GN' and cfg.norm_cfg.type == 'GN'
    assert cfg.model.neck.norm_cfg == dict(type='SyncSN', requires_grad=True, init_ratios=(0.0, 0.0, 1.0))
    tool.main(['own.py', '--to', 'BN', '--statistics', 'synced', '--out', 'back.py'])
    assert Config.fromfile('back.py').model.neck.norm_cfg == dict(type='SyncBN', requires_grad=True)


def test_a_dry_run_writes_nothing(tool, capsys):
    tool.main([FCOS, '--dry-run'])
    out = capsys.readouterr().out
    assert SN_VARIABLE in out and 'not written' in out
    assert not list(Path.cwd().iterdir())


def test_an_existing_file_stays(tool, capsys):
    Path('own.py').write_text('mine')
    with pytest.raises(SystemExit):
        tool.main([FCOS, '--out', 'own.py'])
    assert Path('own.py').read_text() == 'mine' and 'own.py exists' in capsys.readouterr().err


def test_a_reason_that_says_nothing_is_told_by_its_line(tool, capsys):
    """GroupNorm without num_groups: mmcv asserts, without a word."""
    Path('user.py').write_text(
        f'_base_ = {FCOS!r}\nmodel = dict(bbox_head=dict(norm_cfg=dict(_delete_=True, type="GN")))'
    )
    with pytest.raises(SystemExit):
        tool.main(['user.py'])
    assert re.search(r'cannot be built as it is: AssertionError: assert .num_groups. in', capsys.readouterr().err)


@pytest.mark.parametrize(
    'argv, message',
    [
        (['none.py'], r"config 'none\.py' is no file"),
        (['mmdet::none/none.py'], r'mmdet::none/none\.py cannot be read'),
        (['mmnone::none/none.py'], 'cannot be read'),
        ([FCOS, '--to', 'LN'], "invalid choice: 'LN'"),
        ([FCOS, '--init-ratios', '1', '1', '1'], 'sum to 1'),
        ([FCOS, '--to', 'GN', '--statistics', 'frozen'], 'GN has none'),
        ([FCOS, '--out', 'own.json'], r'must end in \.py'),
        ([FCOS, '--out', 'none/own.py'], 'no folder none'),
        (['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'], 'no norm layer changes'),
        (['lazy.py'], 'new-style config'),
        (['classes.py'], 'new-style config'),
        (['circle.py'], 'circle.py cannot be read: its _base_ leads back to itself'),
        (['ends.py'], 'ends.py cannot be read: it ends Python'),
        (['raises.py'], 'raises.py cannot be read: ZeroDivisionError'),
        (['numbers.py'], r'numbers\.py cannot be read: RuntimeError in numbers\.py: z = np\.ones\(3\)'),
        (['asserts.py'], r'asserts\.py cannot be read: AssertionError in asserts\.py: assert False'),
        (['inherits.py'], r'inherits\.py cannot be read: AssertionError in asserts\.py: assert False'),
        ([FCOS, '--out', 'loop.py'], r'loop\.py cannot be written: (Symlink loop|Too many levels)'),
        (['new\nline.py'], r"'new\\nline\.py' cannot be written into a config"),
        ([FCOS, '--out', 'new\nline.py'], r"'new\\nline\.py' cannot be written into a config"),
        ([FCOS, '--out', f'{"x" * 260}.py'], 'cannot be written: File name too long'),
        (['nothing.py'], 'has no model'),
    ],
)
def test_wrong_input_ends_before_anything_is_written(tool, capsys, argv, message):
    Path('nothing.py').write_text('a = 1')
    Path('base.py').write_text('a = 1')
    Path('lazy.py').write_text('from mmengine.config import read_base\nwith read_base():\n    from .base import *\n')
    Path('classes.py').write_text('from torch import nn\nmodel = dict(type=nn.BatchNorm2d, num_features=4)\n')
    Path('circle.py').write_text("_base_ = 'circle.py'")
    Path('ends.py').write_text('import sys\nsys.exit(0)')
    Path('raises.py').write_text('1 / 0')
    Path('numbers.py').write_text('import numpy as np\nz = np.ones(3)')
    Path('asserts.py').write_text('assert False')
    Path('inherits.py').write_text("_base_ = 'asserts.py'")
    Path('loop.py').symlink_to('loop.py')
    Path('new\nline.py').write_text('a = 1')
    before = sorted(Path.cwd().rglob('*'))
    with pytest.raises(SystemExit) as ended:
        tool.main(argv)
    assert ended.value.code == 2
    assert re.search(message, ' '.join(capsys.readouterr().err.split()))
    assert sorted(Path.cwd().rglob('*')) == before


@pytest.mark.parametrize('library, text', [('mmdet', DETECTOR), ('mmseg', SEGMENTOR)])
def test_the_librarys_own_train_tool_takes_the_file(tool, library, text):
    call(
        Path.cwd(), sys.executable, TOOLS / 'make_demo_data.py', 'data', '--train', '4', '--val', '2', '--size', '64x64'
    )
    old = "norm_cfg = dict(type='GN', num_groups=8)"
    assert SN_VARIABLE in text
    Path('user.py').write_text(f'DATA = {str(Path("data").resolve())!r}\n{text.replace(SN_VARIABLE, old)}')
    tool.main(['user.py', '--out', 'own.py'])
    train = Path(get_installed_path(library), '.mim/tools/train.py')
    out = call(
        Path.cwd(), sys.executable, train, 'own.py', '--work-dir', 'work', '--cfg-options', 'train_cfg.max_iters=1'
    )
    assert re.search(r'Iter\(train\) +\[1/1\].* loss: \d', out) or 'Saving checkpoint at 1 iterations' in out
    state = fresh('import torch', "print(*torch.load('work/iter_1.pth', weights_only=False)['state_dict'])").split()
    assert 'backbone.layer1.0.bn1.mean_weight' in state and not any('.gn' in key for key in state)


def test_a_sweep_goes_on_where_it_stopped(tool):
    sweep = [sys.executable, TOOLS.parent / 'benchmarks/sweep_configs.py', '--out', 'sweep.jsonl', '--sample', '2']
    out = call(Path.cwd(), *sweep)
    head, *records = map(json.loads, Path('sweep.jsonl').read_text().splitlines())
    assert {'torch', 'mmdet', 'mmseg', 'date'} <= set(head)
    assert len(records) == 4 and all(record['status'] in out for record in records)
    records[0]['status'] = 'kept'
    text = '\n'.join(json.dumps(record) for record in records)
    Path('sweep.jsonl').write_text(text[:-20])  # as if it had been stopped within the last line
    call(Path.cwd(), *sweep, '--processes', '1')
    again = [json.loads(line) for line in Path('sweep.jsonl').read_text().splitlines()][1:]
    assert [r['config'] for r in again] == [r['config'] for r in records]
    assert again[0]['status'] == 'kept' and [r['status'] for r in again[1:]] == [r['status'] for r in records[1:]]
