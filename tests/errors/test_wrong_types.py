"""Values of types that nobody asked for, in options, calls and steps: the error names the value, never its Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from errors.bad import Bad, raised
from errors.graph_triggers import Q, causal
from runner.batches import batch_of
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import cppass
from cppass.config import CPConfig
from cppass.runner import Bucket

ARRAY = np.array([1, 2])


def option(name: str, value: Any) -> Bad:
    return Bad("CP003", lambda: CPConfig.from_options({name: value}), (name,), name)


VALUES: list[tuple[str, Any]] = [
    ("cp_size", ARRAY),
    ("cp_size", {"size": 2}),
    ("cp_size", np.float32(2)),
    ("cp_size", torch.tensor(2)),
    ("cp_size", -(10**30)),
    ("rank", [0]),
    ("rank", float("nan")),
    ("inputs", ["replicated"]),
    ("inputs", ARRAY),
    ("inputs", b"replicated"),
    ("target", torch.device("cpu")),
    ("target", {"name": "host"}),
    ("inner", torch.compile),
    ("inner", True),
    ("on_refusal", torch.ones(2)),
    ("on_refusal", ("raise",)),
    ("remainder", 1),
    ("remainder", ARRAY),
    ("attention_calls", True),
    ("attention_calls", 2.0),
    ("attention_calls", torch.tensor([1, 2])),
    ("strict", np.bool_(True)),
    ("strict", {}),
    ("overlap", "false"),
    ("check_inputs", torch.tensor(True)),
    ("min_tokens", {"tokens": 4096}),
    ("min_tokens", ARRAY),
    ("min_tokens", np.array("auto")),
    ("min_tokens", 4096.0),
    ("min_tokens", "automatic"),
    ("group", ARRAY),
    ("group", torch.ones(2)),
    ("group", torch.device("cpu")),
    ("group", {"ranks": [0, 1]}),
    ("sharded_inputs", 5),
    ("sharded_inputs", "input_ids"),
    ("sharded_inputs", {0: 0}),
    ("sharded_inputs", {"input_ids": {"dim": 0}}),
    ("mode", ["max-autotune"]),
]


@pytest.mark.parametrize(("name", "value"), VALUES, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_an_option(name: str, value: Any) -> None:
    raised(option(name, value))


@pytest.mark.parametrize("hardware", [["ascend-910b"], {"name": "ascend-910b"}, "abacus", 910, ARRAY], ids=str)
def test_hardware(hardware: Any) -> None:
    row = Bad("CP003", lambda: CPConfig(min_tokens="auto", hardware=hardware), ("hardware",), "ascend-910b")
    raised(row)


GM = make_fx(causal, tracing_mode="fake")(Q, Q, Q)
UNDESCRIBED = torch.fx.GraphModule({}, torch.fx.Graph())
_a, _b = (UNDESCRIBED.graph.placeholder(name) for name in "ab")
UNDESCRIBED.graph.output(UNDESCRIBED.graph.call_function(torch.ops.aten.mm.default, (_a, _b)))


def decides(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


def rewritten_twice() -> None:
    gm = make_fx(causal, tracing_mode="fake")(Q, Q, Q)
    for _ in range(2):
        cppass.run_pass(gm, (Q, Q, Q), cp_size=2)


CALLS = {
    "options that are a text": Bad("CP003", lambda: CPConfig.from_options("strict"), ("'strict'",), "by name"),
    "options that are a list": Bad(
        "CP003", lambda: cppass.explain(causal, Q, Q, Q, cp_size=2, options=["strict"]), ("no dict",)
    ),
    "options of other keys": Bad("CP001", lambda: CPConfig.from_options({("strict",): True})),
    "a config that is a dict": Bad(
        "CP003", lambda: cppass.run_pass(GM, (Q, Q, Q), {"cp_size": 2}), ("no CPConfig",), "CPConfig(cp_size=2)"
    ),
    "a config for the hook that is a number": Bad("CP003", lambda: cppass.npu_pass(2), ("config=2",)),
    "no number of ranks to explain for": Bad(
        "CP003", lambda: cppass.explain(causal, Q, Q, Q, cp_size=None), ("cp_size=None",)
    ),
    "a number of ranks to explain for that is a text": Bad(
        "CP003", lambda: cppass.explain(causal, Q, Q, Q, cp_size="2"), ("cp_size='2'",)
    ),
    "no number of ranks to simulate": Bad("CP003", lambda: cppass.simulate(causal, (Q, Q, Q), None), ("cp_size=None",)),
    "a number of ranks to simulate that is a text": Bad(
        "CP003", lambda: cppass.simulate(causal, (Q, Q, Q), "2"), ("cp_size='2'",)
    ),
    "more ranks than can be simulated": Bad(
        "CP003", lambda: cppass.simulate(causal, (Q, Q, Q), 10**9), ("cp_size=1000000000",)
    ),
    "a model instead of a graph": Bad(
        "CP009", lambda: cppass.run_pass(torch.nn.Linear(2, 2), (Q,), cp_size=2), ("Linear",), "make_fx"
    ),
    "one tensor as example inputs": Bad(
        "CP010", lambda: cppass.run_pass(GM, Q, cp_size=2), ("a Tensor",), "list or tuple"
    ),
    "no example inputs": Bad("CP010", lambda: cppass.run_pass(UNDESCRIBED, None, cp_size=2), ("NoneType",)),
    "example inputs that do not fit": Bad(
        "CP010",
        lambda: cppass.run_pass(UNDESCRIBED, (torch.ones(2, 3), torch.ones(2, 3)), cp_size=2),
        ("cannot be traced",),
        "runs on",
    ),
    "example inputs that are numbers": Bad(
        "CP010", lambda: cppass.run_pass(UNDESCRIBED, (1, 2), cp_size=2), ("cannot be traced",)
    ),
    "one tensor to simulate": Bad("CP010", lambda: cppass.simulate(causal, Q, 2), ("a Tensor",)),
    "too few inputs to simulate": Bad("CP010", lambda: cppass.simulate(causal, (Q, Q), 2), ("cannot be traced",)),
    "too few inputs of a graph": Bad("CP010", lambda: cppass.simulate(GM, (Q, Q), 2), ("3 inputs each", "[2, 2]")),
    "inputs of one rank alone": Bad(
        "CP010", lambda: cppass.simulate(GM, (Q, Q, Q), 2, rank_inputs=[(Q, Q, Q)]), ("2 ranks", "[3]")
    ),
    "inputs of other sizes": Bad(
        "CP010", lambda: cppass.simulate(GM, (Q[:, :, :12],) * 3, 2), ("[1, 4, 12, 8]",), "symbolic"
    ),
    "one tensor for all ranks": Bad("CP010", lambda: cppass.simulate(GM, (Q, Q, Q), 2, rank_inputs=Q), ("a Tensor",)),
    "a graph that was rewritten before": Bad("CP009", rewritten_twice, ("before",), "anew"),
    "a number instead of a model": Bad("CP009", lambda: cppass.explain(3, cp_size=2), ("not int",), "the model"),
    "a function that decides by values": Bad(
        "CP010", lambda: cppass.simulate(decides, (Q,), 2), ("cannot be traced",), "depends on values"
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call(name: str) -> None:
    raised(CALLS[name])


def test_a_module_inside_a_graph_runs() -> None:
    """Control: it is inlined where it holds attention, and called where the graph is left alone."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("inner", (x,)))
    gm = torch.fx.GraphModule({"inner": make_fx(lambda x: x * 2)(Q)}, graph)
    assert all(torch.equal(seen, Q * 2) for seen, _ in cppass.simulate(gm, (Q,), 2))


