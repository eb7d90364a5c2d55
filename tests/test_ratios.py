"""Importance ratios: logged in real trainings, read from what these leave behind, and drawn by tools/plot_ratios.py."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from sn_openmmlab import SNRatioHook, SparseSwitchNorm, SwitchNorm, read_ratios
from sn_openmmlab.analysis import draw

ROOT = Path(__file__).parents[1]
NAMES = ['backbone.1', 'backbone.3', 'neck.1', 'roi_head.bbox_head.bn', 'roi_head.mask_head.0.bn']
PARTS = ['backbone', 'backbone', 'neck', 'box head', 'mask head']
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


class Net(BaseModel):
    """Five SN layers with names as in Mask R-CNN; the neck's has no BN, and the box head's no LN."""

    def __init__(self, norm=SwitchNorm):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.Conv2d(6, 6, 3), norm(6))
        self.neck = nn.Sequential(nn.Conv2d(6, 6, 1), norm(6))
        heads = dict(
            bbox_head=nn.ModuleDict(dict(bn=norm(6))), mask_head=nn.ModuleList([nn.ModuleDict(dict(bn=norm(6)))])
        )
        self.roi_head = nn.ModuleDict(heads)
        if norm is SwitchNorm:
            self.neck[1] = norm(6, normalizers=('in', 'ln'))
            self.roi_head['bbox_head']['bn'] = norm(6, normalizers=('in', 'bn'))
        self.logits = [p for name, p in self.named_parameters() if name.endswith(('mean_weight', 'var_weight'))]
        for p in self.logits:
            p.data.normal_()

    def forward(self, inputs, mode='tensor'):
        x = self.neck(self.backbone(inputs))
        for head in self.roi_head['bbox_head'], self.roi_head['mask_head'][0]:
            x = head['bn'](x.relu() + inputs.mean())
        return dict(loss=(x - torch.arange(6).view(-1, 1, 1) * inputs[:, :1, 4:, 4:]).square().mean())


def train(work_dir, hook, iterations=5, epochs=None, model=None, launcher='none', **config):
    """Train on 4 batches an epoch, by iterations, or by epochs where these are given; returns the model."""
    torch.manual_seed(1)
    model = model or Net()
    images = [dict(inputs=torch.randn(3, 12, 12) * (i + 1)) for i in range(8)]
    runner = Runner(
        model,
        str(work_dir),
        train_dataloader=DataLoader(images, batch_size=2),
        train_cfg=dict(by_epoch=True, max_epochs=epochs) if epochs else dict(by_epoch=False, max_iters=iterations),
        optim_wrapper=OptimWrapper(torch.optim.SGD(model.logits or model.parameters(), lr=10)),
        default_hooks=dict(checkpoint=CheckpointHook(interval=2, by_epoch=bool(epochs))),
        custom_hooks=[hook],
        launcher=launcher,
        # mmengine keeps visualizers by this name and the second of their start
        experiment_name=f'{Path(work_dir).name}{" resumed" * config.get("resume", False)}',
        log_level='ERROR',
        **config,
    )
    runner.train()
    return model


def records(work_dir, name='importance_ratios.json'):
    [path] = Path(work_dir).glob(f'*/vis_data/{name}')
    return [json.loads(line) for line in path.read_text().splitlines()]


def learned(model):
    """Ratios by layer as two dicts by normalizer, from the logits by hand."""
    ratios = {}
    for name in NAMES:
        layer = model.get_submodule(name)
        logits = layer.mean_weight.tolist(), layer.var_weight.tolist()
        powers = [np.exp(values) / np.exp(values).sum() for values in logits]
        ratios[name] = [dict(zip(layer.normalizers, values)) for values in powers]
    return ratios


def array(pair):
    return np.array([[ratios.get(normalizer, np.nan) for normalizer in ('in', 'ln', 'bn')] for ratios in pair])


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The model and the work directory of a training of 5 iterations that logged every second one."""
    work_dir = tmp_path_factory.mktemp('ratios') / 'trained'
    return train(work_dir, SNRatioHook(interval=2, by_epoch=False)), work_dir


