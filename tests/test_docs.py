"""What the documentation says: its code runs, its links lead somewhere, the tests that it names exist, the site builds.

What is done with a block of code goes by its language; every block has to have one of these:

    python        assignments only: a config, which mmengine reads on top of a real one; its norms, hooks, optimizer
                  wrapper and model are built. Anything else is a program, and is run
    pycon         is run, and must print what it says
    bash          is run by bash, where python, pip, make and the like only note how they are called; what they are
                  called with must fit (`check`), and the tools in RUN are run
    console       likewise, and must print what it says
    text, latex   is no code

The blocks of a page come in their order, in one folder and one namespace.
"""

import argparse
import ast
import doctest
import importlib
import importlib.metadata
import inspect
import json
import os
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from authors_models import C1, MaskRCNN, ResNet
from markdown_it import MarkdownIt
from mmcv.cnn import build_norm_layer
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.utils import get_installed_path
from torch import nn

import sn_openmmlab
from sn_openmmlab import SwitchNorm
from sn_openmmlab.swap.build import build, scope_of

ROOT = Path(__file__).parents[1]
PATTERNS = '*.md', 'docs/**/*.md', 'configs/**/*.md', 'benchmarks/**/*.md'
PAGES = sorted(page for pattern in PATTERNS for page in ROOT.glob(pattern))
each_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())

# tools whose commands are run; the others want data sets, GPUs or minutes, and only parse what they are called with
RUN = 'swap_norm.py', 'convert_checkpoint.py'
NOTED = 'python', 'pip', 'make', 'mim', 'git'  # programs that bash does not run
NOTE = '#!/bin/sh\nprintf "%s\\037" "${0##*/}" "$@" >> "$CALLS"; echo >> "$CALLS"\n'
PLACEHOLDER = re.compile(r'\[.*|[A-Z][A-Z_]*')  # of a command that shows how a tool is called

# what blocks of a config are read on top of, if they do not say: by what they mention
DETECTOR = ROOT / 'configs/mmdet/sn/faster-rcnn_r50_fpn_sn-all_2x_coco.py'
SEGMENTOR = ROOT / 'configs/mmseg/sn/fcn_r50-d8_sn_8xb2-100k_ade20k.py'
SPEAKS_OF_SEGMENTORS = re.compile(r'\b(pretrained|decode_head|auxiliary_head)\b')

# top-level names of configs: what Config reads, what Runner takes, and what it looks for besides
READ = re.findall(r"cfg\.get\('(\w+)'", inspect.getsource(Runner))
KEYS = {'_base_', 'custom_imports', 'strategy', *inspect.signature(Runner).parameters, *READ}

# files that pages speak of, or of whose folder they do
FILES = {
    'my_config.py': lambda: "_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'\n",
    'resnet50.pth': lambda: MODELS.build(dict(type='mmdet.ResNet', depth=50, base_channels=8)).state_dict(),
    'sn_resnet50.pth': lambda: ResNet(width=8).state_dict(),
    'encoder_epoch_20.pth': lambda: ResNet(depth=18, deep_stem=True, fc=False).state_dict(),
    'decoder_epoch_20.pth': lambda: C1(512, classes=150).state_dict(),
    'model_step180000.pth': lambda: dict(model=MaskRCNN(classes=3).half().state_dict()),
    'work_dirs/demo/last_checkpoint': lambda: 'epoch_5.pth',
    'work_dirs/demo/epoch_5.pth': lambda: checkpoint(),
    'work_dirs/faster-rcnn_sn/epoch_12.pth': lambda: checkpoint(),
}


def checkpoint():
    return {f'backbone.bn1.{name}': value for name, value in SwitchNorm(4).state_dict().items()}


