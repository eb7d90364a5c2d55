"""Train the model of a config of any OpenMMLab library; the config's ``default_scope`` says which."""

import argparse

from common import add_common_options, check_file, load_config, run
from mmengine.config import Config
from mmengine.device import get_device


def main(argv: list[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    add_common_options(parser)
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision (needs a GPU)')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint or, without a value, from the last one in the work folder, if any',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate from the config's auto_scale_lr.base_batch_size to the real batch size",
    )
    args = parser.parse_args(argv)
    if args.resume not in (None, 'auto'):
        check_file(parser, 'checkpoint', args.resume)
    cfg = load_config(parser, args)
    if args.amp:
        use_amp(parser, cfg)
    if args.auto_scale_lr:
        if not cfg.get('auto_scale_lr', {}).get('base_batch_size'):
            parser.error(
                f'--auto-scale-lr: {args.config} does not say which batch size its learning rate is meant for; '
                'set auto_scale_lr=dict(base_batch_size=...) in it'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    run(cfg, lambda runner: runner.train())


def use_amp(parser: argparse.ArgumentParser, cfg: Config) -> None:
    """Turn the optimizer wrapper into the one for mixed precision, unless it is that already."""
    if get_device() == 'cpu':
        parser.error('--amp needs a GPU, and none was found; leave it out to train in float32')
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    kind = kind if isinstance(kind, str) else kind.__name__
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        parser.error(f'--amp works with optim_wrapper.type OptimWrapper, and the config has {kind!r}')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'


if __name__ == '__main__':
    main()
