"""Environment of every test: no device backend is loaded by `import torch`, and torch_npu can be imported."""

import os

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

import cppass  # noqa: F401  (before torch_npu: it brings the libraries that torch_npu misses without CANN)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz", "random programs (-m fuzz)")
    group.addoption("--fuzz-cases", type=int, default=1000, help="random cases in all, shared by the generators")
    group.addoption("--fuzz-seed", type=int, default=0, help="what they are drawn by")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What became of random cases, where there were any."""
    from fuzz.tally import TALLIES

    for tally in config.stash.get(TALLIES, []):
        for line in tally.lines():
            terminalreporter.write_line(line)
