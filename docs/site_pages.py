"""MkDocs hook: pages of files outside docs/, links between them, and nav entries with a star.

The sources are written for whoever reads the repository: README.md links to docs/npu.md, docs/runner.md links to
../examples/model_runner.py. On the site README.md is the first page, an example is a page with its code, and a link to
any other file becomes the file's name. A link to what does not exist is an error of the build.

    README.md -> index.md      CHANGELOG.md, CONTRIBUTING.md, examples/README.md -> the same
    examples/tour.py -> examples/tour.md           benchmarks/*.md in the nav -> the files there, README first
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = "docs"
PAGES = {"README.md": "index.md"} | {p: p for p in ("CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md")}
EXAMPLES = {f"examples/{p.name}": f"examples/{p.stem}.md" for p in sorted((ROOT / "examples").glob("*.py"))}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    config["nav"] = _expanded(config["nav"])
    return config


def on_files(files: Files, config: Any) -> Files:
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / source).read_text(encoding="utf-8")))
    for source, uri in EXAMPLES.items():
        files.append(File.generated(config, uri, content=example_page(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site has them; what stands in code blocks is left alone."""
    sources = {uri: source for source, uri in PAGES.items()} | dict.fromkeys(EXAMPLES.values(), DOCS)
    source = sources.get(page.file.src_uri, f"{DOCS}/{page.file.src_uri}")
    parts = FENCE.split(markdown)
    return "".join(
        part if part.startswith("```") else LINK.sub(lambda m: _link(m, source, page.file.src_uri), part)
        for part in parts
    )


def example_page(path: Path) -> str:
    """A page of an example: its docstring's first sentence, then all of its code."""
    code = path.read_text(encoding="utf-8")
    first = (ast.get_docstring(ast.parse(code)) or "").split("\n\n")[0].replace("\n", " ")
    return f'# {path.name}\n\n{first}\n\n```python title="examples/{path.name}"\n{code}```\n'


def _link(match: re.Match[str], source: str, uri: str) -> str:
    text, target = match.groups()
    path, _, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", target):
        return match[0]
    found = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if not (ROOT / found).exists():
        raise PluginError(f"{source}: no file {found}, to which [{text}]({target}) links")
    page = _page_of(found)
    if page is None:
        return f"{text} (`{found}`)"
    relative = posixpath.relpath(page, posixpath.dirname(uri) or ".")
    return f"[{text}]({relative}{'#' + anchor if anchor else ''})"


def _page_of(found: str) -> str | None:
    """The page of the site that shows a file or folder of the repository; None where there is none."""
    if (ROOT / found).is_dir():
        found = f"{found}/README.md"
    if found in PAGES or found in EXAMPLES:
        return (PAGES | EXAMPLES)[found]
    inside = found.removeprefix(f"{DOCS}/")
    return inside if inside != found and (ROOT / found).exists() else None


def _expanded(nav: Any) -> Any:
    """A nav in which every "folder/*.md" is the list of pages there."""
    if isinstance(nav, list):
        return [_expanded(entry) for entry in nav]
    if isinstance(nav, dict):
        return {title: _expanded(entry) for title, entry in nav.items()}
    if not nav.endswith("/*.md"):
        return nav
    folder = nav.removesuffix("*.md")
    written = {str(path.relative_to(ROOT / DOCS)) for path in (ROOT / DOCS / folder).glob("*.md")}
    made = {uri for uri in (PAGES | EXAMPLES).values() if uri.startswith(folder)}
    return sorted(written | made, key=lambda uri: (not uri.endswith("README.md"), uri))
