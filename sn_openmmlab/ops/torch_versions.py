"""What differs between versions of torch from 1.13 on. What one lacks answers no, as bool() does."""

import torch

VERSION = tuple(int(number) for number in torch.__version__.split('.')[:2])

_compiler = getattr(torch, 'compiler', None)  # 2.1
is_compiling = getattr(_compiler, 'is_compiling', getattr(torch._utils, 'is_compiling', bool))  # 2.3, or 2.0
count_dispatch_modes = getattr(torch._C, '_len_torch_dispatch_stack', int)  # 2.0


def is_exporting() -> bool:
    """Whether torch.export traces; torch's own (2.7) says so of every compilation, as late as in 2.11."""
    return getattr(_compiler, '_is_exporting_flag', False)
