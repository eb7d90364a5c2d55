"""Fixtures of the tests of swapping."""

import pytest


@pytest.fixture
def tool(import_tool, monkeypatch, tmp_path):
    """The module swap_norm, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return import_tool('swap_norm')
