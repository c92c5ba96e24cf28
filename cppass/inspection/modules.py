"""The module tree of a graph. Siblings that are the same (the layers of a decoder) are folded into one."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping

from cppass.inspection.views import ModuleView, NodeView

Signature = int


@dataclasses.dataclass
class _Module:
    """A module while the tree is built."""

    path: str
    type: str = ""
    own: list[NodeView] = dataclasses.field(default_factory=list)
    children: dict[str, _Module] = dataclasses.field(default_factory=dict)


def tree_of(nodes: Iterable[NodeView], types: Mapping[str, str] | None = None) -> ModuleView:
    """The tree of the modules that nodes were made in; its root stands for the model and has the path "".

    before:  layers.0, layers.1, .., layers.27            after:  layers.0, and layers.1 with `same` of 27 paths

    Args:
        types: path -> class of modules, for those in which no node was made.

    Two siblings are the same where their names are numbers and their nodes are: ops, shapes and states in order.
    """
    types = types or {}
    root = _Module("", types.get("", ""))
    for node in nodes:
        module = root
        parts = node.module.split(".") if node.module else []
        for i, part in enumerate(parts):
            path = ".".join(parts[: i + 1])
            module = module.children.setdefault(part, _Module(path, types.get(path, "")))
        module.type = node.module_type or module.type
        module.own.append(node)
    return _view(root)[0]


def repeated(module: ModuleView) -> Iterator[ModuleView]:
    """The folded modules of a tree, outermost ones alone."""
    for child in module.children:
        if child.same:
            yield child
        else:
            yield from repeated(child)


def _view(module: _Module) -> tuple[ModuleView, Signature]:
    seen = {name: _view(child) for name, child in module.children.items()}
    children = [_folded([seen[name][0] for name in run]) for run in _runs(seen)]
    below = [view for view, _ in seen.values()]
    own = tuple((n.op, n.shape, n.state.text, n.role) for n in module.own)
    view = ModuleView(
        path=module.path,
        name=module.path.rpartition(".")[2],
        type=module.type,
        nodes=len(module.own) + sum(v.nodes for v in below),
        roles=_sum([*(v.roles for v in below), collections.Counter(n.role for n in module.own if n.role)]),
        kinds=_sum([*(v.kinds for v in below), collections.Counter(n.state.kind for n in module.own)]),
        same=(),
        children=tuple(children),
    )
    inside = tuple((name, signature) for name, (_, signature) in seen.items())
    return view, hash((module.type, own, inside))


def _runs(seen: dict[str, tuple[ModuleView, Signature]]) -> list[list[str]]:
    """Names of siblings, those that are the same and follow each other together."""
    keyed = [(seen[name][1] if name.isdigit() else name, name) for name in seen]
    return [[name for _, name in run] for _, run in itertools.groupby(keyed, key=lambda pair: pair[0])]


def _folded(run: list[ModuleView]) -> ModuleView:
    return run[0] if len(run) == 1 else dataclasses.replace(run[0], same=tuple(view.path for view in run))


def _sum(counts: list[dict[str, int]]) -> dict[str, int]:
    total: collections.Counter[str] = collections.Counter()
    for part in counts:
        total.update(part)
    return dict(total)
