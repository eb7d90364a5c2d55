"""Export the raw network of a config to ONNX (OUT.onnx) or as an exported program of torch.export (OUT.pt2).

Raw means from tensor to tensors: what the model computes from a batch of normalized images (mode='tensor'), or, with
--features, only its backbone and neck. For pipelines with pre- and post-processing, such as boxes after NMS, there is
mmdeploy. The file is run and compared with the model before it gets its name.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import warnings
from pathlib import Path

import torch
from common import check_paths, load_config, refuse_code, write_whole
from mmengine.config import DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from sn_openmmlab import SwitchNorm, fold_batch_norm
from sn_openmmlab.checkpoint.read import read_state_dict

TOLERANCE = 1e-4  # of the largest output of the model, or of 1
AXES = {0: 'batch', 2: 'height', 3: 'width'}


class Network(nn.Module):
    """The model from tensor to tensors."""

    def __init__(self, model: nn.Module, features: bool) -> None:
        super().__init__()
        self.model = model
        self.features = features

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """All outputs in order, as a flat tuple."""
        y = self.model.extract_feat(x) if self.features else self.model(x, mode='tensor')
        return tuple(t for t in tree_leaves(y) if isinstance(t, Tensor))


def main(argv: list[str] | None = None) -> None:
    """Read the command line, build, fold, export and compare; only then give the file its name."""
    parser, args = parse(argv)
    cfg = load_config(parser, args)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    try:
        with refuse_code():  # of a teacher that the config names
            model = revert_sync_batchnorm(MODELS.build(cfg.model))
    except ValueError as error:
        parser.error(f'{args.config}: {error}')
    try:
        load(parser, model, args.checkpoint)
    except (OSError, ValueError) as error:
        parser.error(f'{args.checkpoint}: {error}')
    net = Network(model, args.features).eval()
    x = torch.randn(2 if args.dynamic else 1, 3, *args.shape)  # exporters take a size of 1 for a constant
    expected = [(x, run_model(parser, args, net, x))]
    if args.dynamic:
        other = torch.randn(3, 3, args.shape[0] + 64, args.shape[1] + 32)
        expected.append((other, run_model(parser, args, net, other)))
    layers = sum(isinstance(m, SwitchNorm) for m in net.modules())
    if args.fold:
        print(f'{fold_batch_norm(net, x)} of {layers} SN layers folded into convolutions')
    with write_whole(args.out, args.out.suffix) as part:
        with torch.no_grad(), quiet():
            export(args, net, x, part)
            differences = [compare(part, x, y) for x, y in expected]
        if not max(differences) <= TOLERANCE:  # not a number, too
            raise SystemExit(f'{args.out} not written: it differs from the model by {max(differences):.2g}')
    sizes = ' and '.join('x'.join(map(str, x.shape)) for x, _ in expected)
    print(f'{args.out}: largest difference from the model {max(differences):.2g}, at {sizes}')


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line, and check what can be checked without the config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('out', type=Path, help='file to write, .onnx or .pt2')
    parser.add_argument('--features', action='store_true', help="only backbone and neck, the model's extract_feat")
    parser.add_argument('--shape', nargs=2, type=int, default=[512, 512], metavar=('H', 'W'), help='(default: 512 512)')
    parser.add_argument('--dynamic', action='store_true', help='any batch and image size (default: one image, SHAPE)')
    parser.add_argument(
        '--opset',
        type=int,
        default=18,
        help='of ONNX, 17 or more: 17 by the TorchScript-based exporter, later ones by torch.export (default: 18)',
    )
    parser.add_argument(
        '--fold', action='store_true', help='fold the SN layers that are one-hot on BN into their convolutions'
    )
    parser.add_argument('--force', action='store_true', help='replace OUT if it exists')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE')
    parser.set_defaults(launcher='none', local_rank=0, work_dir=None)
    args = parser.parse_args(argv)
    if args.out.suffix not in ('.onnx', '.pt2'):
        parser.error(f'{str(args.out)!r}: the name must end in .onnx or .pt2')
    if args.opset < 17:
        parser.error(f'--opset {args.opset} is too old; 17 or more')
    if min(args.shape) < 1:
        parser.error(f'--shape {args.shape[0]} {args.shape[1]}: height and width in pixels, at least 1')
    needed = ['onnx', 'onnxruntime', *['onnxscript'] * (args.opset > 17)] if args.out.suffix == '.onnx' else []
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f'ONNX needs {" and ".join(missing)}: pip install {" ".join(missing)}')
    check_paths(parser, [args.checkpoint], str(args.out), args.force)
    return parser, args


def load(parser: argparse.ArgumentParser, model: nn.Module, path: str) -> None:
    """Load a checkpoint, which must have all of the model; print what else it has, such as a teacher."""
    missing, unexpected = model.load_state_dict(read_state_dict(path), strict=False)
    if missing:
        parser.error(
            f'{path} is not of this config: {len(missing)} parameters are missing, such as {", ".join(missing[:3])}'
        )
    if unexpected:
        print(f'{len(unexpected)} parameters of {path} are not in the model, such as {", ".join(unexpected[:3])}')


def run_model(parser: argparse.ArgumentParser, args: argparse.Namespace, net: nn.Module, x: Tensor) -> list[Tensor]:
    """Run the model; if it fails, end with an error that says what else could be exported."""
    try:
        with torch.no_grad():
            y = net(x)
    except Exception as error:
        remedy = '' if args.features else '; --features exports its backbone and neck, mmdeploy whole pipelines'
        parser.error(
            f'{args.config}: {type(net.model).__name__} does not run on a batch of {tuple(x.shape)} alone '
            f'({type(error).__name__}: {error}){remedy}'
        )
    return [t.clone() for t in y]


def export(args: argparse.Namespace, net: nn.Module, x: Tensor, path: Path) -> None:
    """Write the file."""
    shapes = ({axis: Dim.DYNAMIC for axis in AXES},) if args.dynamic else None
    common = dict(opset_version=args.opset, input_names=['input'])
    if path.suffix == '.pt2':
        torch.export.save(torch.export.export(net, (x,), dynamic_shapes=shapes), path)
    elif args.opset > 17:
        program = torch.onnx.export(net, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False, **common)
        program.save(path, external_data=False)
    else:
        axes = dict(input=AXES) if args.dynamic else None
        torch.onnx.export(net, (x,), path, dynamo=False, dynamic_axes=axes, **common)


def compare(path: Path, x: Tensor, expected: list[Tensor]) -> float:
    """Run the file; return its largest difference from what was expected, relative as TOLERANCE is."""
    if path.suffix == '.onnx':
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
        given = [torch.from_numpy(y) for y in session.run(None, dict(input=x.numpy()))]
    else:
        given = torch.export.load(path).module()(x)
    if len(given) != len(expected):
        raise ValueError(f'{path} gives {len(given)} outputs where the model gives {len(expected)}')
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(given, expected))


class quiet(warnings.catch_warnings):
    """Silence the exporters' warnings. The file is compared with the model, so none of them matters."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter('ignore')
        logging.getLogger('torch.onnx').setLevel(logging.ERROR)


if __name__ == '__main__':
    main()
