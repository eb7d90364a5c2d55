"""What is found out once for all calls that are alike: whether the arguments fit together, and what computes them.

Calls are alike where nothing differs that this depends on. So nothing has to be forgotten when a parameter is replaced,
a layer moves or its mode changes: the next call is another one.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .backends.interface import Backend, Parameters, Program, Setting, Statistics, kept_sizes
from .formula import NORMALIZERS, moments_dtype

_PLAIN = {Tensor, torch.nn.Parameter}
# what os.environ looks into: it takes ten times as long to say that a variable is not set
_environment: Any = getattr(os.environ, '_data', os.environ)
_SN_BACKEND = os.environ.encodekey('SN_BACKEND') if _environment is not os.environ else 'SN_BACKEND'
_MOST = 4096  # plans that are kept


# the tensors of a call, a plain tuple everywhere: dynamo of some versions of torch cannot slice a named one
ARGUMENTS = 'x', 'mean_weight', 'var_weight', 'weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'
GRADIENT = 'the gradient of the output'


class Plan(NamedTuple):
    """What computes a call."""

    setting: Setting
    backend: Backend | None  # None: the formula does
    program: Program | None = None  # the whole op; None: the parts of the backend do
    backward: tuple = ()  # how its tensors look in the program's backward pass


_plans: dict[tuple, Plan] = {}


def look_up(
    arguments: tuple, normalizers: tuple[str, ...], eps: float, batch: bool, momentum: float | None, alone: bool
) -> tuple[Plan, list[int]]:
    """The plan of a call, and the addresses of its tensors, 0 for None.

    Args:
        arguments: As :data:`ARGUMENTS`.
        normalizers: As the op's.
        eps: Likewise.
        batch: Whether BN takes part with the batch's moments.
        momentum: As the op's.
        alone: Whether this process computes alone.

    Raises:
        ValueError: If a shape does not fit, or another argument is none that the op takes.
        TypeError: If a dtype does not.
        RuntimeError: If ``SN_BACKEND`` names a backend that cannot run this call, or the memory of a tensor was freed.
    """
    x, _, _, weight, bias, mean, var, tracked = arguments
    none = weight is None, bias is None, mean is None, var is None, tracked is None
    if True not in none[:4]:
        present = arguments[:-1] if tracked is None else arguments
    else:
        present = tuple(t for t in arguments if t is not None)
    key: Any = None
    plan = None
    try:
        addresses = [0 if t is None else t.data_ptr() for t in arguments]
        choice = _environment.get(_SN_BACKEND)
        key = describe(*present), x.stride(), none, normalizers, eps, batch, type(momentum), alone, choice
        plan = _plans.get(key)
    except (AttributeError, RuntimeError, TypeError):  # wrappers have no address; what is no tensor is refused below
        key, addresses = None, [0] * len(arguments)
    if plan is None:
        plan = _make(arguments, normalizers, eps, batch, momentum, alone)
        if key is not None:
            if len(_plans) >= _MOST:
                _plans.clear()
            _plans[key] = plan
    if addresses.count(0) > none.count(True):
        refuse_freed(ARGUMENTS, arguments)
        if key is None or any(t.data_ptr() == 0 < t.numel() for t in present):
            plan = Plan(plan.setting, None)
    return plan, addresses


def describe(*tensors: Tensor) -> tuple:
    """All that the way to the elements of tensors depends on, but where they start and the strides of what has gaps."""
    return (
        *map(_describe, tensors),
        *map(type, tensors),
        *map(Tensor.is_neg, tensors),
        *map(Tensor.is_contiguous, tensors),
    )


_describe = attrgetter('shape', 'dtype', 'device')


def _make(
    arguments: tuple, normalizers: tuple[str, ...], eps: float, batch: bool, momentum: float | None, alone: bool
) -> Plan:
    check_eps(eps)
    if momentum is not None and not isinstance(momentum, Real):
        raise ValueError(f'momentum must be None or a number, got {momentum!r}')
    check(arguments, momentum, normalizers)
    x, setting = arguments[0], Setting(normalizers, eps, not batch)
    if x.device.type in ('meta', 'mps'):  # no values, no float64
        return Plan(setting, None)
    if any(t is not None and (type(t) not in _PLAIN or t.is_neg()) for t in arguments):
        return Plan(setting, None)
    backend = backends.choose(x.device, x.dtype)
    if backend is None or not alone or not x.numel():
        return Plan(setting, backend)
    program = backend.prepare(x, Parameters(*arguments[1:5]), statistics_of(arguments, momentum, setting), setting)
    kept = torch.empty(sum(kept_sizes(x.shape[0], x.shape[1], x.dtype)), dtype=torch.float64, device=x.device)
    learned = [t for t in arguments[1:4] if t is not None]
    return Plan(setting, backend, program, describe(x.detach(), x, kept, *learned))


def refuse_freed(names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Refuse ordinary tensors whose memory somebody has freed, as FSDP does: a kernel would read what is not there."""
    for name, t in zip(names, tensors):
        if t is None or type(t) not in _PLAIN or t.device.type not in ('cpu', 'cuda') or t._is_zerotensor():
            continue
        try:
            freed = t.data_ptr() == 0 < t.numel()
        except RuntimeError:  # a wrapper of torch.func
            continue
        if freed:
            raise RuntimeError(f'{name}, of shape {tuple(t.shape)}, has no memory: it was freed before its last use')


