"""Read checkpoints as data, so that a file of unknown origin can run no code.

mmengine's upstream release reads as torch does by default. The onedl release allows ``getattr``, which reaches
everything, and unpickles what it cannot read as data. Both save more than tensors, so torch has to be told what else is
harmless. Before 2.6 torch cannot be told, and a file could even make its ``weights_only`` reading run code. For these
versions this module brings its own unpickler.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import os
import pickle
import re
import tarfile
import types
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import IO, Any, ClassVar, Dict, Optional, SupportsIndex, Union

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import Tensor
from torch._weights_only_unpickler import _get_allowed_globals

from ..ops.torch_versions import VERSION

TRUST = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'  # torch's own switch: unpickle whatever a file holds
# what values of a checkpoint can be computed with; float8, bits and the like cannot
_NUMBERS = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
}  # fmt: skip
MapLocation = Optional[Union[str, torch.device, Dict[str, str]]]
NO_DATA = 'a TorchScript archive, or one of torch 0.1, which cannot be read as data'


def find_oddity(tensor: Tensor) -> str | None:
    """Find what a tensor is, if it does not hold numbers one by one: ``'sparse_coo'``, ``'meta'``, ...; else None."""
    kinds = dict(nested=tensor.is_nested, meta=tensor.is_meta, quantized=tensor.is_quantized)
    kind = next((kind for kind, found in kinds.items() if found), str(tensor.layout)[len('torch.') :])
    if kind != 'strided':
        return kind
    return None if tensor.dtype in _NUMBERS else str(tensor.dtype)[len('torch.') :]


def read_state_dict(path: str, map_location: MapLocation = None) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint file: all that it holds, or its ``state_dict`` or ``model``.

    This never runs code of the file, even if ``TRUST`` is set.

    Args:
        path (str): The file.
        map_location (str, torch.device or dict, optional): As :func:`torch.load`'s. Defaults to None, the CPU.

    Returns:
        dict[str, Tensor]: The tensors by name.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is no checkpoint, or holds code, or no state dict.
    """
    return dict(find_state_dict(read_checkpoint(path, map_location)))


def read_checkpoint(path: str, map_location: MapLocation = None) -> object:
    """Read all that a checkpoint file holds; raises as :func:`read_state_dict`."""
    try:
        with _allow_harmless():
            return load_local(path, map_location or 'cpu')
    except OSError:
        raise
    except Exception as error:  # its type depends on what is wrong with the file
        code = re.search(r'(?:GLOBAL|class) ([\w.]+)|(getattr\(.*?\))|(a TorchScript archive)', str(error))
        if code:
            raise ValueError(
                f'it holds more than data: reading it would run {code[1] or code[2] or code[3]}. Refused; get it from '
                'a source that you trust. One that you do trust is read if you save its tensors alone: '
                'docs/checkpoints.md, Safety, shows how'
            ) from error
        reason = str(error).split('\n')[0] or type(error).__name__
        raise ValueError(f'it is no file that torch.save wrote, or not all of one ({reason})') from error


def find_state_dict(content: object) -> MutableMapping[str, Tensor]:
    """Find the state dict in what :func:`read_checkpoint` returned; it is not copied."""
    for name in 'state_dict', 'model':
        if isinstance(content, MutableMapping) and isinstance(content.get(name), MutableMapping):
            content = content[name]
    if not isinstance(content, MutableMapping):
        raise ValueError(f'it holds a {type(content).__name__}, not a state dict')
    others = [
        str(name) for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)
    ]
    for name in content:
        if isinstance(name, str) and not name.isprintable():  # a terminal, a table or a figure would obey it
            raise ValueError(f'it has the name {name!r}, which cannot be printed')
    if others or not content:
        raise ValueError(
            'it holds no state dict (tensors by name, alone or as state_dict or model), but '
            + (f'also {", ".join(others[:4])}' if others else 'nothing')
        )
    return content


def read_checkpoints_as_data() -> None:
    """Let torch and mmengine run no code of any checkpoint that a config names, unless the user set ``TRUST``.

    Before torch 2.6 this holds for files, not for addresses.
    """
    if is_trusted():
        return
    if VERSION >= (2, 6):
        os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'  # whatever a call to torch.load asks for
        torch.serialization.add_safe_globals(_list_harmless())
    CheckpointLoader.register_scheme('', load_local, force=True)  # '': paths without scheme
    if hasattr(mmengine_checkpoint, '_safe_torch_load'):  # onedl's, for other schemes; it would allow getattr
        mmengine_checkpoint._safe_torch_load = load_local
    if not hasattr(CheckpointLoader.load_checkpoint, '__wrapped__'):
        CheckpointLoader.load_checkpoint = classmethod(_drop_config(CheckpointLoader.load_checkpoint.__func__))


def is_trusted() -> bool:
    """Whether the user has set ``TRUST``, as torch reads it."""
    return os.environ.get(TRUST, '0').lower() in ('1', 'y', 'yes', 'true')


def load_local(file: str | IO[bytes], map_location: MapLocation = None) -> Any:
    """Read a checkpoint file, given by name or opened."""
    file = os.path.expanduser(file) if isinstance(file, str) else file
    try:
        with contextlib.nullcontext() if VERSION >= (2, 6) else _use_own_unpickler(file):
            return torch.load(file, map_location=map_location, weights_only=True)
    except RuntimeError as error:
        if 'weights_only' not in str(error):
            raise
        raise pickle.UnpicklingError(NO_DATA) from error


