"""Export: ONNX by both exporters, torch.export and TorchScript give what the model gives, at sizes of any kind."""

import io
import shutil
import warnings
from collections import Counter
from pathlib import Path

import mmseg
import onnx
import onnxruntime
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from support import randomized, relative_error, scatter
from test_tools import DETECTOR
from torch import nn
from torch.export import Dim

from sn_openmmlab import (
    SwitchNorm,
    SwitchNorm1d,
    SwitchNorm2d,
    SwitchNorm3d,
    SyncSN,
    fold_batch_norm,
    swap_norm,
)
from sn_openmmlab.ops import switch_norm_reference
from sn_openmmlab.ops.formula import switch_norm_graph

pytestmark = pytest.mark.usefixtures('seed')
SIZES = [(2, 3, 64, 48), (1, 3, 32, 96), (3, 3, 48, 48)]  # the first is exported
EXPORTERS = {'torchscript': 17, 'torch.export': 18}  # the oldest opset of each that is promised


class Last(nn.Module):
    """A backbone's last feature map, or a segmentor's logits."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        y = self.net(x)
        return y[-1] if isinstance(y, tuple) else y


def resnet18(stages=4, **norm_cfg):
    init_default_scope('mmdet')
    norm_cfg = dict(dict(type='SN'), **norm_cfg)
    last = dict(num_stages=stages, strides=(1, 2, 2, 2)[:stages], dilations=(1,) * stages, out_indices=(stages - 1,))
    net = dict(type='mmdet.ResNet', depth=18, base_channels=16, stem_channels=16, norm_cfg=norm_cfg, **last)
    return Last(MODELS.build(net))


def fcn_r18_d8():
    name = 'fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py'
    config = Config.fromfile(Path(mmseg.__file__).parent / '.mim/configs' / name)
    config.model.pretrained = None
    config = swap_norm(config)
    init_default_scope('mmseg')
    return Last(MODELS.build(config.model))


def to_onnx(model, x, path, exporter, opset=None, dynamic=True):
    """Export, have the file checked, and return its graph."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    names = dict(opset_version=opset or EXPORTERS[exporter], input_names=['x'])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)  # both exporters call what torch has deprecated
        if exporter == 'torchscript':
            axes = dict(x={axis: f'size {axis}' for axis in axes}) if dynamic else None
            torch.onnx.export(model, (x,), path, dynamo=False, dynamic_axes=axes, **names)
        else:
            shapes = ({axis: Dim.DYNAMIC for axis in axes},) if dynamic else None
            torch.onnx.export(
                model, (x,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False, **names
            )
    onnx.checker.check_model(path, full_check=True)
    file = onnx.load(path)
    assert file.opset_import[0].version == names['opset_version']
    return file.graph


def run_onnx(path, x):
    outputs = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider']).run(None, dict(x=x.numpy()))
    return [torch.from_numpy(y) for y in outputs]


def assert_equal_in_onnxruntime(path, model, x):
    with torch.no_grad():
        expected = model(x)
    expected = expected if isinstance(expected, tuple) else (expected,)
    outputs = run_onnx(path, x)
    assert len(outputs) == len(expected)
    for given, wanted in zip(outputs, expected):
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)


def operations(graph):
    return Counter(node.op_type for node in graph.node if node.op_type != 'Constant')


# -- one layer --------------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Layers of all kinds side by side."""

    def __init__(self, dims):
        super().__init__()
        self.layers = nn.ModuleList([
            {2: SwitchNorm1d, 3: SwitchNorm1d, 4: SwitchNorm2d, 5: SwitchNorm3d}[dims](4),
            SyncSN(4, affine=False),
            SwitchNorm(4, normalizers=('in', 'ln')),
        ])  # fmt: skip
        if dims == 4:
            self.layers.extend(SwitchNorm(4, affine=False, normalizers=(name,)) for name in ('in', 'ln', 'bn'))

    def forward(self, x):
        return tuple(layer(x) for layer in self.layers)


SHAPES = {  # the first is exported
    2: [(2, 4), (1, 4), (5, 4)],
    3: [(2, 4, 6), (1, 4, 1), (3, 4, 9)],
    4: [(2, 4, 5, 6), (1, 4, 1, 1), (3, 4, 7, 2)],
    5: [(2, 4, 3, 4, 5), (1, 4, 1, 1, 1), (3, 4, 2, 3, 7)],
}


