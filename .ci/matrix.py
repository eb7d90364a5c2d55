"""Install the wheel in environments as users have them, and run the tests that concern versions.

python .ci/matrix.py [NAME ...]   # all, or some; results are written to build/matrix
python .ci/matrix.py --table      # docs/compatibility.md, from the results
python .ci/matrix.py --check NAME # only tests: writes no results, and leaves out, with a line, what cannot be installed

Each environment takes 2.5 minutes to install, 5 GB of disk, and 5 minutes of tests on a quiet machine; `make test`
leaves out the same slow ones. Pythons are looked for on the PATH, in pyenv (`pyenv install 3.8`) and in uv (`uv python
install 3.8`).
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / 'build/matrix'
RESULTS = ROOT / 'docs/compatibility.json'
PAGE = ROOT / 'docs/compatibility.md'
README = ROOT / 'README.md'
UPSTREAM, ONEDL = 'upstream', 'onedl'
ENVIRONMENTS = {  # Python, torch, line of OpenMMLab
    'py38-torch1.13': ('3.8', '1.13.1', UPSTREAM),
    'py39-torch2.0': ('3.9', '2.0.1', UPSTREAM),
    'py310-torch2.1': ('3.10', '2.1.2', UPSTREAM),
    'py311-torch2.4': ('3.11', '2.4.1', UPSTREAM),
    'py311-torch2.6': ('3.11', '2.6.0', UPSTREAM),
    'py312-torch2.7': ('3.12', '2.7.1', UPSTREAM),
    'py312-torch2.11': ('3.12', '2.11.0', UPSTREAM),
    'py312-onedl': ('3.12', '2.13.0', ONEDL),
    'py313-onedl': ('3.13', '2.13.0', ONEDL),
}
TESTS = (
    'test_norms.py test_register.py test_running_statistics.py test_layers test_hooks test_convert test_checkpoint '
    'test_analysis test_guards.py test_shipped.py '
    'test_ops/test_switch_norm.py test_ops/test_formula.py test_ops/test_plan.py test_ops/test_run.py '
    'test_ops/test_compiled.py test_ops/test_sparsestmax.py test_ops/test_torch_versions.py '
    'test_ops/test_backends/test_algebra.py test_ops/test_backends/test_interface.py '
    'test_ops/test_backends/test_native.py test_ops/test_backends/test_choose.py test_ops/test_backends/test_cpp'
)
MARKER = '<!-- compatibility {} -->'


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'of {", ".join(ENVIRONMENTS)}; all by default')
    parser.add_argument('--table', action='store_true', help='only write the tables')
    parser.add_argument('--check', action='store_true', help='write nothing, and leave out what cannot be installed')
    args = parser.parse_args()
    unknown = set(args.names) - set(ENVIRONMENTS)
    if unknown:
        parser.error(f'{min(unknown)!r} is none of {", ".join(ENVIRONMENTS)}')
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    names = [] if args.table else args.names or list(ENVIRONMENTS)
    wheel = build() if names else None
    failed = []
    for name in names:
        try:
            install(name)
        except (LookupError, subprocess.CalledProcessError) as error:
            if not args.check:
                raise
            print(f'{name} is not tested: it cannot be installed here ({error})', flush=True)
            continue
        results[name] = measure(name, wheel)
        failed += [name] if results[name]['failed'] else []
        if not args.check:
            RESULTS.write_text(json.dumps({n: results[n] for n in ENVIRONMENTS if n in results}, indent=1) + '\n')
    if not args.check:
        write_tables({n: results[n] for n in ENVIRONMENTS if n in results})
    sys.exit(f'failed: {", ".join(failed)}' if failed else 0)


def build() -> Path:
    """One wheel for all environments."""
    shutil.rmtree(WORK / 'wheel', ignore_errors=True)
    run(sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--wheel-dir', WORK / 'wheel', ROOT)
    return next((WORK / 'wheel').glob('*.whl'))


def measure(name: str, wheel: Path) -> dict:
    """Test the wheel in an environment."""
    version, torch, line = ENVIRONMENTS[name]
    folder = WORK / name
    python = folder / 'bin/python'
    run(python, '-m', 'pip', 'install', '--quiet', '--no-deps', '--force-reinstall', wheel)
    start = time.monotonic()
    # the C++ kernels of the one wheel, from where no checkout is found
    check = 'from sn_openmmlab.ops.backends.cpp.load import library; assert library() is not None'
    run(python, '-c', check, cwd=folder)
    tests = [ROOT / 'tests' / test for test in TESTS.split()]
    report = folder / 'report.xml'
    report.unlink(missing_ok=True)
    # pytest's own command: `python -m pytest` would import the checkout and not the wheel
    code = subprocess.call(
        [folder / 'bin/pytest', '-q', '-m', 'not slow', '-p', 'no:cacheprovider', f'--junitxml={report}', *tests],
        cwd=ROOT,
    )
    if not report.exists():
        sys.exit(f'{name}: pytest ended with {code} before it could report')
    cases = [case for case in ET.parse(report).iter('testcase')]
    skipped = Counter(s.get('message') for case in cases for s in case.iter('skipped'))
    failed = sum(case.find('failure') is not None or case.find('error') is not None for case in cases)
    result = dict(
        python=version, torch=torch, line=line, versions=versions(python),
        passed=len(cases) - failed - sum(skipped.values()), failed=failed, skipped=dict(sorted(skipped.items())),
        test_seconds=round(time.monotonic() - start),
    )  # fmt: skip
    print(f'{name}: {result["passed"]} passed, {failed} failed, {sum(skipped.values())} skipped', flush=True)
    return result


def interpreter(version: str) -> str:
    """The command that starts this version of Python."""
    places = [shutil.which(f'python{version}'), *Path.home().glob(f'.pyenv/versions/{version}.*/bin/python')]
    if shutil.which('uv'):
        places.append(subprocess.run(['uv', 'python', 'find', version], capture_output=True, text=True).stdout.strip())
    for place in filter(None, places):
        if subprocess.run([place, '-c', ''], capture_output=True).returncode == 0:
            return str(place)
    raise LookupError(
        f'there is no Python {version}; `pyenv install {version}` or `uv python install {version}` brings it'
    )


def install(name: str) -> None:
    """Python, torch, and a line of OpenMMLab without compiled operators, unless they are there."""
    version, torch, line = ENVIRONMENTS[name]
    folder = WORK / name
    if (folder / 'ready').exists():
        return
    run(interpreter(version), '-m', 'venv', '--clear', folder)
    python = folder / 'bin/python'
    pip = [python, '-m', 'pip', 'install', '--quiet']
    run(*pip, 'setuptools<81', 'wheel')
    if line == ONEDL:  # mmcv before torch, with which it would compile its operators; and not into pip's cache
        run(*pip, 'psutil', 'ninja', 'matplotlib', 'pytest')
        mmcv = next(r for r in (ROOT / 'requirements/onedl.txt').read_text().split() if r.startswith('onedl-mmcv='))
        run(*pip, '--no-cache-dir', '--no-build-isolation', '--no-deps', mmcv)
    run(*pip, f'torch=={torch}')
    if line == UPSTREAM:
        run(*pip, '--requirement', ROOT / 'requirements/upstream.txt')
    else:
        run(*pip, '--no-build-isolation', '--requirement', ROOT / 'requirements/onedl.txt')
    # two packages own cv2, and only the headless one works without libGL
    run(*pip, '--force-reinstall', '--no-deps', 'opencv-python-headless<4.12')
    where = subprocess.check_output([python, '-c', 'import mmcv; print(mmcv.__path__[0])'], text=True).splitlines()[-1]
    shutil.copy(ROOT / '.ci/mmcv_without_operators.py', Path(where, '_ext.py'))
    (folder / 'ready').touch()


def versions(python: Path) -> dict:
    """What was installed."""
    code = 'import importlib.metadata as m; print(*(d.metadata["Name"] + "=" + d.version for d in m.distributions()))'
    found = dict(item.split('=', 1) for item in subprocess.check_output([python, '-c', code], text=True).split())
    return {
        n: v for n, v in sorted(found.items()) if n in ('torch', 'triton', 'numpy') or 'mm' in n.replace('comm', '')
    }


def run(*command, **kwargs) -> None:
    """Run a command, and end where it fails."""
    subprocess.run([*map(str, command)], check=True, **kwargs)


def write_tables(results: dict) -> None:
    """The page of docs, with all; and README's table of versions."""
    rows = [
        '| Python | torch | OpenMMLab | tests passed | failed | skipped |',
        '| :--- | :--- | :--- | ---: | ---: | ---: |',
    ]
    for r in results.values():
        line = 'upstream' if r['line'] == UPSTREAM else 'maintained (`onedl-*`)'
        skipped = sum(r['skipped'].values())
        rows.append(f'| {r["python"]} | {r["torch"]} | {line} | {r["passed"]} | {r["failed"]} | {skipped} |')
    heads = [f'{r["torch"]} ({r["python"]})' for r in results.values()]
    reasons = ['| ' + ' | '.join(['not done, or not possible, by torch (Python)', *heads]) + ' |']
    reasons.append('| :--- |' + ' :---: |' * len(results))
    for reason in sorted({reason for r in results.values() for reason in r['skipped']}):
        marks = ['x' if reason in r['skipped'] else '' for r in results.values()]
        reasons.append('| ' + ' | '.join([reason.replace('|', '/'), *marks]) + ' |')
    replace(README, 'versions', rows)
    replace(PAGE, 'versions', rows)
    replace(PAGE, 'reasons', reasons)


def replace(path: Path, name: str, rows: list) -> None:
    """Put the table between its markers."""
    begin, end = MARKER.format(f'{name} begin'), MARKER.format(f'{name} end')
    before, _, rest = path.read_text().partition(begin)
    path.write_text('\n'.join([before + begin, '', *rows, '', end]) + rest.partition(end)[2])


if __name__ == '__main__':
    main()
