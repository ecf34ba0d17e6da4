"""Every block of Python in the README and the pages runs, and prints what they say."""

import contextlib
import io
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: The pages whose blocks make a program, and what each leaves behind.
PAGES = {
    "README.md": ("runs/a/run.json",),
    "docs/distributed.md": (),
    "docs/monitoring.md": (),
    "docs/per_example.md": (),
}


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_run_and_print_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)
    names: dict = {}
    printed = []
    for (language, code), following in itertools.pairwise([*blocks, ("", "")]):
        if language != "python":
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, page, "exec"), names)
        if out.getvalue():
            printed.append(out.getvalue())
            assert following == ("", out.getvalue())
    assert printed
    assert all((tmp_path / path).exists() for path in PAGES[page])