@pytest.mark.parametrize('exporter', EXPORTERS)
@pytest.mark.parametrize('dims', SHAPES)
def test_layers_of_every_rank_and_kind(dims, exporter, tmp_path):
    model = scatter(Layers(dims))
    inputs = [torch.randn(shape) + 1 for shape in SHAPES[dims]]
    to_onnx(model, inputs[0], tmp_path / 'layers.onnx', exporter)
    for x in inputs:
        assert_equal_in_onnxruntime(tmp_path / 'layers.onnx', model, x)


@pytest.mark.parametrize('exporter', EXPORTERS)
def test_a_layer_is_few_operations_without_sizes_or_control_flow(exporter, tmp_path):
    layer, x = scatter(SwitchNorm(4)), torch.randn(2, 4, 5, 6)
    graph = to_onnx(layer, x, tmp_path / 'layer.onnx', exporter)
    found = operations(graph)
    found['Mul'] += found.pop('Pow', 0)  # the same square, as each exporter writes it
    assert found == Counter(ReduceMean=4, Sub=3, Mul=8, Add=6, Sqrt=1, Div=1)


def test_the_graph_is_the_formula():
    for dims, shapes in SHAPES.items():
        for layer in scatter(Layers(dims)).double().layers:
            for shape in shapes:
                x = torch.randn(shape).double() + 1e4
                running = (layer.bn.running_mean, layer.bn.running_var) if layer.bn else (None, None)
                args = x, layer.mean_weight, layer.var_weight, layer.weight, layer.bias, *running
                y = switch_norm_graph(*args, layer.normalizers, layer.eps)
                expected = switch_norm_reference(*args, layer.normalizers, layer.eps)[0]
                torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_exported_with_float32_moments(dtype):
    layer = scatter(SwitchNorm(4))
    x = (torch.randn(2, 4, 5, 6) + 30).to(dtype)
    program = torch.export.export(layer, (x,))  # float32 parameters and half-precision input, as after autocast
    torch.testing.assert_close(program.module()(x), layer(x.double().float()).to(dtype), rtol=1e-2, atol=1e-2)
    assert program.module()(x).dtype == dtype


# -- whole networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('make, exporter', [
    (resnet18, 'torchscript'),
    (resnet18, 'torch.export'),
    (fcn_r18_d8, 'torchscript'),
    pytest.param(fcn_r18_d8, 'torch.export', marks=pytest.mark.slow),  # half a minute of one core
])  # fmt: skip
def test_networks_in_onnxruntime(make, exporter, tmp_path):
    model = scatter(make())
    layers = sum(isinstance(m, SwitchNorm) and 'auxiliary_head' not in name for name, m in model.named_modules())
    graph = to_onnx(model, torch.randn(SIZES[0]), tmp_path / 'net.onnx', exporter)
    assert operations(graph)['ReduceMean'] == 4 * layers
    assert not operations(graph).keys() & {'If', 'Loop', 'Shape', 'BatchNormalization'}
    for size in SIZES:
        assert_equal_in_onnxruntime(tmp_path / 'net.onnx', model, torch.randn(size))


@pytest.mark.parametrize('exporter', EXPORTERS)
def test_static_sizes_and_a_later_opset(exporter, tmp_path):
    model, x = scatter(resnet18(stages=1)), torch.randn(1, 3, 32, 32)
    graph = to_onnx(model, x, tmp_path / 'net.onnx', exporter, opset=20, dynamic=False)
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [1, 3, 32, 32]
    assert_equal_in_onnxruntime(tmp_path / 'net.onnx', model, x)


def test_the_torchscript_exporter_takes_a_model_in_training_mode_for_evaluation(tmp_path):
    """As it does a BatchNorm; the other exporter warns."""
    model, x = scatter(resnet18(stages=1)), torch.randn(SIZES[0])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    to_onnx(model.train(), x, tmp_path / 'net.onnx', 'torchscript')
    assert model.training and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert_equal_in_onnxruntime(tmp_path / 'net.onnx', model.eval(), x)


