"""The report says what was found, marks it, stays small, and reads at any width."""

import html
import json
import re
import shutil
import subprocess
import tracemalloc

import numpy as np
import pytest

from gradnorm_jax import monitoring
from gradnorm_jax.monitoring import CODES, Finding, History, charts, marks, series
from gradnorm_jax.monitoring.rows import arrange

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
browser = next(filter(None, map(shutil.which, BROWSERS)), None)


def faults(norms):
    norms["grad"][:] = np.exp(0.1 * np.log(norms["grad"]))
    norms["grad"][100] *= 50
    norms["grad"][200:, 2] = 0
    norms["grad"][250, 1] = np.nan


def words_of(page):
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def finding(code="spike", level="warning", step=0, **more):
    return Finding(code, level, step, "a thing was seen", **more)


def test_each_finding_is_told_with_its_place_its_causes_and_what_to_try(make):
    history = make(steps=400, edit=faults)
    found = monitoring.diagnose(history)
    page = monitoring.report(history)
    words = words_of(page)
    assert {"spike", "dead", "non-finite"} <= {one.code for one in found}
    assert f"{len(found)} findings" in words
    for one in found:
        assert f"{one.level.capitalize()} {one.code} step" in words
        for said in (one.seen[1:], *(w[1:] for w in (*one.likely, *one.tries))):
            assert " ".join(said.split()) in words.replace("/ ", "/")


def test_a_code_is_explained_once_at_an_anchor_of_its_own(make):
    findings = [finding(step=1), finding(step=2), finding("dead", step=3)]
    page = monitoring.report(make(), findings)
    assert re.findall(r'<details id="([^"]*)"', page) == ["spike", "dead"]
    assert page.count('href="#spike"') == 2
    explained = " ".join(monitoring.explain("dead").replace("\n- ", "\n").split())
    assert explained in words_of(page).replace("/ ", "/")


@pytest.mark.parametrize("code", CODES)
def test_every_code_can_be_explained_in_a_page(make, code):
    page = monitoring.report(make(), [finding(code)])
    assert f'<details id="{code}">' in page


def test_a_finding_of_a_users_own_is_told_without_an_explanation(make):
    page = monitoring.report(make(), [finding("<mine>", "info", 7)])
    assert "Info <mine> step 7" in words_of(page)
    assert "<mine>" not in page
    assert "<b>&lt;mine&gt;</b>" in page  # above the pictures, too


def test_that_there_are_no_findings_is_said_plainly(make):
    page = monitoring.report(make(), [])
    assert "No findings Nothing that diagnose looks for was found" in words_of(page)


def test_a_run_too_short_to_judge_is_not_called_sound(make):
    page = monitoring.report(make(steps=39))
    assert "too short for most of what diagnose looks for" in words_of(page)
    assert "too short" not in monitoring.report(make(steps=40), [])


def test_many_findings_are_folded_and_none_is_left_out(make):
    page = monitoring.report(make(), [finding(step=step) for step in range(30)])
    assert "18 more" in words_of(page)
    assert len(re.findall(r'<li class="warning" id="finding-', page)) == 30


def test_the_names_in_a_finding_cannot_break_out_of_the_page(make):
    evil = "<script>alert('1')</script>\"&"
    bad = finding(where=(evil, "b"), parts=3, likely=(evil,), tries=(evil,))
    page = monitoring.report(make(), [bad, finding(evil)])
    assert "<script" not in page


def test_steps_that_findings_name_are_marked_where_they_are(make):
    bins = series.time_bins(make(steps=100))
    findings = [
        finding("non-finite", "error", 80, value=np.nan),
        finding("spike", step=25, value=7.24),
        finding("mine", step=50),
        finding("clip-always", step=20),  # of the whole run: no moment
        finding("spike", step=1000, value=3.0),  # of another run
    ]
    found = marks.moments(findings, bins)
    assert [round(one.at, 3) for one in found] == [0.805, 0.255, 0.505]
    assert [one.label for one in found] == [
        "NaN",
        "7.24\N{MULTIPLICATION SIGN}",
        "mine",
    ]


def test_a_label_gives_way_to_that_of_a_worse_finding(make):
    bins = series.time_bins(make(steps=100))
    found = marks.moments(
        [finding("non-finite", "error", 50, value=np.inf), finding(step=52, value=9.0)],
        bins,
    )
    assert [one.label for one in found] == ["inf", ""]


def test_the_rows_of_dead_parts_are_marked_in_every_picture(make):
    history = make(steps=400, edit=faults)
    findings = [one for one in monitoring.diagnose(history) if one.code == "dead"]
    rows = arrange(history.parts)
    assert list(marks.of_rows(findings, history.parts, rows)) == [2]
    for draw in (charts.heat, charts.flow):
        assert '"block_2/kernel"' in draw(history, findings)
        assert "dead @200" in draw(history, findings)
    labels = monitoring.heat_map(history, findings).axes[0].get_yticklabels()
    assert [label.get_color() != "black" for label in labels] == [
        False,
        False,
        True,
        False,
    ]


def test_a_finding_is_marked_at_the_block_of_its_part():
    parts = [f"layer_{i}/{name}" for i in range(80) for name in ("bias", "kernel")]
    found = marks.of_rows(
        [finding("dead", where=("layer_7/bias",))], parts, arrange(parts)
    )
    assert list(found) == [7]


