"""An outcome, or an error, for people: a table of two columns that fits 80."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cppass.demo.failure import RankError
from cppass.demo.job import count
from cppass.demo.outcome import SCHEMA, Outcome, Timing
from cppass.errors import CPError


def render(outcome: Outcome, console: Console) -> None:
    """Print the table and the verdict."""
    job = outcome.job
    console.print(_model_line(outcome), highlight=False)
    table = Table(show_header=False, expand=False, pad_edge=False)
    table.add_column(no_wrap=False)
    table.add_column(overflow="fold")
    for section in (_checks(outcome), _pass(outcome), _times(outcome), _memory(outcome)):
        for what, value in section:
            table.add_row(what, value)
        table.add_section()
    console.print(table)
    if outcome.rewriting.status != "rewritten":
        console.print(f"note: the graph was {outcome.rewriting.status}: {outcome.rewriting.text}", markup=False)
    if outcome.kernels:
        console.print(f"note: {outcome.kernels}", markup=False)
    verdict = f"every rank equals one device (tolerance {job.tolerance:g} of the largest value, at least of 1)"
    console.print(
        Text("PASS: " + verdict, style="green") if outcome.passed else Text("FAIL: " + _why(outcome), style="red")
    )


def render_error(error: CPError, console: Console, trace: bool = False) -> None:
    """One clean message: code, what was seen, the way out; the other process's traceback on demand."""
    text = Text.assemble((f"error [{error.code}]", "bold red"), f" {error.message}")
    if error.hint:
        text.append(f"\n  way out: {error.hint}")
    console.print(text, highlight=False, soft_wrap=True)
    if trace and isinstance(error, RankError) and error.failure.trace:
        console.print(error.failure.trace, markup=False, highlight=False, soft_wrap=True)


def error_dict(error: CPError) -> dict[str, object]:
    """The same for machines; `kind` is the type that was raised, in whatever process."""
    kind = error.failure.kind if isinstance(error, RankError) else type(error).__name__
    shown = {"code": error.code, "kind": kind, "message": error.message, "hint": error.hint}
    return {"schema": SCHEMA, "ok": False, "error": shown}


def _model_line(outcome: Outcome) -> str:
    m, job = outcome.one_rank.model, outcome.job
    experts = f", {m.experts} experts" if m.experts else ""
    note = f" ({m.note})" if m.note else ""
    cache = "no" if job.cache == "none" else job.cache
    packed = ", packed," if job.dialect == "npu" else ""
    batch = f" x batch {job.batch}{packed}" if job.batch > 1 else ""
    return (
        f"{m.family}{note}: {count(m.layers, 'layer')}, hidden {m.hidden}, {m.heads} heads of {m.head_dim}, "
        f"{m.kv_heads} KV heads{experts}, {m.parameters / 1e6:,.1f} M weights; {job.dtype}, {job.attention}, "
        f"{cache} cache; {count(job.tokens, 'token')}{batch} on {count(job.ranks, 'rank')}"
    )


def _checks(outcome: Outcome) -> list[tuple[str, Text]]:
    job = outcome.job
    enforced = "" if outcome.tokens_enforced else f", not enforced in {job.dtype}"
    tokens = f"{count(job.decode + 1, 'token')} of {count(job.batch, 'sequence')}{enforced}"
    rows = [
        ("tokens equal to one device", _mark(outcome.tokens_equal, tokens)),
        ("logits, max error", _error(outcome.logits_error, outcome.logits_allowed)),
    ]
    if job.cache != "none":
        rows += [
            ("K/V caches, max error", _error(outcome.cache_error, outcome.cache_allowed)),
            ("K/V caches identical on all ranks", _mark(outcome.caches_identical, "every bit, after decoding too")),
        ]
    return rows


def _pass(outcome: Outcome) -> list[tuple[str, Text]]:
    done, layers = outcome.rewriting, outcome.one_rank.model.layers
    rewritten = done.sites if done.status == "rewritten" else 0
    received = "not known" if done.received_bytes is None else size(done.received_bytes)
    each = f"{done.collectives / layers:.3g} per layer, {count(layers, 'layer')}"
    return [
        ("attention sites", Text(f"{done.sites} found, {rewritten} rewritten")),
        ("collectives per forward", Text(f"{done.collectives} ({each})")),
        ("received per rank and forward", Text(received)),
    ]


def _times(outcome: Outcome) -> list[tuple[str, Text]]:
    rows = [
        ("TTFT, 1 rank, 1 thread", _time(outcome.one_rank_time)),
        (f"TTFT, {count(outcome.job.ranks, 'rank')} of 1 thread", _time(outcome.ranks_time)),
    ]
    if outcome.speedup:
        speedup, least, most = outcome.speedup
        rows.append(("speed-up", Text(f"{speedup:.2f}x ({least:.2f}x to {most:.2f}x)", style="bold")))
    if outcome.threads_time:
        rows.append((f"TTFT, 1 process, {count(outcome.job.ranks, 'thread')}", _time(outcome.threads_time)))
    return [*rows, ("compile time, once", Text(f"{outcome.compile_seconds:.1f} s (first call less a prefill)"))]


def _memory(outcome: Outcome) -> list[tuple[str, Text]]:
    ranks = max(r.peak_bytes for r in outcome.ranks)
    rows = [
        ("peak memory, 1 rank", Text(size(outcome.one_rank.peak_bytes))),
        ("peak memory, each of the ranks", Text(size(ranks) + " at most")),
    ]
    if outcome.threads:
        threads = count(outcome.job.ranks, "thread")
        rows.append((f"peak memory, {threads}", Text(size(outcome.threads.peak_bytes))))
    return [
        *rows,
        ("  measured as", Text(outcome.one_rank.peak_method, style="dim")),
    ]


def size(octets: int) -> str:
    """Bytes with three digits: "49.2 kB", "67.1 MB"."""
    value, unit = float(octets), "B"
    for bigger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, bigger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def _why(outcome: Outcome) -> str:
    reasons = []
    if not outcome.tokens_equal and outcome.tokens_enforced:
        reasons.append("tokens differ from one device")
    if not outcome.logits_error <= outcome.logits_allowed:
        reasons.append("logits differ by more than the tolerance")
    if not outcome.cache_error <= outcome.cache_allowed:
        reasons.append("K/V caches differ from one device by more than the tolerance")
    if not outcome.caches_identical:
        reasons.append("K/V caches differ between ranks")
    return "; ".join(reasons)


def _mark(good: bool, detail: str) -> Text:
    return Text.assemble(("yes", "green") if good else ("NO", "bold red"), f" ({detail})")


def _error(error: float, allowed: float) -> Text:
    good = error <= allowed
    return Text.assemble((f"{error:.2e}", "green" if good else "bold red"), f" (allowed {allowed:.1e})")


def _time(timing: Timing) -> Text:
    spread = f"{min(timing.steps):.3f} to {max(timing.steps):.3f}, median of {len(timing.steps)}"
    return Text(f"{timing.median:.3f} s ({spread})")
