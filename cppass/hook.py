"""The pass for people who have a torchair or npugraph_ex backend of their own.

config = torchair.CompilerConfig()
config.post_grad_custom_pre_pass = cppass.npu_pass(cp_size=2)           # GE, and ACL graph by config.mode
torch.compile(model, backend=torchair.get_npu_backend(compiler_config=config))

options = {"post_grad_custom_pre_pass": cppass.npu_pass(cp_size=2)}
torch.compile(model, backend="npugraph_ex", options=options)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from cppass import __version__
from cppass.config import CPConfig
from cppass.errors import CPError, OptionError, refused_error
from cppass.fingerprint import fingerprint
from cppass.guard import compare
from cppass.logs import log_graph
from cppass.party import party_of
from cppass.pipeline import rewrite_graph
from cppass.ranks import ranks_without_group
from cppass.registry import registered
from cppass.report import REFUSED, REWRITTEN, record
from cppass.target import Ranks, Target, load

Hook = Callable[[fx.GraphModule, Sequence[Any], Any], None]


def npu_pass(config: CPConfig | None = None, **options: Any) -> Hook:
    """A function for `post_grad_custom_pre_pass`: rewrites a graph in place for this rank, before any other pass.

    Args:
        config: options, or give them as keywords. The process group must exist, or `cp_size` (and `rank`) be given.

    The ranks compare what they compile, in the hook; nothing runs before a step (backend "npu_cp" has that).
    A graph that the pass leaves alone (too short a step, no attention) stays as it is. The hook cannot add inputs to a
    graph, so under ACL graph it takes known lengths alone; the backend "npu_cp" takes both.

    Raises:
        OptionError: wrong options, or no ranks to share with.
        RefusedError: from the compiler that calls the hook: the graph cannot be rewritten.
        CPError: from the compiler: CP507, symbolic lengths under ACL graph.
    """
    config = CPConfig.merged(config, options)
    wrongs = {
        "target='host'": config.target == "host",
        "check_inputs=True": config.check_inputs is True,
        "inputs='sharded'": config.inputs == "sharded",  # a hook does not see what the model calls its inputs
    }
    wrong = next((text for text, given in wrongs.items() if given), "")
    if wrong:
        raise OptionError("CP003", f"option {wrong} does not go with npu_pass", "leave it out, or use backend='npu_cp'")
    ranks = ranks_without_group(config)
    return _identified(functools.partial(_run, config, ranks), f"cppass {__version__} {config} {ranks} {registered()}")


def _run(config: CPConfig, ranks: Ranks, gm: fx.GraphModule, compiler_config: Any, identity: str) -> None:
    report = rewrite_graph(gm, config, ranks.cp_size, ranks.group_name)
    record(report)
    party = party_of(ranks, config.agreement_timeout) if report.takes_part else None
    if report.status == REFUSED and config.on_refusal == "raise":
        refused = refused_error(report.refusals)
        if party:
            party.fail(refused)
        raise refused
    if party:
        compare(party, fingerprint(gm.graph, report.what, config))
    if report.status == REWRITTEN:
        target = load("npu")
        target.lower(gm, ranks, config)
        log_graph("lowered", gm.graph)
        _check_lengths(target, gm, compiler_config)


def _check_lengths(target: Target, gm: fx.GraphModule, compiler_config: Any) -> None:
    computed = target.computed_lengths(gm)
    if computed and _is_acl_graph(compiler_config):
        raise CPError(
            "CP507",
            f"{len(computed)} lengths are computed from symbolic ones (the first is {computed[0].name}): "
            "an ACL graph rebinds lengths from its inputs alone, and a hook cannot add inputs",
            "use torch.compile(backend='npu_cp', options={'inner': 'npugraph_ex'}), or dynamic=False",
        )


def _is_acl_graph(compiler_config: Any) -> bool:
    """npugraph_ex always; torchair unless its mode is max-autotune (GE)."""
    if type(compiler_config).__module__.startswith("npugraph_ex"):
        return True
    mode = getattr(getattr(compiler_config, "mode", None), "value", "max-autotune")
    return bool(mode != "max-autotune")


def _identified(run: Callable[[fx.GraphModule, Any, str], None], identity: str) -> Hook:
    """A function whose code holds its identity: torchair's cache_compile tells hooks apart by their code alone."""

    def hook(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Any) -> None:
        run(gm, config, "identity of a hook")

    code = hook.__code__
    constants = tuple(identity if c == "identity of a hook" else c for c in code.co_consts)
    hook.__code__ = code.replace(co_consts=constants)
    return hook