def test_a_finding_of_most_parts_marks_no_row(make):
    parts = make().parts
    found = marks.of_rows([finding("dead", where=parts[1:])], parts, arrange(parts))
    assert found == {}


def test_the_histogram_counts_every_step_also_zero_and_nan(make):
    def edit(norms):
        norms["grad"][3:5], norms["grad"][7:10] = 0, np.nan

    picture = series.trace(make(steps=200, edit=edit))
    assert picture.shares.sum() == pytest.approx(1)
    assert picture.shares[0] >= 2 / 200
    assert picture.shares[-1] >= 3 / 200
    norms = make(steps=200, edit=edit).global_norm()
    ordered = np.sort(np.where(np.isnan(norms), np.inf, norms))
    assert picture.usual == ordered[179]


def test_the_scale_of_the_heat_map_ends_at_the_outer_percentiles(make):
    picture = series.heat(make(parts=20, steps=500))
    low, high = np.quantile(picture.largest, [0.01, 0.995])
    assert (picture.axis.low, picture.axis.high) == pytest.approx((low, high))


def test_parts_of_a_block_with_one_norm_do_not_coincide():
    shifts = arrange([f"layer_{i}/w{k}" for i in range(60) for k in range(3)]).shifts()
    assert np.all(np.abs(shifts) < 0.5)
    assert len({round(shift, 6) for shift in shifts[:3]}) == 3
    assert arrange(["a", "b"]).shifts().tolist() == [0, 0]


def test_a_report_leaves_the_history_as_it_was(make):
    def edit(norms):
        norms["grad"][3, 1], norms["update"][4, 2] = np.nan, np.inf

    history = make(steps=60, edit=edit)
    for kind in history.kinds:
        history.norms(kind).flags.writeable = False
    page = monitoring.report(history)
    assert page == monitoring.report(make(steps=60, edit=edit))


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_memory_of_a_report_is_of_the_picture_and_not_of_the_run(order):
    norms = np.ones((40_000, 500), np.float32, order=order)
    parts = tuple(f"block_{i // 8}/w{i % 8}" for i in range(500))
    history = History(np.arange(40_000), parts, norms, norms, norms, {})
    tracemalloc.start()
    try:
        page = monitoring.report(history)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < norms.nbytes / 2
    assert len(page) < 1_000_000


# Opens every fold, then looks for words that overlap, and for what is cut off.
LOOK = """<script>addEventListener("load", () => {
  const width = document.documentElement.clientWidth, faults = [];
  const place = (element) => element.getBoundingClientRect();
  document.querySelectorAll("details").forEach((fold) => (fold.open = true));
  if (document.documentElement.scrollWidth > width) faults.push("scrolls sideways");
  for (const box of document.querySelectorAll(".y, .x, .legend, dl, ol, .advice")) {
    let items = [...box.children];
    if (box.matches(".moments")) items = items.map((item) => item.firstElementChild);
    items = items.filter((item) => item.textContent.trim() && place(item).width);
    items.forEach((one, i) => items.slice(i + 1).forEach((two) => {
      const a = place(one), b = place(two);
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 0.5 && down > 3)
        faults.push(`${one.textContent} overlaps ${two.textContent}`);
    }));
  }
  for (const one of document.querySelectorAll("main *:not(svg *, .scroll *)")) {
    const { left, right } = place(one);
    if (right > left && (left < -0.5 || right > width + 0.5))
      faults.push(`cut off: <${one.tagName}> ${one.textContent.slice(0, 40)}`);
  }
  const seen = document.querySelectorAll("svg, img, li, span").length;
  document.title = JSON.stringify({ width, seen, faults });
});</script>"""
FRAME = """<script>addEventListener("load", () => setTimeout(() => {
  const frame = document.querySelector("iframe");
  document.title = frame.contentDocument.title;
}, 500));</script>"""


def look(page, width, folder):
    """Opens a page in a frame: a window cannot be as narrow as a phone."""
    (folder / "page.html").write_text(page.replace("</body>", LOOK + "</body>"))
    frame = f'<iframe src="page.html" style="width:{width}px;height:3000px"></iframe>'
    (folder / "frame.html").write_text(f"{FRAME}{frame}")
    url = (folder / "frame.html").as_uri()
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom")
    options += ("--allow-file-access-from-files", "--virtual-time-budget=4000")
    command = [browser, *options, f"--user-data-dir={folder / 'profile'}", url]
    seen = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True
    )
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", seen.stdout)[1]))


@pytest.mark.skipif(browser is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1100, 1920])
def test_nothing_overlaps_or_is_cut_off(make, width, tmp_path):
    page = monitoring.report(make(parts=60, steps=400, edit=faults))
    seen = look(page, width, tmp_path)
    assert seen["faults"] == []
    assert seen["width"] == pytest.approx(width, abs=16)
    assert seen["seen"] > 50


@pytest.mark.skipif(browser is None, reason="needs Chromium")
def test_what_overlaps_would_be_seen(make, tmp_path):
    page = monitoring.report(make()).replace("left:", "left:50%;no:")
    assert look(page, 390, tmp_path)["faults"]