@pytest.fixture
def stage(tmp_path, monkeypatch, page):
    """The folder that a page's commands are given in: the project, and the files that the page speaks of."""
    for path in ROOT.iterdir():
        if path.name in ('benchmarks', 'configs', 'requirements', 'sn_openmmlab', 'tools', 'setup.py'):
            (tmp_path / path.name).symlink_to(path)
    for name, make in FILES.items():
        spoken = os.path.dirname(name) or name
        if re.search(rf'(?<!\w){re.escape(spoken)}', page.read_text()):
            path, content = tmp_path / name, make()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content) if isinstance(content, str) else torch.save(content, path)
    (tmp_path / '.bin').mkdir()
    for name in NOTED:
        (tmp_path / '.bin' / name).write_text(NOTE)
        (tmp_path / '.bin' / name).chmod(0o755)
    for name in 'bash', 'cat', 'dirname':
        (tmp_path / '.bin' / name).symlink_to(shutil.which(name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / 'tools')
    monkeypatch.setenv('COLUMNS', '100')
    torch.manual_seed(0)
    return tmp_path


# -- blocks of code ---------------------------------------------------------------------------------------------------


@each_page
def test_blocks_of_code(page, stage, monkeypatch, capsys):
    names = {'__name__': '__main__'}
    for line, language, code in blocks(page):
        try:
            if language == 'python' and is_config(code):
                check_config(code)
            elif language == 'python':
                exec(compile('\n' * line + code, str(page), 'exec'), names)
            elif language == 'pycon':
                check_session(code, names)
            elif language == 'bash':
                for call in run_in_bash(code, stage):
                    check(call, monkeypatch)
            elif language == 'console':
                check_console(code, stage, monkeypatch, capsys)
            else:
                assert language in ('text', 'latex'), f'the language of a block is {language or "missing"!r}'
        except BaseException as error:
            error.add_note(f'in {page}, line {line}')
            raise


def blocks(page):
    """Line, language and text of each block of code; an indented one has no language."""
    return [(t.map[0] + 1, t.info.strip(), t.content) for t in tokens(page) if t.type in ('fence', 'code_block')]


@lru_cache(None)
def tokens(page):
    return MarkdownIt('commonmark').enable('table').parse(page.read_text())


def test_examples_of_docstrings(monkeypatch):
    """They are part of the site too; what they log is not what they print."""
    monkeypatch.setattr(MMLogger.get_current_instance(), 'disabled', True)
    packages = pkgutil.walk_packages(sn_openmmlab.__path__, 'sn_openmmlab.')
    results = [doctest.testmod(importlib.import_module(package.name)) for package in packages]
    assert sum(r.failed for r in results) == 0 and sum(r.attempted for r in results) > 10


def is_config(code):
    return all(isinstance(statement, ast.Assign) for statement in ast.parse(code).body)


def check_config(code):
    """Read it, over a real config unless it has a base, and build what it sets."""
    base = SEGMENTOR if SPEAKS_OF_SEGMENTORS.search(code) else DETECTOR
    tree = ast.parse(code)
    if not any(target.id == '_base_' for statement in tree.body for target in statement.targets):
        code = f'_base_ = {str(base)!r}\n{code}'
        tree = ast.parse(code)
    Path('block.py').write_text(code)
    cfg = Config.fromfile('block.py')
    with DefaultScope.overwrite_default_scope(scope_of(cfg)):
        said = {}
        exec(code, said)
        Path('base.py').write_text(f'_base_ = {said["_base_"]!r}')
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        unknown = said.keys() - KEYS - Config.fromfile('base.py').keys() - used - {'__builtins__'}
        assert not unknown, f'neither the base nor mmengine knows {unknown}'
        for norm_cfg in norms(said):
            build_norm_layer({key: value for key, value in norm_cfg.items() if key != '_delete_'}, 32)
        for hook in said.get('custom_hooks', ()):
            HOOKS.build(hook)
        if 'optim_wrapper' in said:
            build_optim_wrapper(nn.Linear(1, 1), cfg.optim_wrapper)
    if 'model' in said:
        build(cfg)


def norms(value):
    """The norm_cfg and the like that have a type, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if str(key).endswith('norm_cfg') and 'type' in inner:
                yield inner
            elif key != '__builtins__':
                yield from norms(inner)


def check_session(code, names):
    test = doctest.DocTestParser().get_doctest(code, names, 'session', None, 0)
    said = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=said.append, clear_globs=False)
    assert not said, ''.join(said)
    names.update(test.globs)


def run_in_bash(code, stage):
    """The calls of programs in NOTED that bash comes to; what others print is printed, and most others are an error."""
    calls = stage / '.calls'
    calls.write_text('')
    done = subprocess.run(
        ['bash', '-efuc', code], env=dict(PATH=str(stage / '.bin'), CALLS=str(calls)), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f'bash: {done.stdout}'
    print(done.stdout, end='')
    return [line.split('\037')[:-1] for line in calls.read_text().splitlines()]


def check_console(code, stage, monkeypatch, capsys):
    """Run the lines with a prompt, and compare all that is printed with the others."""
    commands = [line[2:] for line in code.splitlines() if line.startswith('$ ')]
    expected = [line for line in code.splitlines() if not line.startswith('$ ')]
    capsys.readouterr()
    ran = [check(call, monkeypatch) for command in commands for call in run_in_bash(command, stage)]
    assert all(ran), 'what this command prints cannot be checked; show it as text'
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == expected


# -- calls of programs ------------------------------------------------------------------------------------------------


def check(call, monkeypatch):
    """Whether a call fits its program; True if it was run."""
    program, *args = call
    if program == 'python':
        return check_python(args, monkeypatch)
    if program == 'mim':
        assert args[:2] == ['train', 'sn_openmmlab']
        return check_python(['tools/train.py', *args[2:]], monkeypatch)
    if program == 'make':
        subprocess.run(['make', '--dry-run', *args], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    elif program == 'pip':
        check_pip(args)
    else:
        assert args[0] == 'clone', f'git {args[0]}'


def check_pip(args):
    command, *args = args
    assert command == 'install'
    extras = importlib.metadata.metadata('sn-openmmlab').get_all('Provides-Extra')
    for option, value in zip(['', *args], args):
        if option in ('-r', '--requirement', '-c', '--constraint'):
            assert Path(value).is_file()
        elif not value.startswith('-'):
            place, _, names = value.partition('[')
            assert place == '.' and all(name in extras for name in names.rstrip(']').split(',') if name), value


def check_python(args, monkeypatch):
    """Whether a tool's own parser takes the arguments; True if it is one of RUN, and was run with them."""
    if args[:2] == ['-m', 'torch.distributed.run']:  # of dist_*.sh
        args = args[next(i for i, arg in enumerate(args) if arg.endswith('.py')) :]
    args = args[args[0] == '-u' :]
    if args[:2] == ['-m', 'sn_openmmlab']:
        return check_python([f'tools/{args[2]}.py', *args[3:]], monkeypatch)
    if args[0] == '-m':
        _, tool, *args = args
        source, start = Path(f'{tool.replace(".", "/")}.py'), runpy.run_module
    else:
        tool, *args = args
        source, start = Path(tool), runpy.run_path
        if not source.exists():  # one of mmdetection's, in a clone of it
            source = tool = Path(get_installed_path('mmdet'), '.mim', tool)
    pattern = any(map(PLACEHOLDER.fullmatch, args))
    really = source.name in RUN and not pattern

    def only_parse(parser, argv=None, namespace=None):
        if any(arg == '...' or arg.startswith('[') for arg in args):
            options = {arg.strip('[]') for arg in args if arg.strip('[').startswith('--')}
            assert options <= parser._option_string_actions.keys(), f'{tool} has no {options}'
        else:
            config = getattr(parse(parser, argv, namespace), 'config', None)
            assert config is None or pattern or is_there(config), f'{config} is not there'
        raise Parsed

    parse = argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'argv', [str(source), *args])
        if really:
            start(str(tool), run_name='__main__')
        elif 'ArgumentParser' in source.read_text():
            patch.setattr(argparse.ArgumentParser, 'parse_args', only_parse)
            with pytest.raises(Parsed):
                start(str(tool), run_name='__main__')
        else:
            assert not args, f'{tool} takes no arguments'
    return really


