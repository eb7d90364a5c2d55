"""The page for exploring importance ratios: what it holds, and what a browser shows."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from ratio_trainings import NAMES, PARTS, learned

from sn_openmmlab import read_ratios
from sn_openmmlab.analysis import page

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium (apt-get install chromium)')


# what a reader does: hover over a bar and over the course, filter, switch a run off; `seen` tells what the page shows
ACTIONS = """<script>{
const seen = {}, all = selector => [...document.querySelectorAll(selector)];
const hover = (element, x) => element.dispatchEvent(new PointerEvent('pointermove', {bubbles: true, clientX: x}));
const count = () => ['#layers .bar', '#parts .bar', '#course path.line', '#radar svg'].map(name => all(name).length);
const tip = document.getElementById('tip'), filter = document.getElementById('filter');
const type = text => { filter.value = text; filter.dispatchEvent(new Event('input')); };
const bar = all('#layers .bar')[0], area = all('#course rect')[0], box = area.getBoundingClientRect();
seen.all = count();
seen.widths = [...bar.children].map(piece => piece.getBoundingClientRect().width / bar.clientWidth);
hover(bar, 0);
seen.bar = tip.textContent;
hover(area, box.left + 0.42 * box.width);
seen.course = tip.textContent.split('\\n');
hover(document.querySelector('h1'), 0);
seen.tipHidden = tip.hidden;
type('mask|neck');
seen.filtered = count();
type('(');
seen.invalid = [filter.checkValidity(), ...count()];
type('');
all('#runs input')[0].click();
seen.second = count();
document.body.dataset.seen = JSON.stringify(seen);
}</script>"""


def test_it_holds_the_ratios_as_data(trained):
    """Of a part's layers and of the course; a label cannot end the element that they stand in."""
    run = read_ratios(trained[1], label='</script><b>')
    text = page.render([run])
    assert '</script><b>' not in text
    [data] = re.findall(r'<script type="application/json" id="data">(.*)</script>', text)
    [seen] = json.loads(data)['runs']
    assert seen['label'] == run.label and seen['steps'] == [*run.course]
    assert [(layer['part'], layer['name']) for layer in seen['layers']] == [*zip(PARTS, NAMES)]
    for layer in seen['layers']:
        expected = [run.layers[layer['name']], *(ratios[layer['name']] for ratios in run.course.values())]
        got = np.array([layer['ratios'], *layer['course']], dtype=float)  # None becomes NaN
        np.testing.assert_allclose(got, expected, atol=5e-5)


@needs_chromium
def test_it_works_offline_without_a_console_message(tool, tmp_path, trained):
    """In two runs of which only the first one has a course, with a label that would be markup."""
    tool('trained', 'start.pth', '--labels', 'late', '</script><b>&', '--format', 'html')
    text = Path('ratios/ratios.html').read_text()
    assert not re.search(r'https?://(?!www\.w3\.org/2000/svg)|\bsrc=|\bhref=|@import|url\(', text)
    dom, console = browse(tmp_path, text + ACTIONS)
    assert console == []
    seen = json.loads(re.search(r'data-seen="([^"]*)"', dom)[1].replace('&quot;', '"'))
    first = learned(trained[0])[NAMES[0]][0]
    # bars: two of each layer and run; lines of the course: 3 of backbone and mask head, 2 of neck and box head
    assert seen['all'] == [18, 14, 20, 4]
    assert seen['widths'] == pytest.approx([*first.values()], abs=5e-3)
    values = '   '.join(f'{name.upper()} {ratio:.3f}' for name, ratio in first.items())
    assert seen['bar'] == f'{NAMES[0]}\nlate\nmeans: {values}'
    middle = read_ratios(trained[1]).course[2]
    backbone = (middle[NAMES[0]][0] + middle[NAMES[1]][0]) / 2
    values = '   '.join(f'{name} {ratio:.3f}' for name, ratio in zip(('IN', 'LN', 'BN'), backbone))
    assert seen['course'] == ['iteration 2', values]
    assert seen['tipHidden'] is True
    assert seen['filtered'] == [8, 8, 10, 0]
    assert seen['invalid'] == [False, 8, 8, 10, 0]  # as before
    assert seen['second'] == [8, 6, 0, 2]


@needs_chromium
def test_errors_would_be_seen(tool, tmp_path):
    """The proof for the test above: exceptions, errors and forbidden requests all reach the console."""
    tool('trained', '--format', 'html')
    bad = "<script>console.error('an error'); Promise.reject(new Error('late')); undefined_function()</script>"
    bad += '<script src="https://localhost/x.js"></script>'
    _, console = browse(tmp_path, Path('ratios/ratios.html').read_text() + bad)
    for text in 'an error', 'Error: late', 'undefined_function is not defined', 'Content Security Policy':
        assert sum(text in line for line in console) == 1, console


def browse(folder, page):
    """Open a page in headless Chromium; returns the document as it became, and what was said on the console."""
    path = folder / 'page.html'
    path.write_text(page, encoding='utf-8')
    switches = [
        'headless',
        'no-sandbox',
        'disable-gpu',
        'disable-quic',
        'no-first-run',
        'disable-background-networking',
    ]
    switches += ['disable-component-update', 'disable-sync', f'user-data-dir={folder / "user"}']
    switches += ['enable-logging=stderr', 'v=0', 'dump-dom']
    command = [CHROMIUM, *(f'--{switch}' for switch in switches), path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if ':CONSOLE' in line]
