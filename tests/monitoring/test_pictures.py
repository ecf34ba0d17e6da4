"""The figures and the report can be drawn of every run, and the page is sound."""

import base64
import html.parser
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest

from gradnorm_jax import monitoring
from gradnorm_jax.monitoring import History, palette, series, svg
from gradnorm_jax.monitoring.summary import summarize


def all_to(value):
    def edit(norms):
        for kind in norms:
            norms[kind][:] = value

    return edit


def burst(norms):
    norms["grad"][20:23] *= 50
    norms["grad"][30:, 2] = 0
    norms["grad"][40, 1] = np.nan


RUNS = {
    "faults": {"edit": burst},
    "one step of one part": {"parts": 1, "steps": 1},
    "all zero": {"edit": all_to(0)},
    "all NaN": {"edit": all_to(np.nan)},
    "all inf": {"edit": all_to(np.inf)},
    "all as small as can be": {"edit": all_to(1e-45)},
    "all as large as can be": {"edit": all_to(3e38)},
    "no clip": {"limit": None},
    "an infinite limit": {"limit": np.inf},
    "a limit of zero": {"limit": 0.0},
    "gradients alone": {"kinds": ("grad",)},
    "updates alone": {"kinds": ("update",)},
    "1000 parts": {"parts": 1000, "steps": 20},
    "100000 steps": {"parts": 2, "steps": 100_000},
}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
VOID = {"meta", "img", "wbr"}
PLACES = {"d", "x", "y", "width", "height", "fill-opacity", "style"}


class Page(html.parser.HTMLParser):
    """Reads a page, and checks that each tag is closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.links, self.places, self.ids = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.places += [value for name, value in attrs if name in PLACES]
        self.ids += [value for name, value in attrs if name == "id"]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@every_run
def test_every_run_has_its_figures(make, run, tmp_path):
    for path in monitoring.save_all(make(**run), tmp_path / "figures"):
        assert path.read_bytes().startswith(b"\x89PNG")


@every_run
def test_every_run_has_a_page_that_is_well_formed_and_needs_no_network(make, run):
    page = monitoring.report(make(**run))
    read = Page(page)
    assert "script" not in read.tags
    assert "link" not in read.tags
    targets = {f"#{target}" for target in read.ids}
    assert len(targets) == len(read.ids)
    images = "data:image/png;base64,"
    assert all(link in targets or link.startswith(images) for link in read.links)
    assert "http" not in page
    assert "url(" not in page
    assert not [place for place in read.places if re.search("nan|inf", place)]


def test_a_page_stays_small_whatever_the_length_of_the_run(make):
    assert len(monitoring.report(make(parts=300, steps=5000))) < 350_000


def test_the_names_of_parts_cannot_break_out_of_the_page():
    evil = "<script>alert('1')</script>\"&$x$"
    columns = [f"{kind}/{evil}" for kind in ("grad", "update", "param")]
    history = History.from_rows(columns, [0, 1], [[np.nan, 1, 1], [0, 1, 1]])
    read = Page(monitoring.report(history))
    assert "script" not in read.tags
    assert evil in "".join(read.words)


def test_write_leaves_the_page_in_a_file(make, tmp_path):
    path = monitoring.write(make(), tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == monitoring.report(make())


def test_the_summary_says_what_went_wrong_and_where(make):
    history = make(edit=burst)
    summary = summarize(history)
    peak = history.steps[np.nanargmax(history.global_norm())]
    assert f"at step {peak}" in summary.sentence
    assert (
        "1 step had a NaN or an inf, at step 40 in the gradient of block_1/kernel"
        in (summary.sentence)
    )
    figures = {figure.label: figure for figure in summary.figures}
    assert figures["Non-finite steps"].alarming
    assert figures["Steps"].value == "50"
    assert figures["Steps clipped"].note == "limit 1"
    part = summary.parts[2]
    assert (part.name, part.zero_steps, part.nonfinite_steps) == (
        "block_2/kernel",
        20,
        0,
    )
    assert part.largest == pytest.approx(history.grad[:, 2].max())
    assert history.grad[part.at_step, 2] == history.grad[:, 2].max()


def test_the_summary_names_parts_that_get_no_gradient(make):
    def edit(norms):
        norms["grad"][:, 1:3] = 0

    sentence = summarize(make(edit=edit)).sentence
    assert "of block_1/kernel and 1 more was zero in the last 50 steps" in sentence


def test_the_summary_of_a_sound_run_raises_no_alarm(make):
    assert not [figure for figure in summarize(make()).figures if figure.alarming]


def test_the_summary_counts_dropped_steps():
    history = History.from_rows(["grad/a"], [5, 6, 9], np.ones((3, 1)))
    [dropped] = [f for f in summarize(history).figures if f.label == "Dropped rows"]
    assert dropped.value == "2"


def test_both_pictures_of_a_part_over_time_have_the_same_colors(make):
    history = make(edit=burst)
    shown = monitoring.heat_map(history).axes[0].images[0].get_array()
    shades = series.heat(history).shades()
    expected = palette.heat_colors()[shades]
    np.testing.assert_allclose(np.asarray(shown)[..., :3], expected / 255)
    page = monitoring.report(history)
    image = svg.png(shades, palette.heat_colors(), palette.NO_ROW)
    assert image in page


def test_the_image_in_a_page_is_the_png_that_the_standard_describes():
    cells = np.arange(6, dtype=np.uint8).reshape(2, 3)
    image = svg.png(cells, palette.heat_colors(), transparent=0)
    data = base64.b64decode(image.partition(",")[2])
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        (check,) = struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert check == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + length
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (3, 2)
    assert zlib.decompress(chunks[b"IDAT"]) == bytes([0, 0, 1, 2, 0, 3, 4, 5])
    assert chunks[b"tRNS"] == b"\0"


def test_a_line_breaks_where_there_is_no_number():
    drawn = svg.line([0, 0.5, 1, 1], [0, 1, np.nan, 0.5], "css")
    assert drawn == '<path class="css" d="M0,100 500,0M1000,50h0"/>'
    assert svg.line([0], [np.nan], "css") == ""


def test_a_missing_matplotlib_is_told_with_the_way_out(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'gradnorm-jax\[plot\]'"):
        monitoring.norm_trace(make())


def test_neither_the_import_nor_a_report_loads_matplotlib():
    script = (
        "import sys, gradnorm_jax.monitoring as m\n"
        "m.report(m.History.from_rows(['grad/a'], [0], [[1.0]]))\n"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_is_handed_on_is_what_is_named():
    assert sorted(monitoring.__all__) == list(monitoring.__all__)
    assert all(hasattr(monitoring, name) for name in monitoring.__all__)
