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

from sn_openmmlab.swap import write

FCOS = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
FCN = 'mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-769x769.py'
MASK = 'mmdet::gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py'

SN_VARIABLE = "norm_cfg = dict(type='SN', requires_grad=True)"


@pytest.fixture
def tool(import_tool, monkeypatch, tmp_path):
    """The module swap_norm, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return import_tool('swap_norm')


def fresh(*lines):
    """What a process prints that has not imported sn_openmmlab."""
    code = '\n'.join(['from mmengine.config import Config', *lines])
    return call(Path.cwd(), sys.executable, '-c', code)


def test_the_file_for_a_config_of_mmdet(tool, capsys):
    tool.main([FCOS])
    text = Path('fcos_r50-caffe_fpn_gn-head_1x_coco_sn-all.py').read_text()
    assert text == (
        '# fcos_r50-caffe_fpn_gn-head_1x_coco.py with SN in backbone, neck, head; made by swap_norm.py\n'
        f'_base_ = {FCOS!r}\n\n'
        "custom_imports = dict(imports=['sn_openmmlab'], allow_failed_imports=False)\n"
        f'{SN_VARIABLE}\n'
        'model = dict(backbone=dict(norm_cfg=norm_cfg),\n'
        '             bbox_head=dict(norm_cfg=norm_cfg))\n'
    )
    out = capsys.readouterr().out
    for line in (
        'backbone: 53 BatchNorm2d -> SwitchNorm',
        "- backbone.norm_cfg=dict(type='BN', requires_grad=False)",
        'head: 8 GroupNorm -> SwitchNorm',
        "+ bbox_head.norm_cfg=dict(type='SN', requires_grad=True)",
        'note: backbone.norm_eval=True',
    ):
        assert line in out
    cfg = Config.fromfile('fcos_r50-caffe_fpn_gn-head_1x_coco_sn-all.py')
    assert cfg.model.bbox_head.norm_cfg == dict(type='SN', requires_grad=True)
    assert [p.name for p in Path.cwd().iterdir()] == ['fcos_r50-caffe_fpn_gn-head_1x_coco_sn-all.py']


def test_one_of_mmseg_reads_without_this_package_imported(tool):
    """Which mmengine would not find in onedl-mmsegmentation."""
    tool.main([FCN, '--out', 'own.py'])
    assert f"_base_ = __import__('sn_openmmlab') and {FCN!r}\n" in Path('own.py').read_text()
    assert 'SN SN\n' in fresh(
        "m = Config.fromfile('own.py').model", 'print(m.backbone.norm_cfg.type, m.decode_head.norm_cfg.type)'
    )


def test_keys_that_must_go(tool):
    """num_groups, also in the variable, which model copies before it is replaced."""
    tool.main([MASK, '--out', 'own.py'])
    text = Path('own.py').read_text()
    assert 'dict(_delete_=True, **norm_cfg)' in text and 'num_groups' not in text
    cfg = Config.fromfile('own.py')
    norms = [cfg.norm_cfg, cfg.model.backbone.norm_cfg, cfg.model.neck.norm_cfg]
    norms += [cfg.model.roi_head.bbox_head.norm_cfg, cfg.model.roi_head.mask_head.norm_cfg]
    assert norms == [dict(type='SN', requires_grad=True)] * 5


def test_options(tool):
    tool.main([MASK, '--to', 'SyncSN', '--parts', 'head', 'neck', '--init-ratios', '0', '0', '1', '--out', 'own.py'])
    text = Path('own.py').read_text()
    assert "neck_heads_norm_cfg = dict(type='SyncSN'" in text
    cfg = Config.fromfile('own.py')
    assert cfg.model.backbone.norm_cfg.type == 'GN' and cfg.norm_cfg.type == 'GN'
    assert cfg.model.neck.norm_cfg == dict(type='SyncSN', requires_grad=True, init_ratios=(0.0, 0.0, 1.0))
    tool.main(['own.py', '--to', 'BN', '--statistics', 'synced', '--out', 'back.py'])
    assert Config.fromfile('back.py').model.neck.norm_cfg == dict(type='SyncBN', requires_grad=True)


def test_lists_norms_of_their_own_and_other_imports(tool, capsys):
    Path('sub').mkdir()
    base = 'mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py'
    Path('user.py').write_text(
        f'_base_ = __import__("sn_openmmlab") and {base!r}\n'
        "custom_imports = dict(imports=['mmseg.models'], allow_failed_imports=False)\n"
        "model = dict(decode_head=dict(norm_cfg=dict(_delete_=True, type='BN', eps=1e-3)))\n"
    )
    tool.main(['user.py', '--out', 'sub/own.py'])
    text = Path('sub/own.py').read_text()
    assert "_base_ = __import__('sn_openmmlab') and '../user.py'\n" in text
    cfg = Config.fromfile('sub/own.py')
    assert cfg.custom_imports.imports == ['mmseg.models', 'sn_openmmlab']
    assert cfg.model.decode_head.norm_cfg == dict(type='SN', eps=1e-3)
    assert [head.norm_cfg.type for head in cfg.model.auxiliary_head] == ['SN'] * 4
    assert [head.channels for head in cfg.model.auxiliary_head] == [16, 64, 256, 1024]
    out = ' '.join(capsys.readouterr().out.split())
    assert 'Not swapped' in out and '8 BatchNorm2d' in out and 'DetailBranch' in out
    assert 'backbone.norm_cfg keeps its norm: has no effect' in out
    assert 'note: batch statistics are those of each process now' in out and 'frozen_stages' not in out


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


def test_names_and_numbers_are_data(tool, capsys):
    """Brackets, quotes and dollars in a path; NaN, which is not equal to itself; a comment that speaks of read_base."""
    folder = Path("c[/b] 'd' $x$ [red]")
    folder.mkdir(parents=True)
    text = f'# we do not use read_base\n_base_ = {FCOS!r}\n'
    text += 'model = dict(test_cfg=dict(score_thr=float("nan"), min_bbox_size=float("-inf")))\n'
    (folder / 'user.py').write_text(text)
    out = folder / 'own.py'
    tool.main([str(folder / 'user.py'), '--out', str(out)])
    said = ' '.join(capsys.readouterr().out.split())
    assert "c[/b] 'd' $x$ [red]/user.py: 61 norm layers change" in said and str(out) in said
    assert 'test_cfg' not in out.read_text()  # it is as it was
    cfg = Config.fromfile(out)
    assert cfg.model.backbone.norm_cfg.type == 'SN' and cfg.model.test_cfg.score_thr != cfg.model.test_cfg.score_thr


def test_mmdets_flops_of_swapped_heads(tool):
    """Which takes whatever has a head_norm_cfg for a Mask R-CNN of its own."""
    tool.main([FCOS, '--parts', 'head', '--out', 'own.py'])
    assert 'heads_norm_cfg = dict(type' in Path('own.py').read_text()
    flops = Path(get_installed_path('mmdet'), '.mim/tools/analysis_tools/get_flops.py')
    out = call(Path.cwd(), sys.executable, flops, 'own.py', fails=True)
    assert "KeyError: 'roi_head'" not in out and 'FileNotFoundError' in out  # it wants COCO, and got that far


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
    Path('new\nline.py').write_text('a = 1')
    before = sorted(Path.cwd().rglob('*'))
    with pytest.raises(SystemExit) as ended:
        tool.main(argv)
    assert ended.value.code == 2
    assert re.search(message, ' '.join(capsys.readouterr().err.split()))
    assert sorted(Path.cwd().rglob('*')) == before


def test_a_file_that_would_read_back_otherwise_is_not_written(tool, monkeypatch):
    monkeypatch.setattr(
        write, 'express_change', lambda old, new, *_: {} if isinstance(new, dict) and 'type' in new else new
    )
    with pytest.raises(AssertionError, match='reads back as another config in model'):
        tool.main([FCOS])
    assert not list(Path.cwd().iterdir())


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
    call(Path.cwd(), *sweep)
    again = [json.loads(line) for line in Path('sweep.jsonl').read_text().splitlines()][1:]
    assert [r['config'] for r in again] == [r['config'] for r in records]
    assert again[0]['status'] == 'kept' and [r['status'] for r in again[1:]] == [r['status'] for r in records[1:]]