class TestHook:
    def test_what_is_logged(self, trained):
        """Every layer's ratios, and the means of the parts, at the start, every 2 iterations, and at the end."""
        model, work_dir = trained
        log = records(work_dir)
        assert [record['step'] for record in log] == [0, 2, 4, 5]
        expected = {}
        for (name, pair), part in zip(learned(model).items(), PARTS):
            for kind, ratios in zip(('mean', 'var'), pair):
                for normalizer, ratio in ratios.items():
                    expected[f'sn_{part.replace(" ", "_")}/{name}/{kind}_{normalizer}'] = ratio
        for kind in 'mean', 'var':
            for normalizer in 'in', 'ln', 'bn':
                of = '/{}/' + f'{kind}_{normalizer}'
                both = [expected['sn_backbone' + of.format(name)] for name in NAMES[:2]]
                expected[f'sn_parts/backbone/{kind}_{normalizer}'] = sum(both) / 2
                for part, name in zip(('neck', 'box_head', 'mask_head'), NAMES[2:]):
                    if f'sn_{part}' + of.format(name) in expected:
                        expected[f'sn_parts/{part}/{kind}_{normalizer}'] = expected[f'sn_{part}' + of.format(name)]
        start, last = log[0], log[-1]
        assert all(abs(start[name] - last[name]) > 1e-4 for name in start if name != 'step')  # they do learn
        assert last.pop('step') == 5
        assert last == pytest.approx(expected, abs=1e-6) and len(last) == 2 * (13 + 10)
        # all that goes to the visualizer's scalars, beside the losses
        assert [r for r in records(work_dir, 'scalars.json') if 'sn_neck/neck.1/mean_in' in r][-1] == {
            **last,
            'step': 5,
        }

    def test_the_log_agrees_with_the_checkpoint(self, trained):
        model, work_dir = trained
        then = Net()
        then.load_state_dict(torch.load(work_dir / 'iter_2.pth', weights_only=False)['state_dict'])
        _, record, *_ = records(work_dir)
        for name, part in zip(NAMES, PARTS):
            for kind, ratios in zip(('mean', 'var'), learned(then)[name]):
                for normalizer, ratio in ratios.items():
                    assert record[f'sn_{part.replace(" ", "_")}/{name}/{kind}_{normalizer}'] == pytest.approx(
                        ratio, abs=1e-6
                    )

    @pytest.mark.parametrize('interval, steps', [(1, [0, 4, 8, 12]), (2, [0, 8, 12])])
    def test_by_epoch(self, tmp_path, interval, steps):
        train(tmp_path, SNRatioHook(interval), epochs=3)
        assert [record['step'] for record in records(tmp_path)] == steps

    def test_two_processes(self, two, tmp_path):
        """One of them writes, and wrapped models have the same names."""
        results = two(train_wrapped, str(tmp_path))
        assert results[0] == results[1]
        log = records(tmp_path)
        assert [record['step'] for record in log] == [0, 2, 3]
        last = {name: log[-1][f'sn_mask_head/{NAMES[4]}/{name}'] for name in ('mean_in', 'mean_ln', 'mean_bn')}
        assert list(last.values()) == pytest.approx(results[0], abs=1e-6)

    def test_a_model_without_sn_is_an_error(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"Net has no SN layer.*norm_cfg=dict\(type='SN'\).*swap_norm.*custom_hooks"
        ):
            train(tmp_path, SNRatioHook(), epochs=1, model=Net(nn.BatchNorm2d))

    def test_epochs_in_a_loop_by_iterations_are_an_error(self, tmp_path):
        with pytest.raises(ValueError, match='by_epoch=False and interval'):
            train(tmp_path, SNRatioHook())

    def test_interval(self):
        with pytest.raises(ValueError, match='interval must be a whole number of at least 1, got 0'):
            SNRatioHook(interval=0)


