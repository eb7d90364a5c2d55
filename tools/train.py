"""Train the model of a config of any OpenMMLab library; the config's ``default_scope`` says which."""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from common import add_common_options, check_file, load_config, run
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner

from sn_openmmlab import SwitchNorm
from sn_openmmlab.checkpoint import SCHEME
from sn_openmmlab.norms import is_switchable, own_modules, unwrap


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
        last = Path(cfg.work_dir, 'last_checkpoint')
        if args.resume == 'auto' and last.is_file():
            check_file(parser, f'the checkpoint that {last} names,', last.read_text(encoding='utf-8').strip())
    for name, path in find_checkpoints(cfg.to_dict()):
        check_file(parser, name, path)
    run(cfg, train)


def find_checkpoints(value: object, name: str = '') -> Iterator[tuple[str, str]]:
    """Find what a config loads, with the names of the settings: ``load_from``, and all that is switchnorm://."""
    if isinstance(value, str) and (name == 'load_from' or value.startswith(SCHEME)):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from find_checkpoints(item, f'{name}.{key}'.lstrip('.'))


def train(runner: Runner) -> None:
    """Train, and warn if a norm_cfg does not reach the whole model."""
    runner.register_hook(WarnOfOtherNorms())
    runner.train()


class WarnOfOtherNorms(Hook):
    """Warn if a norm_cfg of the config says SN, but the model has other norms too."""

    def before_train(self, runner: Runner) -> None:
        """Name the parts that hold other norms."""
        said = [name for name, value in runner.cfg.items() if name.endswith('norm_cfg') and is_sn(value)]
        others = count_other_norms(runner) if said else {}
        if others:
            held = '; '.join(
                f'{part}: {", ".join(f"{n} {kind}" for kind, n in c.items())}' for part, c in others.items()
            )
            runner.logger.warning(
                f'{said[0]} says {runner.cfg[said[0]].type}, but {held}. The variable reaches only the parts of the '
                'model that it is written into. Unless this is meant, set '
                + ', '.join(f'model.{part}.norm_cfg' for part in others)
            )


def is_sn(norm_cfg: object) -> bool:
    """Whether a value of the config builds an SN layer."""
    kind = norm_cfg.get('type') if isinstance(norm_cfg, dict) else None
    kind = MODELS.get(kind) if isinstance(kind, str) else kind
    return isinstance(kind, type) and issubclass(kind, SwitchNorm)


def count_other_norms(runner: Runner) -> dict[str, Counter]:
    """Count, by kind, the norm layers that could be SN in each part of the model, named as in the config."""
    others = defaultdict(Counter)
    for name, m in own_modules(unwrap(runner.model)):
        kind = type(m).__name__
        if not is_switchable(type(m)):  # SN itself, or such as LayerNorm, which norm_cfg=dict(type='SN') cannot replace
            continue
        part, config = [], runner.cfg.model
        for key in name.split('.'):
            config = config.get(key)
            if not isinstance(config, dict):
                break
            part.append(key)
        # mmengine's replacement of SyncBatchNorm if there is one process
        others['.'.join(part) or name]['SyncBatchNorm' if kind == '_BatchNormXd' else kind] += 1
    return others


def use_amp(parser: argparse.ArgumentParser, cfg: Config) -> None:
    """Turn on mixed precision in the optimizer wrapper."""
    if get_device() == 'cpu':
        parser.error('--amp needs a GPU, and none was found; leave it out to train in float32')
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    kind = kind if isinstance(kind, str) else kind.__name__
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        parser.error(f'--amp works with optim_wrapper.type OptimWrapper, and the config has {kind!r}')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'


if __name__ == '__main__':
    main()
