"""TORCH_LOGS and TORCH_TRACE, as a user types them: each in a process of its own, since torch reads them once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = """
{imports}
from torch.nn.functional import scaled_dot_product_attention

def model(q, k, v):
    return scaled_dot_product_attention(q, k, v, is_causal=True)

cppass.explain(model, *(torch.randn(1, 2, 16, 8) for _ in range(3)), cp_size=2)
{more}
"""
BACKEND = """
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
with torch.no_grad():
    torch.compile(model, backend="npu_cp")(*(torch.randn(1, 2, 16, 8) for _ in range(3)))
dist.destroy_process_group()
"""
TORCH_FIRST, CPPASS_FIRST = "import torch\nimport cppass", "import cppass\nimport torch"


def run(folder: Path, imports: str, more: str = BACKEND, **environment: str) -> str:
    """What the script writes to stderr."""
    script = folder / "script.py"
    script.write_text(SCRIPT.format(imports=imports, more=more))
    given = {k: v for k, v in os.environ.items() if not k.startswith("TORCH_")}
    given |= {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **environment}
    ended = subprocess.run([sys.executable, str(script)], env=given, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def said(text: str) -> list[str]:
    """Which of our headings are in a log."""
    headings = r"\] (?:\[\S+\] )?(graph 0/\d: rewritten|sites|plan|graph before|graph rewritten|graph lowered)$"
    return re.findall(headings, text, re.M)


ALL = ["graph before", "sites", "plan", "graph rewritten"]


def test_everything_and_a_trace(tmp_path: Path) -> None:
    """With torch imported first; explain, then the backend."""
    text = run(tmp_path, TORCH_FIRST, TORCH_LOGS="+cppass", TORCH_TRACE=str(tmp_path))
    assert said(text) == [*ALL, *ALL, "graph 0/1: rewritten", "graph lowered"]
    assert "torch.ops.cppass.attention.default" in text
    assert "torch.ops.cppass_host.attention.default" in text
    assert re.search(r"cppass/logs.py:\d+\] \[0/1\]", text)  # by torch's own formatter
    check_artifacts(tmp_path)


def test_one_stage_and_reports(tmp_path: Path) -> None:
    text = run(tmp_path, CPPASS_FIRST, TORCH_LOGS="cppass,+cppass.plan,graph_breaks")
    assert said(text) == ["plan", "plan", "graph 0/1: rewritten"]


def test_in_code(tmp_path: Path) -> None:
    """Silent before: nothing is logged that was not asked for."""
    text = run(tmp_path, CPPASS_FIRST, "torch._logging.set_logs(modules={'cppass': 10})" + BACKEND)
    assert said(text) == [*ALL, "graph 0/1: rewritten", "graph lowered"]


def test_names_that_do_not_exist_are_torchs_to_refuse() -> None:
    """Why the stages are modules: a name that cppass would register is not known yet when torch reads this."""
    script = [sys.executable, "-c", "import torch"]
    environment = os.environ | {"TORCH_LOGS": "cppass_plan", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    ended = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert "Invalid log settings: cppass_plan" in ended.stderr


# -- TORCH_TRACE -------------------------------------------------------------------------------------------------------


def artifacts(folder: Path) -> dict[str, tuple[dict[str, object], str]]:
    """Name -> (the record, its payload) of cppass's artifacts in a trace."""
    (log,) = folder.glob("dedicated_log_torch_trace_*.log")
    found: dict[str, tuple[dict[str, object], str]] = {}
    for entry in re.split(r"^(?=[VIWEC]\d{4} )", log.read_text(), flags=re.M):
        head, _, payload = entry.partition("\n")
        record = json.loads(head[head.index("{") :]) if "{" in head else {}
        name = record.get("artifact", {}).get("name", "")
        if name.startswith("cppass_"):
            found[name] = (record, re.sub(r"^\t", "", payload, flags=re.M))
    return found


def check_artifacts(folder: Path) -> None:
    found = artifacts(folder)
    stages = ["before", "rewritten", "lowered"]
    assert set(found) == {"cppass_sites", "cppass_plan", "cppass_report", *(f"cppass_graph_{s}" for s in stages)}
    for name, (record, payload) in found.items():
        assert record["artifact"] == {"name": name, "encoding": "json" if name in JSON else "string"}
        assert (record["frame_id"], record["frame_compile_id"], record["rank"]) == (0, 1, 0)  # tlparse sorts by these
        assert payload
    (site,) = json.loads(found["cppass_sites"][1])
    assert site["form"] == "scaled_dot_product_attention (CPU flash)"
    assert "scaled_dot_product_attention" in site["where"]
    assert json.loads(found["cppass_report"][1])["status"] == "rewritten"
    assert "plan: 1 sites, 16 tokens over 2 ranks" in found["cppass_plan"][1]
    assert "cppass.attention" in found["cppass_graph_rewritten"][1]
    assert "cppass_host.attention" in found["cppass_graph_lowered"][1]
    assert "cppass" not in found["cppass_graph_before"][1]


JSON = {"cppass_sites", "cppass_report"}
