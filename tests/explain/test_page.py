"""The page in a browser: search, folding, keyboard, theme, graph breaks, refusals, hostile names, 94 layers."""

from __future__ import annotations

import dataclasses
import html.parser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from explain.browser import Watched, browser, opened
from explain.models import HOSTILE, explained, hostile
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import cppass
from cppass.inspection.modules import tree_of
from cppass.inspection.views import NodeView

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages by name, written once."""
    made = {
        "rewritten": explained(layers=4),
        "refused": explained(dropout=0.5),
        "broken": explained(layers=2, breaks=True),
        "left alone": explained(layers=1, tokens=3),
        "hostile": hostile(),
    }
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: folder / f"{name.replace(' ', '-')}.html" for name in made}
    for name, explanation in made.items():
        explanation.save_html(paths[name])
    return paths


@pytest.fixture
def rewritten(context: Any, pages: dict[str, Path]) -> Iterator[Watched]:
    watched = opened(context, pages["rewritten"])
    yield watched
    watched.page.close()
    assert watched.wrong == []


# -- without a browser ------------------------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_text_of_a_model_makes_no_markup() -> None:
    """Tags of the page of a model with hostile names: those that the same page has without them."""
    plain, bad = Tags(hostile("x").to_html()), Tags(hostile().to_html())
    assert [tag for tag, _ in bad.tags] == [tag for tag, _ in plain.tags]
    assert not any(name.startswith("on") or name == "style" for _, attributes in bad.tags for name in attributes)
    assert HOSTILE not in hostile().to_html()


def test_a_module_may_be_called_anything() -> None:
    """The whole way from a model's own module names and class names to the page and the text."""
    name = "<img src=x onerror=alert(1)>"

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = getattr(self, name)(x)
            return scaled_dot_product_attention(x, x, x, is_causal=True)

    Odd.__name__ = Odd.__qualname__ = "<b>Odd</b>"
    found = cppass.explain(Odd().eval(), torch.ones(1, 2, 16, 8), cp_size=2)
    assert [m.path for m in found.graph_view.modules.children] == [name]
    assert name in str(found) and "<b>Odd</b>" in str(found)
    page = found.to_html()
    assert "img" not in {tag for tag, _ in Tags(page).tags}
    assert name not in page and "<b>Odd" not in page


def test_a_page_names_nothing_outside_of_itself(pages: dict[str, Path]) -> None:
    for path in pages.values():
        addresses = [
            a.get("href") or a.get("src") for _, a in Tags(path.read_text()).tags if a.get("href") or a.get("src")
        ]
        assert addresses and all(str(address).startswith(("#", "data:")) for address in addresses)


# -- in one -----------------------------------------------------------------------------------------------------------


def test_the_page_says_what_happened(rewritten: Watched) -> None:
    page = rewritten.page
    assert page.inner_text(".badge") == "rewritten"
    assert page.inner_text("h1") == "Decoder"
    assert page.inner_text(".lead").startswith(
        "2 ranks share the tokens: 4 attention sites, 5 collectives in a forward"
    )
    assert page.locator("#layout rect.half0").count() == page.locator("#layout rect.half1").count() == 2
    assert page.locator("#cost polyline").count() == 2


def test_search_finds_nodes_and_slash_reaches_it(rewritten: Watched) -> None:
    page = rewritten.page
    page.keyboard.press("/")
    page.keyboard.insert_text("layers.2.attention local")
    page.wait_for_selector("#count:has-text(' of ')")
    found = page.locator("#list .row")
    assert found.count() > 0
    texts = found.all_inner_texts()
    assert all("layers.2.attention" in text and ("local" in text or "gathered" in text) for text in texts)
    page.keyboard.press("Enter")
    assert page.get_attribute("#list .row >> nth=0", "aria-selected") == "true"
    assert "layers.2.attention" in page.inner_text("#detail")
    page.keyboard.press("/")
    page.keyboard.press("Escape")
    assert " of " not in page.inner_text("#count")
    page.keyboard.press("/")
    page.keyboard.insert_text("no such node")
    page.wait_for_selector("#list .empty")


