"""What differs between versions of torch from 1.13 on. What one lacks answers no, as bool() does."""

import sys
from typing import Any, Callable

import torch

VERSION = tuple(int(number) for number in torch.__version__.split('.')[:2])

_compiler = getattr(torch, 'compiler', None)  # 2.1
is_compiling = getattr(_compiler, 'is_compiling', getattr(torch._utils, 'is_compiling', bool))  # 2.3, or 2.0
count_dispatch_modes = getattr(torch._C, '_len_torch_dispatch_stack', int)  # 2.0


def constant(function: Callable) -> Any:
    """Decorate what dynamo is to call while it traces, and not to trace.

    As ``torch.compiler.assume_constant_result`` does it, which imports torch._dynamo: half a second.
    """
    marked: Any = function
    marked._dynamo_marked_constant = True
    return marked


@constant
def _is_exporting() -> bool:
    """Whether torch.export traces; torch's own says so of every compilation, as late as in 2.11."""
    tracer = sys.modules.get('torch.export._trace')  # torch 2.7 says only there that an export is a strict one
    return torch.compiler._is_exporting_flag or getattr(tracer, '_EXPORT_FLAGS', None) is not None


def _never() -> bool:
    return False


is_exporting = _is_exporting if VERSION >= (2, 7) else _never
