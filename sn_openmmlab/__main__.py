"""Run a tool of the installed package: ``python -m sn_openmmlab swap_norm CONFIG`` is ``tools/swap_norm.py CONFIG``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

TOOLS = Path(__file__).parent / '.mim/tools'


def main() -> None:
    """Run the tool that the first argument names, with the others."""
    names = sorted(path.stem for path in TOOLS.glob('*.py') if path.stem != 'common')
    if not set(sys.argv[1:2]) & set(names):
        sys.exit(f'usage: python -m sn_openmmlab TOOL ..., where TOOL is one of {", ".join(names)}')
    path = str(TOOLS / f'{sys.argv[1]}.py')
    sys.argv[:2] = [path]
    sys.path.insert(0, str(TOOLS))  # where the tools find what they share
    runpy.run_path(path, run_name='__main__')


if __name__ == '__main__':
    main()
