"""Fixtures of the tests of figures."""

import pytest
import torch
from ratio_trainings import Net


@pytest.fixture
def tool(import_tool, tmp_path, trained, monkeypatch, capsys):
    """Run plot_ratios in a folder with the work directory 'trained' and the checkpoint start.pth, for its output."""
    (tmp_path / 'trained').symlink_to(trained[1])
    torch.save({k: v for k, v in Net().state_dict().items() if 'bbox_head' not in k}, tmp_path / 'start.pth')
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        import_tool('plot_ratios').main([*map(str, argv)])
        return capsys.readouterr().out

    return run
