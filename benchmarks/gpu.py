"""The whole check on a GPU in one command: ``python -m benchmarks.gpu``. Needs torch, triton, mmengine and pytest.

Runs the tests of the kernels against the float64 oracle on the device, then times one layer in float32, float16 and
bfloat16 and both layouts, and writes one result file for each.
"""

import subprocess
import sys

import torch

from benchmarks import bench_switch_norm


def main() -> None:
    """Test, then measure."""
    if not torch.cuda.is_available():
        sys.exit('benchmarks.gpu needs a CUDA device, and torch sees none; on the CPU run benchmarks.bench_switch_norm')
    # those of torch.compile build networks of mmdet
    tests = subprocess.run(
        [
            sys.executable,
            '-m',
            'pytest',
            '-q',
            '-m',
            'not slow',
            'tests/test_ops',
            '--ignore=tests/test_ops/test_compile.py',
        ]
    )
    for dtype in 'float32', 'float16', 'bfloat16':
        for layout in 'contiguous', 'channels_last':
            more = [] if (dtype, layout) == ('float32', 'contiguous') else ['--no-compiled']
            bench_switch_norm.main(['--device', 'cuda', '--dtype', dtype, '--layout', layout, '--seconds', '2', *more])
    sys.exit(tests.returncode)


if __name__ == '__main__':
    main()
