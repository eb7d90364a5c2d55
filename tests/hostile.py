"""Checkpoints that would make the folder ``intruded`` when they are read, or crash the process, in every known form.

Run as a program, in a folder with a checkpoint good.pth, with tools and their arguments by name as JSON, it hands each
tool all files, in place of FILE, and prints which were not refused, and which ran.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from pickle import BINUNICODE, BUILD, GLOBAL, MARK, NEWOBJ, PROTO, REDUCE, STOP, TUPLE

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from support import speed_mmengine_up
from torch import nn

FOLDER = 'intruded'
PROGRAM = f"__import__('os').mkdir({FOLDER!r})"


class Call:
    """Is saved as the call of a function."""

    def __init__(self, function, *args, state=None):
        self.called = (function, args, state) if state is not None else (function, args)

    def __reduce__(self):
        return self.called


class Named(Call):
    """As protocol 2 saves a function inside a class: by ``getattr``."""

    def __init__(self, owner, *names):
        for name in names[:-1]:
            owner = Call(getattr, owner, name)
        super().__init__(getattr, owner, names[-1])


def make_folder():
    return Call(os.mkdir, FOLDER)


def with_state(cls, **state):
    new = cls.__new__(cls)
    new.__dict__.update(state)
    return new


def metadata():
    state = OrderedDict(weight=torch.ones(1))
    state._metadata = OrderedDict(version=make_folder())
    return state


multiarray = (np.core if np.__version__ < '2' else np._core).multiarray
POINTER = b'A' * 8  # which would be followed
OBJECTS = np.dtype('O')


def made_of_fields(code):
    """A type of one field, an object, whose flags say that it holds none."""
    return Call(np.dtype, code, False, True, state=(3, '<', None, ('a',), {'a': (OBJECTS, 0)}, 8, 1, 0))


# what would run, or crash, each inside an otherwise good checkpoint
CONTENTS = {
    'os.mkdir': make_folder,
    'os.system': lambda: Call(os.system, f'mkdir {FOLDER}'),
    'eval': lambda: Call(eval, PROGRAM),
    'exec': lambda: Call(exec, PROGRAM),
    'subprocess.call': lambda: Call(subprocess.call, ['mkdir', FOLDER]),
    'pickle.loads': lambda: Call(pickle.loads, pickle.dumps(make_folder())),
    'getattr of a class': lambda: Named(HistoryBuffer, '__init__', '__globals__'),
    'getattr of a method': lambda: Named(HistoryBuffer, 'register_statistics'),
    'getattr of an allowed class': lambda: Named(OneCycleParamScheduler, '__init__', '__globals__', 'get'),
    'getattr of a config': lambda: Named(ConfigDict, '__subclasses__'),
    'getattr of an array': lambda: Named(np.ndarray, 'tofile'),
    'getattr of a string': lambda: Named('', 'format'),
    'key of a dict': lambda: {make_folder(): 1},
    'in a history': lambda: with_state(HistoryBuffer, _log_history=make_folder()),
    'in a config': lambda: ConfigDict(a=[make_folder()]),
    'state of an object': lambda: Call(HistoryBuffer, state=dict(a=make_folder())),
    'metadata': metadata,
    'array of objects': lambda: Call(np.ndarray, (1,), OBJECTS, POINTER),
    'array of fields': lambda: Call(np.ndarray, (1,), made_of_fields('V8'), POINTER),
    'array of a type with the state of another': lambda: Call(
        multiarray._reconstruct, np.ndarray, (0,), b'b', state=(1, (1,), made_of_fields('i8'), False, POINTER)
    ),
    'array of a shape that is not': lambda: Call(
        multiarray._reconstruct, np.ndarray, (0,), b'b', state=(1, (2**40, 2**40), np.dtype('u1'), False, b'A')
    ),
}  # fmt: skip


def around(content):
    """A checkpoint that is good but for one thing in what surrounds its weights."""
    good = torch.load('good.pth', weights_only=False)
    good['meta']['hostile'] = content
    return good


def zipped(path, content):
    torch.save(around(content), path)


def legacy(path, content):
    torch.save(around(content), path, _use_new_zipfile_serialization=False)


def tar(path, content):
    """As torch 0.1 wrote them: it is unpickled in parts."""
    with tarfile.open(path, 'w') as archive:
        for name in 'sys_info', 'pickle', 'storages', 'tensors':
            data = pickle.dumps(content, 2)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def plain(protocol):
    return lambda path, content: path.write_bytes(pickle.dumps(content, protocol))


def program(path, _):
    """TorchScript, whose ``__setstate__`` is a program."""
    torch.jit.save(torch.jit.script(nn.ReLU()), path)


def twice(path, content):
    """Two files of one name in an archive: a good one, and another."""
    torch.save(dict(weight=torch.ones(1)), path)
    with zipfile.ZipFile(path, 'a') as archive:
        name = next(name for name in archive.namelist() if name.endswith('data.pkl'))
        archive.writestr(name, pickle.dumps(content, 2))


def opcodes(path, _):
    """A call that no object is saved as: a class changed by BUILD, then called."""
    text = lambda t: BINUNICODE + len(t).to_bytes(4, 'little') + t.encode()  # noqa: E731
    name = lambda module, name: GLOBAL + f'{module}\n{name}\n'.encode()  # noqa: E731
    empty = MARK + TUPLE
    code = PROTO + b'\x02' + name('mmengine.logging.history_buffer', 'HistoryBuffer') + empty + NEWOBJ
    code += MARK + b'N' + b'}' + text('__class__') + name('posix', 'system') + b's' + TUPLE + BUILD
    code += name('posix', 'mkdir') + MARK + text(FOLDER) + TUPLE + REDUCE + STOP
    path.write_bytes(code)


def config(path, _):
    """Nothing but data; but mmengine's Runner.resume runs the text of a config that a checkpoint holds."""
    good = torch.load('good.pth', weights_only=False)
    good['meta']['config'] = PROGRAM
    torch.save(good, path)


