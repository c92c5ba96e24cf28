"""An Explanation as one HTML page that asks for nothing outside of itself.

Text that comes from a model goes through Jinja's autoescape, or as JSON to a script that sets it as text, never as
markup. A content security policy with the hashes of our own style and script forbids everything else.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from typing import Any

from cppass.errors import OptionError
from cppass.inspection import summary, units
from cppass.inspection.advice import FALLBACK, FALLBACK_EFFECT, falls_back, meaning
from cppass.inspection.page_data import explorer_data
from cppass.inspection.pictures import cost_picture, layout_picture
from cppass.inspection.states import KINDS
from cppass.inspection.views import Explanation, GraphView
from cppass.report import REFUSED

SCRIPTS = ("list.js", "tree.js", "page.js")
STYLES = ("colours.css", "page.css", "explorer.css")


def render(explanation: Explanation) -> str:
    """The page.

    Raises:
        OptionError: CP055, jinja2 is not installed.
    """
    style, script = (_texts(names) for names in (STYLES, SCRIPTS))
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    text: str = (
        _environment()
        .get_template("page.html.j2")
        .render(
            explanation=explanation,
            verdict=summary.verdict(explanation),
            size=summary.size(explanation),
            graphs=[_graph(i, view, i == explanation.main) for i, view in enumerate(explanation.graphs)],
            data=explorer_data(explanation),
            kinds=KINDS,
            policy=policy,
            style=style,
            script=script,
        )
    )
    return text


def _graph(index: int, view: GraphView, main: bool) -> dict[str, Any]:
    """What the template needs of one graph."""
    report = view.report
    return {
        "index": index,
        "main": main,
        "view": view,
        "report": report,
        "refused": report.status == REFUSED,
        "name": f"graph {report.graph or index}",
        "sites": summary.sites(view),
        "gathers": summary.gathers(view),
        "refusals": [(r, meaning(r.first)) for r in summary.refusals(view)],
        "fallback": (FALLBACK, FALLBACK_EFFECT) if any(falls_back(r) for r in report.refusals) else None,
        "received": summary.received(view),
        "layout": layout_picture(view.layout) if view.layout else None,
        "cost": cost_picture(view.cost) if view.cost else None,
    }


def _environment() -> Any:
    try:
        import jinja2
    except ModuleNotFoundError as missing:
        way_out = 'pip install "cppass[explain]"'
        raise OptionError("CP055", "a page needs jinja2, which is not installed", way_out) from missing
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cppass.inspection", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    for shown in (units.octets, units.seconds, units.flops, units.plural, units.folded, units.place):
        environment.filters[shown.__name__] = shown
    return environment


def _texts(names: tuple[str, ...]) -> str:
    """Our own files, one after the other. They are trusted: nothing of a model is in them."""
    folder = importlib.resources.files("cppass.inspection").joinpath("page")
    return "\n" + "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
