"""The job of one process: build, prefill and time, decode, compare. A rank and a plain device run the same lines."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sympy
import torch

from cppass.demo import memory
from cppass.demo.job import BACKEND, Job, Phase
from cppass.demo.results import Comparison, ProcessResult, Rewriting
from cppass.demo.subject import Forward, Session, build, prompt
from cppass.errors import CPError, OptionError

if TYPE_CHECKING:
    from cppass.report import Report

Say = Callable[[str], None]
Barrier = Callable[[], None]

REFERENCE = "one_device.pt"


@torch.no_grad()
def run_process(job: Job, phase: Phase, folder: Path, say: Say, barrier: Barrier) -> ProcessResult:
    """Run one process of a phase.

    Args:
        folder: where one device leaves its logits, tokens and caches, and ranks find them.
        say: told what starts next.
        barrier: passed before each timed prefill; does nothing where there is one process.

    Raises:
        CPError: from the backend, or CP652 where a rank's cache has another shape than one device's.
    """
    torch.set_num_threads(phase.threads)
    say("building the model")
    subject = build(job)
    ids = prompt(job, subject.facts.vocab)
    forward = compiled(job, subject.module) if phase.compiled else subject.module

    say("compiling, first prefill" if phase.compiled else "first prefill, untimed")
    barrier()
    first, _, _ = timed_prefill(forward, ids, subject.begin())
    rewriting = reported(job) if phase.compiled else None

    was_reset = memory.reset_peak()
    seconds = []
    for i in range(job.repeat):
        say(f"prefill {i + 1} of {job.repeat}")
        session = subject.begin()
        barrier()
        elapsed, logits, token = timed_prefill(forward, ids, session)
        seconds.append(elapsed)
    peak, method = memory.peak_bytes(was_reset)

    say("decoding, comparing")
    kept = [logits, *session.keys_and_values()]
    digest = hashlib.sha256()
    absorb(digest, kept[1:])
    if phase.reference == "write":
        save(kept, folder / REFERENCE)
    errors = compare(kept, folder / REFERENCE) if phase.reference == "compare" else None
    del kept
    tokens = decode(forward, token, session, job.decode)
    caches = session.keys_and_values()
    absorb(digest, caches)
    return ProcessResult(
        model=subject.facts,
        first_seconds=first,
        prefill_seconds=tuple(seconds),
        tokens=tuple(tuple(row) for row in tokens.tolist()),
        cache_digest=digest.hexdigest() if caches else "",
        peak_bytes=peak,
        peak_method=method,
        comparison=errors,
        rewriting=rewriting,
    )


def compiled(job: Job, model: torch.nn.Module) -> Forward:
    """The one line this product is about."""
    if job.dynamic is False:  # a dynamic cache grows with each step, so a static graph is compiled for each step
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, job.decode + 4)
    return torch.compile(model, backend=BACKEND, dynamic=job.dynamic, options={"inner": job.inner})


def timed_prefill(forward: Forward, ids: torch.Tensor, session: Session) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Time to first token: seconds, last token's logits [batch, vocab], first generated token [batch, 1]."""
    start = time.perf_counter()
    logits = session.step(forward, ids)
    token = logits.argmax(-1, keepdim=True)
    return time.perf_counter() - start, logits, token


def decode(forward: Forward, token: torch.Tensor, session: Session, count: int) -> torch.Tensor:
    """Greedy decoding after a prefill: ids [batch, count + 1], the given first token among them."""
    tokens = [token]
    for _ in range(count):
        tokens.append(session.step(forward, tokens[-1]).argmax(-1, keepdim=True))
    return torch.cat(tokens, dim=-1)


def reported(job: Job) -> Rewriting:
    """What cppass says about the graphs of the first prefill, summed where graph breaks left several."""
    import cppass

    reports = cppass.reports()
    chosen = [r for r in reports if r.status == "rewritten"] or list(reports)
    if not chosen:
        raise CPError("CP653", "the backend reported nothing about this model", "is anything of it compiled?")
    return Rewriting(
        status=chosen[0].status,
        sites=sum(len(r.sites) for r in chosen),
        collectives=sum(r.collectives for r in chosen),
        received_bytes=received_bytes(chosen, job.sequence_rows),
        text="\n".join(str(r) for r in chosen),
    )


def received_bytes(reports: Sequence[Report], tokens: int) -> int | None:
    """Per forward and rank. Dynamic shapes leave a formula of the token count; None where it holds other symbols."""
    received = sympy.Integer(0)
    for report in reports:
        for gather in report.gathers:
            received += sympy.sympify(gather.formula).subs(sympy.Symbol(str(report.tokens)), tokens)
    return int(received) if received.is_Integer else None


def save(kept: list[torch.Tensor], path: Path) -> None:
    """For `compare` in other processes.

    Raises:
        OptionError: CP050, there is no space; torch itself says "unexpected pos".
    """
    try:
        torch.save(kept, path)
    except (RuntimeError, OSError) as error:
        needed, free = sum(x.nbytes for x in kept), shutil.disk_usage(path.parent).free
        raise OptionError(
            "CP050",
            f"the results of one device ({needed / 1e6:.1f} MB) cannot be written to {path.parent}, where "
            f"{free / 1e6:.1f} MB are free",
            "free some space, or set TMPDIR to another directory",
        ) from error


def compare(found: list[torch.Tensor], reference: Path) -> Comparison:
    """[logits, K, V, K, V, ...] after prefill against those that one device saved. Tokens are compared later.

    Raises:
        CPError: CP652, another number of caches or another shape.
    """
    expected: list[torch.Tensor] = torch.load(reference, weights_only=True, mmap=True)
    if [t.shape for t in found] != [t.shape for t in expected]:
        seen, want = ([tuple(t.shape) for t in side[1:3]] for side in (found, expected))
        raise CPError(
            "CP652",
            f"caches are {seen} (first layer, {len(found) - 1} in all), on one device {want} ({len(expected) - 1})",
            "this is a bug of cppass: full caches are promised",
        )
    caches = list(zip(found[1:], expected[1:], strict=True))
    return Comparison(
        logits_error=largest(found[0], expected[0]),
        logits_scale=largest(expected[0]),
        cache_error=max((largest(a, b) for a, b in caches), default=0.0),
        cache_scale=max((largest(b) for _, b in caches), default=0.0),
    )


def largest(a: torch.Tensor, b: torch.Tensor | None = None) -> float:
    """max |a|, or max |a - b|; a NaN anywhere gives NaN, equal infinities give 0."""
    if b is None:
        return float(a.float().abs().max())
    if torch.equal(a, b):
        return 0.0
    return float((a.float() - b.float()).abs().max())


def absorb(digest: Any, tensors: list[torch.Tensor]) -> None:
    """Feed the bytes of tensors to a hashlib object."""
    for t in tensors:
        digest.update(t.detach().contiguous().view(torch.uint8).numpy().data)