@pytest.mark.parametrize('strict', [True, False])
def test_torch_export(strict):
    model = scatter(resnet18(stages=1))
    sizes = {0: Dim('batch'), 2: Dim.AUTO, 3: Dim.AUTO}
    program = torch.export.export(model, (torch.randn(SIZES[0]),), dynamic_shapes=(sizes,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in SIZES:
        x = torch.randn(size)
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('strict', [True, False])
def test_torch_export_in_training_mode_updates_the_running_statistics(strict):
    layer = scatter(SwitchNorm(4)).train()
    shapes = ({0: Dim('batch'), 2: Dim('height'), 3: Dim('width')},)
    program = torch.export.export(layer, (torch.randn(2, 4, 5, 6),), dynamic_shapes=shapes, strict=strict).module()
    for size in (3, 4, 7, 2), (1, 4, 2, 9):
        x = torch.randn(size)
        torch.testing.assert_close(program(x), layer(x), rtol=1e-4, atol=1e-5)
    for name in 'running_mean', 'running_var', 'num_batches_tracked':
        torch.testing.assert_close(program.get_buffer(f'bn.{name}'), layer.get_buffer(f'bn.{name}'))


def test_torchscript_traces_without_a_warning_about_sn():
    model = scatter(resnet18(stages=2))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        traced = torch.jit.trace(model, torch.randn(SIZES[0]))
    assert not [w for w in said if 'sn_openmmlab' in w.filename]
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for size in SIZES:
        x = torch.randn(size)
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4)


def test_wrong_channels_are_told_while_tracing():
    with pytest.raises(ValueError, match='num_features=4, but .* has 5 channels'):
        torch.jit.trace(SwitchNorm(4).eval(), torch.randn(2, 5, 3, 3))


def test_scripting_says_to_trace():
    with pytest.raises(NotImplementedError, match=r'SyncSN cannot be compiled .* torch.jit.trace\(model.eval\(\)'):
        torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), SyncSN(4)))


# -- folding ----------------------------------------------------------------------------------------------------------


def test_layers_that_are_batch_norm_are_folded(tmp_path):
    model, x = scatter(resnet18(init_ratios=(0, 0, 1))), torch.randn(SIZES[0])
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SwitchNorm)}
    for name, layer in layers.items():
        layer.reset_parameters()
        if name.endswith('bn2'):
            with torch.no_grad():
                layer.var_weight[2] -= 90  # no longer one-hot, in one of the two triples
    randomized(model)
    expected = model(x)
    assert fold_batch_norm(model, x) == 12  # of 20: 8 blocks have a bn2
    assert relative_error(model(x), expected) < 1e-5
    left = {name for name, layer in model.named_modules() if isinstance(layer, SwitchNorm)}
    assert left == {name for name in layers if name.endswith('bn2')}
    graph = to_onnx(model, x, tmp_path / 'net.onnx', 'torchscript')
    assert operations(graph)['ReduceMean'] == 4 * 8
    assert relative_error(run_onnx(tmp_path / 'net.onnx', x)[0], expected) < 1e-4


# -- the tool ---------------------------------------------------------------------------------------------------------


SEGMENTOR = """
_base_ = ['mmseg::_base_/models/fcn_r50-d8.py']
default_scope = 'mmseg'
norm_cfg = dict(type='SN', init_ratios=(0, 0, 1))
model = dict(
    data_preprocessor=dict(size=(64, 64)), pretrained=None,
    backbone=dict(depth=18, base_channels=16, stem_channels=16, norm_cfg=norm_cfg),
    decode_head=dict(in_channels=128, channels=16, num_classes=5, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=64, channels=16, num_classes=5, norm_cfg=norm_cfg))
"""


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A folder with configs and their checkpoints."""
    folder = tmp_path_factory.mktemp('files')
    for name, text in ('seg', SEGMENTOR), ('det', f"DATA = 'data'\n{DETECTOR}"):
        (folder / f'{name}.py').write_text(text)
        config = Config.fromfile(folder / f'{name}.py')
        init_default_scope(config.default_scope)
        torch.save(dict(state_dict=randomized(MODELS.build(config.model)).state_dict()), folder / f'{name}.pth')
    return folder


@pytest.fixture
def tool(import_tool, monkeypatch, tmp_path, files):
    """The tool's main, in a copy of that folder."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    main = import_tool('export').main
    return lambda *args: main([*args, '--shape', '64', '64'])


