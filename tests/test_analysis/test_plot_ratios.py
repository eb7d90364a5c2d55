"""tools/plot_ratios.py as users run it."""

import csv
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from ratio_trainings import NAMES, PARTS, learned
from support import can_be_saved
from torch import nn

from sn_openmmlab import SwitchNorm
from sn_openmmlab.analysis import draw


def test_every_format(tool, trained):
    tool('trained', '--out', 'deep/out', '--format', 'png', 'svg', 'pdf', 'html', 'csv')
    out = Path('deep/out')
    figures = {f'{name}.{kind}' for name in ('layers', 'parts', 'radar', 'course') for kind in ('png', 'svg', 'pdf')}
    assert {path.name for path in out.iterdir()} == figures | {'ratios.html', 'ratios.csv'}
    for path in out.glob('*.png'):
        colors = cv2.imread(str(path)).reshape(-1, 3)[:, ::-1]
        for color in '#E69F00', '#009E73', '#0072B2':
            assert (colors == [*bytes.fromhex(color[1:])]).all(1).sum() > 300, (path, color)
    for path in out.glob('*.svg'):
        ElementTree.parse(path)
        assert '<!-- variances -->' in path.read_text() or '<!-- backbone, variances -->' in path.read_text()
    assert all(path.read_bytes()[:5] == b'%PDF-' and path.stat().st_size > 5000 for path in out.glob('*.pdf'))
    rows = [*csv.DictReader((out / 'ratios.csv').open())]
    assert [(row['run'], row['part'], row['layer']) for row in rows] == [('trained', *x) for x in zip(PARTS, NAMES)]
    for row in rows:
        for kind, ratios in zip(('mean', 'var'), learned(trained[0])[row['layer']]):
            values = {n: float(row[f'{kind}_{n}']) for n in ('in', 'ln', 'bn') if row[f'{kind}_{n}']}
            assert values == pytest.approx(ratios, abs=1e-6)


def test_table_of_several_runs(tool, trained):
    out = tool('trained', 'start.pth', '--labels', 'late', 'early', '--layers', 'head', '--format', 'csv')
    assert 'late: 2 SN layers' in out and 'early: 1 SN layers' in out
    ratios = [f'{ratio:.3f}' for pair in learned(trained[0])[NAMES[4]] for ratio in pair.values()]
    [row] = [line for line in out.split('early:')[0].splitlines() if NAMES[4] in line]
    assert row.replace('│', ' ').split() == [NAMES[4], *ratios]
    assert re.search(r'mask head \(1\) ', out) and 'backbone' not in out
    assert {row['run'] for row in csv.DictReader(Path('ratios/ratios.csv').open())} == {'late', 'early'}


def test_names_are_data(tool):
    """Neither formulas (of mathtext or spreadsheets), nor markup (of rich or HTML), nor bytes that are no text."""
    names = [
        'a$\\frac$b',
        'c$x$',
        '[/red]',
        '[bold]d',
        '=HYPERLINK("x")',
        '+1',
        '-1',
        '@SUM(1)',
        '<b>&</b>',
        '../e',
    ]
    labels = ['=cmd|A0 $\\frac$', '[/b]\udcff\x1b[2J\n"']
    state = {f'{name}.{kind}_weight': torch.ones(3) for name in names for kind in ('mean', 'var')}
    for name in 'one.pth', 'two.pth':
        torch.save(state, name)
    out = tool('one.pth', 'two.pth', '--labels', *labels, '--format', 'png', 'svg', 'html', 'csv')
    assert '\x1b' not in out and all(name in out for name in names)
    assert '[/b]\\udcff\\x1b[2J\\n"' in out
    rows = [*csv.DictReader(Path('ratios/ratios.csv').open(newline=''))]
    assert len(rows) == 2 * len(names)
    assert not any(row[key].startswith(('=', '+', '-', '@')) for row in rows for key in ('run', 'part', 'layer'))
    assert {row['layer'].lstrip("'") for row in rows} == set(names)
    figure = Path('ratios/layers.svg').read_text()
    assert all(f'<!-- {name} -->' in figure for name in ('c$x$', '[/red]', 'a$\\frac$b'))
    assert '<b>&' not in Path('ratios/ratios.html').read_text()