class Parsed(Exception):
    """A tool got as far as having understood its command line."""


def is_there(config):
    library, _, name = config.rpartition('::')
    return Path(get_installed_path(library), '.mim/configs', name).is_file() if library else Path(config).is_file()


# -- links and names --------------------------------------------------------------------------------------------------


@each_page
def test_links(page):
    """Those within the project: the file is there, and has the heading."""
    inline = [t for token in tokens(page) for t in token.children or ()]
    assert not [t.content for t in inline if t.type == 'text' and re.search(r'\]\s?\[\w', t.content)]  # undefined
    links = [t.attrs.get('href') or t.attrs.get('src') for t in inline if t.type in ('link_open', 'image')]
    for link in links:
        path, _, heading = unquote(link).partition('#')
        if '://' in link:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), f'{link} leads nowhere'
        assert not heading or heading in headings(target), f'{link}: there is no such heading'


@lru_cache(None)
def headings(page):
    """The anchors that GitHub gives to the headings."""
    after = zip(tokens(page), tokens(page)[1:])
    texts = [
        ''.join(t.content for t in inline.children if t.type in ('text', 'code_inline'))
        for token, inline in after
        if token.type == 'heading_open'
    ]
    return [re.sub(r'[^\w\- ]', '', text.lower()).replace(' ', '-') for text in texts]


