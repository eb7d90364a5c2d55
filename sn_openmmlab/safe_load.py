"""Checkpoints read as data, so that one of unknown origin can run no code.

mmengine's upstream release leaves the way of reading to torch's default; the onedl one allows ``getattr``, which
reaches everything, and unpickles what it cannot read. Both save more than tensors, so that torch needs to be told what
else is harmless.
"""

import contextlib
import os
import pickle
import re
from collections.abc import Mapping, MutableMapping

import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.utils import digit_version
from torch import Tensor

TRUST = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'  # torch's own switch: unpickle whatever a file holds


def read_state_dict(path: str, map_location=None) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint file, which may be all that it holds, or its ``state_dict`` or ``model``.

    Nothing makes this run code, ``TRUST`` included.

    Args:
        path (str): The file.
        map_location: As :func:`torch.load`'s. Defaults to None, the CPU.

    Returns:
        dict[str, Tensor]: The tensors by name.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is no checkpoint, or holds code, or no state dict.
    """
    return dict(state_dict_in(read_checkpoint(path, map_location)))


def read_checkpoint(path: str, map_location=None) -> object:
    """Read all that a checkpoint file holds; else as :func:`read_state_dict`."""
    try:
        with _allowing():
            return torch.load(os.path.expanduser(path), map_location=map_location or 'cpu', weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many types, by the way in which a file is none of torch's
        code = re.search(r'(?:GLOBAL|class) ([\w.]+)|(getattr\(.*?\))', str(error))
        if code:
            raise ValueError(
                f'it holds more than data: reading it would run {code[1] or code[2]}. Refused; get it from a source '
                'that you trust, and save its tensors alone'
            ) from error
        reason = str(error).split('\n')[0] or type(error).__name__
        raise ValueError(f'it is no file that torch.save wrote, or not all of one ({reason})') from error


def state_dict_in(content: object) -> MutableMapping[str, Tensor]:
    """The state dict of what :func:`read_checkpoint` returned, itself and no copy."""
    for name in 'state_dict', 'model':
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise ValueError(f'it holds a {type(content).__name__}, not a state dict')
    others = [
        str(name) for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)
    ]
    if others or not content:
        raise ValueError(
            'it holds no state dict (tensors by name, alone or as state_dict or model), but '
            + (f'also {", ".join(others[:4])}' if others else 'nothing')
        )
    return content


def read_checkpoints_as_data() -> None:
    """Make torch refuse code in checkpoints, wherever a config names them, unless the user has set ``TRUST``.

    Before torch 2.6, which cannot be told all that is harmless, nothing changes.
    """
    if os.environ.get(TRUST) or not _can_allow():
        return
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'  # whatever a call to torch.load asks for
    torch.serialization.add_safe_globals(harmless())
    CheckpointLoader.register_scheme('', load_local, force=True)  # '': paths without scheme


def load_local(filename: str, map_location=None) -> dict:
    """Read a checkpoint file."""
    return torch.load(os.path.expanduser(filename), map_location=map_location, weights_only=True)


def _can_allow() -> bool:
    return digit_version(torch.__version__) >= digit_version('2.6')


def _allowing():
    """Within it torch reads what is harmless. What was allowed for good stays so, which torch itself would forget."""
    if not _can_allow():
        return contextlib.nullcontext()
    known = torch.serialization.get_safe_globals()
    return torch.serialization.safe_globals([each for each in harmless() if each not in known])


def harmless() -> list:
    """What mmengine saves beside tensors: log histories, numpy arrays and numbers, as numpy 1 and 2 name them."""
    import numpy as np

    multiarray = (np._core if hasattr(np, '_core') else np.core).multiarray
    functions = {
        f'numpy.{package}.multiarray.{f.__name__}': f
        for package in ('core', '_core')
        for f in (multiarray._reconstruct, multiarray.scalar)
    }
    dtypes = {type(np.dtype(code)) for code in '?' + np.typecodes['AllInteger'] + np.typecodes['Float']}
    named = {'builtins.getattr': history_method, **functions}
    return [HistoryBuffer, np.ndarray, np.dtype, *dtypes, *((f, name) for name, f in named.items())]


def history_method(owner: type, name: str):
    """In place of ``getattr``, by which log histories name their own methods: nothing else can be had from it."""
    if owner is not HistoryBuffer or name.startswith('_'):
        raise pickle.UnpicklingError(f'getattr({owner!r}, {name!r}) in a checkpoint')
    return getattr(owner, name)
