"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before anything imports Triton."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')


@pytest.fixture(autouse=True)
def forget_plans():
    """Tests change what nothing else changes in a process."""
    from sn_openmmlab.ops import plan

    plan._plans.clear()