@each_page
def test_names(page):
    """Tests and files that are named as code exist; tests in the file that a link before them leads to."""
    files = [*ROOT.glob('tests/**/*.py')]
    linked = files
    for t in (t for token in tokens(page) for t in [token, *(token.children or ())]):
        name = t.content
        if t.type in ('inline', 'link_open'):
            path = (page.parent / t.attrs.get('href', '')).resolve()
            linked = [path] if path in files else files
        if t.type != 'code_inline':
            continue
        if re.match(r'test_', name) and not re.match(r'test_(cfg|dataloader|evaluator|pipeline)\b', name):
            pattern = re.escape(name.partition('[')[0]).replace(r'\.\.\.', r'\w+')
            found = any(re.search(rf'def {pattern}\(', path.read_text()) for path in linked)
            assert found, f'there is no test {name} in {linked[0] if linked != files else "tests"}'
        elif re.fullmatch(r'(tools|configs|docs|benchmarks|tests|sn_openmmlab|requirements)/[\w./-]+', name):
            places = ROOT, *(Path(get_installed_path(library), '.mim') for library in ('mmdet', 'mmseg'))
            assert any((place / name).exists() for place in places), f'there is no {name}'


# -- the notebook -----------------------------------------------------------------------------------------------------


def test_the_notebook(tmp_path, monkeypatch):
    """Its cells run in order, in seconds, and give what its text says; its links lead somewhere."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in json.loads((ROOT / 'docs/swap_a_detector.ipynb').read_text())['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'code':
            exec(text, names)
        else:
            assert all((ROOT / 'docs' / link).exists() for link in re.findall(r'\]\((.+?)\)', text))
    assert names['difference'] < 0.01 and names['loss'].isfinite()
    assert len(names['run'].layers) == 20 and {'bn.pth', 'sn.pth', 'ratios.png'} <= set(os.listdir())


# -- the site ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The site, as `make docs` builds it: a warning is an error."""
    out = tmp_path_factory.mktemp('site')
    command = [sys.executable, '-m', 'sphinx', '--fail-on-warning', '--keep-going', '--quiet', '-c', 'docs']
    done = subprocess.run(
        [*command, '-d', out / 'doctrees', '.', out / 'html'], cwd=ROOT, text=True, env=dict(os.environ, LC_ALL='C'),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return out / 'html'


def test_the_site_has_every_page(site):
    built = {path.relative_to(site).with_suffix('.md') for path in site.rglob('*.html')}
    assert built >= {page.relative_to(ROOT) for page in PAGES}
    assert (site / 'index.html').read_text() == (site / 'README.html').read_text()


def test_the_site_needs_no_other(site):
    """Nothing is fetched to read it: no script, style, font or picture of another host."""
    for page in site.rglob('*.html'):
        assert not re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^>]*', page.read_text())
    for style in site.rglob('*.css'):
        assert not re.findall(r'(?:@import|url\()\W*(?:https?:)?//', style.read_text())


def test_the_site_has_the_public_names_with_formulas(site):
    text = (site / 'docs/api.html').read_text()
    names = [f'sn_openmmlab.{name}' for name in sn_openmmlab.__all__ if name != '__version__']
    assert names and all(f'id="{name}"' in text for name in names)
    assert text.count('<math ') >= 5 and 'mean_weight</mtext>' in text
    assert not re.search(r'\\frac|\.\. math|:(?:math|class|func|meth):', text)  # markup that was not understood