# -- steps of a model runner -------------------------------------------------------------------------------------------

BATCH = batch_of([13, 50, 1], [0, 20, 30])


def step(code: str, *says: str, **given: Any) -> Bad:
    def act() -> None:
        from cppass.runner import plan_step

        tensors = {"slot_mapping": BATCH.slots, "block_table": BATCH.table, "block_size": 16}
        named = {"lengths": BATCH.lengths, "prefixes": BATCH.prefixes, "cp_size": 2, "rank": 0, **tensors, **given}
        plan_step(named.pop("lengths"), named.pop("prefixes"), **named)

    return Bad(code, act, says)


PLAN = BATCH.plan(2)
STEPS = {
    "lengths that are a number": step("CP610", "64", lengths=64),
    "lengths that are none": step("CP610", "None", lengths=None),
    "lengths that are a text": step("CP610", "'64'", lengths="64"),
    "lengths in a tensor": step("CP610", "a tensor [3]", lengths=torch.tensor([13, 50, 1])),
    "lengths in floats": step("CP610", "13.0", lengths=[13.0, 50, 1]),
    "lengths in bools": step("CP610", "True", lengths=[13, 50, True]),
    "lengths in lists": step("CP610", "[13]", lengths=[[13], [50], [1]]),
    "a negative length": step("CP610", "-50", lengths=[13, -50, 1]),
    "a huge length": step("CP610", f"{2**62}", lengths=[13, 2**62, 1]),
    "prefixes that are a number": step("CP610", "20", prefixes=20),
    "a negative prefix": step("CP610", "-20", prefixes=[0, -20, 30]),
    "min_tokens that is a text": step("CP610", "min_tokens='auto'", min_tokens="auto"),
    "slots in a list": step("CP611", "slot_mapping is a list", slot_mapping=BATCH.slots.tolist()),
    "no slots": step("CP611", "NoneType", slot_mapping=None),
    "slots in floats": step("CP611", "torch.float32", slot_mapping=BATCH.slots.float()),
    "slots in bytes": step("CP611", "torch.uint8", slot_mapping=BATCH.slots.byte()),
    "slots in bools": step("CP611", "torch.bool", slot_mapping=BATCH.slots.bool()),
    "slots in another order": step("CP611", "position 0 of sequence 0", slot_mapping=BATCH.slots.flip(0)),
    "one slot for all": step("CP611", "two tokens", slot_mapping=torch.zeros_like(BATCH.slots)),
    "slots on a device, in floats": step("CP611", "torch.float32", slot_mapping=BATCH.slots.float().to("meta")),
    "a pad slot that is a text": step("CP611", "pad_slot='-1'", pad_slot="-1"),
    "a pad slot far below 0": step("CP611", "-1000", pad_slot=-1000),
    "a number of slots that is a float": step("CP611", "slots=128.0", slots=128.0),
    "a cache without slots": step("CP611", "the cache has", slots=0),
    "a block table in lists": step("CP612", "block_table is a list", block_table=BATCH.table.tolist()),
    "a block table in floats": step("CP612", "torch.float64", block_table=BATCH.table.double()),
    "no block table": step("CP612", "NoneType", block_table=None),
    "a block table of no columns": step("CP612", "0 blocks", block_table=BATCH.table[:, :0]),
    "a block size that is a text": step("CP612", "'16'", block_size="16"),
    "a block size that is a bool": step("CP612", "True", block_size=True),
    "another block size": step("CP611", "sequence", block_size=17),
    "a bucket that is a number": step("CP613", "bucket=64", bucket=64),
    "a bucket that is a tuple": step("CP613", "(64, 4)", bucket=(64, 4)),
    "a bucket of a bool": Bad("CP613", lambda: Bucket(32, True), ("sequences=True",)),
    "ranks that are a text": step("CP615", "'2'", cp_size="2"),
    "no rank": step("CP615", "None", rank=None),
    "a rank that is a bool": step("CP615", "True", rank=True),
    "a remainder that is a list": step("CP615", "['first']", remainder=["first"]),
    "rows that are a list": Bad("CP614", lambda: PLAN.shard([1] * 64), ("a list",)),
    "no rows": Bad("CP614", lambda: PLAN.restore(None), ("NoneType",)),
    "a dimension that is a text": Bad("CP614", lambda: PLAN.shard(torch.ones(64), dim="rows"), ("'rows'",)),
    "rows by name": Bad("CP614", lambda: PLAN.restore_rows(torch.ones(64), ["last"]), ("'last'",)),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step(name: str) -> None:
    raised(STEPS[name])


def test_numbers_of_numpy_are_numbers() -> None:
    """Control: runners count with numpy."""
    from cppass.runner import plan_step

    lengths, prefixes = np.array(BATCH.lengths), np.array(BATCH.prefixes)
    given = {"slot_mapping": BATCH.slots, "block_table": BATCH.table, "block_size": 16, "cp_size": 2, "rank": 0}
    seen = plan_step(lengths, prefixes, pad_slot=np.int64(-1), min_tokens=np.int32(8), slots=np.int64(4096), **given)
    assert (seen.cu_q, seen.lengths) == (PLAN.cu_q, PLAN.lengths)
    assert all(type(n) is int for n in (*seen.lengths, *seen.cu_q, *seen.kv_lens))
