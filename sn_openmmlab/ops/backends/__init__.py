"""The ways to run the op: torch's own kernels, C++ for the CPU, Triton for CUDA; and which of them is taken."""

from __future__ import annotations

import functools
import os
import warnings

import torch

from . import cpp, native

NAMES = ('reference', 'native', 'cpp', 'triton')


def choose(device: torch.device, dtype: torch.dtype):
    """The module whose passes to run, or None for the reference."""
    name = os.environ.get('SN_BACKEND')
    if name and name not in NAMES:
        raise RuntimeError(f'SN_BACKEND is {name!r}; choose one of {list(NAMES)} or unset it')
    if name == 'reference':
        return None
    if (not name or name == 'cpp') and cpp.runs_on(device, dtype):
        return cpp
    if name == 'cpp':
        raise RuntimeError(
            f"SN_BACKEND is 'cpp', which does not run on {dtype} on {device}: it takes float32 and bfloat16 on the "
            'CPU, where the installation found a C++ compiler; unset SN_BACKEND, or install sn_openmmlab anew'
        )
    if name == 'native' or (not name and device.type != 'cuda'):
        return native
    triton, reason = _triton(device, dtype)
    if triton is not None:
        return triton
    if not name:
        _warn_once(f'SwitchNorm takes slower kernels of torch, since its own do not run here: {reason}')
        return native
    raise RuntimeError(
        f"SN_BACKEND is 'triton', whose kernels do not run here: {reason}; mend this or unset SN_BACKEND"
    )


@functools.lru_cache(None)
def _triton(device: torch.device, dtype: torch.dtype):
    """The Triton backend, imported and tried when first wanted; or None, and why it does not run."""
    try:
        from . import triton_kernels as triton
    except ImportError as error:
        # torch demands one version of Triton: another one is had by another torch only
        return None, f'they need Triton 3.0 or newer, which comes with torch 2.4 and newer ({error})'
    reason = triton.lacks(device, dtype)
    if reason is None:
        try:
            triton.moments(torch.zeros(1, 1, 1, dtype=dtype, device=device))
        except Exception as error:  # of many types, where there is no C compiler, no Python.h, no folder to write to
            reason = f'Triton cannot compile them ({error})'
    return (triton, None) if reason is None else (None, reason)


@functools.lru_cache(None)
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=5)
