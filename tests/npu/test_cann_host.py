"""The real torch_npu and its compilers where there is no CANN, each case in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from cppass import environment
from cppass.errors import CPError

needs_torch_npu = pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is None or environment.has_cann(), reason="for torch_npu without CANN"
)

FUNCTION = """
import cppass, torch, torch_npu
def f(x, y):
    return torch.mm(torch_npu.npu_rms_norm(torch.add(x, 1), y[0])[0], y)
x = torch.randn(4, 4)
"""
NPUGRAPH_EX = (
    FUNCTION + "c = torch.compile(f, backend='npugraph_ex', options={options}, fullgraph=True, dynamic=False)\n"
)
TORCHAIR = (
    FUNCTION
    + """
import torchair
config = torchair.CompilerConfig()
config.mode = "max-autotune"
config.debug.graph_dump.type = "pbtxt"
config.debug.run_eagerly = {eagerly}
c = torch.compile(f, backend=torchair.get_npu_backend(compiler_config=config), fullgraph=True, dynamic=False)
"""
)
RUN = "print(float((c(x, x) - f(x, x)).abs().max()))\n"
FAIL = """
try:
    c(x, x)
except Exception as error:
    print(type(error).__name__, error)
"""


def run(code: str, folder: Path, *arguments: str) -> str:
    """Standard output of a program that must end well and silently."""
    script = folder / "script.py"
    script.write_text(code)
    command = [sys.executable, "-W", "ignore", str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@needs_torch_npu
def test_torch_npu_imports_silently_and_finds_no_device(tmp_path: Path) -> None:
    code = "import cppass, torch, torch_npu; print(torch.npu.is_available(), torch.npu.device_count())"
    assert run(code, tmp_path) == "False 0\n"


@needs_torch_npu
def test_npugraph_ex_runs_its_graph_on_cpu_tensors(tmp_path: Path) -> None:
    assert run(NPUGRAPH_EX.format(options={"force_eager": True}) + RUN, tmp_path) == "0.0\n"


@needs_torch_npu
def test_torchair_converts_and_runs_on_cpu_tensors(tmp_path: Path) -> None:
    assert run(TORCHAIR.format(eagerly=True) + RUN, tmp_path) == "0.0\n"
    converted = "".join(path.read_text() for path in tmp_path.glob("dynamo_original_graph*.pbtxt"))
    assert '"RmsNorm"' in converted
    assert '"MatMul' in converted


@needs_torch_npu
@pytest.mark.parametrize("code", [NPUGRAPH_EX.format(options={}), TORCHAIR.format(eagerly=False)], ids=["ex", "ge"])
def test_what_needs_a_device_fails_with_a_way_out(code: str, tmp_path: Path) -> None:
    said = run(code + FAIL, tmp_path)
    assert "[CP602] this needs an NPU and CANN" in said
    assert "force_eager" in said


@needs_torch_npu
@pytest.mark.parametrize("module", ["multiprocessing", "torch.multiprocessing"])
def test_children_of_spawn(module: str, tmp_path: Path) -> None:
    code = f"""
import cppass, torch, torch_npu
import {module} as mp
def child(rank):
    print(rank, torch_npu.__version__ != "", flush=True)
if __name__ == "__main__":
    if "{module}" == "multiprocessing":
        process = mp.get_context("spawn").Process(target=child, args=(0,))
        process.start()
        process.join()
        assert process.exitcode == 0
    else:
        mp.spawn(child, nprocs=1)
"""
    assert run(code, tmp_path) == "0 True\n"


@needs_torch_npu
def test_a_missing_private_part_is_told() -> None:
    from types import SimpleNamespace

    from lowering.cann_host.compilers import PATCHES

    with pytest.raises(CPError, match=r"\[CP504\] compat_ir has no is_cann_compat"):
        PATCHES["torchair._ge_concrete_graph.compat_ir"](SimpleNamespace(__name__="compat_ir"))


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_stub_defines_what_it_is_asked_for(machine: str, tmp_path: Path) -> None:
    """Read back by the reader's rule: no section table, so by name here and by the loader in the other tests."""
    from lowering.cann_host.elf import MACHINES, RETURN_ZERO, stub_library

    library = stub_library("libx.so", ["aclInit", "_ZN2ge4Node"], machine)
    assert library[:4] == b"\x7fELF"
    assert int.from_bytes(library[18:20], "little") == MACHINES[machine]
    for part in (b"\0libx.so\0", b"\0aclInit\0", b"\0_ZN2ge4Node\0", RETURN_ZERO[machine]):
        assert part in library


def test_cann_is_found_by_variable_library_and_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*environment.CANN_HOMES, "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "CANN_FOLDER", tmp_path / "Ascend")
    assert environment.cann_found() == ""
    (tmp_path / "Ascend" / "ascend-toolkit").mkdir(parents=True)
    assert environment.cann_found() == str(tmp_path / "Ascend" / "ascend-toolkit")
    (tmp_path / "libascendcl.so").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path}")
    assert environment.cann_found() == str(tmp_path)
    monkeypatch.setenv("ASCEND_HOME_PATH", "/opt/cann")
    assert environment.cann_found() == "ASCEND_HOME_PATH=/opt/cann"


def test_a_machine_with_cann_is_left_alone() -> None:
    code = "import os, sys; n = len(sys.meta_path); import cppass; print(len(sys.meta_path) - n, os.environ.get('%s'))"
    variables = {"ASCEND_HOME_PATH": "/opt/cann"}
    command = [sys.executable, "-c", code % environment.AUTOLOAD]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == "0 None\n"
