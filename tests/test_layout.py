"""Tests mirror the package: those of ``sn_openmmlab/a/b.py`` are in ``tests/test_a/test_b.py``."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / 'sn_openmmlab'
ELSEWHERE = {  # a module, and the file with its tests
    'ops/backends/triton_kernels/algebra.py': 'test_ops/test_backends/test_algebra.py',  # one test for every algebra
}


def test_every_module_has_its_tests():
    """But for ``__init__.py``, which says what a package offers, and for the number of the version."""
    missing, unknown = [], set(ELSEWHERE)
    for path in sorted(PACKAGE.rglob('*.py')):
        module = path.relative_to(PACKAGE)
        if module.stem in ('__init__', '__main__', 'version'):
            continue
        mirror = Path(*(f'test_{part}' for part in module.parts))
        file = TESTS / ELSEWHERE.get(module.as_posix(), mirror)
        if not file.exists() or not re.search(r'^ *def test_', file.read_text(), re.M):
            missing.append(f'{module}: {file.relative_to(TESTS)}')
        unknown.discard(module.as_posix())
    assert missing == [], 'modules without the file of their tests'
    assert not unknown, 'these are gone'
