"""Evaluate a checkpoint of a config of any OpenMMLab library; the config's ``default_scope`` says which.

``--out``, ``--show``, ``--show-dir`` and ``--tta`` do what the library's own tool does, and so differ by library.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from common import add_common_options, check_file, load_config, run
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner


def main(argv: list[str] | None = None) -> None:
    """Read the command line and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    add_common_options(parser)
    parser.add_argument(
        '--out',
        help='where to keep the predictions: for mmseg a folder, which gets a label map (.png) for each image; else a '
        '.pkl file, which gets a list of predictions (masks as RLE)',
    )
    parser.add_argument('--show', action='store_true', help='show pictures of the predictions in a window')
    parser.add_argument(
        '--show-dir',
        help='folder to put pictures of the predictions in (mmseg: in its vis_data/vis_image)',
    )
    parser.add_argument('--wait-time', type=float, default=2, help='seconds that --show shows each (default: 2)')
    parser.add_argument(
        '--tta',
        action='store_true',
        help="test with augmented images, by the config's tta_model and tta_pipeline (mmdet: flipped, without these)",
    )
    args = parser.parse_args(argv)
    check_file(parser, 'checkpoint', args.checkpoint)
    cfg = load_config(parser, args)
    cfg.load_from = args.checkpoint
    scope = cfg.get('default_scope')
    if args.show or args.show_dir:
        draw(parser, args, cfg, scope)
    if args.tta:
        augment(parser, cfg, scope)
    if args.out:
        keep_label_maps(parser, args, cfg) if scope == 'mmseg' else check_dump(parser, args)

    def work(runner: Runner) -> None:
        if args.out and scope != 'mmseg':
            runner.test_evaluator.metrics.append(make_dump(args.out, scope))
        runner.test()

    run(cfg, work)


def draw(parser: argparse.ArgumentParser, args: argparse.Namespace, cfg: Config, scope: str) -> None:
    """Turn on the library's hook that draws predictions."""
    if scope not in ('mmdet', 'mmseg'):
        parser.error(f'--show and --show-dir draw for mmdet and mmseg, and default_scope is {scope!r}')
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        kind = {'mmdet': 'DetVisualizationHook', 'mmseg': 'SegVisualizationHook'}[scope]
        parser.error(f'--show and --show-dir need default_hooks=dict(visualization=dict(type={kind!r})) in the config')
    hook.draw, hook.interval = True, 1  # mmseg 1.2 draws every 50th image otherwise
    if args.show:
        hook.show, hook.wait_time = True, args.wait_time
    if args.show_dir is None:
        return
    folder = str(Path(args.show_dir).absolute())  # a relative one would mean another place in each library
    if scope == 'mmdet':
        hook.test_out_dir = folder
        return
    if args.show:
        parser.error('mmseg draws into a window or into files: give --show or --show-dir, not both')
    backends = cfg.get('visualizer', {}).get('vis_backends') or []
    if not any(backend.type == 'LocalVisBackend' for backend in backends):
        parser.error("--show-dir needs dict(type='LocalVisBackend') among visualizer.vis_backends of the config")
    cfg.visualizer.save_dir = folder


def augment(parser: argparse.ArgumentParser, cfg: Config, scope: str) -> None:
    """Wrap the model into the config's test-time augmentation; mmdet's has a default, as in mmdet's own tool."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if scope == 'mmdet':
        cfg.setdefault(
            'tta_model',
            dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)),
        )
        cfg.setdefault('tta_pipeline', flip_pipeline(dataset.pipeline))
    for name in 'tta_model', 'tta_pipeline':
        if not cfg.get(name):
            parser.error(f'--tta needs {name} in the config; the _base_ configs of {scope} have examples')
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def flip_pipeline(pipeline: list) -> list:
    """Replace the packing at the end of mmdet's test pipeline: pack twice, once flipped."""
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
    flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
    both = dict(type='TestTimeAug', transforms=[flips, [dict(type='PackDetInputs', meta_keys=keys)]])
    return [*copy.deepcopy(pipeline[:-1]), both]


def keep_label_maps(parser: argparse.ArgumentParser, args: argparse.Namespace, cfg: Config) -> None:
    """Let mmseg's metrics write their predictions into the folder ``--out``."""
    if Path(args.out).suffix in ('.pkl', '.pickle'):
        parser.error(f'--out {args.out}: mmseg keeps predictions as label maps in a folder; give a folder')
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    for evaluator in evaluators:
        evaluator.update(output_dir=args.out, keep_results=True)


def check_dump(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if Path(args.out).suffix not in ('.pkl', '.pickle'):
        parser.error(f'--out {args.out}: predictions are kept in a file whose name ends in .pkl or .pickle')


def make_dump(path: str, scope: str):
    """Make the metric that only writes predictions: mmdet's, which packs masks, or mmengine's."""
    if scope == 'mmdet':
        from mmdet.evaluation import DumpDetResults as Dump
    else:
        from mmengine.evaluator import DumpResults as Dump
    return Dump(out_file_path=path)


if __name__ == '__main__':
    main()
