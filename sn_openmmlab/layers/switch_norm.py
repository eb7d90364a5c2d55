"""Switchable Normalization as a norm layer of OpenMMLab: ``norm_cfg=dict(type='SN')``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from operator import itemgetter
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.fx
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..ops import NORMALIZERS, switch_norm
from ..ops.plan import check_eps, check_normalizers, quiet_in_traces
from ..ops.sparsestmax import softmax_of_sparsestmax
from ..ops.torch_versions import is_compiling
from . import batch_statistics
from .start import correct_for_blend, distribute_like, equal_ratios, start_ratios
from .state_dict import (
    explain_sizes,
    is_computable,
    log_starts,
    note_start,
    refuse_authors_names,
    warn_of_no_statistics,
)

_LEARNED = itemgetter('mean_weight', 'var_weight', 'weight', 'bias')


@MODELS.register_module('SN')
class SwitchNorm(nn.InstanceNorm2d):
    r"""Normalize by a learned blend of instance, layer and batch statistics.

    .. math::
        y = \gamma_c \frac{x - \sum_k w_k \mu_k}{\sqrt{\sum_k w'_k \sigma^2_k + \epsilon}} + \beta_c,
        \quad w = \mathrm{softmax}(\text{mean\_weight}), \; w' = \mathrm{softmax}(\text{var\_weight})

    from *Differentiable Learning-to-Normalize via Switchable Normalization* (Luo et al., ICLR 2019, Eq. 3). The
    importance ratios :math:`w, w'` are learned: one triple for the means and one for the variances of each layer, in
    the order IN, LN, BN.

    The batch statistics live in the child ``bn``, a :class:`torch.nn.BatchNorm2d` without parameters of its own. While
    it is in training mode, BN takes the moments of the batch, and the running ones are updated. While it is in
    evaluation mode (``model.eval()``, ``norm_eval=True``, ``frozen_stages``), BN takes the running ones. IN and LN
    always come from the sample. If ``bn`` is turned into torch's or mmcv's SyncBatchNorm (``sync_bn='torch'`` or
    ``'mmcv'``), the batch moments are those of all processes. What else can be done to a BatchNorm works too:
    ``docs/third_parties.md``.

    Three conventions are PyTorch's and not the authors': ``momentum`` weighs the *new* value; the input is normalised
    with the *biased* variance while ``running_var`` stores the *unbiased* one; weight, bias and running statistics
    have shape *(C,)*.

    Args:
        num_features (int): Number of channels C.
        eps (float): Added to the variance. Defaults to 1e-5.
        momentum (float, optional): Weight of the new value in the running statistics; None averages all batches
            equally. Defaults to 0.1.
        affine (bool): Whether there are ``weight`` and ``bias``. Defaults to True.
        normalizers (Sequence[str]): Which of 'in', 'ln' and 'bn' take part, in this order. Without 'bn' there is no
            child ``bn`` (the paper's setting for one image per GPU). Defaults to ('in', 'ln', 'bn').
        init_ratios (Sequence[float], optional): Importance ratios to start from, one for each normalizer, summing
            to 1. ``(0, 0, 1)`` is batch normalization; a ratio of 0 is a logit so low that it no longer learns.
            Defaults to None: equal ratios from scratch (all logits 1, as the authors'), and (0.001, 0.001, 0.998) when
            weights of a BatchNorm are loaded, so that the network computes what it did.
        correction (bool): Whether to change a weight and bias that come from a BatchNorm, so that for any ratios the
            layer gives on average what the BatchNorm gave (:func:`~sn_openmmlab.layers.start.correct_for_blend`).
            Defaults to True.
        device (torch.device, optional): Device of the parameters. Defaults to None.
        dtype (torch.dtype, optional): Dtype of the parameters. Defaults to None.

    Shape:
        - Input: (N, C, \*) with 2 to 5 dimensions, of any floating-point dtype and any number of pixels, also 0 or 1.
        - Output: as the input.

    Raises:
        ValueError: If an argument or the shape of the input is wrong.
        TypeError: If the dtypes of input and parameters do not fit.

    Examples:
        >>> import torch
        >>> from mmengine.registry import MODELS
        >>> import sn_openmmlab
        >>> norm = MODELS.build(dict(type='SN', num_features=64))
        >>> norm(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
        >>> norm.importance_ratios.shape
        torch.Size([2, 3])
    """

    # InstanceNorm2d for every number of dimensions: optimizers that exempt norms from weight decay list these classes.
    _abbr_ = 'bn'  # attributes are named bn1, bn2, ... so that BatchNorm checkpoints find them
    _num_dims: tuple[int, ...] = (2, 3, 4, 5)

    normalizers: tuple[str, ...]
    init_ratios: tuple[float, ...] | None
    correction: bool
    mean_weight: nn.Parameter
    var_weight: nn.Parameter
    bn: Any  # a BatchNorm, or what others put in its place; None without BN
    _eps: float  # without BN

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        normalizers: Sequence[str] | str = NORMALIZERS,
        init_ratios: Sequence[float] | None = None,
        correction: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        names: Any = (normalizers,) if isinstance(normalizers, str) else normalizers
        normalizers = tuple(names) if isinstance(names, list) else names  # of a config; a set has no order
        check_normalizers(normalizers)
        _check_ratios(normalizers, init_ratios)
        check_eps(eps)
        if not (isinstance(num_features, Integral) and num_features >= 1):
            raise ValueError(f'num_features must be a whole number of at least 1, got {num_features!r}')
        if momentum is not None and not (isinstance(momentum, Real) and 0 <= momentum <= 1):
            raise ValueError(
                f'momentum must be None or between 0 and 1 (the weight of the new value), got {momentum!r}'
            )
        for name, value in dict(affine=affine, correction=correction).items():
            if value not in (True, False):
                raise ValueError(f'{name} must be True or False, got {value!r}')
        factory = dict(device=device, dtype=dtype)
        super().__init__(num_features, eps, None, affine, track_running_stats=False, **factory)
        self.normalizers = normalizers
        self.init_ratios = None if init_ratios is None else tuple(init_ratios)
        self.correction = correction
        self.mean_weight = nn.Parameter(torch.empty(len(normalizers), **factory))
        self.var_weight = nn.Parameter(torch.empty(len(normalizers), **factory))
        self.bn = None
        if 'bn' in normalizers:
            self.bn = batch_statistics.BatchNorm2d(num_features, eps, momentum, affine=False, **factory)
        self.reset_parameters()

    @property
    def momentum(self) -> float | None:
        """Weight of the new value in the running statistics. It is read from the child ``bn``, and set there."""
        bn = self._find_statistics()
        return getattr(bn, 'momentum', None)

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        bn = self._find_statistics()
        if bn is not None:
            bn.momentum = value

    @property
    def eps(self) -> float:
        """What is added to the variance. It is read from the child ``bn``, if there is one, and set there too."""
        bn = self._find_statistics()
        return self._eps if bn is None else bn.eps

    @eps.setter
    def eps(self, value: float) -> None:
        bn = self._find_statistics()
        self._eps = value
        if bn is not None:
            bn.eps = value

    @property
    def importance_ratios(self) -> Tensor:
        """A copy of the current importance ratios (2, K): of the means, then of the variances."""
        return torch.stack([self.mean_weight.detach(), self.var_weight.detach()]).float().softmax(1)

    def reset_parameters(self) -> None:
        """Set everything to its start: weight 1, bias 0, logits by ``init_ratios``, running mean 0 and variance 1."""
        super().reset_parameters()
        if hasattr(self, 'bn'):  # not yet, when the base class calls this
            ratios = self.init_ratios or equal_ratios(self.normalizers)
            for logits in self.mean_weight, self.var_weight:
                with torch.no_grad():
                    logits.copy_(self._make_logits(ratios))
            if self.bn is not None:
                self.bn.reset_running_stats()

    @torch.no_grad()
    def start_from(
        self, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, load: object = None
    ) -> dict[str, Tensor]:
        """Compute the parameters of a layer that starts from a BatchNorm; the layer itself does not change.

        The importance ratios are ``init_ratios``, or nearly all on BN without them. Weight and bias are corrected for
        the ratios.

        Args:
            weight (Tensor, optional): The BatchNorm's weight (C,).
            bias (Tensor, optional): Its bias (C,).
            mean (Tensor): Its running mean (C,).
            var (Tensor): Its running variance (C,).
            load: An object that all layers of a load share, so that one line is logged for all. Defaults to None: no
                line.

        Returns:
            dict[str, Tensor]: Values by the names of the layer's parameters, without those that are None.
        """
        ratios = start_ratios(self.normalizers, self.init_ratios)
        if self.correction:
            weight, bias = correct_for_blend(weight, bias, mean, var, dict(zip(self.normalizers, ratios)), self.eps)
        if load is not None:
            note_start(load, self.normalizers, ratios, self.init_ratios is not None, self.correction)
        logits = self._make_logits(ratios).to(mean.device)
        start = dict(
            weight=weight,
            bias=bias,
            mean_weight=distribute_like(logits, self.mean_weight),
            var_weight=distribute_like(logits.clone(), self.var_weight),
        )
        return {name: value for name, value in start.items() if value is not None}

    def _make_logits(self, ratios: tuple[float, ...]) -> Tensor:
        """Logits whose softmax is ``ratios``, 1 for equal ones as the authors start."""
        tiny = torch.finfo(torch.float32).tiny  # in place of 0: a finite logit, yet 1 + tiny == 1
        logits = [1 + math.log(len(ratios)) + math.log(max(ratio, tiny)) for ratio in ratios]
        return torch.tensor(logits, dtype=self.mean_weight.dtype)

    def train(self, mode: bool = True) -> SwitchNorm:
        """Set the mode, and log how layers start that took BatchNorm weights since the last call."""
        log_starts()
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` of shape (N, C, \\*)."""
        if isinstance(input, torch.fx.Proxy):
            return self._record_call(input)
        bn = self._find_statistics()
        if bn is not None and batch_statistics.has_hooks(bn):
            return batch_statistics.call_with_hooks(bn, input, lambda x: self._normalize(x, bn))
        return self._normalize(input, bn)

    def _normalize(self, x: Tensor, bn: Any) -> Tensor:
        """Normalize with the batch statistics of ``bn``."""
        self._check_input_dim(x)
        normalizers, mean_weight, var_weight, weight, bias = self._choose()
        parameters = mean_weight, var_weight, weight, bias
        if bn is None:
            return switch_norm(x, *parameters, eps=self._eps, normalizers=normalizers)
        mean, var, tracked, training, momentum = batch_statistics.read_statistics(bn)
        group = self._find_group(bn) if training else None
        return switch_norm(
            x, *parameters, mean, var, tracked,
            training=training, momentum=momentum, eps=bn.eps, normalizers=normalizers, group=group,
        )  # fmt: skip

    def _record_call(self, x: torch.fx.Proxy) -> torch.fx.Proxy:
        """Record this module as one call in a symbolic trace; its inside would fix the mode of the moment."""
        tracer: Any = x.tracer
        return tracer.create_proxy('call_module', tracer.path_of_module(self), (x,), {})

    def _choose(self) -> tuple[tuple[str, ...], Tensor, Tensor, Tensor | None, Tensor | None]:
        """Choose the normalizers to compute, the logits of their importance ratios, and weight and bias."""
        if not is_compiling():
            try:
                return self.normalizers, *_LEARNED(self._parameters)  # getattr takes four times as long
            except KeyError:  # FSDP, pruning and parametrizations put something else in their place
                pass
        return self.normalizers, self.mean_weight, self.var_weight, self.weight, self.bias

    def _find_statistics(self) -> Any:
        """The module that holds the batch statistics; None without BN."""
        bn = self.bn if is_compiling() else self._modules.get('bn')  # dynamo of torch 2.1 knows no such get
        return None if bn is None else batch_statistics.find_holder(bn)

    def _find_group(self, bn: nn.Module) -> dist.ProcessGroup | None:
        """The process group to take batch moments over; None without one."""
        several = dist.is_available() and dist.is_initialized()  # first, as looking at a module takes longer
        return self._find_own_group(bn) if several and batch_statistics.is_synchronised(bn) else None

    def _find_own_group(self, bn: nn.Module) -> dist.ProcessGroup | None:
        """The group of ``bn``, else of all processes; None if it has one process only."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = batch_statistics.get_group(bn) or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a child ``bn`` comes to belong to this layer."""
        super().__setattr__(name, batch_statistics.adopt(self, value) if name == 'bn' else value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a child; ``bn`` comes to belong to this layer."""
        super().add_module(name, batch_statistics.adopt(self, module) if name == 'bn' else module)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle, in which ``bn`` has lost its link to the layer."""
        super().__setstate__(state)
        bn = self._find_statistics()
        if isinstance(bn, batch_statistics.BatchNorm2d):
            bn.belong_to(self)

    def _check_input_dim(self, x: Tensor) -> None:
        shape, ranks = x.shape, self._num_dims
        if torch.jit.is_tracing() or not ranks[0] <= len(shape) <= ranks[-1] or shape[1] != self.num_features:
            self._check_shape(x)

    @quiet_in_traces
    def _check_shape(self, x: Tensor) -> None:
        if not self._num_dims[0] <= x.dim() <= self._num_dims[-1]:  # torch.compile of torch 2.4 misreads `not in`
            expected = ' or '.join(f'{rank}-D' for rank in self._num_dims)
            raise ValueError(f'{type(self).__name__} expects {expected} input, got shape {tuple(x.shape)}')
        if x.shape[1] != self.num_features:
            raise ValueError(
                f'{type(self).__name__} has num_features={self.num_features}, but the input of shape {tuple(x.shape)} '
                f'has {x.shape[1]} channels (dimension 1)'
            )

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            f'{type(self).__name__} cannot be compiled by torch.jit.script; record it: '
            'torch.jit.trace(model.eval(), example_input)'
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load this layer's own keys, BatchNorm's, or tensors of shape (1, C, 1, 1) under the authors' flat names."""
        if not any(key.startswith(prefix) for key in state_dict):
            refuse_authors_names(unexpected_keys)
        if isinstance(self.bn, batch_statistics.BatchNorm2d):
            for name in 'weight', 'bias':  # of a FrozenBatchNorm2d that took its place; they had no effect
                state_dict.pop(f'{prefix}bn.{name}', None)
        logits = [prefix + name for name in ('mean_weight', 'var_weight')]
        anew = not any(name in state_dict for name in logits)  # the checkpoint is not SN's
        names = 'weight', 'bias', 'bn.running_mean', 'bn.running_var', 'bn.num_batches_tracked'
        for name in names[2:]:
            flat = prefix + name[3:]
            if flat in state_dict and (anew or self.bn is not None):
                state_dict[prefix + name] = state_dict.pop(flat)
        for name in names[:4]:
            value: Any = state_dict.get(prefix + name)
            if is_computable(value) and value.shape[1:2] == (self.num_features,) and value.numel() == self.num_features:
                state_dict[prefix + name] = value.reshape(-1)
        if prefix + 'radius' in state_dict and 'radius' not in self._buffers:
            radius: Any = state_dict.get(prefix + 'radius')
            of_ssn: list[Any] = [state_dict.get(name) for name in logits]
            if is_computable(radius, *of_ssn) and radius.numel() == 1 and all(v.dim() == 1 and len(v) for v in of_ssn):
                del state_dict[prefix + 'radius']
                state_dict.update({k: softmax_of_sparsestmax(v, radius) for k, v in zip(logits, of_ssn)})
        weight, bias, mean, var = (state_dict.get(prefix + name) for name in names[:4])
        given = [value for value in (weight, bias, mean, var) if value is not None]
        fitting = is_computable(*given) and all(value.shape == (self.num_features,) for value in given)
        if anew and fitting and mean is not None and var is not None:
            start = self.start_from(weight, bias, mean, var, load=missing_keys)
            state_dict.update({prefix + name: value for name, value in start.items()})
            for name in names[2:] if self.bn is None else ():
                state_dict.pop(prefix + name, None)
        elif anew and weight is not None and mean is None and self.bn is not None:
            warn_of_no_statistics(missing_keys, prefix.rstrip('.'))
        found = [state_dict[name] for name in logits if is_computable(state_dict.get(name))]
        explain_sizes(found, self.normalizers, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def extra_repr(self) -> str:
        """The arguments."""
        text = f'{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}'
        text += f', normalizers={self.normalizers}'
        text += '' if self.init_ratios is None else f', init_ratios={self.init_ratios}'
        return text if self.correction else f'{text}, correction=False'


@MODELS.register_module('SN1d')
class SwitchNorm1d(SwitchNorm):
    """:class:`SwitchNorm` for (N, C) or (N, C, L) input only."""

    _num_dims = (2, 3)


@MODELS.register_module('SN2d')
class SwitchNorm2d(SwitchNorm):
    """:class:`SwitchNorm` for (N, C, H, W) input only."""

    _num_dims = (4,)


@MODELS.register_module('SN3d')
class SwitchNorm3d(SwitchNorm):
    """:class:`SwitchNorm` for (N, C, D, H, W) input only."""

    _num_dims = (5,)


def _check_ratios(normalizers: tuple[str, ...], ratios: object) -> None:
    if ratios is None:
        return
    values = list(ratios) if isinstance(ratios, Iterable) else []
    numbers = all(isinstance(value, Real) for value in values) and all(value >= 0 for value in values)
    if len(values) != len(normalizers) or not numbers or not abs(sum(values) - 1) <= 1e-6:
        raise ValueError(
            f'init_ratios must be {len(normalizers)} non-negative numbers that sum to 1, '
            f'one for each of {normalizers}, got {ratios!r}'
        )
