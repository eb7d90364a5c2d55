"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before anything imports Triton."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')

from sn_openmmlab.ops import plan  # noqa: E402
from sn_openmmlab.ops.backends import native  # noqa: E402
from test_ops.cases import BACKENDS, CPP  # noqa: E402


@pytest.fixture(autouse=True)
def forget_plans():
    """Tests change what nothing else changes in a process."""
    plan._plans.clear()


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """For input in any dtype; the value is the device."""
    name, *where = request.param.split()
    monkeypatch.setenv('SN_BACKEND', name)
    if where[:1] == ['as']:
        monkeypatch.setattr(native, '_aten', AsOnCuda())
    return 'cuda' if where[:1] == ['on'] else 'cpu'


class AsOnCuda:
    """torch's operators, with the batch norm that CUDA has."""

    def __getattr__(self, name):
        return getattr(torch.ops.aten, name)

    class native_batch_norm:
        @staticmethod
        def out(x, weight, bias, running_mean, running_var, training, momentum, eps, *, out, save_mean, save_invstd):
            """As ATen's batch_norm_cuda_out evaluates: it keeps the moments, and takes those that it has kept."""
            assert not training
            save_mean.resize_(running_mean.shape).copy_(running_mean)
            save_invstd.resize_(running_var.shape).copy_((running_var + eps).rsqrt())
            shape = 1, -1, *[1] * (x.dim() - 2)
            mean, rstd, weight, bias = (t.view(shape) for t in (save_mean, save_invstd, weight, bias))
            out.copy_((x.to(mean.dtype) - mean) * rstd * weight + bias)


@pytest.fixture(params=[*BACKENDS, CPP])
def float_backend(request, monkeypatch):
    """For input in float32 or bfloat16."""
    monkeypatch.setenv('SN_BACKEND', request.param)
    return request.param
