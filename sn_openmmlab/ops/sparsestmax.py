"""SparsestMax: ratios that become one-hot as a circle around the centre of the simplex grows."""

from __future__ import annotations

import torch
from torch import Tensor


def sparsestmax(z: Tensor, radius: Tensor | float) -> Tensor:
    r"""Importance ratios of :math:`z` that are nowhere closer to equal ones than a circle allows.

    .. math::
        p = \operatorname*{argmin}_{p \in \Delta} \lVert p - z \rVert
        \quad \text{where} \quad \lVert p - u \rVert \ge r, \quad u = (1/K, \ldots, 1/K), \quad r = \rho \sqrt{(K-1)/K}

    from *SSN: Learning Sparse Switchable Normalization via SparsestMax* (Shao et al., CVPR 2019), with :math:`\Delta`
    the probability simplex. The steps are the paper's: :math:`p_0` is the projection of :math:`z` onto the simplex
    (sparsemax, Martins & Astudillo, 2016). Inside of the circle it is pushed out onto it, from the centre; what thereby
    leaves the simplex is projected onto a face, and the same happens there, with the circle in which the face cuts the
    sphere. At :math:`\rho = 0` this is sparsemax; as :math:`\rho` grows to 1 only the vertices of the simplex remain,
    and :math:`p` is one-hot, of the largest :math:`z_k`. Where the nearest point is not unique, since :math:`p_0` is
    the centre of the simplex or of a face, it stays there until :math:`\rho = 1`, when the first largest wins.

    The gradient is that of the steps: on the simplex along it, on a circle along the circle, zero on a vertex and for
    ratios of 0. There is none for ``radius``.

    Args:
        z: Logits, K along the last axis, floating point.
        radius: :math:`\rho`, the radius as a fraction of the largest, from 0 to 1.

    Shape:
        - z: (\*, K). Output: as z, non-negative and summing to 1 along the last axis.

    Examples:
        >>> import torch
        >>> z = torch.tensor([0.3, 0.2, 0.5])
        >>> sparsestmax(z, 0.0)
        tensor([0.3000, 0.2000, 0.5000])
        >>> sparsestmax(z, 1.0)
        tensor([0., 0., 1.])
    """
    k = z.shape[-1]
    radius = torch.as_tensor(radius, dtype=z.dtype, device=z.device)
    outer = radius.square() * (k - 1) / k + 1 / k
    p = _sparsemax(z)
    face = torch.ones_like(z, dtype=torch.bool)
    for _ in range(k - 1):  # each face has a dimension less
        size = face.sum(-1, keepdim=True, dtype=z.dtype)
        offset = p - face / size  # from the centre of the face
        distance = offset.square().sum(-1, keepdim=True)
        inner = (outer - 1 / size).clamp(min=0)  # squared radius of the circle on the face
        push = (distance < inner) & (distance > TIE)
        pushed = face / size + offset * inner.sqrt() * distance.masked_fill(~push, 1).rsqrt()
        p = _sparsemax(torch.where(push, pushed, p).masked_fill(~face, -torch.inf))
        face = p > 0
    first = (torch.arange(k, device=z.device) == z.argmax(-1, keepdim=True)).to(z.dtype)
    first = first.masked_fill(z.isnan().any(-1, keepdim=True) | radius.isnan(), float('nan'))  # not the first by chance
    return torch.where(radius < 1, p, first)


TIE = 1e-12  # squared distance from a centre below which there is no direction, only rounding


def _sparsemax(z: Tensor) -> Tensor:
    """The point of the simplex that is closest to ``z``."""
    rank = torch.arange(1, z.shape[-1] + 1, device=z.device)
    shifts = (z.sort(-1, descending=True).values.cumsum(-1) - 1) / rank  # for each number of ratios above 0
    return (z - shifts.amax(-1, keepdim=True)).clamp(min=0)


def softmax_of_sparsestmax(logits: Tensor, radius: Tensor | float) -> Tensor:
    """Logits whose softmax, which is all that SN and its backends know, gives the ratios of SSN's logits."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # log(tiny) in place of log(0) is finite, its softmax nothing beside 1, and its gradient 0, as it is to be
    return sparsestmax(logits, radius).clamp(min=torch.finfo(torch.float32).tiny).log()
