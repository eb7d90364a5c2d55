"""Convert a checkpoint of the authors' SN code, or of a model with BatchNorm, for the models of OpenMMLab with SN.

Of the authors' models these are the ImageNet ResNets, the detectors, and the segmentation encoder and decoder; both
files of the latter make one segmentor. docs/checkpoints.md says how to build the models.
"""

from __future__ import annotations

import argparse

from common import check_paths, save

from sn_openmmlab import __version__
from sn_openmmlab.checkpoint.convert import RULES, TARGETS, convert_checkpoint, describe_data
from sn_openmmlab.checkpoint.read import find_state_dict, read_checkpoint


def main(argv: list[str] | None = None) -> None:
    """Read the command line, convert, and print what became of the keys."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', nargs='+', help='checkpoint file; encoder and decoder of a segmentor are two')
    parser.add_argument('dst', help='file to write')
    parser.add_argument(
        '--from',
        dest='source',
        choices=['auto', *RULES],
        default='auto',
        help="what the checkpoint is: of a model with BatchNorm, of the authors' ResNets or segmentors (switchnorm), "
        'or of their detectors; auto tells by its keys (default: auto)',
    )
    parser.add_argument(
        '--to',
        dest='target',
        choices=TARGETS,
        help='library of the model; for a backbone alone, mmpretrain also has the classifier (default: mmseg for a '
        'decoder, else mmdet)',
    )
    parser.add_argument(
        '--init-ratios',
        nargs=3,
        type=float,
        metavar=('IN', 'LN', 'BN'),
        help='for BatchNorm checkpoints: importance ratios to store, and weights corrected for them (default: none; '
        'layers start near BatchNorm as they load it)',
    )
    parser.add_argument(
        '--prefix',
        help="for BatchNorm checkpoints: what to take away in front of the names, as encoder_q. or model.backbone.; '' "
        'leaves them, whatever they are',
    )
    parser.add_argument('--force', action='store_true', help='replace DST if it exists')
    parser.add_argument('--verbose', action='store_true', help='list all keys')
    args = parser.parse_args(argv)
    check_paths(parser, args.src, args.dst, args.force)
    state_dict, meta = {}, {}
    for src in args.src:
        try:
            content = read_checkpoint(src)
            tensors = find_state_dict(content)
        except (OSError, ValueError) as error:
            parser.error(f'{src}: {error}')
        if state_dict.keys() & tensors.keys():
            parser.error(f'{src} has keys of the file before it, such as {min(state_dict.keys() & tensors.keys())}')
        state_dict.update(tensors)
        meta.update(describe_data(content))
    try:
        result, report = convert_checkpoint(state_dict, args.source, args.target, args.init_ratios, args.prefix)
    except ValueError as error:
        parser.error(f'{" ".join(args.src)}: {error}')
    meta.update(sn_openmmlab_version=__version__, converted_from=report.source)
    save(dict(state_dict=result, meta=meta), args.dst)
    if args.verbose:
        for old, new in report.mapped.items():
            print(f'{old} -> {new}')
        for old, reason in report.skipped.items():
            print(f'{old} skipped: {reason}')
        for new in report.missing:
            print(f'{new} missing')
    print(f'{args.dst}: {report}')


if __name__ == '__main__':
    main()
