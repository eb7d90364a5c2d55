"""Replace the running statistics in a checkpoint by those of training batches; the weights stay.

This is the batch average of the SN paper (section 3.1), for SN and BatchNorm layers: docs/batch_average.md. OUT is the
checkpoint with another running_mean and running_var. All else in it, also the optimizer, stays.
"""

from __future__ import annotations

import argparse
import re

from common import add_common_options, check_paths, load_config, run, save
from mmengine.dist import is_main_process
from mmengine.runner import Runner

from sn_openmmlab.checkpoint.read import find_state_dict, read_checkpoint
from sn_openmmlab.running_statistics import average_runner_statistics, statistics_layers


def main(argv: list[str] | None = None) -> None:
    """Read the command line, average, and write OUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file, of which the model and train_dataloader are used')
    parser.add_argument('checkpoint', help='checkpoint file of the model; it stays as it is')
    parser.add_argument('out', help='checkpoint file to write')
    parser.add_argument(
        '--num-batches', type=int, required=True, help='number of training batches (of each process) to average over'
    )
    parser.add_argument('--force', action='store_true', help='replace OUT if it exists')
    add_common_options(parser)
    args = parser.parse_args(argv)
    check_paths(parser, [args.checkpoint], args.out, args.force)
    if args.num_batches < 1:
        parser.error(f'--num-batches must be at least 1, got {args.num_batches}')
    try:
        content = read_checkpoint(args.checkpoint)
        state_dict = find_state_dict(content)
    except (OSError, ValueError) as error:
        parser.error(f'{args.checkpoint}: {error}')
    cfg = load_config(parser, args)
    if cfg.get('train_dataloader') is None:
        parser.error(f'{args.config} has no train_dataloader, whose batches are averaged over')
    cfg.load_from, cfg.resume = args.checkpoint, False

    def work(runner: Runner) -> None:
        # mmengine loads keys with and without the prefix of a DistributedDataParallel
        keys = {re.sub(r'^module\.', '', key): key for key in state_dict}
        try:
            lacking = [name for name in statistics_layers(runner.model) if f'{name}.running_mean' not in keys]
            if lacking:
                raise ValueError(
                    f'{args.checkpoint} has no {lacking[0]}.running_mean (and {len(lacking) - 1} others), which the '
                    f'model of {args.config} has: give a checkpoint of this model'
                )
            runner.call_hook('before_run')
            runner.load_or_resume()
            names = average_runner_statistics(runner, args.num_batches)
        except ValueError as error:
            raise SystemExit(f'average_stats.py: error: {error}') from error
        if is_main_process():
            new = runner.model.state_dict()
            new = {re.sub(r'^module\.', '', key): value for key, value in new.items()}
            for name in names:
                for key in f'{name}.running_mean', f'{name}.running_var':
                    state_dict[keys[key]] = new[key].to(state_dict[keys[key]])
            save(content, args.out)
            print(f'{args.out}: {len(names)} layers with the statistics of {args.num_batches} batches')

    run(cfg, work)


if __name__ == '__main__':
    main()
