"""What every right composition has in common."""

from __future__ import annotations

from composition.parallel_ranks import Seen

TOLERANCE = 1e-5  # values are of the order of 1; sums over a group add in another order than one device


def same_as_one_device(ranks: list[Seen]) -> None:
    """Logits and caches on every rank; caches to the bit among ranks that share a sequence; attention was rewritten."""
    assert max(error for seen in ranks for error in seen.errors + seen.cache_errors) <= TOLERANCE
    for peers in {seen.peers for seen in ranks}:
        assert len({seen.caches for seen in ranks if seen.peers == peers}) == 1
    assert all("rewritten" in seen.statuses for seen in ranks)


def ran(ranks: list[Seen]) -> str:
    """The collectives of one forward, which are the same on every rank."""
    texts = {"\n".join(seen.ran) for seen in ranks}
    assert len(texts) == 1
    return texts.pop()
