"""What a prefill costs on P ranks: FLOPs, bytes, memory as closed forms, and times from a device's figures.

    formulas.py   closed forms in sympy, exact where 2P divides the tokens
    model.py      shapes of models            hardware.py   figures of devices, with their sources
    predict.py    time to first token         gate.py       the length from which a graph gains, plain arithmetic
    host.py       figures of this host, measured

docs/cost-model.md derives the formulas and says what of this was measured.
"""

from __future__ import annotations

from cppass.cost.gate import NEVER, break_even_tokens
from cppass.cost.hardware import HARDWARE, Hardware
from cppass.cost.model import MODELS, ModelShape

__all__ = ["HARDWARE", "MODELS", "NEVER", "Hardware", "ModelShape", "break_even_tokens"]
