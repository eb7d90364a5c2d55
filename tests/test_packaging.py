"""What users install: the wheel and the editable install, each in an environment of its own."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

from sn_openmmlab import __version__

ROOT = Path(__file__).parents[1]
SITE = Path(sysconfig.get_paths()['purelib'])
CONFIG = 'mmdet/sn/mask-rcnn_r50_fpn_sn-all_2x_coco.py'

# a user's own config, on top of one of ours
PRINT_INHERITED = f"""
import sn_openmmlab
from mmengine.config import Config
from mmengine.hub import get_config
open('own.py', 'w').write("_base_ = 'sn_openmmlab::{CONFIG}'")
assert get_config('sn_openmmlab::{CONFIG}').model == Config.fromfile('own.py').model
print(sn_openmmlab.__file__, Config.fromfile('own.py').model.backbone.norm_cfg.type)
"""

PRINT_BACKEND = """
import torch
from sn_openmmlab.ops import backends
print(backends.choose(torch.device('cpu'), torch.float32).__name__)
"""
BACKEND = 'cpp' if shutil.which(os.environ.get('CXX', 'c++')) else 'native'  # what an install gets here


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of the source tree, so that building leaves nothing in the real one."""
    source = tmp_path_factory.mktemp('source')
    ignore = shutil.ignore_patterns('.*', 'build', 'data', 'work_dirs', '*.egg-info', '__pycache__', '*.so')
    shutil.copytree(ROOT, source, ignore=ignore, dirs_exist_ok=True)
    return source


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory):
    """The wheel that ``pip wheel`` makes."""
    folder = tmp_path_factory.mktemp('wheel')
    run(sys.executable, *pip('wheel'), '--wheel-dir', folder, source)
    return next(folder.glob('*.whl'))


@pytest.fixture
def environment(tmp_path):
    """The python of a fresh environment, which finds this one's packages, but not the package that it has installed."""
    run(sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'venv')
    site = next((tmp_path / 'venv/lib').glob('python*/site-packages'))
    (site / 'others.pth').write_text(str(SITE))  # .pth files in there, as those of editable installs, are not followed
    return tmp_path / 'venv/bin/python'


def pip(command):
    return ['-m', 'pip', command, '--quiet', '--no-deps', '--no-index', '--no-build-isolation']


def run(*command, **kwargs):
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    assert done.returncode == 0, done.stdout
    return done.stdout


