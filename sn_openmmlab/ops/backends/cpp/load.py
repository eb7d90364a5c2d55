"""The compiled library: where it is, and whether it may be loaded."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import warnings
from pathlib import Path
from typing import Any

from ....version import __version__

# these take one block of arguments
_OF_BLOCK = 'sn_pool', 'sn_coefficients', 'sn_pool_gradients', 'sn_gradients', 'sn_forward', 'sn_backward'
_FOLDER = Path(__file__).parent
_SOURCES = [_FOLDER / name for name in ('passes.cpp', 'algebra.cpp', 'parallel.h')]  # not in a wheel


@functools.lru_cache(None)
def library() -> Any:
    """The ``ctypes.CDLL`` that setup.py compiled; None where it could not, or it cannot be loaded or is out of date."""
    reason = None
    # several may lie here: an older install's was compiled for one Python, under a name that Python itself prefers
    for path in (_FOLDER / f'_cpp{suffix}' for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        if not path.exists():
            continue
        try:
            _check_length(path)
            library = ctypes.CDLL(str(path))
            _check_stamp(library)
            break
        except (OSError, AttributeError) as error:
            reason = error
    else:
        if reason is not None:
            warnings.warn(
                f'SwitchNorm takes slower kernels of torch, since its own cannot be loaded: {reason}. Install '
                'sn_openmmlab anew, where it is to run',
                stacklevel=6,
            )
        return None
    sizes = [ctypes.c_int64] * 3 + [ctypes.c_int] * 2 + [ctypes.c_int64]
    arguments = dict(sn_sums=[ctypes.c_void_p] * 5 + sizes, sn_combine=[ctypes.c_void_p] * 7 + sizes)
    for name in ('sn_sums', 'sn_combine', *_OF_BLOCK):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments.get(name, [ctypes.c_char_p]), None
    return library


def _check_length(path: Path) -> None:
    """Refuse a file that is cut off, whose loading would end the process (of ELF, whose last part is a table)."""
    with path.open('rb') as file:
        head = file.read(64)
    if head[:5] == b'\x7fELF\x02' and len(head) == 64:
        order: Any = 'little' if head[5] == 1 else 'big'
        start, size, number = (int.from_bytes(head[a:b], order) for a, b in ((40, 48), (58, 60), (60, 62)))
        if path.stat().st_size < start + size * number:
            raise OSError(f'{path} is cut off')


def _check_stamp(library: ctypes.CDLL) -> None:
    """Refuse a library of other code, whose functions may want other arguments."""
    library.sn_stamp.restype = ctypes.c_char_p
    version, code = library.sn_stamp().decode().split()
    if version != __version__:
        raise OSError(f'it was compiled for version {version}, and this is {__version__}')
    if all(source.exists() for source in _SOURCES):
        content = b''.join(source.read_bytes() for source in _SOURCES)
        if code != hashlib.sha256(content).hexdigest():
            raise OSError('the C++ code of this editable install has changed since it was compiled')
