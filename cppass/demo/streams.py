"""Keeping what libraries print (warnings, gloo's connection lines) off the screen: below Python, by descriptor."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


def private_copy(descriptor: int) -> TextIO:
    """A text stream of our own on descriptor 1 or 2, which keeps working while `silenced` holds."""
    return os.fdopen(os.dup(descriptor), "w", buffering=1, encoding="utf-8")


@contextlib.contextmanager
def silenced(log: Path) -> Iterator[None]:
    """Send descriptors 1 and 2 to a file, and back again at the end."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with log.open("w") as sink:
        try:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