def files(folder):
    """Relative paths of the files under ``folder`` that belong to the project."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts}


def libraries(folder):
    """The libraries of compiled code, relative to the package in ``folder``."""
    return {
        p.relative_to(folder / 'sn_openmmlab').as_posix() for p in folder.glob('sn_openmmlab/ops/backends/cpp/_cpp.*')
    }


def test_the_citation_has_the_version():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == __version__


def test_the_wheel_carries_package_configs_and_tools(wheel, source, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    mim = tmp_path / 'sn_openmmlab/.mim'
    assert files(mim / 'configs') == files(source / 'configs') and files(mim / 'configs')
    assert files(mim / 'tools') == files(source / 'tools') > {'train.py', 'test.py', 'dist_train.sh'}
    assert not any(p.is_symlink() for p in mim.rglob('*'))
    metafiles = yaml.safe_load((mim / 'model-index.yml').read_text())['Import']
    assert metafiles and all((mim / metafile).is_file() for metafile in metafiles)
    ours, theirs = (files(folder / 'sn_openmmlab') for folder in (tmp_path, source))
    assert 'py.typed' in ours
    assert {p for p in ours if not p.startswith('.mim')} == {
        p for p in theirs | libraries(tmp_path) if not p.startswith('.mim') and not p.endswith(('.cpp', '.h'))
    }
    assert {p.name for p in tmp_path.iterdir()} == {'sn_openmmlab', f'sn_openmmlab-{__version__}.dist-info'}


def test_metadata(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    metadata = importlib.metadata.PathDistribution(next(tmp_path.glob('*.dist-info'))).metadata
    assert metadata['Name'] == 'sn-openmmlab' and metadata['Version'] == __version__
    assert metadata['Requires-Python'] == '>=3.8'
    assert [r for r in metadata.get_all('Requires-Dist') if 'extra' not in r] == ['torch>=1.13']
    assert set(metadata.get_all('Provides-Extra')) == {'onedl', 'openmmlab', 'dev'}
    assert 'mmcv<2.2,>=2.0; extra == "openmmlab"' in metadata.get_all('Requires-Dist')  # mmdet 3.3 refuses 2.2
    assert f'Programming Language :: Python :: 3.{sys.version_info[1]}' in metadata.get_all('Classifier')
    assert list(tmp_path.glob('*.dist-info/**/LICENSE'))
    assert not re.search(r'\]\((?!https?:|#)', metadata.get_payload())  # links that lead nowhere from a package index


def test_one_wheel_serves_all_pythons(wheel):
    assert '-cp38-abi3-' in wheel.name
    assert 'sn_openmmlab/ops/backends/cpp/_cpp.abi3.so' in zipfile.ZipFile(wheel).namelist() or BACKEND == 'native'


def test_an_installed_wheel(wheel, environment, tmp_path):
    """Its configs can be inherited from, and its tools run, as ``mim train sn_openmmlab CONFIG`` runs them."""
    run(environment, *pip('install'), '--ignore-installed', wheel)
    place, norm = run(environment, '-c', PRINT_INHERITED, cwd=tmp_path).split()
    assert tmp_path in Path(place).parents and norm == 'SN'
    tools = Path(place).parent / '.mim/tools'
    assert 'usage: train.py' in run(environment, tools / 'train.py', '--help')
    assert os.access(tools / 'dist_train.sh', os.X_OK)
    assert run(environment, '-c', PRINT_BACKEND, cwd=tmp_path).strip() == f'sn_openmmlab.ops.backends.{BACKEND}'


def test_an_editable_install(source, environment, tmp_path):
    run(environment, *pip('install'), '--ignore-installed', '--editable', source)
    place, norm = run(environment, '-c', PRINT_INHERITED, cwd=tmp_path).split()
    assert Path(place) == source / 'sn_openmmlab/__init__.py' and norm == 'SN'
    assert run(environment, '-c', PRINT_BACKEND, cwd=tmp_path).strip() == f'sn_openmmlab.ops.backends.{BACKEND}'
    new = source / 'configs' / CONFIG.replace('mask', 'new')
    shutil.copy(source / 'configs' / CONFIG, new)  # an editable install follows the source tree
    assert (source / 'sn_openmmlab/.mim/configs' / CONFIG.replace('mask', 'new')).read_text() == new.read_text()
    new.unlink()


def test_without_a_compiler_an_install_takes_torchs_kernels(source, environment, tmp_path):
    copy = tmp_path / 'source'
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns('build', '*.so', '.mim'))
    none = dict(CC='no-such-compiler', CXX='no-such-compiler')
    run(environment, *pip('install'), '--ignore-installed', copy, env={**os.environ, **none})
    assert run(environment, '-c', PRINT_BACKEND, cwd=tmp_path).strip() == 'sn_openmmlab.ops.backends.native'


@pytest.mark.parametrize(
    'python, torch, message',
    [
        ('3, 7, 16', '1.13.0', 'sn_openmmlab needs Python 3.8 or newer; this is 3.7.16'),
        ('3, 8, 1', '1.12.1', 'sn_openmmlab needs torch 1.13 or newer; this is 1.12.1'),
    ],
)
def test_what_is_too_old_is_said_before_anything_else(python, torch, message, tmp_path):
    (tmp_path / 'torch.py').write_text(f'__version__ = {torch!r}')
    paths = [str(tmp_path), str(ROOT)]
    code = f'import sys; sys.version_info = ({python}); sys.path[:0] = {paths}; import sn_openmmlab'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == f'ImportError: {message}'


def test_the_import_costs_little_above_torch_and_mmengine(tmp_path):
    code = (
        'import time, torch, mmengine.hooks, mmengine.runner, mmengine.hub; before = time.process_time();'
        'import sn_openmmlab; print(time.process_time() - before)'
    )
    times = (float(run(sys.executable, '-W', 'ignore', '-c', code, cwd=ROOT).split()[-1]) for _ in range(3))
    assert any(seconds < 0.1 for seconds in times)  # the first one, unless the machine has much else to do


def test_the_matrix_leaves_out_what_cannot_be_installed_only_if_told_to(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location('matrix', ROOT / '.ci/matrix.py')
    matrix = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matrix)
    monkeypatch.setattr(matrix, 'WORK', tmp_path)
    monkeypatch.setattr(matrix, 'build', lambda: tmp_path / 'some.whl')
    monkeypatch.setitem(matrix.ENVIRONMENTS, 'future', ('3.99', '9.0', matrix.UPSTREAM))
    monkeypatch.setattr(sys, 'argv', ['matrix.py', '--check', 'future'])
    with pytest.raises(SystemExit) as ended:
        matrix.main()
    assert not ended.value.code
    assert capsys.readouterr().out.startswith(
        'future is not tested: it cannot be installed here (there is no Python 3.99'
    )
    monkeypatch.setattr(sys, 'argv', ['matrix.py', 'future'])
    with pytest.raises(LookupError, match='pyenv install 3.99'):
        matrix.main()


def test_without_mmengine_import_says_what_to_install(tmp_path):
    """In an environment that has every package of this one but mmengine."""
    for path in SITE.iterdir():
        if 'mmengine' not in path.name:
            (tmp_path / path.name).symlink_to(path)
    done = subprocess.run(
        [sys.executable, '-S', '-c', 'import torch, sn_openmmlab'],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)])),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert 'ImportError: sn_openmmlab needs mmengine' in done.stderr
    assert "pip install 'sn-openmmlab[onedl]'" in done.stderr and "'sn-openmmlab[openmmlab]'" in done.stderr
