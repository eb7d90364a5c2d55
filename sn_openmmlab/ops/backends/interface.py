"""What a backend is given, and what it has to offer.

It sees tensors of one process. The two sums over processes that SyncSN needs stand between its parts.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Parameters(NamedTuple):
    """What is learned. Logits are (K,), for K normalizers; weight and bias (C,), or both None."""

    mean_weight: Tensor
    var_weight: Tensor
    weight: Tensor | None
    bias: Tensor | None


class Statistics(NamedTuple):
    """Running statistics (C,): what BN takes where they are frozen, and what it moves by ``momentum`` where not."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None = None
    momentum: float | None = None  # None: all batches weigh the same


class Setting(NamedTuple):
    """What is computed."""

    normalizers: tuple[str, ...]
    eps: float
    frozen: bool  # BN's moments are given, and constants


def kept_sizes(n: int, c: int, dtype: torch.dtype) -> tuple[int, int]:
    """What backward needs of the forward pass are the moments and ``joint`` (see :class:`Backend`), in one tensor.

    Returns:
        The number of float64 that the moments of (N, C) maps of ``dtype`` take, an even one since kernels read 16 bytes
        at once; and that of ``joint``, which follows.
    """
    moments = 2 * n * c if dtype == torch.float64 else n * c
    return moments + moments % 2, 2 * (n + c) + 1


class Program(Protocol):
    """The whole op on one process, for tensors that look like those that it was made for. Addresses are theirs."""

    def forward(
        self, arguments: tuple, addresses: list[int], momentum: float | None, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """The output; and what backward needs, see :func:`kept_sizes`, or where it is not to be kept anything.

        Arguments are x, mean_weight, var_weight, weight, bias, running_mean, running_var and num_batches_tracked; the
        address of what is None is 0.
        """

    def backward(self, tensors: tuple, addresses: list[int]) -> tuple[Tensor, Tensor]:
        """The gradient of x, and in one tensor (2C + 2K,) those of weight, bias, mean_weight and var_weight.

        Tensors are dy, x, what forward kept, mean_weight, var_weight and weight; the address of what is None is 0.
        """


class Backend(Protocol):
    """Four passes over maps, and the algebra on (N, C) before each that writes.

    Maps, ``x`` and ``dy``, are stored alike, with samples first and channels second or, channels last, at the end; what
    is written is stored like them, in a tensor of its own. All else is dense:

    - ``moments`` (2, N, C): means and biased variances of the maps, in float32, or in float64 for such maps.
    - ``sums`` (2, N, C): of dy, and of dy * (x - mean).
    - ``joint`` (2N + 2C + 1,): means and variances of LN, those of BN, and the number of pixels behind BN's.
    - ``shared``: what :meth:`pool` or :meth:`pool_gradients` returned, summed over processes; None for this one alone.
    """

    def moments(self, x: Tensor) -> Tensor:
        """Pass 1: ``moments``."""

    def pool(self, moments: Tensor, size: int) -> Tensor:
        """This process's part of a ``shared`` (2C + 1,) for :meth:`coefficients`; ``size`` is the pixels of a map."""

    def coefficients(
        self,
        moments: Tensor,
        size: int,
        shared: Tensor | None,
        parameters: Parameters,
        statistics: Statistics | None,
        setting: Setting,
    ) -> tuple[Tensor, Tensor]:
        """Of the forward pass: a and s in one tensor (2, N, C), and ``joint``. Running statistics are moved."""

    def affine(self, x: Tensor, moments: Tensor, coefficients: Tensor) -> Tensor:
        """Pass 2: ``a*(x - mean) + s``."""

    def reduce(self, dy: Tensor, x: Tensor, moments: Tensor) -> Tensor:
        """Pass 3: ``sums``."""

    def pool_gradients(
        self, sums: Tensor, moments: Tensor, joint: Tensor, parameters: Parameters, setting: Setting
    ) -> Tensor:
        """This process's part of a ``shared`` (2C,) for :meth:`gradients`."""

    def gradients(
        self,
        sums: Tensor,
        moments: Tensor,
        joint: Tensor,
        size: int,
        shared: Tensor | None,
        parameters: Parameters,
        setting: Setting,
    ) -> tuple[Tensor, Tensor]:
        """Of the backward pass: b1, b0 and a in one tensor (3, N, C); and in one (2C + 2K,) the gradients of weight,
        bias, mean_weight and var_weight."""

    def combine(self, dy: Tensor, x: Tensor, moments: Tensor, coefficients: Tensor) -> Tensor:
        """Pass 4: ``b1*(x - mean) + b0 + a*dy``."""

    def prepare(
        self, x: Tensor, parameters: Parameters, statistics: Statistics | None, setting: Setting
    ) -> Program | None:
        """The parts above in one, for tensors that look like these; None where there is nothing to gain."""