@contextlib.contextmanager
def _use_own_unpickler(file: str | IO[bytes]) -> Iterator[None]:
    """Let torch read data by the unpickler below. torch 1.13 would ignore it as ``pickle_module``."""
    with open(file, 'rb') if isinstance(file, str) else contextlib.nullcontext(file) as opened:
        if _is_archive(opened):  # torch reads these in other ways
            raise pickle.UnpicklingError(NO_DATA)
    serialization: Any = torch.serialization
    theirs = serialization._weights_only_unpickler
    serialization._weights_only_unpickler = types.SimpleNamespace(Unpickler=_Unpickler, load=_load)
    try:
        yield
    finally:
        serialization._weights_only_unpickler = theirs


def _is_archive(opened: IO[bytes]) -> bool:
    try:
        tarfile.open(fileobj=opened).close()
        return True
    except tarfile.TarError:
        return zipfile.is_zipfile(opened) and any(
            name.endswith('/constants.pkl') for name in zipfile.ZipFile(opened).namelist()
        )
    finally:
        opened.seek(0)


def _drop_config(load: Callable[..., Any]) -> Callable[..., Any]:
    """Make a loader drop the config in a checkpoint: Runner.resume would run this text to compare numbers of GPUs."""

    @functools.wraps(load)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        content = load(*args, **kwargs)
        meta = content.get('meta') if isinstance(content, Mapping) else None
        if isinstance(meta, MutableMapping):
            meta.pop('config', None)
        return content

    return load_checkpoint


# What torch allows by itself from 2.6 on.
_KNOWN_LATER = {'_codecs.encode': codecs.encode, 'builtins.set': set, 'collections.Counter': Counter}


class _Unpickler(pickle._Unpickler):
    """An unpickler that makes nothing but data; in Python, as torch's own is."""

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> object:
        full = f'{module}.{name}'.replace('__builtin__.', 'builtins.')  # as Python 2 named them
        known = {**_get_allowed_globals(), **_KNOWN_LATER, **HARMLESS}
        if full not in known:
            raise pickle.UnpicklingError(f'GLOBAL {full} is no data')
        return known[full]

    def load_build(self) -> None:
        if callable(self.stack[-2]):
            raise pickle.UnpicklingError(f'class {self.stack[-2]!r} would be changed')
        super().load_build()  # type: ignore[misc]  # typeshed leaves it out

    dispatch[pickle.BUILD[0]] = load_build


def _load(*args: Any, **kwargs: Any) -> object:
    return _Unpickler(*args, **kwargs).load()


def _allow_harmless() -> AbstractContextManager:
    """Let torch read what is harmless, without what it knows already, as ``safe_globals`` would forget that."""
    if VERSION < (2, 6):
        return contextlib.nullcontext()
    known = torch.serialization.get_safe_globals()
    return torch.serialization.safe_globals([each for each in _list_harmless() if each not in known])


def _list_harmless() -> list:
    return [(stand_in, name) for name, stand_in in HARMLESS.items()]


def method(owner: object, name: str) -> object:
    """Replace ``getattr``, by which files name functions inside a class: allow only those that mmengine saves."""
    functions = {
        HistoryBuffer: ('min', 'max', 'current', 'mean'),
        OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
    }
    if not isinstance(owner, type) or name not in functions.get(owner, ()):
        raise pickle.UnpicklingError(f'getattr({owner!r}, {name!r}) in a checkpoint')
    return getattr(owner, name)


class Dtype:
    """Replaces ``numpy.dtype``, whose state in a file can turn bytes into pointers: allows numbers and text only."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch(r'[?biufcSU]\d*', str(code)):
            raise pickle.UnpicklingError(f'class numpy.dtype({code!r}) in a checkpoint')
        self.numpy = np.dtype(str(code))

    def __setstate__(self, state: tuple) -> None:
        """Take the order of bytes, the only part of the state that the code does not tell."""
        self.numpy = self.numpy.newbyteorder(state[1])


class Array(np.ndarray):
    """Replaces ``numpy.ndarray``, which would read any bytes as objects. Saved again, it is an ndarray."""

    def __new__(cls) -> Array:
        return super().__new__(cls, (0,))

    def __setstate__(self, state: tuple) -> None:
        *_, shape, dtype, fortran, data = state
        try:
            super().__setstate__((1, shape, dtype.numpy, fortran, data))
        except (AttributeError, MemoryError, TypeError, ValueError) as error:
            raise pickle.UnpicklingError(f'class numpy.ndarray of shape {shape} and {type(dtype)}: {error}') from error

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)


def array(*_: object) -> Array:
    """Replace numpy's ``_reconstruct``; the state follows."""
    return Array()


def scalar(dtype: Dtype, data: bytes) -> np.generic:
    """Replace numpy's ``scalar``."""
    return np.frombuffer(data, dtype.numpy)[0]


def empty_bytes() -> bytes:
    """Replace ``bytes``, which old formats call for empty bytes."""
    return b''


# What a checkpoint may name besides what torch allows, and what replaces it: what mmengine's schedulers, optimizer
# wrappers, hooks and message hub save, and the command line that other libraries keep. A file may call these with any
# arguments, so each of them only holds data.
HARMLESS = {
    'argparse.Namespace': Namespace,
    'builtins.bytes': empty_bytes,
    'builtins.getattr': method,
    'mmengine.config.config.ConfigDict': ConfigDict,
    'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
    'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler': OneCycleParamScheduler,
    'numpy.dtype': Dtype,
    'numpy.ndarray': Array,
    'numpy.core.multiarray._reconstruct': array,  # numpy 1
    'numpy.core.multiarray.scalar': scalar,
    'numpy._core.multiarray._reconstruct': array,  # numpy 2
    'numpy._core.multiarray.scalar': scalar,
}
