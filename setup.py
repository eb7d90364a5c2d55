"""Metadata, the kernels for the CPU, and configs and tools in the place where OpenMMLab looks for them."""

import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
HOME = os.environ.get('SN_OPENMMLAB_HOME', '')  # where the project's files can be seen; a release sets it
MIM_FILES = ('configs', 'tools', 'model-index.yml')


class BuildPy(build_py):
    """Also put configs, tools and model-index.yml into ``sn_openmmlab/.mim``.

    There ``mim train sn_openmmlab CONFIG`` and bases such as ``_base_ = 'sn_openmmlab::mmdet/...'`` look for them. An
    editable install, which has no directory but the source tree, gets links.
    """

    def run(self) -> None:
        super().run()
        editable = getattr(self, 'editable_mode', False)  # openmim brings in a setuptools that has no such mode
        mim = Path(ROOT if editable else self.build_lib, 'sn_openmmlab', '.mim')
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir(parents=True)
        for name in MIM_FILES:
            if editable:
                (mim / name).symlink_to(Path('../..', name))
            elif (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, mim / name, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy(ROOT / name, mim)


def libraries():
    """The CPU's kernels: a plain shared library. Without a compiler for it the package takes torch's own kernels."""
    if os.name != 'posix':
        return []
    openmp = ['-fopenmp'] if sys.platform != 'darwin' else []
    sources = [ROOT / 'sn_openmmlab/ops/backends/cpp' / name for name in ('passes.cpp', 'algebra.cpp', 'parallel.h')]
    stamp = f'{version()} {hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()}'
    flags = ['-std=c++17', '-O3', '-g0', '-fno-math-errno', '-fno-trapping-math', '-Wno-psabi', '-Wno-unknown-pragmas']
    return [
        Extension(
            'sn_openmmlab.ops.backends.cpp._cpp',
            ['sn_openmmlab/ops/backends/cpp/algebra.cpp', 'sn_openmmlab/ops/backends/cpp/passes.cpp'],
            depends=['sn_openmmlab/ops/backends/cpp/parallel.h'],
            py_limited_api=True,  # loaded by ctypes, and the same for every Python
            define_macros=[('SN_STAMP', f'"{stamp}"')],  # cpp/load.py compares it before the first call
            extra_compile_args=[*flags, *openmp],
            extra_link_args=openmp,
            language='c++',
            optional=True,
        )
    ]


def version() -> str:
    """The version, read as text: importing the package would need torch."""
    return re.search(r"__version__ = '(.+)'", (ROOT / 'sn_openmmlab/version.py').read_text())[1]


def description() -> str:
    """README.md, whose links to other files of the project lead to them also where it stands alone."""
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    if not HOME:
        text = re.sub(r'!\[.*?\]\((?!https?:).*?\)\n', '', text)
        return re.sub(r'\[([^]]*)\]\((?!https?:|#).*?\)', r'\1', text)
    return re.sub(r'(\]\()(?!https?:|#)', rf'\1{HOME}/', text)


setup(
    name='sn-openmmlab',
    version=version(),
    description='Switchable Normalization for OpenMMLab: a norm layer, recipes and tools',
    long_description=description(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    author='The sn_openmmlab contributors',
    project_urls={'Paper': 'https://arxiv.org/abs/1806.10779', **({'Source': HOME} if HOME else {})},
    keywords='computer vision, object detection, semantic segmentation, normalization',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        *(f'Programming Language :: Python :: {python}' for python in ('3', *(f'3.{minor}' for minor in range(8, 14)))),
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
    packages=find_packages(include=['sn_openmmlab', 'sn_openmmlab.*']),
    package_data={'sn_openmmlab': ['py.typed'], 'sn_openmmlab.analysis': ['page.html']},
    python_requires='>=3.8',
    # mmengine is needed too, but comes as one of two distributions: see the extras
    install_requires=['torch>=1.13'],
    extras_require={
        'onedl': ['onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation'],
        # mmdet and mmsegmentation refuse mmcv 2.2, and need numpy 1; mmsegmentation imports ftfy and regex unasked
        'openmmlab': [
            'mmengine>=0.10,<0.11',
            'mmcv>=2.0,<2.2',
            'mmdet>=3.0,<4',
            'mmsegmentation>=1.0,<2',
            'numpy<2',
            'ftfy',
            'regex',
        ],
        'dev': ['pytest', 'ruff', 'mypy', 'matplotlib'],
    },
    cmdclass={'build_py': BuildPy},
    options={'bdist_wheel': {'py_limited_api': 'cp38'}} if libraries() else {},
    ext_modules=libraries(),
    zip_safe=False,
)
