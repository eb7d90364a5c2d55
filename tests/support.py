"""What several test files need: places, commands, models away from their start, and what loggers say."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import mmengine.config.utils
import torch
from mmengine.logging import MMLogger
from processes import free_port
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from yapf.yapflib import yapf_api

from sn_openmmlab import SwitchNorm

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / 'tools'
CONFIGS = ROOT / 'configs'


def remember(function):
    """The function, which is called once for each of its arguments; these need not be hashable."""
    known = {}

    def remembering(*args, **kwargs):
        key = repr((args, kwargs))
        if key not in known:
            known[key] = function(*args, **kwargs)
        return known[key]

    return remembering


def speed_mmengine_up():
    """Reading configs and starting Runners costs mmengine more than the rest of small tests, for what stays the same.

    It reads all metafiles of a library each time that a config names a base there, and formats a config five times for
    each Runner.
    """
    mmengine.config.utils.load = remember(mmengine.config.utils.load)
    yapf_api.FormatCode = remember(yapf_api.FormatCode)


def call(place, *command, fails=False):
    """Run a command in the folder ``place`` and return what it printed. Runs on the CPU, so that results are exact."""
    env = dict(os.environ, CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1', PORT=str(free_port()))
    env['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{env["PATH"]}'
    done = subprocess.run(
        [*map(str, command)], cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def norms(model):
    """Norm layers by name, without the holders of SN layers' batch statistics."""
    own = {id(m.bn) for m in model.modules() if isinstance(m, SwitchNorm)}
    kinds = (_NormBase, nn.GroupNorm, nn.LayerNorm)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and id(m) not in own}


def foreign_norms(model):
    """Names of norm layers that are not SN."""
    return [name for name, m in norms(model).items() if not isinstance(m, SwitchNorm)]


def randomized(model):
    """With weights, shifts and statistics that are not those of a new layer."""
    for module in model.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name in ('weight', 'running_var') and value.dim() == 1:
                nn.init.uniform_(value, 0.5, 1.5)
            elif name in ('bias', 'running_mean'):
                nn.init.normal_(value, std=0.3)
            elif name == 'num_batches_tracked':
                value.fill_(7)
    return model


def scatter(model):
    """Everything that is learned, importance ratios too, away from its start; in evaluation mode."""
    randomized(model)
    for layer in model.modules():
        if isinstance(layer, SwitchNorm):
            nn.init.normal_(layer.mean_weight)
            nn.init.normal_(layer.var_weight)
    return model.eval()


def relative_error(a, b):
    """The largest difference, as a part of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


class Said(logging.Handler):
    """What mmengine's current logger says."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def listen(self):
        MMLogger.get_current_instance().addHandler(self)

    def emit(self, record):
        self.lines.append(record.getMessage())


class Intruder:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ('intruded',)


def can_be_saved(make) -> bool:
    """Whether this torch has what ``make`` makes, and writes it to files, which older ones do of fewer."""
    try:
        torch.save(make(), io.BytesIO())
    except Exception:
        return False
    return True
