"""Checkpoints read as data, so that one of unknown origin can run no code.

mmengine's upstream release leaves the way of reading to torch's default; the onedl one allows ``getattr``, which
reaches everything, and unpickles what it cannot read. Both save more than tensors, so that torch needs to be told what
else is harmless.
"""

import os
import pickle

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.utils import digit_version

TRUST = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'  # torch's own switch: unpickle whatever a file holds


def read_checkpoints_as_data() -> None:
    """Make torch refuse code in checkpoints, wherever a config names them, unless the user has set ``TRUST``.

    Before torch 2.6, which cannot be told all that is harmless, nothing changes.
    """
    if os.environ.get(TRUST) or digit_version(torch.__version__) < digit_version('2.6'):
        return
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'  # whatever a call to torch.load asks for
    torch.serialization.add_safe_globals(harmless())
    CheckpointLoader.register_scheme('', load_local, force=True)  # '': paths without scheme


def load_local(filename: str, map_location=None) -> dict:
    """Read a checkpoint file."""
    return torch.load(os.path.expanduser(filename), map_location=map_location, weights_only=True)


def harmless() -> list:
    """What mmengine saves beside tensors: log histories, numpy arrays and numbers, as numpy 1 and 2 name them."""
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
