"""Sparse Switchable Normalization: ``norm_cfg=dict(type='SSN')``, which ends in one normalizer instead of a blend."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor

from ..ops.sparsestmax import softmax_of_sparsestmax, sparsestmax
from . import batch_statistics
from .start import distribute_like
from .state_dict import is_computable
from .switch_norm import SwitchNorm


@MODELS.register_module('SSN')
class SparseSwitchNorm(SwitchNorm):
    r""":class:`SwitchNorm` whose importance ratios become one-hot during training.

    .. math::
        w = \mathrm{sparsestmax}(\text{mean\_weight}; \rho), \quad w' = \mathrm{sparsestmax}(\text{var\_weight}; \rho)

    in place of softmax (*SSN: Learning Sparse Switchable Normalization via SparsestMax*, Shao et al., CVPR 2019; see
    :func:`sn_openmmlab.ops.sparsestmax`). The buffer ``radius``, :math:`\rho`, is saved with the checkpoint. It starts
    at 0, where the ratios are the projection of the logits onto the simplex. :class:`SSNRadiusHook` lets it grow to 1,
    where each triple of ratios is one-hot. Means and variances choose separately, as in SN.

    In evaluation mode only normalizers with a ratio above 0 are computed. If this is IN, LN or BN alone, torch's group
    or batch norm computes it. The layer looks up which they are when it enters evaluation mode, and when it loads a
    checkpoint in it. After any other change of logits or radius call ``eval()`` again.

    Checkpoints of BatchNorm load as into SN. Checkpoints of SN load too, and their ratios are the start. Checkpoints of
    SSN load into SN with the ratios that they have.

    Args:
        *args: As :class:`SwitchNorm`'s.
        **kwargs: As :class:`SwitchNorm`'s. The logits start at ``init_ratios`` themselves.

    Examples:
        >>> import torch
        >>> from mmengine.registry import MODELS
        >>> import sn_openmmlab
        >>> norm = MODELS.build(dict(type='SSN', num_features=64, init_ratios=(0.2, 0.3, 0.5)))
        >>> norm.radius.fill_(1.0)
        tensor(1.)
        >>> norm.importance_ratios
        tensor([[0., 0., 1.],
                [0., 0., 1.]])
    """

    radius: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer('radius', torch.zeros_like(self.mean_weight[0].detach()))
        self._used = self.normalizers
        self.reset_parameters()

    @property
    def importance_ratios(self) -> Tensor:
        """A copy of the current importance ratios (2, K): of the means, then of the variances."""
        logits = torch.stack([self.mean_weight.detach(), self.var_weight.detach()])
        return sparsestmax(logits.float(), self.radius)

    def reset_parameters(self) -> None:
        """Set everything to its starting value, ``radius`` to 0."""
        super().reset_parameters()
        if hasattr(self, 'radius'):  # not yet, when the base class calls this
            self.radius.zero_()

    def train(self, mode: bool = True) -> SparseSwitchNorm:
        """Set the mode, and look up which normalizers evaluation needs."""
        super().train(mode)
        self._find_used()
        return self

    def _normalize(self, x: Tensor, bn: Any) -> Tensor:
        learns = torch.is_grad_enabled() and (self.mean_weight.requires_grad or self.var_weight.requires_grad)
        learns = learns and not torch.jit.is_tracing()  # a graph of its own has nobody who waits
        alone = self._used[0] if len(self._used) == 1 and (self.affine or not learns) else None
        weight: Tensor | None = self.weight
        if alone and learns and weight is not None:
            # the logits' gradient is 0, but DistributedDataParallel waits for it
            weight = weight + 0 * (self.mean_weight + self.var_weight).sum()
        if alone == 'bn':
            mean, var, _, training, _ = batch_statistics.read_statistics(bn)
            if not training and mean is not None:
                self._check_input_dim(x)
                return F.batch_norm(x, mean, var, weight, self.bias, eps=bn.eps)
        # torch's group norm is slow on channels last, and some devices refuse parameters of another dtype
        if alone in ('in', 'ln') and x.is_contiguous() and x.dtype == self.mean_weight.dtype:
            self._check_input_dim(x)
            groups = self.num_features if alone == 'in' else 1
            return torch.group_norm(x, groups, weight, self.bias, self.eps)
        return super()._normalize(x, bn)

    def _make_logits(self, ratios: tuple[float, ...]) -> Tensor:
        """The logits for ``ratios``: these themselves, which sparsestmax with radius 0 does not change."""
        return torch.tensor(ratios, dtype=self.mean_weight.dtype)

    def _find_used(self) -> None:
        """Look up which normalizers are needed: in training mode all."""
        self._used = self.normalizers
        if not self.training and not any(t.is_meta for t in (self.radius, self.mean_weight, self.var_weight)):
            taken = (self.importance_ratios != 0).any(0).tolist()  # NaN counts as used
            self._used = tuple(itertools.compress(self.normalizers, taken))

    def _choose(self) -> tuple[tuple[str, ...], Tensor, Tensor, Tensor | None, Tensor | None]:
        _, mean_weight, var_weight, weight, bias = super()._choose()
        logits = torch.stack([mean_weight, var_weight])
        if len(self._used) == 1:
            return self._used, *(logits[:, :1] * 0), weight, bias
        logits = softmax_of_sparsestmax(logits, self.radius)
        if self._used != self.normalizers:
            logits = logits[:, [self.normalizers.index(name) for name in self._used]]
        return self._used, *logits, weight, bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as SN does. A checkpoint of SN or BN has no ``radius``: this becomes 0, and logits their softmax."""
        found = next((value for key, value in state_dict.items() if key.startswith(prefix)), None)
        if prefix + 'radius' not in state_dict and found is not None:
            # where the others are, since with assign=True it takes this one's place
            device = found.device if isinstance(found, Tensor) else self.radius.device
            radius = torch.zeros((), dtype=self.radius.dtype, device=device)
            state_dict[prefix + 'radius'] = distribute_like(radius, self.radius)
            for name in prefix + 'mean_weight', prefix + 'var_weight':
                if is_computable(state_dict.get(name)):
                    state_dict[name] = state_dict[name].softmax(0)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._find_used()
