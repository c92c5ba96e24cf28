"""The ranks of a group as one of them sees the others: what each says before a step, over the group's store.

A store is what the ranks found each other by (TCPStore under torchrun). Saying something there and hearing the others
takes a fifth of a millisecond on one machine, needs no device, and ends in bounded time, where a collective that one
rank does not join ends at the group's timeout, or hands out wrong data if sizes differ. Words are JSON: plain data.

Ranks count their steps alike: a step is what all take part in, and a failure of a rank takes the place of one.
"""

from __future__ import annotations

import contextlib
import json
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from cppass.errors import CPError, PeerError
from cppass.process import has_ended, this_process
from cppass.target import Ranks
from cppass.torch_private import prefixed, resolve_group, store_of_group, timeout_of_group

Said = Mapping[str, Any]

LONGEST_WAIT = 300.0  # seconds
GRACE = 5.0  # seconds that a rank which failed in a step waits to see whether the others did, too
_parties: dict[str, Party] = {}


def party_of(ranks: Ranks, timeout: float | None = None) -> Party | None:
    """The party of a group, the same one as long as the group lives; None for one rank or a group that is not real.

    Args:
        timeout: seconds to wait for the others in a step, from now on; None leaves it as it was.
    """
    if ranks.cp_size == 1:
        return None
    group = _find_group(ranks.group_name)
    if group is None:
        return None
    known = _parties.get(ranks.group_name)
    if known is None or not known.is_of(group):
        store = store_of_group(ranks.group_name)
        if store is None:
            return None
        known = _parties[ranks.group_name] = Party(group, store, ranks)
    known.timeout = known.timeout if timeout is None else timeout
    return known


def _find_group(name: str) -> Any:
    """The process group of this name, None where there is none."""
    try:
        return resolve_group(name)
    except (RuntimeError, ValueError):
        return None


