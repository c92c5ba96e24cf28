"""The host target: gloo functional collectives and efficient CPU attention. Needs torch alone."""

from lowering.host.target import TARGET

__all__ = ["TARGET"]
