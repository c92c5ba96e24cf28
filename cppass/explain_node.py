"""Where a node comes from, in the user's words."""

from __future__ import annotations

from torch import fx

from cppass.errors import Refusal


def source_of(node: fx.Node) -> str:
    """ "file:line in function: code" of the innermost frame that made the node, "" where the graph does not know."""
    frames = [line for line in (node.stack_trace or "").strip().splitlines() if line.strip()]
    for i in reversed(range(len(frames))):
        if frames[i].lstrip().startswith("File "):
            place = (
                frames[i]
                .strip()
                .removeprefix("File ")
                .replace('"', "")
                .replace(", line ", ":")
                .replace(", in ", " in ")
            )
            code = frames[i + 1].strip() if i + 1 < len(frames) else ""
            return f"{place}: {code}" if code else place
    return ""


def op_of(node: fx.Node) -> str:
    """The node's target as text, such as "aten.mm.default"."""
    target = node.target
    return target if isinstance(target, str) else (getattr(target, "__name__", None) and str(target)) or str(target)


def refuse(code: str, node: fx.Node, why: str, hint: str = "") -> Refusal:
    return Refusal(code, node.name, op_of(node), why, hint, source_of(node))
