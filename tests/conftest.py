"""What all tests share: processes that run for the whole session, since starting one takes seconds."""

import importlib
import os
import sys

import pytest
import torch

if not torch.cuda.is_available():  # as test_ops/conftest.py, but before the package, which imports Triton on torch 2.4
    os.environ.setdefault('TRITON_INTERPRET', '1')

from processes import Processes  # noqa: E402
from support import TOOLS, speed_mmengine_up  # noqa: E402

if 'PYTEST_XDIST_WORKER' in os.environ:  # one of several processes, which share the cores
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))

speed_mmengine_up()


def pytest_runtest_setup(item):
    """Skip a test marked ``needs('mmdet')`` where mmdet is not installed; where it is, import it first."""
    for mark in item.iter_markers('needs'):
        pytest.importorskip(mark.args[0], reason=f'{mark.args[0]} is not installed')


@pytest.fixture(autouse=True)
def no_rest_of_safe_reading():
    """Whatever reads checkpoints as data sets this variable for its whole process, which here is everybody's."""
    yield
    os.environ.pop('TORCH_FORCE_WEIGHTS_ONLY_LOAD', None)


@pytest.fixture
def seed():
    """The same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture
def import_tool(monkeypatch):
    """Import a tool by name, with the folder of tools on the path as where one is run."""
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.setenv('LOCAL_RANK', '0')  # which tools set
    yield importlib.import_module
    for path in TOOLS.glob('*.py'):
        sys.modules.pop(path.stem, None)


@pytest.fixture(scope='session')
def two():
    """Run a function in two processes: ``two(function, *args)``."""
    processes = Processes(2)
    yield processes
    processes.stop()


@pytest.fixture(scope='session')
def four():
    """Run a function in four processes."""
    processes = Processes(4)
    yield processes
    processes.stop()


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """The model and the work directory of a training of 5 iterations that logged every second one."""
    from ratio_trainings import train

    from sn_openmmlab import SNRatioHook

    work_dir = tmp_path_factory.mktemp('ratios') / 'trained'
    return train(work_dir, SNRatioHook(interval=2, by_epoch=False)), work_dir
