"""The definition itself, against numbers worked out by hand."""

import pytest
import torch

from sn_openmmlab.ops import switch_norm_reference

# maps of two pixels each, chosen so that all moments are whole numbers or simple fractions
X = torch.tensor([[[1.0, 3.0], [2.0, 6.0]], [[5.0, 5.0], [0.0, 2.0]]], dtype=torch.float64)  # (N=2, C=2, S=2)
MEAN = {
    'in': [[2, 4], [5, 1]],
    'ln': [[3, 3], [3, 3]],
    'bn': [[3.5, 2.5], [3.5, 2.5]],
}
VAR = {
    'in': [[1, 4], [0, 1]],
    'ln': [[3.5, 3.5], [4.5, 4.5]],  # of 1 3 2 6 and of 5 5 0 2
    'bn': [[2.75, 4.75], [2.75, 4.75]],  # of 1 3 5 5 and of 2 6 0 2
}


def by_hand(mean_ratios, var_ratios, weight, bias, eps):
    y = torch.empty_like(X)
    for n in range(2):
        for c in range(2):
            mean = sum(r * MEAN[k][n][c] for k, r in mean_ratios.items())
            var = sum(r * VAR[k][n][c] for k, r in var_ratios.items())
            for s in range(2):
                y[n, c, s] = (X[n, c, s] - mean) / (var + eps) ** 0.5 * weight[c] + bias[c]
    return y


@pytest.mark.parametrize('names', [('in', 'ln', 'bn'), ('in', 'ln'), ('ln', 'bn'), ('bn',)])
def test_hand_computed_numbers(names):
    mean_ratios = dict(zip(names, [[1.0], [0.25, 0.75], [0.5, 0.3, 0.2]][len(names) - 1]))
    var_ratios = dict(zip(names, [[1.0], [0.9, 0.1], [0.1, 0.2, 0.7]][len(names) - 1]))
    weight, bias = torch.tensor([2.0, -3.0]).double(), torch.tensor([0.5, 1.0]).double()
    logits = [torch.tensor(list(r.values())).double().log() + 5 for r in (mean_ratios, var_ratios)]
    y, mean_bn, var_bn = switch_norm_reference(X, *logits, weight, bias, None, None, names, eps=0.25)
    torch.testing.assert_close(y, by_hand(mean_ratios, var_ratios, weight, bias, 0.25), rtol=1e-7, atol=1e-7)
    if 'bn' in names:
        assert mean_bn.tolist() == MEAN['bn'][0] and var_bn.tolist() == VAR['bn'][0]
    else:
        assert mean_bn is None and var_bn is None


def test_a_2x2x2x2_input_by_hand():
    """Every number here was worked out on paper: equal ratios, weight 1, bias 0, eps 0."""
    x = torch.cat([X, X], 2).view(2, 2, 2, 2)  # the same moments, on 2x2 maps
    third = torch.zeros(3, dtype=torch.float64)
    y, *_ = switch_norm_reference(x, third, third, None, None, None, None, ('in', 'ln', 'bn'), eps=0)
    # n=0, c=0: mean (2 + 3 + 3.5)/3 = 17/6, var (1 + 3.5 + 2.75)/3 = 29/12; x = 1, 3
    expected = torch.tensor([-11 / 6, 1 / 6], dtype=torch.float64) / (29 / 12) ** 0.5
    torch.testing.assert_close(y[0, 0], expected.expand(2, 2), rtol=1e-12, atol=0)
    # n=1, c=1: mean (1 + 3 + 2.5)/3 = 13/6, var (1 + 4.5 + 4.75)/3 = 41/12; x = 0, 2
    expected = torch.tensor([-13 / 6, -1 / 6], dtype=torch.float64) / (41 / 12) ** 0.5
    torch.testing.assert_close(y[1, 1], expected.expand(2, 2), rtol=1e-12, atol=0)
