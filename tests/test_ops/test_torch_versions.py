"""What is asked of torch: what is going on, in versions that can tell."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sn_openmmlab.ops import torch_versions
from sn_openmmlab.ops.torch_versions import VERSION


class Asks(nn.Module):
    """Adds 1 where the answer is yes while its forward runs, or is traced."""

    def __init__(self, question):
        super().__init__()
        self.question = getattr(torch_versions, question)

    def forward(self, x):
        return x + 1 if self.question() else x


def answers(run):
    """Whether torch compiles, and whether it exports, by a function that makes something runnable of a model."""
    return [bool(run(Asks(question))(torch.zeros(1))) for question in ('is_compiling', 'is_exporting')]


def test_the_version_is_that_of_torch():
    assert torch.__version__.startswith('{}.{}.'.format(*VERSION)) and VERSION >= (1, 13)


def test_nothing_is_going_on():
    assert answers(lambda model: model) == [False, False]


@pytest.mark.skipif(VERSION < (2, 1), reason='torch 2.0 compiles SN in several graphs')
def test_a_compilation_is_no_export():
    torch._dynamo.reset()
    assert answers(lambda model: torch.compile(model, backend='eager', fullgraph=True)) == [True, False]


@pytest.mark.skipif(VERSION < (2, 7), reason='before torch 2.7 exports cannot be told from compilations')
@pytest.mark.parametrize('strict', [False, True])
def test_an_export_is_both(strict):
    assert answers(lambda model: torch.export.export(model, (torch.zeros(1),), strict=strict).module()) == [True, True]


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_modes_that_see_each_operation_are_counted():
    assert torch_versions.count_dispatch_modes() == 0
    with Mode():
        assert torch_versions.count_dispatch_modes() == (VERSION >= (2, 0))
