"""Fixtures of the tests of the Triton kernels, which are skipped where these cannot be imported."""

import pytest


@pytest.fixture(params=['default', 'packed', 'split', 'by row and column', 'torch algebra'])
def way(request, monkeypatch):
    """Bring about, one after the other, what the shapes of real networks do."""
    from .cases import algebra, take

    take(request.param, monkeypatch)
    yield
    algebra.plans.cache_clear()
