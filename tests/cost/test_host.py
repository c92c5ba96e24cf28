"""Measuring this host: figures that are positive and finite, and a link between two real processes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from cppass.cost import host
from cppass.cost.host import calibrate, measure_link
from cppass.errors import CPError


def test_figures_without_a_link_are_assumed_in_words() -> None:
    threads = torch.get_num_threads()
    found = calibrate(0.3, link=False)
    assert torch.get_num_threads() == threads
    numbers = {k: v for k, v in dataclasses.asdict(found).items() if isinstance(v, float) and k != "memory"}
    assert all(0 < v < math.inf for v in numbers.values()), numbers
    assert 1e8 < found.matmul_rate < 1e13
    assert "link" in found.assumed


@pytest.mark.timeout(90)
def test_two_processes_time_an_all_gather() -> None:
    bandwidth, latency = measure_link(0.2)
    assert 1e6 < bandwidth < 1e12
    assert 1e-6 < latency < 10


def test_processes_that_do_not_answer_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.sys, "executable", "/bin/true")
    with pytest.raises(CPError, match=r"\[CP654\] two processes could not time"):
        measure_link(0.2)