def test_the_tree_is_used_by_keyboard(rewritten: Watched) -> None:
    """Down to the layers, open, open the fold, choose the last layer: the list shows its nodes alone."""
    page = rewritten.page
    labels = lambda: page.locator("#tree .label").all_inner_texts()  # noqa: E731
    assert labels() == ["model", "embed", "layers", "head"]
    page.locator("#tree [tabindex='0']").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert labels() == ["model", "embed", "layers", "0 .. 3", "head"]
    assert page.inner_text("#tree .same") == "4 × same"  # noqa: RUF001
    for key in ("ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert labels() == ["model", "embed", "layers", "0 .. 3", "0", "1", "2", "3", "head"]
    for key in ("End", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    places = page.locator("#list .place").all_inner_texts()
    assert places and all(place.startswith("layers.3") for place in places)
    page.keyboard.press("ArrowRight")
    assert labels()[-4:] == ["3", "attention", "mlp", "head"]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert all(p.startswith("layers.3.attention") for p in page.locator("#list .place").all_inner_texts())
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.querySelector('.label').textContent") in ("3", "0 .. 3")
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    assert " of " not in page.inner_text("#count")


def test_the_list_is_used_by_keyboard(rewritten: Watched) -> None:
    page = rewritten.page
    page.locator("#list").focus()
    page.keyboard.press("End")
    last = page.locator("#list [aria-selected='true']")
    assert "return" in last.inner_text()
    assert page.get_attribute("#list", "aria-activedescendant") == last.get_attribute("id")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    assert page.locator("#list [aria-selected='true']").get_attribute("aria-posinset") == "2"
    page.locator("#detail .link").first.click()
    assert page.evaluate("document.activeElement.id") == "list"


def test_weights_are_shown_on_demand(rewritten: Watched) -> None:
    page = rewritten.page
    few = page.inner_text("#count")
    page.fill("#search", "layers.1.attention.qkv aten.t")
    page.wait_for_selector("#count:has-text('1 of ')")
    page.locator("#list .row").click()
    page.locator("#detail .link").first.click()
    assert page.is_checked("#weights")
    assert "input layers.1.attention.qkv.weight" in page.inner_text("#list [aria-selected='true']")
    assert page.inner_text("#count") != few
    page.uncheck("#weights")
    assert page.inner_text("#count") == few


def test_before_and_after_side_by_side(rewritten: Watched) -> None:
    page = rewritten.page
    page.locator("#tab-nodes").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#tab-rows", "aria-selected") == "true"
    page.fill("#search", "cppass.gather")
    page.wait_for_selector("#count:has-text(' of ')")
    assert all("cppass.gather" in text for text in page.locator("#list .cell.new").all_inner_texts())
    page.fill("#search", "")
    page.wait_for_selector("#count:not(:has-text(' of '))")
    page.check("#only")
    assert " of " in page.inner_text("#count")
    kinds = page.eval_on_selector_all("#list .row", "rows => rows.map(r => [...r.children].map(c => c.className))")
    assert all(pair != ["cell ", "cell "] for pair in kinds)


def test_the_theme_follows_the_system_and_the_button(context: Any, pages: dict[str, Path]) -> None:
    watched = opened(context, pages["rewritten"], color_scheme="dark")
    page = watched.page
    paper = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")  # noqa: E731
    dark = paper()
    page.click("#theme")
    assert page.get_attribute("#theme", "aria-pressed") == "false"
    assert paper() != dark
    page.keyboard.press("Enter")  # the button has the focus
    assert paper() == dark
    page.close()
    assert watched.wrong == []


def test_a_refused_model(context: Any, pages: dict[str, Path]) -> None:
    watched = opened(context, pages["refused"])
    page = watched.page
    assert page.inner_text(".badge") == "refused"
    assert "CP102" in page.inner_text(".refusal h3") and "3 times" in page.inner_text(".refusal h3")
    assert "model.eval()" in page.inner_text(".way-out")
    assert page.is_disabled("#tab-rows")
    page.locator(".refusal [data-node]").click()
    assert "refused" in page.inner_text("#list [aria-selected='true']")
    assert "scaled_dot_product" in page.inner_text("#detail")
    page.close()
    assert watched.wrong == []


def test_other_graphs_can_be_chosen(context: Any, pages: dict[str, Path]) -> None:
    watched = opened(context, pages["broken"])
    page = watched.page
    whole = page.inner_text("#count")
    page.select_option("#graph", "1")
    assert page.inner_text("#count") != whole
    assert "no attention in this graph" in page.inner_text(".graph:not([hidden])")
    page.close()
    assert watched.wrong == []


@pytest.mark.parametrize("name", ["hostile", "left alone"])
def test_hostile_names_are_text(name: str, context: Any, pages: dict[str, Path]) -> None:
    """Searched for, chosen and opened: what they say is shown, and nothing of it runs."""
    watched = opened(context, pages[name])
    page = watched.page
    if name == "hostile":
        assert page.inner_text("h1") == HOSTILE
        page.locator("#list").focus()
        for key in ("End", "ArrowUp", "ArrowUp"):
            page.keyboard.press(key)
        assert "<script>alert('x')</script>" in page.inner_text("#detail")
        page.locator("#tree [tabindex='0']").focus()
        for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
            page.keyboard.press(key)
        assert "{{ 7 * 7 }}" in page.inner_text("#tree")
    assert page.locator("img").count() == 0
    page.close()
    assert watched.wrong == []


def large(layers: int) -> Any:
    """A decoder's explanation, one of its layers repeated."""
    found = explained(layers=4)
    view = found.graph_view

    def repeated(nodes: tuple[NodeView, ...]) -> tuple[NodeView, ...]:
        inside = [n for n in nodes if n.module.startswith("layers.1")]
        names = {n.name for n in inside}
        more = [
            dataclasses.replace(
                n,
                name=f"{n.name}_{i}",
                module=n.module.replace("layers.1", f"layers.{i}"),
                inputs=tuple(f"{x}_{i}" if x in names else x for x in n.inputs),
            )
            for i in range(4, layers)
            for n in inside
        ]
        return (*nodes, *more)

    nodes = repeated(view.nodes)
    view = dataclasses.replace(view, nodes=nodes, after=repeated(view.after), modules=tree_of(nodes))
    return dataclasses.replace(found, graphs=(view,))


SEARCH = """(words) => {
  const began = performance.now();
  state.words = words;
  refresh();
  document.getElementById("list").getBoundingClientRect();
  return performance.now() - began;
}"""


def test_thirteen_thousand_nodes_stay_responsive(context: Any, tmp_path: Path) -> None:
    """The list holds what is in sight, and a search takes less than the blink of an eye."""
    found = large(600)
    assert len(found.graph_view.nodes) > 13_000
    path = tmp_path / "large.html"
    found.save_html(path)
    watched = opened(context, path)
    page = watched.page
    assert page.locator("#list .row").count() < 100
    page.evaluate(SEARCH, ["mm"])  # what is searched is put together once
    assert page.evaluate(SEARCH, ["addmm", "layers.577"]) < 300
    assert page.locator("#list .row").count() == 2
    page.evaluate(SEARCH, [])
    page.locator("#list").focus()
    page.keyboard.press("End")
    assert page.locator("#list .row").count() < 100
    page.click("#tab-rows")
    assert page.locator("#list .row").count() < 100
    page.close()
    assert watched.wrong == []