def statistics_of(arguments: tuple, momentum: float | None, setting: Setting) -> Statistics | None:
    """The running statistics of a call that BN takes or moves."""
    mean, var, tracked = arguments[5:]
    if 'bn' not in setting.normalizers or mean is None or var is None:
        return None
    return Statistics(mean, var, tracked, momentum)


def quiet_in_traces(check: Callable) -> Callable:
    """Decorate a check of shapes: TorchScript's tracer warns of what it does not record, and this it need not."""

    @functools.wraps(check)
    def wrapper(*args):
        if not torch.jit.is_tracing():
            return check(*args)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', torch.jit.TracerWarning)
            return check(*args)

    return wrapper


def check_eps(eps: float) -> None:
    """Refuse what is no number to add to a variance."""
    if not (isinstance(eps, Real) and 0 <= eps < math.inf):
        raise ValueError(f'eps must be a finite number of at least 0, got {eps!r}')


def check_normalizers(normalizers: tuple[str, ...]) -> None:
    """Refuse all but some of the normalizers, in their order."""
    given = isinstance(normalizers, tuple) and bool(normalizers)
    if not given or normalizers != tuple([name for name in NORMALIZERS if name in normalizers]):
        raise ValueError(
            f'normalizers must be a tuple of one or more of {NORMALIZERS}, each once and in this order, '
            f'got {normalizers!r}'
        )


@quiet_in_traces
def check(arguments: tuple, momentum: float | None, normalizers: tuple[str, ...]) -> None:
    """Refuse normalizers that are none, and tensors that do not fit together."""
    check_normalizers(normalizers)
    x, _, _, weight, bias, running_mean, running_var, num_batches_tracked = arguments
    if not x.is_floating_point():
        how = 'x.dequantize(), or quantize by prepare_fx, which leaves SN alone' if x.is_quantized else 'x.float()'
        raise TypeError(f'switch_norm got {x.dtype} input; convert it to a floating-point dtype, e.g. by {how}')
    if x.dim() < 2:
        raise ValueError(f'switch_norm expects input of shape (N, C, *), got {tuple(x.shape)}')
    if (weight is None) != (bias is None) or (running_mean is None) != (running_var is None):
        raise ValueError('switch_norm takes weight and bias together, and running_mean and running_var together')
    if momentum is None and running_mean is not None and num_batches_tracked is None:
        raise ValueError('switch_norm with momentum=None averages by num_batches_tracked; pass it, or a momentum')
    if num_batches_tracked is not None and num_batches_tracked.is_meta and not x.is_meta:
        raise ValueError(f'num_batches_tracked is on meta and the input on {x.device}; move one, e.g. by to_empty()')
    logits, channels, device = (len(normalizers),), (x.shape[1],), x.device
    shapes = logits, logits, channels, channels, channels, channels
    for name, tensor, shape in zip(ARGUMENTS[1:-1], arguments[1:-1], shapes):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f'{name} has shape {tuple(tensor.shape)} where {shape} was expected, '
                f'for input of shape {tuple(x.shape)} and normalizers {normalizers}'
            )
        if tensor.device != device:
            raise ValueError(
                f'{name} is on {tensor.device} and the input on {device}; move one, e.g. by layer.to(x.device)'
            )
        if tensor.dtype != x.dtype and tensor.dtype != moments_dtype(x.dtype):
            raise TypeError(
                f'{name} is {tensor.dtype} and the input is {x.dtype}; convert one, e.g. by layer.to(x.dtype)'
            )
