"""What the tools share: common options, reading configs, writing files safely, and starting mmengine's Runner."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

import sn_openmmlab  # noqa: F401  (registers SN, also where the config forgets custom_imports)
from sn_openmmlab.checkpoint import SCHEME
from sn_openmmlab.checkpoint.read import TRUST, read_checkpoints_as_data


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share, as mmdet's and mmseg's tools have them."""
    parser.add_argument(
        '--work-dir', help='folder of logs and checkpoints (default: the one in the config, or work_dirs/CONFIG)'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help="settings that override the config's, e.g. train_dataloader.batch_size=4 model.backbone.norm_cfg.type=SN; "
        'lists as key="[a,b]" or key=a,b, without blanks',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='who started the processes of distributed work: dist_*.sh say pytorch, slurm_*.sh slurm (default: none)',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by old launchers')


def load_config(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Config:
    """Read the config that the command line names, and apply the common options to it.

    The work folder is the first given of ``--work-dir``, the config's ``work_dir`` and work_dirs/CONFIG.
    """
    read_checkpoints_as_data()  # before anything builds a model that names some
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    check_file(parser, 'config', args.config)
    for key in args.cfg_options:
        if key.split('.')[0] == 'norm_cfg':
            parser.error(
                f'--cfg-options {key}: the variable norm_cfg was copied into the model when the config was read, so '
                'that setting it now changes nothing; set model.backbone.norm_cfg.type and the like'
            )
    try:
        cfg = Config.fromfile(args.config)
    except RecursionError:
        parser.error(f'{args.config} inherits from itself; follow its _base_ to see where')
    except FileNotFoundError as error:
        parser.error(f'{args.config} cannot be read: {error}')
    cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', Path(args.config).stem))
    scope = cfg.get('default_scope') or 'mmengine'
    if importlib.util.find_spec(scope) is None:
        parser.error(f'{args.config} has default_scope={scope!r}, a library that is not installed; install it')
    return cfg


def check_file(parser: argparse.ArgumentParser, what: str, path: str) -> None:
    """End with an error if ``path`` is no file; addresses such as https:// and torchvision:// pass."""
    file = path[len(SCHEME) :] if path.startswith(SCHEME) else path
    if '://' not in file and not Path(file).expanduser().is_file():
        parser.error(f'{what} {path!r} is no file (from {os.getcwd()})')


def check_paths(parser: argparse.ArgumentParser, sources: list[str], dst: str, force: bool) -> None:
    """End with an error if a checkpoint to read is missing, or ``dst`` cannot be written or would be lost."""
    for src in sources:
        if '://' in src:
            parser.error(f'checkpoint {src!r} is an address; download it, and give the file')
        check_file(parser, 'checkpoint', src)
    if any(Path(dst).samefile(src) for src in sources if os.path.exists(dst)):
        parser.error(f'{dst} is the checkpoint to read; give another name to write')
    check_out(parser, dst, force)


def check_out(parser: argparse.ArgumentParser, dst: str, force: bool) -> None:
    """End with an error if ``dst`` cannot be written, or exists and would be lost."""
    out = Path(dst)
    if not out.parent.is_dir():
        parser.error(f'{str(out.parent)!r}, the folder to write {out.name!r} into, does not exist')
    with refuse_unwritable(parser, repr(dst)):
        if out.is_dir():
            parser.error(f'{dst!r} is a folder; give a file')
        if out.exists() and not out.is_file():
            parser.error(f'{dst!r} is a device or a pipe, which a file would replace; give the name of a file')
        if out.exists() and not force:
            parser.error(f'{dst!r} exists; --force replaces it')
        try_to_write(out)


@contextlib.contextmanager
def refuse_unwritable(parser: argparse.ArgumentParser, what: str) -> Iterator[None]:
    """End with an error that names ``what`` if its path cannot be looked at or written to."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # a link to itself is the latter before Python 3.13
        parser.error(f'{what} cannot be written: {getattr(error, "strerror", error)}')


def try_to_write(path: Path) -> None:
    """Make this process's temporary file beside ``path``, and remove it."""
    part = part_file(path)
    part.touch()
    part.unlink()


def part_file(path: Path, suffix: str = '') -> Path:
    """This process's temporary name beside ``path``, or beside what it links to."""
    path = path.resolve()
    return path.with_name(f'{path.name[:50]}.{os.getpid()}.part{suffix}')  # at most 255 bytes, in any alphabet


@contextlib.contextmanager
def write_whole(path: Path, suffix: str = '') -> Iterator[Path]:
    """Give a temporary name to write to, and rename the file at the end, so that ``path`` is never half a file.

    If ``path`` is a link, the file that it leads to is written. However the work ends, no temporary file stays. An
    error such as a full disk ends the program with one line.
    """
    part = part_file(path, suffix)
    try:
        with exit_on_signals():
            yield part
            part.replace(path.resolve())
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch raises a consequence of it
        if isinstance(cause, (SystemExit, KeyboardInterrupt)):
            raise cause from None
        if isinstance(cause, OSError):
            raise SystemExit(f'error: {path} not written: {cause.strerror or cause}') from error
        if 'inline_container' in str(error):
            raise SystemExit(f'error: {path} not written, is the disk full? ({error})') from error
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit, so that clean-up runs, unless they are handled or ignored already."""
    signals = [getattr(signal, name) for name in ('SIGTERM', 'SIGHUP') if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        signals = []
    signals = [number for number in signals if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores SIGHUP
    for number in signals:
        signal.signal(number, lambda n, _: sys.exit(128 + n))
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)


def save(content: object, path: str | Path) -> None:
    """Write a checkpoint, or bytes."""
    with write_whole(Path(path)) as part, part.open('wb') as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            torch.save(content, file)  # a name would be stored in the archive, and equal files would differ


def run(cfg: Config, work: Callable[[Runner], object]) -> None:
    """Build the runner of a config, and do ``work`` with it."""
    if cfg.launcher == 'pytorch' and get_device() == 'cpu':
        join_cpu_group(cfg)
    with refuse_code():
        work(RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # the group's threads may abort a process that ends before it


@contextlib.contextmanager
def refuse_code() -> Iterator[None]:
    """Let a checkpoint that holds code, or cannot be converted, end the program with a line that says so."""
    try:
        yield
    except ValueError as error:
        if SCHEME not in str(error):
            raise
        raise SystemExit(f'error: {error}') from error
    except UnpicklingError as error:
        raise SystemExit(
            f'A checkpoint holds more than data, and reading it could run foreign code:\n{error}\n'
            f'If you trust where it comes from, set the environment variable {TRUST}=1.'
        ) from error


def join_cpu_group(cfg: Config) -> None:
    """Join torchrun's processes on a machine without GPU; mmengine by itself would ask for CUDA devices."""
    torch.distributed.init_process_group('gloo')
    wrapper = dict(broadcast_buffers=False, find_unused_parameters=cfg.get('find_unused_parameters', False))
    cfg.model_wrapper_cfg = dict({**wrapper, **cfg.get('model_wrapper_cfg', {})}, device_ids=None)
