"""`cppass bench`: counted sections give known values, timed ones the right shape; no time is ever asserted."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cppass import cli
from cppass.bench import attention, compile_time, record
from cppass.bench.layouts import LayoutResult, contiguous_share, measure, uneven_batches, zigzag_share
from cppass.bench.machine import Machine, command_line
from cppass.bench.prefills import JOB, Prefill, PrefillResult, checked
from cppass.bench.ratio import Ratio, in_turns
from cppass.bench.sections import SECTIONS, chosen
from cppass.bench.table import Bars, Table
from cppass.demo.display import Silent
from cppass.errors import CPError, OptionError

MACHINE = Machine("A CPU", 2, "2.13.0", "0123456789ab")

# -- ratios ------------------------------------------------------------------------------------------------------------


def test_a_ratio_is_of_what_was_measured_in_the_same_turn() -> None:
    ratio = Ratio.of((2.0, 9.0, 4.0), (1.0, 3.0, 1.0))
    assert (ratio.median, ratio.spread) == (3.0, (2.0, 4.0))
    assert ratio.text() == "3.00x (2.00..4.00)"
    assert Ratio.of((0.05,), (1.0,)).text("%", 100, 1) == "5.0% (5.0..5.0)"


def test_turns_alternate_after_one_unmeasured_call_of_each() -> None:
    said: list[str] = []

    def side(name: str, seconds: list[float]) -> float:
        said.append(name)
        return seconds.pop(0)

    a, b = [99.0, 1.0, 2.0, 3.0], [99.0, 10.0, 20.0, 30.0]
    assert in_turns(lambda: side("A", a), lambda: side("B", b), 3) == ((1.0, 2.0, 3.0), (10.0, 20.0, 30.0))
    assert "".join(said) == "AB" + "AB" + "BA" + "AB"


# -- layout ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cp_size", [2, 4, 8])
def test_contiguous_blocks_leave_the_last_rank_twice_the_mean_less_a_share(cp_size: int) -> None:
    """Control: 2 - 1/P in the limit; L / P rows that begin at L - L / P, of L (L + 1) / 2 pairs. Zigzag is even."""
    length = 1024
    own = length // cp_size
    exact = Fraction(own * (length - own) + own * (own + 1) // 2, length * (length + 1) // 2) * cp_size
    share = contiguous_share((length,), cp_size)
    assert share.imbalance == exact
    assert 2 - 1 / cp_size - float(exact) == pytest.approx(0, abs=1e-3)
    assert zigzag_share((length,), cp_size, "first").imbalance == 1


def test_every_layout_counts_the_pairs_of_the_causal_mask() -> None:
    for lengths in uneven_batches(10):
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        for share in (
            zigzag_share(lengths, 4, "first"),
            zigzag_share(lengths, 4, "balanced"),
            contiguous_share(lengths, 4),
        ):
            assert sum(share.pairs) == pairs
            assert share.rows * 4 >= share.tokens == sum(lengths)


def test_layout_has_the_known_values() -> None:
    lines = {(line.lengths, line.cp_size): line for line in measure(True, Silent()).lines}
    assert lines["4,096", 8].imbalance == {"first": (1.0,), "balanced": (1.0,), "contiguous": (15362 / 8194,)}
    assert lines["33", 8].imbalance["first"] == pytest.approx([1.01248], abs=1e-5)
    assert lines["33", 8].padding == {"first": (40 / 33,), "balanced": (48 / 33,), "contiguous": (40 / 33,)}
    assert lines["64 x 9", 4].padding == {"first": (4 / 3,), "balanced": (1.0,), "contiguous": (4 / 3,)}
    assert {p for lengths, p in lines if lengths == "20 batches"} == {2, 4, 8}
    for (_, cp_size), line in lines.items():
        assert all(1 <= value < 2 - 1 / cp_size + 0.01 for values in line.imbalance.values() for value in values)


# -- timed sections ----------------------------------------------------------------------------------------------------


def test_compile_times_the_pass_inside_one_compilation_of_each_case() -> None:
    cases = (compile_time.Case("dense", 1), compile_time.Case("dense", 2))
    found = compile_time.measure_cases(cases, 1, Silent())
    one, two = found.costs
    assert 1 < two.nodes / one.nodes < 2
    assert all(cost.passes[0] > 0 and cost.rest[0] > 0 for cost in found.costs)
    assert found.growth(one).values == (1.0,)
    assert [row[:2] for row in found.table().rows] == [
        ("dense static, 1", f"{one.nodes:,}"),
        ("dense static, 2", f"{two.nodes:,}"),
    ]


def test_attention_sides_compute_the_same_rows() -> None:
    """Row by row: the shards of both layouts hold what one device computes."""
    attention.load("host")
    q, k, v = (torch.randn(1, heads, 64, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    shards = torch.cat([attention.contiguous_work(q, k, v, 4, rank)() for rank in range(4)], 2)
    torch.testing.assert_close(shards, whole, rtol=1e-4, atol=1e-5)
    halves = [attention.zigzag_work(q, k, v, 4, rank)() for rank in range(4)]
    natural = torch.cat([h[:, :, :8] for h in halves] + [h[:, :, 8:] for h in reversed(halves)], 2)
    torch.testing.assert_close(natural, whole, rtol=1e-4, atol=1e-5)


def test_prefill_says_where_ranks_differ_or_nothing_was_rewritten() -> None:
    found = [Prefill(64, 2, (2.0,), (1.0,), (1.0,), equal, done) for equal, done in ((True, True), (False, False))]
    result = PrefillResult(tuple(found), JOB)
    assert [row[3:5] for row in result.table().rows] == [("2.00x (2.00..2.00)", "100%")] * 2
    assert [row[-1] for row in result.table().rows] == ["yes", "NO, not rewritten"]
    with pytest.raises(CPError, match=r"CP655.*\[64\] tokens"):
        checked(result)
    assert checked(PrefillResult((found[0],), JOB)).prefills == (found[0],)
    predicted = dataclasses.replace(found[0], predicted_one=(1.8,), predicted_ranks=(1.1,))
    assert PrefillResult((predicted,), JOB).table().rows[0][6:8] == ("1.8 s (-10%)", "1.1 s (+10%)")
    assert result.bars().ideal == ("ideal", (2.0, 2.0))


# -- records -----------------------------------------------------------------------------------------------------------


def layout_result() -> LayoutResult:
    return measure(True, Silent())


def test_markdown_has_the_command_the_machine_and_every_row() -> None:
    result = layout_result()
    text = record.markdown("layout", result, MACHINE, "cppass bench layout --quick")
    assert text.startswith("# layout: ")
    for line in ("command: `cppass bench layout --quick`", "CPU: A CPU", "cores: 2", "torch: 2.13.0"):
        assert f"- {line}\n" in text
    assert "- commit: 0123456789ab\n" in text
    assert all("| " + " | ".join(row) + " |\n" in text for row in result.table().rows)
    assert text.isascii()


def test_the_command_of_a_record_holds_no_absolute_path(tmp_path: Path) -> None:
    assert (
        command_line(["layout"], True, Path("docs/benchmarks")) == "cppass bench layout --quick --out docs/benchmarks"
    )
    assert command_line([], False, tmp_path) == "cppass bench --out DIR"


def test_files_of_a_record(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert record.write(tmp_path, "layout", layout_result(), MACHINE, "c") == ["layout.md", "layout.svg"]
    first = (tmp_path / "layout.svg").read_bytes()
    assert "(layout.svg)" in (tmp_path / "layout.md").read_text()
    record.write(tmp_path, "layout", layout_result(), MACHINE, "c")
    assert (tmp_path / "layout.svg").read_bytes() == first  # the same numbers, the same bytes


def test_plots_show_spreads_and_an_ideal(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bars = Bars("title", "axis", ("a", "b"), (("s", (1.0, 2.0)),), (((0.5, 1.5), (2.0, 2.5)),), ("ideal", (2.0, 2.0)))
    record.draw(bars, tmp_path / "plot.svg")
    assert all(f">{text}<" in (tmp_path / "plot.svg").read_text() for text in ("title", "axis", "a", "b", "s", "ideal"))


def test_without_matplotlib_the_record_has_no_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "can_plot", lambda: False)
    assert record.write(tmp_path, "layout", layout_result(), MACHINE, "c") == ["layout.md"]
    assert "svg" not in (tmp_path / "layout.md").read_text()
    result = CliRunner().invoke(cli.app, ["bench", "layout", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0


def test_a_table_row_has_a_cell_for_every_column() -> None:
    with pytest.raises(AssertionError):
        Table("t", ("a", "b"), (("1",),))


# -- the command -------------------------------------------------------------------------------------------------------


def test_sections_are_chosen_by_name_and_all_by_default() -> None:
    assert list(chosen([])) == list(SECTIONS)
    assert list(chosen(["memory", "layout", "memory"])) == ["memory", "layout"]
    with pytest.raises(OptionError, match="CP050"):
        chosen(["layout", "speed"])


def test_an_unknown_section_is_refused_with_the_names_of_all() -> None:
    result = CliRunner().invoke(cli.app, ["bench", "layout", "speed"])
    assert "[CP050] there is no section 'speed'" in result.stderr
    assert "way out: choose of compile, layout, gather, attention, prefill, memory" in result.stderr
    assert (result.exit_code, result.stdout) == (2, "")


def test_json_is_one_object_on_standard_output() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cppass.cli", "bench", "layout", "--quick", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["command"] == "cppass bench layout --quick"
    assert set(found["machine"]) == {"CPU", "cores", "torch", "commit"}
    assert list(found["sections"]) == ["layout"]
    assert "layout: done" in done.stderr
