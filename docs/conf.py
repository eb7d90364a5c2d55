"""The site that `make docs` builds: the project's Markdown where it lies, and the public names from their docstrings.

The source tree of the site is the repository, so that a link which works on GitHub works in the site. Nothing is
fetched, neither while it is built nor while it is read: formulas become MathML, fonts are the reader's.
"""

import re
import shutil
import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = 'sn_openmmlab'
release = re.search(r"__version__ = '(.+)'", (ROOT / 'sn_openmmlab/version.py').read_text())[1]
html_title = f'{project} {release}'

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode']
root_doc = 'README'
include_patterns = ['*.md', 'docs/*.md', 'docs/*.rst', 'benchmarks/**.md', 'configs/**.md']
exclude_patterns = ['.*', 'build', 'dist', 'data', 'work_dirs', 'sn_openmmlab', 'tests', 'tools']
html_theme = 'furo'
html_static_path = ['site.css']
html_css_files = ['site.css']
html_copy_source = False
html_math_renderer = 'mathml'

myst_heading_anchors = 4  # as GitHub names them
napoleon_custom_sections = [('Shape', 'notes_style')]
autodoc_typehints = 'none'  # the docstrings have them
autodoc_member_order = 'bysource'
toc_object_entries_show_parents = 'hide'

# the pages in the order in which the side bar has them
CONTENTS = """
```{toctree}
:hidden:

Home <self>
docs/quickstart
docs/compatibility
docs/troubleshooting
```

```{toctree}
:hidden:
:caption: Guides

Finetuning <docs/finetuning>
Swapping norms <docs/swapping>
docs/checkpoints
Importance ratios <docs/ratios>
Batch average <docs/batch_average>
Sparse choice <docs/sparse>
Export <docs/export>
docs/datasets
Third parties <docs/third_parties>
Engines <docs/engines>
```

```{toctree}
:hidden:
:caption: Models and measurements

Detectors <configs/mmdet/sn/README>
Segmentors <configs/mmseg/sn/README>
ImageNet <configs/mmpretrain/sn/README>
Kinetics <configs/mmaction2/sn/README>
benchmarks/README
Accuracy <benchmarks/accuracy/README>
```

```{toctree}
:hidden:
:caption: Reference

docs/api
docs/architecture
CHANGELOG
CONTRIBUTING
```
"""


def setup(app):
    """Register what Sphinx does not have: the table of contents, MathML, and an index.html."""
    app.connect('source-read', add_contents)
    app.connect('build-finished', add_index)
    app.add_html_math_renderer('mathml', inline_renderers=(write_math, None), block_renderers=(write_math, None))


def add_contents(app, docname, source):
    """Put the table of contents under the home page, which as a README on GitHub has none."""
    if docname == root_doc:
        source[0] += CONTENTS


def add_index(app, error):
    """Give the home page the name that web servers look for."""
    if error is None and app.builder.name == 'html':
        shutil.copy(Path(app.outdir, f'{root_doc}.html'), Path(app.outdir, 'index.html'))


def write_math(writer, node):
    """Write a formula as MathML, which browsers draw by themselves."""
    display = 'block' if isinstance(node, nodes.math_block) else 'inline'
    latex = node.astext().replace(r'\_', '_')  # which would stay as it is inside \text
    writer.body.append(convert(latex, display=display).replace('&#x02032;', "'"))  # many fonts' prime is hardly seen
    raise nodes.SkipNode
