"""The file that a swap is written as: what stands in it, and that it reads back as what was swapped."""

import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.utils import get_installed_path
from support import call

from sn_openmmlab.swap import write
from test_swap.cases import FCN, FCOS, MASK, SCRATCH, SN_VARIABLE, fresh


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


@pytest.mark.parametrize(
    'args, told',
    [
        ([MASK], True),  # Detectron's ResNet with GN
        ([MASK, '--parts', 'neck', 'head'], False),
        ([SCRATCH], False),
        ([FCOS], False),  # from a ResNet with BatchNorm
        ([FCOS, '--to', 'GN'], True),
    ],
)
def test_names_that_a_checkpoint_does_not_have_are_told(tool, capsys, args, told):
    tool.main([*args, '--dry-run'])
    out = ' '.join(capsys.readouterr().out.split())
    assert ('norms of the backbone have other names now (backbone.' in out) == told


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


@pytest.mark.parametrize(
    'value',
    [
        'lambda x: x',
        '__import__("functools").partial(int, base=2)',
        '{float("nan"): 1}',
        '__import__("numpy").ones(3)',
        '__import__("torch").ones(3)',
        '__import__("decimal").Decimal("NaN")',
        '__import__("pathlib").Path("a")',
        'object()',
    ],
)
def test_values_that_are_not_equal_when_read_again(tool, value):
    Path('user.py').write_text(f'_base_ = {FCOS!r}\nmodel = dict(test_cfg=dict(own={value}))\n')
    tool.main(['user.py', '--out', 'own.py'])
    assert 'own=' not in Path('own.py').read_text()  # it is as it was
    assert Config.fromfile('own.py').model.backbone.norm_cfg.type == 'SN'


def test_mmdets_flops_of_swapped_heads(tool):
    """Which takes whatever has a head_norm_cfg for a Mask R-CNN of its own."""
    tool.main([FCOS, '--parts', 'head', '--out', 'own.py'])
    assert 'heads_norm_cfg = dict(type' in Path('own.py').read_text()
    flops = Path(get_installed_path('mmdet'), '.mim/tools/analysis_tools/get_flops.py')
    out = call(Path.cwd(), sys.executable, flops, 'own.py', fails=True)
    assert "KeyError: 'roi_head'" not in out and 'FileNotFoundError' in out  # it wants COCO, and got that far


def test_a_file_that_would_read_back_otherwise_is_not_written(tool, monkeypatch, capsys):
    monkeypatch.setattr(
        write, 'express_change', lambda old, new, *_: {} if isinstance(new, dict) and 'type' in new else new
    )
    with pytest.raises(SystemExit):
        tool.main([FCOS])
    assert 'would read back as another one in model' in capsys.readouterr().err
    assert not list(Path.cwd().iterdir())
