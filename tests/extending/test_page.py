"""docs/extending.md, run from top to bottom in a process of its own: every block, and what it says is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```", re.M | re.S)


def test_the_page_runs_and_prints_what_it_says(tmp_path: Path) -> None:
    blocks = BLOCK.findall(PAGE.read_text())
    assert [kind for kind, _ in blocks].count("text") >= 6
    script = tmp_path / "page.py"
    script.write_text("\n".join(text if kind == "python" else f"print({text!r}, end='')" for kind, text in blocks))
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    printed = ended.stdout
    for kind, text in blocks:
        if kind == "text":
            assert text + text in printed, f"the page says\n{text}\nand not all of it is in\n{printed}"
