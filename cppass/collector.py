"""The garbage collector stands still while the pass runs: it would walk all that Dynamo holds, and find nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """No collections in here, unless the program has them off anyway. Works as a decorator, too.

    A pass over 4,000 nodes makes enough objects for several full collections, which took a quarter of its time.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
