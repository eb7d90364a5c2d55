"""Triton kernels, for CUDA: the four big passes, and the algebra between them."""

import triton

if tuple(map(int, triton.__version__.split('.')[:2])) < (3, 0):
    raise ImportError(f'Triton is {triton.__version__}')

from .algebra import coefficients, gradients, pool, pool_gradients  # noqa: E402
from .passes import affine, combine, lacks, moments, reduce  # noqa: E402
from .program import prepare  # noqa: E402

__all__ = [
    'affine', 'coefficients', 'combine', 'gradients', 'lacks', 'moments', 'pool', 'pool_gradients', 'prepare', 'reduce'
]  # fmt: skip
