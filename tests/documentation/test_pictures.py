"""The pictures of docs/how-it-works.md are what docs/pictures/draw.py draws from cppass.layout."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "docs" / "pictures"


def drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw", FOLDER / "draw.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_up_to_date() -> None:
    draw = drawing()
    assert {p.name: p.read_text(encoding="utf-8") for p in FOLDER.glob("*.svg")} == {
        name: function() for name, function in draw.PICTURES.items()
    }, "python docs/pictures/draw.py"


def test_zigzag_work_is_equal_and_contiguous_work_is_not() -> None:
    picture = drawing().zigzag_picture()
    assert "busiest / mean: 1.00" in picture
    assert "busiest / mean: 1.67" in picture
