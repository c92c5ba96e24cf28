"""Around a compiled graph: the ranks agree before it runs, and an error in it reaches all of them.

before   every rank: here I am, at my step 7, with this graph, these sizes [, this hash of token ids and weights]
run      collectives
error    every rank: I failed at step 7, because ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cppass.checked import checked_first
from cppass.config import CPConfig
from cppass.contents import Contents, differing, digest
from cppass.errors import PeerError
from cppass.fingerprint import Fingerprint, first_difference
from cppass.party import Party, Said


def agreed(
    run: Callable[..., Any],
    party: Party,
    mark: Fingerprint,
    varying: Mapping[int, str],
    contents: Contents,
    config: CPConfig,
) -> Callable[..., Any]:
    """`run`, a graph with collectives, with an agreement before each call (with agreement="graph": the first one).

    Args:
        varying: inputs whose sizes are compared, as `varying_inputs` finds them.
        contents: inputs whose values are, as `contents_of` finds them.

    Raises:
        PeerError: on every rank. CP601 token ids differ, CP603 graphs, versions or options differ, CP604 sizes differ,
            CP605 a rank failed, CP606 a rank is missing, CP607 the group is gone, CP608 a collective failed, CP609
            weights differ.
    """
    met = False

    def check(inputs: Sequence[Any]) -> None:
        nonlocal met
        party.check_group()
        if not met or config.agreement == "step":
            compare(party, mark, _sizes(inputs, varying), hashes(inputs))
        met = True

    def hashes(inputs: Sequence[Any]) -> dict[str, dict[str, str]]:
        first = not met and config.check_inputs is not False
        ids = (first or config.check_inputs is True) and config.inputs == "replicated"
        with party.told():
            return contents.hashes(inputs, ids, weights=first)

    def told(*args: Any) -> Any:
        try:
            return run(*args)
        except Exception as error:
            raised = party.break_off(error)
            if raised is error:
                raise
            raise raised from error

    told._boxed_call = getattr(run, "_boxed_call", False)  # type: ignore[attr-defined]
    return checked_first(told, check)


def agreed_once(run: Callable[..., Any], party: Party, mark: Fingerprint) -> Callable[..., Any]:
    """`run`, a graph that was left alone, with an agreement before its first call: was it left alone everywhere?"""
    met = False

    def check(inputs: Sequence[Any]) -> None:
        nonlocal met
        if not met:
            party.check_group()
            compare(party, mark)
        met = True

    return checked_first(run, check)


def compare(
    party: Party, mark: Fingerprint, sizes: Mapping[str, Any] | None = None, hashes: Mapping[str, Any] | None = None
) -> None:
    """One step of agreement. Raises PeerError (see `agreed`), the same on every rank."""
    said = party.exchange({"graph": mark.digest, "sizes": sizes or {}, "values": digest(hashes) if hashes else ""})
    odd = _odd(said, "graph")
    if odd:
        details = party.details(mark.to_dict())
        raise PeerError(
            "CP603",
            "ranks do not run the same graph: "
            + first_difference(details[0], details[odd[0]], ("rank 0", f"rank {odd[0]}")),
            "run the same code, versions and options on every rank, and hand each the same inputs",
        )
    odd = _odd(said, "sizes")
    if odd:
        raise PeerError(
            "CP604",
            f"ranks are handed inputs of different sizes: {_difference(said, odd[0])}",
            "hand every rank the same inputs: broadcast them from rank 0",
        )
    odd = _odd(said, "values")
    if odd and hashes:
        details = party.details(hashes)
        raise _other_values(odd, *differing(details[0], details[odd[0]]))


def _other_values(ranks: list[int], kind: str, names: list[str]) -> PeerError:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    meant = "; check_inputs=False where they are meant to differ"
    if kind == "weights":
        why = f"ranks {ranks} have other weights than rank 0: {shown}"
        return PeerError("CP609", why, f"load the same checkpoint, or seed random weights alike, on every rank{meant}")
    why = f"ranks {ranks} were handed other token ids or positions than rank 0: {shown}"
    return PeerError("CP601", why, f"broadcast the inputs from rank 0, and seed samplers alike{meant}")


def _odd(said: Sequence[Said], field: str) -> list[int]:
    return [rank for rank, words in enumerate(said) if words[field] != said[0][field]]


def _difference(said: Sequence[Said], rank: int) -> str:
    here, there = said[0]["sizes"], said[rank]["sizes"]
    name = next(n for n in here if here[n] != there[n])
    return f"{name} is {here[name]} on rank 0, {there[name]} on rank {rank}"


def varying_inputs(gm: fx.GraphModule, names: Mapping[str, str] | None = None) -> dict[int, str]:
    """{position: name} of inputs whose sizes the graph does not fix, and of numbers; Dynamo's guards hold the others.

    Args:
        names: what the model calls the inputs, by placeholder.
    """
    found = {}
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        if any(isinstance(size, torch.SymInt) for size in sizes):
            kind = "the size of" if isinstance(value, torch.Tensor) else "the number"
            found[position] = f"{kind} {(names or {}).get(node.name) or node.target}"
    return found


def _sizes(inputs: Sequence[Any], varying: Mapping[int, str]) -> dict[str, Any]:
    sizes = {name: inputs[position] for position, name in varying.items()}
    return {name: list(x.shape) if isinstance(x, torch.Tensor) else x for name, x in sizes.items()}