CONTAINERS = {'zip': zipped, 'legacy': legacy, 'tar': tar, **{f'protocol {p}': plain(p) for p in range(6)}}


def write_all(folder: Path) -> list[Path]:
    """Write a file of each content in both formats, one of each format, and those that are of one kind only."""
    paths = [folder / 'good.pth']
    for name, container, content in [
        *(
            (f'{kind} {name}', CONTAINERS[name], make())
            for kind, make in CONTENTS.items()
            for name in ('zip', 'legacy')
        ),
        *((f'folder {name}', container, make_folder()) for name, container in CONTAINERS.items()),
        *((container.__name__, container, make_folder()) for container in (twice, program, opcodes, config)),
    ]:
        paths.append(folder / f'{name.replace(" ", "_")}.pth')
        container(paths[-1], content)
    return paths


def main(ways: dict[str, list[str]]) -> None:
    """Call tools with each file in place of FILE among their arguments."""
    paths = write_all(Path.cwd())
    for way, (tool, *argv) in ways.items():
        for path in paths:
            said = io.StringIO()
            outcome = 'was accepted'
            try:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    importlib.import_module(tool).main([arg.replace('FILE', str(path)) for arg in argv])
            except SystemExit as ended:
                if ended.code:
                    outcome = 'refused'
            except Exception as error:
                outcome = f'ended in {type(error).__name__}: {error}'.splitlines()[0]
            if Path(FOLDER).exists():
                outcome += ', AND RAN'
                Path(FOLDER).rmdir()
            if outcome != 'refused':
                print(f'{way}: {path.stem} {outcome}')
        print(f'{way}: {len(paths)} files')


if __name__ == '__main__':
    sys.path[:0] = [str(Path(__file__).parents[1] / 'tools'), str(Path.cwd())]
    speed_mmengine_up()
    main(json.loads(sys.argv[1]))