def train_wrapped(work_dir):
    os.environ['LOCAL_RANK'] = '0'
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None)
    hook = SNRatioHook(interval=2, by_epoch=False)
    model = train(work_dir, hook, 3, launcher='pytorch', cfg=dict(model_wrapper_cfg=wrapper))
    return [*learned(model)[NAMES[4]][0].values()]


class TestReading:
    def test_a_work_directory(self, trained):
        model, work_dir = trained
        run = read_ratios(work_dir)
        assert run.label == 'trained' and [*run.course] == [0, 2, 4, 5]
        assert run.parts == {'backbone': NAMES[:2], 'neck': NAMES[2:3], 'box head': NAMES[3:4], 'mask head': NAMES[4:]}
        for name, pair in learned(model).items():
            np.testing.assert_allclose(run.layers[name], array(pair), atol=1e-6)
            np.testing.assert_allclose(run.course[5][name], array(pair), atol=1e-6)
            np.testing.assert_allclose(run.course[0][name], array(learned(Net())[name]), atol=1e-6)

    def test_a_work_directory_that_was_moved(self, trained, tmp_path):
        model, work_dir = trained
        shutil.copytree(work_dir, tmp_path / 'moved')
        (tmp_path / 'moved/last_checkpoint').write_text('no/such/folder/iter_4.pth')
        run = read_ratios(tmp_path / 'moved')
        np.testing.assert_allclose(run.layers[NAMES[0]], run.course[4][NAMES[0]], atol=1e-6)

    def test_a_log_alone(self, trained, tmp_path):
        """Without a checkpoint, while its last line is being written."""
        model, work_dir = trained
        shutil.copytree(work_dir, tmp_path / 'running', ignore=shutil.ignore_patterns('*.pth', 'last_checkpoint'))
        [log] = (tmp_path / 'running').glob('*/vis_data/importance_ratios.json')
        log.write_text(log.read_text() + '{"sn_parts/back')
        run = read_ratios(tmp_path / 'running')
        assert [*run.course] == [0, 2, 4, 5] and [*run.layers] == NAMES
        np.testing.assert_array_equal(run.layers[NAMES[3]], run.course[5][NAMES[3]])

    @pytest.mark.parametrize('cut', ['', '{"sn_parts/back'], ids=['empty', 'half a line'])
    def test_a_newest_log_without_a_record_costs_nothing(self, trained, tmp_path, cut):
        """As that of a training that was resumed, and stopped before its first record."""
        shutil.copytree(trained[1], tmp_path / 'work')
        newest = tmp_path / 'work/20991231_000000/vis_data'
        newest.mkdir(parents=True)
        (newest / 'importance_ratios.json').write_text(cut)
        assert [*read_ratios(tmp_path / 'work').course] == [0, 2, 4, 5]

    def test_an_empty_last_checkpoint(self, trained, tmp_path):
        """As a full disk leaves it: the log is enough."""
        shutil.copytree(trained[1], tmp_path / 'work')
        (tmp_path / 'work/last_checkpoint').write_text('')
        run = read_ratios(tmp_path / 'work')
        np.testing.assert_array_equal(run.layers[NAMES[0]], run.course[5][NAMES[0]])

    def test_a_resumed_training(self, tmp_path):
        """What came after the checkpoint that it went on from no longer counts."""
        train(tmp_path, SNRatioHook(interval=1, by_epoch=False), 3)
        [first] = [log.parent for log in tmp_path.glob('*/vis_data')]
        first.rename(tmp_path / '20000101_000000')
        (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
        train(tmp_path, SNRatioHook(interval=4, by_epoch=False), 6, resume=True)
        assert [*read_ratios(tmp_path).course] == [0, 1, 2, 4, 6]

    def test_a_checkpoint(self, tmp_path):
        """Also one that DistributedDataParallel has prefixed; two logits without batch statistics are IN and LN."""
        model = nn.Sequential(SwitchNorm(4, init_ratios=(0.2, 0.3, 0.5)), SwitchNorm(4, normalizers=('in', 'ln')))
        torch.save({f'module.{k}': v for k, v in model.state_dict().items()}, tmp_path / 'model.pth')
        run = read_ratios(tmp_path / 'model.pth')
        assert run.label == f'{tmp_path.name}/model' and run.course == {}
        np.testing.assert_allclose(run.layers['0'], [[0.2, 0.3, 0.5]] * 2, atol=1e-6)
        np.testing.assert_allclose(run.layers['1'], [[0.5, 0.5, np.nan]] * 2, atol=1e-6)

    def test_a_checkpoint_of_sparse_sn(self, tmp_path):
        net = nn.Sequential(SparseSwitchNorm(4, init_ratios=(0.2, 0.3, 0.5)), SwitchNorm(4))
        net[0].radius.fill_(0.6)
        path = tmp_path / 'ssn.pth'
        torch.save(net.state_dict(), path)
        layers = read_ratios(path).layers
        assert [*layers] == ['0', '1']
        for i, ratios in enumerate(layers.values()):
            np.testing.assert_allclose(ratios, net[i].importance_ratios, atol=1e-7)
        assert (layers['0'][:, 2] > 0.5).all()  # pushed away from its logits by the radius

    def test_a_result_of_the_accuracy_comparison(self, tmp_path):
        ratios = {'backbone.bn1': [[0.2, 0.3, 0.5], [0.1, 0.2, 0.7]], 'decode_head.bn': [[0.4, 0.6], [0.5, 0.5]]}
        (tmp_path / 'cell.json').write_text(json.dumps(dict(importance_ratios=ratios)))
        run = read_ratios(tmp_path / 'cell.json')
        assert run.label == 'cell' and run.parts == {'backbone': ['backbone.bn1'], 'decode head': ['decode_head.bn']}
        np.testing.assert_array_equal(run.layers['decode_head.bn'], [[0.4, 0.6, np.nan], [0.5, 0.5, np.nan]])

    def test_figures_show_these_ratios(self, trained):
        """Widths and colours of the bars, and the points of the radar and of the course."""
        model, work_dir = trained
        run, ratios = read_ratios(work_dir), learned(model)
        figures = draw.figures([run])
        assert set(figures) == {'layers', 'parts', 'radar', 'course'}
        for kind in 0, 1:
            bars = {}
            for bar in figures['layers'].axes[kind].patches:
                bars.setdefault(matplotlib_color(bar), []).append(bar.get_width())
            for i, normalizer in enumerate(('in', 'ln', 'bn')):
                widths = [ratios[name][kind].get(normalizer, 0) for name in NAMES]
                np.testing.assert_allclose(bars[draw.COLORS[normalizer].lower()], widths, atol=1e-6)
                backbone = sum(ratios[name][kind][normalizer] for name in NAMES[:2]) / 2
                for name in 'radar', 'course':
                    line = figures[name].axes[kind].lines[i]
                    assert line.get_color() == draw.COLORS[normalizer]
                    assert line.get_ydata()[0 if name == 'radar' else -1] == pytest.approx(backbone, abs=1e-6)


def matplotlib_color(bar):
    from matplotlib.colors import to_hex

    return to_hex(bar.get_facecolor())


def test_importing_the_package_does_not_import_matplotlib():
    code = 'import sys, mmengine.runner; before = "matplotlib" in sys.modules; import sn_openmmlab; '
    code += 'print(before, "matplotlib" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ['False', 'False'], done.stderr


@pytest.fixture
def tool(import_tool, tmp_path, trained, monkeypatch, capsys):
    """Run plot_ratios in a folder with the work directory 'trained' and the checkpoint start.pth, for its output."""
    (tmp_path / 'trained').symlink_to(trained[1])
    torch.save({k: v for k, v in Net().state_dict().items() if 'bbox_head' not in k}, tmp_path / 'start.pth')
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        import_tool('plot_ratios').main([*map(str, argv)])
        return capsys.readouterr().out

    return run


class TestTool:
    def test_every_format(self, tool, trained):
        tool('trained', '--out', 'deep/out', '--format', 'png', 'svg', 'pdf', 'html', 'csv')
        out = Path('deep/out')
        figures = {
            f'{name}.{kind}' for name in ('layers', 'parts', 'radar', 'course') for kind in ('png', 'svg', 'pdf')
        }
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

    def test_table_of_several_runs(self, tool, trained):
        out = tool('trained', 'start.pth', '--labels', 'late', 'early', '--layers', 'head', '--format', 'csv')
        assert 'late: 2 SN layers' in out and 'early: 1 SN layers' in out
        ratios = [f'{ratio:.3f}' for pair in learned(trained[0])[NAMES[4]] for ratio in pair.values()]
        [row] = [line for line in out.split('early:')[0].splitlines() if NAMES[4] in line]
        assert row.replace('│', ' ').split() == [NAMES[4], *ratios]
        assert re.search(r'mask head \(1\) ', out) and 'backbone' not in out
        assert {row['run'] for row in csv.DictReader(Path('ratios/ratios.csv').open())} == {'late', 'early'}

    def test_names_are_data(self, tool):
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

    def test_a_path_that_is_no_text(self, tool):
        os.rename(b'start.pth', b'st\xffrt.pth')
        out = tool('st\udcffrt.pth', '--format', 'csv')
        assert 'st\\udcffrt' in out and 'st\\udcffrt' in Path('ratios/ratios.csv').read_text()

    def test_figures_are_drawn_where_they_are_asked_for(self, tool, monkeypatch):
        monkeypatch.setattr(draw, 'figures', None)
        tool('start.pth', '--format', 'html', 'csv')
        assert sorted(path.name for path in Path('ratios').iterdir()) == ['ratios.csv', 'ratios.html']

    def test_existing_files_are_kept(self, tool, capsys):
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

    @pytest.mark.parametrize(
        'argv, message',
        [
            (['none.pth'], r'none\.pth: .*No such file'),
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
            (['radius.pth'], r'radius\.pth: 0: its radius must be one finite number, got tensor'),
            (['infinite.pth'], r'infinite\.pth: 0: its radius must be one finite number, got nan'),
            (['meta.pth'], r'meta\.pth: 0: its logits are no tensors that hold their values one by one'),
        ],
    )
    def test_wrong_input_ends_before_any_work(self, tool, capsys, argv, message):
        two, nan = SwitchNorm(4, normalizers=('ln', 'bn')), SwitchNorm(4)
        nan.var_weight.data[1] = np.nan
        torch.save(nn.Sequential(nn.BatchNorm2d(4)).state_dict(), 'bn.pth')
        torch.save(nn.Sequential(two).state_dict(), 'two.pth')
        torch.save(nn.Sequential(nan).state_dict(), 'nan.pth')
        torch.save({'0.mean_weight': torch.ones(3)}, 'half.pth')
        logits = {f'0.{kind}_weight': torch.ones(3) for kind in ('mean', 'var')}
        torch.save({**logits, '0.radius': torch.ones(2)}, 'radius.pth')
        torch.save({**logits, '0.radius': torch.tensor(torch.nan)}, 'infinite.pth')
        torch.save({key: value.to('meta') for key, value in logits.items()}, 'meta.pth')
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


# what a reader does: hover over a bar and over the course, filter, switch a run off; `seen` tells what the page shows
ACTIONS = """<script>{
const seen = {}, all = selector => [...document.querySelectorAll(selector)];
const hover = (element, x) => element.dispatchEvent(new PointerEvent('pointermove', {bubbles: true, clientX: x}));
const count = () => ['#layers .bar', '#parts .bar', '#course path.line', '#radar svg'].map(name => all(name).length);
const tip = document.getElementById('tip'), filter = document.getElementById('filter');
const type = text => { filter.value = text; filter.dispatchEvent(new Event('input')); };
const bar = all('#layers .bar')[0], area = all('#course rect')[0], box = area.getBoundingClientRect();
seen.all = count();
seen.widths = [...bar.children].map(piece => piece.getBoundingClientRect().width / bar.clientWidth);
hover(bar, 0);
seen.bar = tip.textContent;
hover(area, box.left + 0.42 * box.width);
seen.course = tip.textContent.split('\\n');
hover(document.querySelector('h1'), 0);
seen.tipHidden = tip.hidden;
type('mask|neck');
seen.filtered = count();
type('(');
seen.invalid = [filter.checkValidity(), ...count()];
type('');
all('#runs input')[0].click();
seen.second = count();
document.body.dataset.seen = JSON.stringify(seen);
}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium (apt-get install chromium)')
class TestPage:
    def test_it_works_offline_without_a_console_message(self, tool, tmp_path, trained):
        """In two runs of which only the first one has a course, with a label that would be markup."""
        tool('trained', 'start.pth', '--labels', 'late', '</script><b>&', '--format', 'html')
        page = Path('ratios/ratios.html').read_text()
        assert not re.search(r'https?://(?!www\.w3\.org/2000/svg)|\bsrc=|\bhref=|@import|url\(', page)
        dom, console = browse(tmp_path, page + ACTIONS)
        assert console == []
        seen = json.loads(re.search(r'data-seen="([^"]*)"', dom)[1].replace('&quot;', '"'))
        first = learned(trained[0])[NAMES[0]][0]
        # bars: two of each layer and run; lines of the course: 3 of backbone and mask head, 2 of neck and box head
        assert seen['all'] == [18, 14, 20, 4]
        assert seen['widths'] == pytest.approx([*first.values()], abs=5e-3)
        values = '   '.join(f'{name.upper()} {ratio:.3f}' for name, ratio in first.items())
        assert seen['bar'] == f'{NAMES[0]}\nlate\nmeans: {values}'
        middle = read_ratios(trained[1]).course[2]
        backbone = (middle[NAMES[0]][0] + middle[NAMES[1]][0]) / 2
        values = '   '.join(f'{name} {ratio:.3f}' for name, ratio in zip(('IN', 'LN', 'BN'), backbone))
        assert seen['course'] == ['iteration 2', values]
        assert seen['tipHidden'] is True
        assert seen['filtered'] == [8, 8, 10, 0]
        assert seen['invalid'] == [False, 8, 8, 10, 0]  # as before
        assert seen['second'] == [8, 6, 0, 2]

    def test_errors_would_be_seen(self, tool, tmp_path):
        """The proof for the test above: exceptions, errors and forbidden requests all reach the console."""
        tool('trained', '--format', 'html')
        bad = "<script>console.error('an error'); Promise.reject(new Error('late')); undefined_function()</script>"
        bad += '<script src="https://localhost/x.js"></script>'
        _, console = browse(tmp_path, Path('ratios/ratios.html').read_text() + bad)
        for text in 'an error', 'Error: late', 'undefined_function is not defined', 'Content Security Policy':
            assert sum(text in line for line in console) == 1, console


def browse(folder, page):
    """Open a page in headless Chromium; returns the document as it became, and what was said on the console."""
    path = folder / 'page.html'
    path.write_text(page, encoding='utf-8')
    switches = [
        'headless',
        'no-sandbox',
        'disable-gpu',
        'disable-quic',
        'no-first-run',
        'disable-background-networking',
    ]
    switches += ['disable-component-update', 'disable-sync', f'user-data-dir={folder / "user"}']
    switches += ['enable-logging=stderr', 'v=0', 'dump-dom']
    command = [CHROMIUM, *(f'--{switch}' for switch in switches), path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if ':CONSOLE' in line]
