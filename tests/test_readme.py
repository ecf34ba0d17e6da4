"""Every block of Python in the README runs, and prints what the README says."""

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_blocks_of_the_readme_run_and_print_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(\w*)\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict = {}
    printed = ""
    for (language, code), following in zip(
        blocks, [*blocks[1:], ("", "")], strict=True
    ):
        if language != "python":
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "README.md", "exec"), names)
        if out.getvalue():
            printed += out.getvalue()
            assert following == ("", out.getvalue())
    assert "grad_norm/global_preclip" in printed
    assert (tmp_path / "runs/a/run.json").exists()
