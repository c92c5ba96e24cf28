"""The documentation site: builds without a warning, holds every page, and asks no other machine for anything."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mkdocs.exceptions import PluginError

import cppass

ROOT = Path(__file__).parents[2]
LOADED = re.compile(
    r"""<(?:script|img|iframe|link(?![^>]*rel="?(?:canonical|next|prev)))[^>]*?(?:src|href)="?(https?:)?//"""
)


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(folder),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    ended = build(folder)
    assert ended.returncode == 0, ended.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    expected = {p.replace("README.md", "index.md") for p in pages | {"CHANGELOG.md", "CONTRIBUTING.md", "index.md"}}
    expected |= {f"examples/{p.stem}.md" for p in (ROOT / "examples").glob("*.py")}
    built = {str(p.relative_to(site)) for p in site.rglob("*.html")}
    assert {page.removesuffix(".md") + ".html" for page in expected} <= built


def test_readme_is_the_first_page_and_its_links_lead_to_pages(site: Path) -> None:
    first = (site / "index.html").read_text(encoding="utf-8")
    assert "Prefill context parallelism as a compiler pass" in first
    for link in ("runner.html", "how-it-works.html", "CHANGELOG.html", "examples/npu_dialect.html"):
        assert f'href="{link}"' in first or f"href={link}" in first


def test_reference_comes_from_docstrings(site: Path) -> None:
    runner = (site / "reference" / "runner.html").read_text(encoding="utf-8")
    assert 'id="cppass.runner.plan_step"' in runner
    assert "Call it with the same arguments" in runner


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    missing = {name for name in cppass.__all__ if f'id="cppass.{name}"' not in pages}
    assert missing == {"__version__"}


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    assert LOADED.search('<link rel="stylesheet" href="https://fonts.example/css">')
    for page in site.rglob("*.html"):
        assert not LOADED.search(page.read_text(encoding="utf-8")), page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


LINKS = {  # (page, link as it is written for the repository) -> as the site has it
    ("runner.md", "[a](../examples/tour.py)"): "[a](examples/tour.md)",
    ("runner.md", "[a](npu.md#which-forms)"): "[a](npu.md#which-forms)",
    ("proven.md", "[a](benchmarks)"): "[a](benchmarks/README.md)",
    ("decisions/README.md", "[a](../../CONTRIBUTING.md#decisions)"): "[a](../CONTRIBUTING.md#decisions)",
    ("index.md", "[a](docs/npu.md)"): "[a](npu.md)",
    ("index.md", "[a](cppass/demo/npu)"): "a (`cppass/demo/npu`)",
    ("examples/README.md", "[a](tour.py)"): "[a](tour.md)",
    ("npu.md", "[a](https://semver.org)"): "[a](https://semver.org)",
    ("npu.md", "```text\n[a](nowhere.md)\n```"): "```text\n[a](nowhere.md)\n```",
}


def on_page_markdown(markdown: str, page: str) -> str:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.on_page_markdown(markdown, SimpleNamespace(file=SimpleNamespace(src_uri=page))))


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_links_of_the_repository_become_links_of_the_site(page: str, link: str) -> None:
    assert on_page_markdown(link, page) == LINKS[page, link]


def test_a_link_to_nothing_is_an_error() -> None:
    with pytest.raises(PluginError, match=r"no file examples/gone\.py"):
        on_page_markdown("[a](../examples/gone.py)", "runner.md")
