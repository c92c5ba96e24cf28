"""Every Python block of README.md, docs/ and examples/ runs; outputs that a page shows are what its blocks print."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from documentation.code_blocks import FENCE, PAGES, ROOT, Outcome, blocks_of, run_page
from documentation.page_ranks import ALONE, NAMES, RANKS, PageResult, run_pages
from gloo import on_ranks

pytestmark = pytest.mark.timeout(600)  # the first test of a page on ranks waits for all of them

ELSEWHERE = {"docs/extending.md": "tests/extending/test_page.py"}  # it registers ops: in a process of its own
BLOCKS = {page: blocks for page in PAGES if page not in ELSEWHERE and (blocks := blocks_of(page))}
CASES = [(page, line) for page, lines in BLOCKS.items() for line in lines]
SKIP = re.compile(r'^<!--- skip: next "?([^"\n]*)', re.MULTILINE)
LANGUAGES = {"python", "text", "bash", "sh", "yaml", "toml"}  # a block in any other would be run by nobody


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, PageResult]]:
    """By rank: the pages that need several ranks. path/to/Qwen3-0.6B is a checkpoint of one small layer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("pages")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(**sizes, head_dim=16, num_hidden_layers=1, vocab_size=128)
    Qwen3ForCausalLM(config).save_pretrained(folder / "path" / "to" / "Qwen3-0.6B")
    return on_ranks(RANKS, run_pages, str(folder), {page: free_port() for page in NAMES}, group=False)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def in_this_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[int, Outcome]]:
    """Run a page without ranks, once, in a folder of its own."""
    done: dict[str, dict[int, Outcome]] = {}

    def outcomes(page: str) -> dict[int, Outcome]:
        if page not in done:
            torch._dynamo.reset()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp("page"))
                done[page] = run_page(page, ALONE.get(page, dict)())
        return done[page]

    return outcomes


@pytest.mark.parametrize(("page", "line"), CASES, ids=[f"{page}:{line}" for page, line in CASES])
def test_block(page: str, line: int, request: pytest.FixtureRequest) -> None:
    if page in NAMES:
        outcomes = [rank[page][0][line] for rank in request.getfixturevalue("on_two_ranks")]
    else:
        outcomes = [request.getfixturevalue("in_this_process")(page)[line]]
    failures = [outcome.failure for outcome in outcomes if outcome.failure]
    assert not failures, f"{page}:{line}\n{failures[0]}"
    if outcomes[0].skipped:
        pytest.skip(outcomes[0].skipped)


@pytest.mark.parametrize("page", NAMES)
def test_what_pages_compile_on_ranks_is_rewritten(page: str, on_two_ranks: list[dict[str, PageResult]]) -> None:
    for rank in on_two_ranks:
        assert "rewritten" in rank[page][1]


def test_no_block_is_missed() -> None:
    for page in PAGES:
        fences = FENCE.findall((ROOT / page).read_text(encoding="utf-8"))
        assert set(fences) <= LANGUAGES, page
        if page in ELSEWHERE:
            assert Path(page).name in (ROOT / ELSEWHERE[page]).read_text(encoding="utf-8")
            continue
        python = [line for line in BLOCKS.get(page, ()) if _language(page, line) == "python"]
        assert len(python) == fences.count("python"), page


def _language(page: str, line: int) -> str:
    text = (ROOT / page).read_text(encoding="utf-8").splitlines()[line - 1]
    return text.strip().removeprefix("```").split()[0]


def test_blocks_that_are_not_run_are_counted_and_say_why() -> None:
    reasons = [r for page in PAGES for r in SKIP.findall((ROOT / page).read_text(encoding="utf-8"))]
    assert len(reasons) == 3
    assert all(len(reason) > 20 for reason in reasons)


def test_a_broken_block_fails_and_what_follows_is_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        '```python\nx = 1\nprint(x)\n```\n\n```text title="output"\n2\n```\n\n```python\nraise SystemExit\n```\n'
    )
    first, second, third = run_page(str(page), {}).values()
    assert first == Outcome()
    assert "the page says\n2" in second.failure
    assert third.failure == "not run: a block before it failed"
