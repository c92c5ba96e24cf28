"""Where a node comes from, in the user's words."""

from __future__ import annotations

import functools
import re

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


def module_of(node: fx.Node) -> str:
    """Path of the innermost module that the node was made in, "model.layers.0.self_attn"; "" where none is known.

    before:  L['self'].model.layers.slice(None, 28, None).0.self_attn            after:  model.layers.0.self_attn
    """
    return next(reversed(modules_of(node)), "")


def modules_of(node: fx.Node) -> dict[str, str]:
    """Path -> class of the modules that the node was made in, outermost first: {"": "Decoder", "layers.0": "Layer"}."""
    stack = node.meta.get("nn_module_stack") or {}
    found = {}
    for path, kind in stack.values():
        name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
        found[path_of(str(path))] = name.rpartition(".")[2]
    return found


@functools.lru_cache(maxsize=4096)
def path_of(source: str) -> str:
    """A module or weight as people write it, from how Dynamo reaches it.

    before:  self._modules['layers']._modules['0']._parameters['weight']            after:  layers.0.weight
    """
    source = re.sub(r"\.?slice\([^)]*\)", "", source)  # a ModuleList that was sliced
    source = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", source)  # L['self'] and layers[0]
    source = re.sub(r"getattr\(([^,]*), ['\"]([^'\"]*)['\"]\)", r"\1.\2", source)  # names that are no identifiers
    parts = [p for p in source.split(".") if p not in ("", "_modules", "_parameters", "_buffers")]
    parts = parts[1:] if parts[:1] == ["L"] else parts
    if parts[:2] == ["args", "0"]:  # a decorated forward(*args)
        return ".".join(parts[2:])
    return ".".join(parts[1:] if parts[:1] == ["self"] else parts)


def op_of(node: fx.Node) -> str:
    """The node's target as text, such as "aten.mm.default"."""
    target = node.target
    return target if isinstance(target, str) else (getattr(target, "__name__", None) and str(target)) or str(target)


def refuse(code: str, node: fx.Node, why: str, hint: str = "") -> Refusal:
    return Refusal(code, node.name, op_of(node), why, hint, source_of(node), module_of(node))
