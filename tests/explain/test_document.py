"""The JSON object fits its schema, whatever was explained, and the schema is one that can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from explain.models import explained, hostile

from cppass.inspection.document import schema

MADE: dict[str, Callable[[], Any]] = {
    "rewritten": lambda: explained(cp_size=4),
    "symbolic": lambda: explained(layers=1, dynamic=True),
    "refused": lambda: explained(dropout=0.5),
    "broken": lambda: explained(layers=2, breaks=True),
    "left alone": lambda: explained(layers=1, tokens=3),
    "hostile": hostile,
}


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(schema())
    return jsonschema.Draft202012Validator(schema())


@pytest.mark.parametrize("name", MADE)
def test_explanations_fit_the_schema(name: str, validator: jsonschema.Draft202012Validator) -> None:
    found = MADE[name]().to_dict()
    assert json.loads(json.dumps(found)) == found
    validator.validate(found)
    for graph in found["graphs"]:
        names = {node["name"] for node in graph["before"]}
        assert len(names) == len(graph["before"])
        assert {name for node in graph["before"] for name in node["inputs"]} <= names
        assert graph["modules"]["nodes"] == len(graph["before"])
        assert (graph["after"] is not None) == (graph["status"] == "rewritten" or name == "hostile")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.pop("schema"),
        lambda d: d.update(status="done"),
        lambda d: d["graphs"][0]["before"][0].update(extra=1),
        lambda d: d["graphs"][0]["before"][0]["state"].update(kind="somewhere"),
        lambda d: d["graphs"][0]["modules"]["children"][0].pop("same"),
        lambda d: d["graphs"][0]["layout"]["ranks"][0]["spans"][0].append(1),
    ],
)
def test_a_spoiled_object_does_not_fit(spoil: Any, validator: jsonschema.Draft202012Validator) -> None:
    found = json.loads(json.dumps(MADE["rewritten"]().to_dict()))
    spoil(found)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(found)


def test_what_the_object_says() -> None:
    found = MADE["rewritten"]().to_dict()
    graph = found["graphs"][found["main"]]
    assert (found["schema"], found["status"], graph["collectives"]) == (1, "rewritten", 4)
    assert graph["received_bytes"] == sum(g["received_bytes"] for g in graph["gathers"]) > 0
    layers = graph["modules"]["children"][1]
    assert (layers["path"], layers["children"][0]["same"]) == ("layers", ["layers.0", "layers.1", "layers.2"])
    kinds = {node["name"]: node["state"]["kind"] for node in graph["before"]}
    assert kinds["embedding"] == "local" and set(kinds.values()) >= {"full", "local", "gathered", "fetched"}
    assert {node["role"] for node in graph["after"]} >= {"shard", "gather", "attention"}
