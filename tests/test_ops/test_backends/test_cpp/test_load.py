"""The compiled library: when it is loaded, and what is said where it is not."""

import _ctypes
import ctypes
import importlib.machinery
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from sn_openmmlab.ops import backends
from sn_openmmlab.ops.backends import cpp, native
from test_ops.cases import needs_library

CPU = torch.device('cpu')
# those of the checkout, which the library was compiled from also where it was installed from a wheel, without them
SOURCES = [Path(__file__).parents[4] / 'sn_openmmlab/ops/backends/cpp' / path.name for path in cpp.load._SOURCES]
LIBRARY = next(Path(cpp.__file__).parent.glob('_cpp.abi3.so'), None)


@pytest.fixture
def fresh():
    """The library is looked for anew, and again after the test."""
    cpp.library.cache_clear()
    yield
    cpp.library.cache_clear()


def test_without_a_library_native_serves_silently(monkeypatch, fresh):
    monkeypatch.delenv('SN_BACKEND', raising=False)
    monkeypatch.setattr(cpp.load, '_FOLDER', Path('an installation without it'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert backends.choose(CPU, torch.float32) is native


def test_a_library_that_cannot_be_loaded_is_said_once(monkeypatch, fresh, tmp_path):
    monkeypatch.delenv('SN_BACKEND', raising=False)
    broken = tmp_path / '_cpp.so'
    broken.write_bytes(b'not a library')
    monkeypatch.setattr(cpp.load, '_FOLDER', tmp_path)
    with pytest.raises(OSError):
        ctypes.CDLL(str(broken))
    with pytest.warns(UserWarning, match='cannot be loaded: .*_cpp.so.*Install sn_openmmlab anew'):
        assert backends.choose(CPU, torch.float32) is native
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert backends.choose(CPU, torch.float32) is native


@needs_library
def test_an_older_library_beside_the_new_one_does_not_matter(monkeypatch, fresh, tmp_path):
    """Before there was one for all Pythons it had the name of one, which Python finds first."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    assert suffixes[-2:] == ['.abi3.so', '.so']
    shutil.copy(_ctypes.__file__, tmp_path / f'_cpp{suffixes[0]}')  # some library without the functions
    monkeypatch.delenv('SN_BACKEND', raising=False)
    monkeypatch.setattr(cpp.load, '_FOLDER', tmp_path)
    with pytest.warns(UserWarning, match='cannot be loaded: .*undefined symbol: sn_stamp'):
        assert backends.choose(CPU, torch.float32) is native
    cpp.library.cache_clear()
    shutil.copy(LIBRARY, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert backends.choose(CPU, torch.float32) is cpp


@needs_library
def test_a_library_of_other_code_is_not_taken(monkeypatch, fresh, tmp_path):
    """After ``git pull`` in an editable install its functions may want other arguments, whatever the times of files."""
    changed = tmp_path / 'passes.cpp'
    changed.write_bytes(SOURCES[0].read_bytes() + b'\n')
    os.utime(changed, (0, 0))
    monkeypatch.delenv('SN_BACKEND', raising=False)
    monkeypatch.setattr(cpp.load, '_SOURCES', [changed, *SOURCES[1:]])
    with pytest.warns(UserWarning, match='has changed since it was compiled. Install sn_openmmlab anew'):
        assert backends.choose(CPU, torch.float32) is native


@needs_library
def test_a_library_whose_code_was_only_touched_is_taken(monkeypatch, fresh, tmp_path):
    copies = [tmp_path / source.name for source in SOURCES]
    for copy, source in zip(copies, SOURCES):
        copy.write_bytes(source.read_bytes())
    monkeypatch.delenv('SN_BACKEND', raising=False)
    monkeypatch.setattr(cpp.load, '_SOURCES', copies)
    assert backends.choose(CPU, torch.float32) is cpp


@needs_library
def test_a_library_of_another_version_is_not_taken(monkeypatch, fresh):
    """In a wheel there is no code to compare."""
    monkeypatch.delenv('SN_BACKEND', raising=False)
    monkeypatch.setattr(cpp.load, '_SOURCES', [Path('not in a wheel.cpp')])
    monkeypatch.setattr(cpp.load, '__version__', '99.0')
    with pytest.warns(UserWarning, match=r'compiled for version .* and this is 99\.0'):
        assert backends.choose(CPU, torch.float32) is native


@needs_library
def test_a_library_that_is_cut_off_does_not_end_the_process(tmp_path):
    """As by a full disk, anywhere; loading it is what did."""
    whole = LIBRARY.read_bytes()
    code = (
        'import sys, torch; from pathlib import Path; from sn_openmmlab.ops import plan, switch_norm;'
        'from sn_openmmlab.ops.backends.cpp import load\n'
        'for load._FOLDER in map(Path, sys.argv[1:]):\n'
        '    load.library.cache_clear(), plan._plans.clear()\n'
        '    print(switch_norm(torch.randn(2, 3, 4, 4), torch.ones(3), torch.ones(3)).isfinite().all())'
    )
    parts = [0.0, 0.02, 0.5, 0.92, 0.999]
    for part in parts:
        cut = tmp_path / str(part) / '_cpp.so'
        cut.parent.mkdir()
        cut.write_bytes(whole[: int(len(whole) * part)])
    command = [sys.executable, '-c', code, *(str(tmp_path / str(part)) for part in parts)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ['tensor(True)'] * 5, done.stderr
    assert all(f'its own cannot be loaded: {tmp_path / str(part)}/_cpp.so' in done.stderr for part in parts), (
        done.stderr
    )