def test_the_tool_folds_and_compares(tool, capsys):
    tool('seg.py', 'seg.pth', 'net.onnx', '--fold', '--dynamic', '--opset', '17')
    printed = capsys.readouterr().out
    assert '25 of 26 SN layers folded into convolutions' in printed  # all but the auxiliary head's
    assert 'net.onnx: largest difference from the model ' in printed and 'at 2x3x64x64 and 3x3x128x96' in printed
    assert operations(onnx.load('net.onnx').graph)['ReduceMean'] == 0


@pytest.mark.parametrize('out', ['det.onnx', 'det.pt2'])
def test_the_tool_exports_backbone_and_neck(tool, capsys, out):
    tool('det.py', 'det.pth', out, '--features')
    assert f'{out}: largest difference' in capsys.readouterr().out
    assert sorted(p.name for p in Path().glob('det.*')) == sorted(['det.py', 'det.pth', out])


def test_the_tool_writes_nothing_that_differs(tool, import_tool, monkeypatch):
    monkeypatch.setattr(import_tool('export'), 'TOLERANCE', 0)
    with pytest.raises(SystemExit, match='net.pt2 not written: it differs from the model by'):
        tool('seg.py', 'seg.pth', 'net.pt2', '--fold')
    assert not list(Path().glob('net*'))


@pytest.mark.parametrize('args, message', [
    (('seg.py', 'seg.pth', 'net.pb'), "'net.pb': the name must end in .onnx or .pt2"),
    (('seg.py', 'seg.pth', 'net.onnx', '--opset', '16'), '--opset 16 is too old; 17 or more'),
    (('seg.py', 'none.pth', 'net.onnx'), "checkpoint 'none.pth' is no file"),
    (('seg.py', 'seg.pth', 'none/net.onnx'), "'none', the folder to write 'net.onnx' into, does not exist"),
    (('seg.py', 'det.pth', 'net.onnx'), 'det.pth is not of this config: '),
    (('seg.py', 'seg.py', 'net.onnx'), 'seg.py: it is no file that torch.save wrote'),
    (('seg.py', 'seg.pth', 'old.onnx'), "'old.onnx' exists; --force replaces it"),
], ids=['suffix', 'opset', 'checkpoint', 'folder', 'other', 'no-checkpoint', 'exists'])  # fmt: skip
def test_the_tool_refuses(tool, capsys, args, message):
    Path('old.onnx').write_text('mine')
    with pytest.raises(SystemExit):
        tool(*args)
    assert message in capsys.readouterr().err
    assert Path('old.onnx').read_text() == 'mine' and not list(Path().glob('net*'))


# -- lower precision --------------------------------------------------------------------------------------------------


def deviation(y, expected):
    """Norm of the difference by the norm of what was expected."""
    return ((y - expected).norm() / expected.norm()).item()


class Calibration(CalibrationDataReader):
    """The inputs that ranges of activations are taken from."""

    def __init__(self, inputs):
        self.inputs = iter(inputs)

    def get_next(self):
        x = next(self.inputs, None)
        return None if x is None else dict(x=x.numpy())


def test_int8_in_onnxruntime(tmp_path):
    """Convolutions in int8; random weights, and random images of one distribution."""
    errors = {}
    for norm in 'SN', 'BN':
        model = scatter(resnet18(type=norm))
        images = torch.randn(4, 2, 3, 64, 64)
        to_onnx(model, images[0], tmp_path / 'net.onnx', 'torchscript', dynamic=False)
        quantize_static(
            tmp_path / 'net.onnx', tmp_path / 'int8.onnx', Calibration(images[1:]), op_types_to_quantize=['Conv']
        )
        errors[norm] = deviation(run_onnx(tmp_path / 'int8.onnx', images[0])[0], model(images[0]))
    print(f'int8, deviation from float32: {errors}')
    assert errors['BN'] < 0.02 and errors['SN'] < 0.04


def test_bfloat16_autocast():
    errors = {}
    for norm in 'SN', 'BN':
        model, x = scatter(resnet18(type=norm)), torch.randn(SIZES[0])
        with torch.no_grad():
            expected = model(x)
            with torch.autocast('cpu', torch.bfloat16):
                errors[norm] = deviation(model(x).float(), expected)
    print(f'bfloat16, deviation from float32: {errors}')
    assert errors['BN'] < 0.01 and errors['SN'] < 0.02