def test_a_path_that_is_no_text(tool):
    os.rename(b'start.pth', b'st\xffrt.pth')
    out = tool('st\udcffrt.pth', '--format', 'csv')
    assert 'st\\udcffrt' in out and 'st\\udcffrt' in Path('ratios/ratios.csv').read_text()


def test_figures_are_drawn_where_they_are_asked_for(tool, monkeypatch):
    monkeypatch.setattr(draw, 'figures', None)
    tool('start.pth', '--format', 'html', 'csv')
    assert sorted(path.name for path in Path('ratios').iterdir()) == ['ratios.csv', 'ratios.html']


def test_existing_files_are_kept(tool, capsys):
    Path('ratios').mkdir()
    mine = Path('ratios/ratios.csv')
    mine.write_text('mine')
    with pytest.raises(SystemExit):
        tool('trained', '--format', 'csv', 'html')
    assert 'has ratios.csv already; --force' in capsys.readouterr().err
    assert [p.name for p in Path('ratios').iterdir()] == ['ratios.csv'] and Path(
        'ratios/ratios.csv'
    ).read_text() == 'mine'
    tool('trained', '--format', 'csv', '--force')
    assert mine.read_text().startswith('run,part')


ODD = dict(
    meta=lambda t: t.to('meta'),
    complex=lambda t: t + 1j,
    bool=lambda t: t > 0,
    nested=lambda t: torch.nested.nested_tensor([t, t]),
    float8=lambda t: t.to(torch.float8_e4m3fn),
)
ODD = {name: make for name, make in ODD.items() if can_be_saved(lambda make=make: make(torch.ones(3)))}
TAG = 'sn_stage/0/mean_in'
BAD_JSON = [
    '[' * 100_000,
    '{"importance_ratios": {"0": [[1e400, 0, 0], [1, 0, 0]]}}',
    '{"importance_ratios": {"0": [[1, 0, 0], [NaN, 0, 0]]}}',
    '{"importance_ratios": {"0": [["a", 0, 0], [1, 0, 0]]}}',
]
BAD_LOG = [
    *[f'{{"step": {step}, "{TAG}": 1}}' for step in ('"a"', 'null', '2.5', 'true')],
    f'{{"step": 1, "{TAG}": "a"}}',
    '[' * 100_000,
    '3',
]


