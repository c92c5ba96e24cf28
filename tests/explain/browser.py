"""Debian's Chromium, headless, driven by Playwright: pages are opened from files, and whatever goes wrong is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


@dataclasses.dataclass
class Watched:
    """A page, and everything a good one has not: requests to elsewhere, errors, dialogs."""

    page: Any
    wrong: list[str] = dataclasses.field(default_factory=list)


def chromium() -> str:
    """The path of the browser, or the test is skipped with the reason."""
    pytest.importorskip("playwright", reason='needs playwright: pip install "cppass[test]"')
    path = os.environ.get("CPPASS_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("needs a browser: apt-get install chromium, or CPPASS_CHROMIUM=/path/of/one")
    return path


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """A browser with a profile that nobody has used."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile), executable_path=path, headless=True, args=FLAGS, chromium_sandbox=False
        )
        context.set_default_timeout(20_000)
        yield context
        context.close()


def opened(context: Any, path: Path, **look: Any) -> Watched:
    """A page of its own on a file; `look` is what page.emulate_media takes."""
    watched = Watched(context.new_page())
    page = watched.page
    page.set_viewport_size({"width": 1280, "height": 900})
    page.on(
        "console", lambda m: watched.wrong.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: watched.wrong.append(f"exception: {error}"))
    page.on("request", lambda r: watched.wrong.append(f"request: {r.url}") if not _own(r.url, path) else None)
    page.on("dialog", lambda dialog: (watched.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.emulate_media(**{"color_scheme": "light", **look})
    page.goto(path.as_uri())
    return watched


def _own(url: str, path: Path) -> bool:
    return url.partition("#")[0] == path.as_uri() or url.startswith("data:")
