"""Processes that run for the whole session, since starting one takes seconds."""

import pytest
from processes import Processes


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