@pytest.mark.parametrize(
    'argv, message',
    [
        (['none.pth'], r"source 'none\.pth' is no file"),
        (['devices/ratios.csv'], r"source 'devices/ratios\.csv' is no file"),
        (['noise.pth'], r'noise\.pth: it is no file that torch\.save wrote'),
        (['bn.pth'], r"bn\.pth: it has no SN layer \(norm_cfg=dict\(type='SN'\)"),
        (['two.pth'], r'two\.pth: 0: 2 logits with batch statistics do not tell.*SNRatioHook'),
        (['nan.pth'], r'nan\.pth: 0: its logits are no finite numbers.*diverged'),
        (['half.pth'], r'half\.pth: 0: mean_weight and var_weight .* got \(3,\) and none'),
        (['empty'], r'empty: neither last_checkpoint nor .*importance_ratios\.json'),
        (['gone'], r"gone: .*No such file.*'nowhere/iter_1\.pth'"),
        (['broken'], r"importance_ratios\.json is no log of SNRatioHook \('no json'\)"),
        (['bn.json'], r'bn\.json: it has no SN layer'),
        (['other.json'], r'other\.json: no JSON with importance_ratios'),
        (['trained', '--layers', 'layer9'], r"--layers 'layer9' matches none of trained, which are: backbone\.1, "),
        (['trained', '--layers', '('], r"--layers '\(' is no regular expression"),
        (['trained', 'trained'], r"two sources would be called 'trained'.*--labels"),
        (['trained', '--labels', 'a', 'b'], '--labels: 2 for 1 sources'),
        (['trained', '--format', 'gif'], "invalid choice: 'gif'"),
        (['trained', '--out', 'bn.pth', '--format', 'csv'], r'--out bn\.pth is no folder'),
        (['trained', '--out', 'bn.pth/deep', '--format', 'csv'], r'--out bn\.pth/deep cannot be made: Not a dir'),
        (
            ['trained', '--out', 'devices', '--format', 'csv', '--force'],
            r"'devices/ratios\.csv' is a device or a pipe",
        ),
        (['trained', '--out', 'a\nb', '--format', 'csv'], r"--out 'a\\nb' cannot be printed"),
        (['escape.pth'], r"escape\.pth: it has the name 'a\\x1b\[2J\.mean_weight', which cannot be printed"),
        (['escape.json'], r"escape\.json: it has the name 'a\\x1b\[2J', which cannot be printed"),
        (['radius.pth'], r'radius\.pth: 0: its radius must be one number from 0 to 1, got tensor'),
        (['infinite.pth'], r'infinite\.pth: 0: its radius must be one number from 0 to 1, got nan'),
        (['large.pth'], r'large\.pth: 0: its radius must be one number from 0 to 1, got 5'),
        *[([f'{name}.pth'], f'{name}.pth: 0: its logits are no tensors that hold numbers one by one') for name in ODD],
        *[([f'bad{i}.json'], 'no JSON with importance_ratios, by layer two triples') for i in range(len(BAD_JSON))],
        *[([f'log{i}'], r'importance_ratios\.json is no log of SNRatioHook') for i in range(len(BAD_LOG))],
    ],
)
def test_wrong_input_ends_before_any_work(tool, capsys, argv, message):
    two, nan = SwitchNorm(4, normalizers=('ln', 'bn')), SwitchNorm(4)
    nan.var_weight.data[1] = np.nan
    torch.save(nn.Sequential(nn.BatchNorm2d(4)).state_dict(), 'bn.pth')
    torch.save(nn.Sequential(two).state_dict(), 'two.pth')
    torch.save(nn.Sequential(nan).state_dict(), 'nan.pth')
    torch.save({'0.mean_weight': torch.ones(3)}, 'half.pth')
    logits = {f'0.{kind}_weight': torch.ones(3) for kind in ('mean', 'var')}
    torch.save({**logits, '0.radius': torch.ones(2)}, 'radius.pth')
    torch.save({**logits, '0.radius': torch.tensor(torch.nan)}, 'infinite.pth')
    torch.save({**logits, '0.radius': torch.tensor(5.0)}, 'large.pth')
    for name, make in ODD.items():
        torch.save({key: make(value) for key, value in logits.items()}, f'{name}.pth')
    for i, text in enumerate(BAD_JSON):
        Path(f'bad{i}.json').write_text(text)
    for i, text in enumerate(BAD_LOG):
        Path(f'log{i}/20260101_000000/vis_data').mkdir(parents=True)
        Path(f'log{i}/20260101_000000/vis_data/importance_ratios.json').write_text(text + '\n')
    torch.save({key.replace('0', 'a\x1b[2J'): value for key, value in logits.items()}, 'escape.pth')
    Path('escape.json').write_text(json.dumps(dict(importance_ratios={'a\x1b[2J': [[1, 0, 0], [1, 0, 0]]})))
    Path('devices').mkdir()
    os.mkfifo('devices/ratios.csv')
    Path('noise.pth').write_bytes(b'noise')
    Path('bn.json').write_text('{"importance_ratios": {}}')
    Path('other.json').write_text('[1, 2]')
    Path('broken/20260101_000000/vis_data').mkdir(parents=True)
    Path('broken/20260101_000000/vis_data/importance_ratios.json').write_text('no json\n')
    for name in 'empty', 'gone':
        Path(name).mkdir()
    Path('gone/last_checkpoint').write_text('nowhere/iter_1.pth')
    before = sorted(Path().rglob('*'))
    with pytest.raises(SystemExit) as ended:
        tool(*argv)
    assert ended.value.code == 2
    error = ' '.join(capsys.readouterr().err.split())
    assert re.search(message, error) and 'Traceback' not in error
    assert sorted(Path().rglob('*')) == before
