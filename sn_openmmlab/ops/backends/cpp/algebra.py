"""The algebra of :mod:`..algebra` in C++: one call each way, so that small layers do not wait for many operations.

Arguments and names are those of :mod:`..algebra`; joint moments are float64. Sums over a process group go there.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ....version import __version__
from .. import algebra

_FOLDER = Path(__file__).parent
_SOURCES = [_FOLDER / name for name in ('passes.cpp', 'algebra.cpp', 'parallel.h')]  # not in a wheel


class _Arguments(ctypes.Structure):
    """What algebra.cpp is given, field by field as there."""

    _numbers = 'samples channels size threads in_ ln bn frozen'
    _inputs = 'mean var mean_logits var_logits weight bias joint'
    _forward = 'a s'
    _backward = 'sum_dy sum_dyx b1 b0 dmean_logits dvar_logits dweight dbias'
    _fields_ = [
        *((name, ctypes.c_int64) for name in _numbers.split()),
        ('eps', ctypes.c_double),
        *((name, ctypes.c_void_p) for name in f'{_inputs} {_forward} {_backward}'.split()),
    ]


def forward(
    mean_in, var_in, mean_bn, var_bn, mean_weight, var_weight, weight, bias, normalizers, eps, size, group
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...], Tensor | int | None]:
    """Coefficients of the forward pass from IN moments: see :func:`..algebra.forward`."""
    if group is not None:
        return algebra.forward(
            mean_in, var_in, mean_bn, var_bn, mean_weight, var_weight, weight, bias, normalizers, eps, size, group
        )
    (n, c), count = mean_in.shape, None
    joint = mean_in.new_empty(2 * (n + c), dtype=torch.float64)
    if 'bn' in normalizers:
        _, *bn = joint.split([2 * n, c, c])
        if mean_bn is None:
            (mean_bn, var_bn), count = bn, n * size
        else:
            bn[0].copy_(mean_bn)
            bn[1].copy_(var_bn)
    a, s = mean_in.new_empty((2, n, c)).unbind()
    given = mean_in, var_in, mean_weight, var_weight, weight, bias
    _run('sn_forward', given, joint, normalizers, eps, size, count is None, a=a, s=s)
    return a, s, (mean_in, var_in, mean_bn, var_bn, joint), count


def backward(
    sum_dy, sum_dyx, saved, mean_weight, var_weight, weight, normalizers, eps, size, count, group
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Coefficients of the backward pass, and the gradients of everything small: see :func:`..algebra.backward`."""
    if group is not None:
        return algebra.backward(
            sum_dy, sum_dyx, saved, mean_weight, var_weight, weight, normalizers, eps, size, count, group
        )
    mean_in, var_in, _, _, joint = saved
    (n, c), k = mean_in.shape, len(normalizers)
    a, b1, b0 = mean_in.new_empty((3, n, c)).unbind()
    dmean_logits, dvar_logits, dweight, dbias = mean_in.new_empty(2 * (k + c)).split([k, k, c, c])
    given = mean_in, var_in, mean_weight, var_weight, weight, None
    _run(
        'sn_backward', given, joint, normalizers, eps, size, count is None,
        a=a, sum_dy=sum_dy, sum_dyx=sum_dyx, b1=b1, b0=b0, dmean_logits=dmean_logits, dvar_logits=dvar_logits,
        dweight=dweight, dbias=dbias,
    )  # fmt: skip
    return a, b1, b0, dmean_logits, dvar_logits, dweight, dbias


def _run(name: str, given, joint: Tensor, normalizers, eps, size, frozen, **tensors: Tensor) -> None:
    given = [None if t is None else _dense(t) for t in given]
    numbers = *given[0].shape, size, torch.get_num_threads(), *_places(normalizers), frozen, eps
    arguments = _Arguments(*numbers, *map(pointer, (*given, joint)))
    for field, tensor in tensors.items():
        setattr(arguments, field, tensor.data_ptr())
    getattr(library(), name)(ctypes.byref(arguments))


def _dense(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float32 and t.is_contiguous() else t.float().contiguous()


@functools.lru_cache(None)
def _places(normalizers: tuple[str, ...]) -> list[int]:
    return [normalizers.index(name) if name in normalizers else -1 for name in ('in', 'ln', 'bn')]


def pointer(t: Tensor | None) -> int | None:
    """Where the elements of a tensor lie."""
    return None if t is None else t.data_ptr()


@functools.lru_cache(None)
def library() -> ctypes.CDLL | None:
    """What setup.py compiled; None where it could not, where it cannot be loaded, or where it is out of date."""
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
    for function, arguments in (
        (library.sn_sums, [ctypes.c_void_p] * 5 + sizes),
        (library.sn_combine, [ctypes.c_void_p] * 7 + sizes),
        (library.sn_forward, [ctypes.POINTER(_Arguments)]),
        (library.sn_backward, [ctypes.POINTER(_Arguments)]),
    ):
        function.argtypes, function.restype = arguments, None
    return library


def _check_length(path: Path) -> None:
    """Refuse a file that is cut off, whose loading would end the process (of ELF, whose last part is a table)."""
    with path.open('rb') as file:
        head = file.read(64)
    if head[:5] == b'\x7fELF\x02' and len(head) == 64:
        order = 'little' if head[5] == 1 else 'big'
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
