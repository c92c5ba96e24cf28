"""Which inputs of a graph arrive as local rows: from the names a user gives to placeholders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from cppass.errors import OptionError
from cppass.rules import is_tensor, shape_of
from cppass.tokens import Tokens


def entering_inputs(
    graph: fx.Graph, named: Iterable[tuple[str, int]], input_names: Mapping[str, str] | None
) -> dict[fx.Node, Tokens]:
    """The placeholders that carry local rows, with the dimension that does.

    Args:
        named: (name, token dimension): "position_ids" means an input of that name, and one of that name inside another,
            such as metadata.position_ids.
        input_names: what the model calls an input, by placeholder; its target if left out.

    Raises:
        OptionError: CP011, a named input has no such dimension, or the named ones have different numbers of rows.
    """
    found: dict[fx.Node, Tokens] = {}
    for node in graph.nodes:
        if node.op != "placeholder" or not is_tensor(node):
            continue
        own = str(node.target) if input_names is None else input_names.get(node.name, "")
        for name, dim in named:
            if own == name or own.endswith(f".{name}"):
                found[node] = Tokens(_axis(node, own, dim))
    sizes = [node.meta["val"].shape[state.dim] for node, state in found.items()]
    if not all(bool(size == sizes[0]) for size in sizes):  # guards, where sizes are symbolic
        given = ", ".join(f"{n.target} {list(shape_of(n))}" for n in found)
        raise OptionError("CP011", f"the sharded inputs have different numbers of rows: {given}", "hand in local rows")
    return found


def _axis(node: fx.Node, name: str, dim: int) -> int:
    ndim = len(shape_of(node))
    if not -ndim <= dim < ndim:
        raise OptionError(
            "CP011",
            f"sharded_inputs says that {name!r} has its tokens in dimension {dim}; it has the shape "
            f"{list(shape_of(node))}",
            "give the dimension that counts tokens",
        )
    return dim % ndim