class Party:
    """One rank's view of a group.

    Args:
        group: the process group; not kept alive.
        store: its store.

    Attributes:
        timeout: seconds to wait for the others in a step.
    """

    def __init__(self, group: Any, store: Any, ranks: Ranks) -> None:
        self.ranks, self._step = ranks, 0
        self.timeout = min(LONGEST_WAIT, timeout_of_group(ranks.group_name))
        self._group = weakref.ref(group)
        self._said: list[str] = []
        with self._store_errors():
            life = store.add(f"cppass/lives/{ranks.rank}", 1)  # a store may outlive a group
            self._store = prefixed(store, f"cppass/{life}")
            self._store.set(self._process(ranks.rank), this_process())

    def is_of(self, group: Any) -> bool:
        return self._group() is group

    def check_group(self) -> None:
        """Raises PeerError CP607 where the group that a graph was compiled for is no more."""
        now = _find_group(self.ranks.group_name)
        if now is None or not self.is_of(now):
            raise PeerError(
                "CP607",
                f"the process group {self.ranks.group_name!r} was {'destroyed' if now is None else 'rebuilt'} after "
                f"this graph was compiled for its rank {self.ranks.rank} of {self.ranks.cp_size}",
                "call torch.compiler.reset() and use the compiled model again, with a group",
            )

    def exchange(self, own: Said) -> list[Said]:
        """What every rank says in this step, by rank.

        Raises:
            PeerError: CP605, a rank says that it failed; CP606, a rank has ended, says nothing, or there is no store.
        """
        self._step += 1
        self._say(own)
        try:
            said = self._hear(self.timeout)
        except PeerError as missing:
            self._say_failed(missing)  # for those who come later
            raise
        failed = [(rank, words["failed"]) for rank, words in enumerate(said) if "failed" in words]
        if failed:
            raise _failed(failed)
        self._forget()
        return said

    def details(self, own: Said) -> list[Said]:
        """What every rank says when they were found to differ."""
        self._say(own, "details")
        return self._hear(self.timeout, "details")

    def fail(self, error: BaseException) -> None:
        """Tell the others, in place of the next step, that this rank failed."""
        self._step += 1
        self._say_failed(error)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Whatever is raised in here, before this rank spoke, the others hear of: they wait for its words."""
        try:
            yield
        except Exception as error:
            self.fail(error)
            raise

    def break_off(self, error: Exception) -> Exception:
        """Tell the others that a step ended in an error here; what to raise for it.

        A rank that raises leaves the others in a collective. If they do not fail as well, or say something else, the
        group is destroyed: their collective then ends, and so do those of the ranks that wait for them in turn.
        """
        own = not _is_lost_connection(error)
        self.fail(error)
        if not own or not self._all_went_on():
            self._destroy_group()
        return error if own else self._cause_of(error)

    def _cause_of(self, error: Exception) -> Exception:
        """Why a collective failed: what a rank said that failed, or that it has ended."""
        try:
            said = self._hear(1.0)
        except PeerError as missing:
            ended = missing if missing.code == "CP606" else None
            said = self._heard()
        else:
            ended = None
        failed = [(r, w["failed"]) for r, w in enumerate(said) if "failed" in w and not _is_lost_text(w["failed"])]
        if failed:
            return _failed(failed)
        return PeerError(
            "CP608",
            f"a collective of this step failed: {error}" + (f"\n  {ended.message}" if ended else ""),
            "this step's KV rows are undefined; rebuild the group and prefill the step again",
        )

    def _all_went_on(self) -> bool:
        try:
            self._hear(GRACE)
        except PeerError:
            return False
        return True

    def _destroy_group(self) -> None:
        import torch.distributed as dist

        group = self._group()
        if group is not None:
            with contextlib.suppress(RuntimeError, ValueError, AssertionError):
                dist.destroy_process_group(group)

    # -- words in the store --

    def _say_failed(self, error: BaseException) -> None:
        ours = f"[{error.code}] {error.message}" if isinstance(error, CPError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(PeerError):
            self._say({"failed": ours})

    def _key(self, rank: int, kind: str = "step") -> str:
        return f"{kind}/{self._step}/{rank}"

    def _process(self, rank: int) -> str:
        return f"process/{rank}"

    def _say(self, words: Said, kind: str = "step") -> None:
        key = self._key(self.ranks.rank, kind)
        with self._store_errors():
            self._store.set(key, json.dumps(words))
        self._said.append(key)

    def _hear(self, timeout: float, kind: str = "step") -> list[Said]:
        """Every rank's words; waits by asking, since a wait of the store that times out writes warnings."""
        keys = [self._key(rank, kind) for rank in range(self.ranks.cp_size)]
        end, pause, looked = time.monotonic() + timeout, 0.0001, time.monotonic()
        with self._store_errors():
            while not self._store.check(keys):
                now = time.monotonic()
                if now - looked > 0.5:
                    self._check_processes(keys)
                    looked = now
                if now > end:
                    raise self._missing(self._silent(keys), f"did not reach this step within {timeout:g} s")
                time.sleep(pause)
                pause = min(pause * 1.5, 0.02)
            return [json.loads(text) for text in self._store.multi_get(keys)]

    def _heard(self) -> list[Said]:
        """The words of the ranks that said something in this step; {} for the others."""
        keys = [self._key(rank) for rank in range(self.ranks.cp_size)]
        with contextlib.suppress(PeerError), self._store_errors():
            silent = self._silent(keys)
            return [{} if rank in silent else json.loads(self._store.get(key)) for rank, key in enumerate(keys)]
        return []

    def _silent(self, keys: list[str]) -> list[int]:
        return [rank for rank, key in enumerate(keys) if not self._store.check([key])]

    def _check_processes(self, keys: list[str]) -> None:
        """Raises PeerError CP606 where a rank that is waited for has ended."""
        ended = []
        for rank in self._silent(keys):
            known = self._store.check([self._process(rank)])
            if known and has_ended(self._store.get(self._process(rank)).decode()):
                ended.append(rank)
        still = [rank for rank in ended if not self._store.check([keys[rank]])]  # its last words may be newer
        if still:
            raise self._missing(still, "ended")

    def _missing(self, ranks: list[int], what: str) -> PeerError:
        return PeerError(
            "CP606",
            f"{_names(ranks)} of {self.ranks.cp_size} {what}; this is rank {self.ranks.rank}, step {self._step}",
            "every rank has to make the same calls; see the output of the ranks that are missing. "
            "Where ranks may be apart for longer: option agreement_timeout",
        )

    def _forget(self) -> None:
        """Remove words that every rank has heard: all are at this step now."""
        done = [key for key in self._said if int(key.split("/")[1]) < self._step]
        with self._store_errors():
            for key in done:
                self._store.delete_key(key)
        self._said = [key for key in self._said if key not in done]

    @contextlib.contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except PeerError:
            raise
        except RuntimeError as error:
            raise PeerError(
                "CP606",
                f"the store of the process group cannot be reached: {error}",
                "the process that holds it (rank 0, or the launcher) has probably ended: see its output",
            ) from error


def _failed(failed: list[tuple[int, str]]) -> PeerError:
    rank, why = failed[0]
    others = [r for r, _ in failed[1:]]
    more = f"\n  and so did {_names(others)}" if others else ""
    return PeerError(
        "CP605",
        f"rank {rank} failed: {why}{more}",
        "mend what failed there; this step's KV rows are undefined on this rank",
    )


def _names(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(str(r) for r in ranks)


LOST = (
    "Connection closed",
    "Connection reset",
    "Connection refused",
    "Timed out waiting",
    "Broken pipe",
    "gloo",
    "HCCL",
)
LOST_KINDS = ("DistBackendError", "DistNetworkError", "DistStoreError", "RuntimeError: [Rank")


def _is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed, rather than this rank's own work."""
    return isinstance(error, RuntimeError) and _is_lost_text(f"{type(error).__name__}: {error}")


def _is_lost_text(text: str) -> bool:
    return text.startswith(LOST_KINDS) or any(words in text for words in LOST)
