"""What this machine has and how far it gets: `cppass doctor`.

Nothing here imports torch: what needs it runs in processes of its own, each with a time limit.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cppass.environment import AUTOLOAD, autoload_of_shell, cann_found

if TYPE_CHECKING:
    from rich.console import Console

OK, NOTE, BROKEN = "ok", "note", "broken"
SCHEMA = 1
INSTALL = 'pip install "cppass[host]"'
INSTALL_NPU = 'pip install "cppass[npu-host]"'
NEEDED = ("transformers", "numpy")  # by the host job, beside torch
TORCH = "2.13"

ASK_TORCH = """
import json, cppass, torch
print(json.dumps({"gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available()}))
"""
ASK_NPU = """
import json, cppass, torch, torch_npu, torchair, npugraph_ex
torchair.get_npu_backend, npugraph_ex.get_npu_backend
print(json.dumps({"devices": torch.npu.device_count()}))
"""


@dataclasses.dataclass(frozen=True)
class Line:
    """One check.

    Attributes:
        check: what was looked at.
        finding: what is there.
        state: OK; NOTE, something is limited but the host job runs; BROKEN.
        hint: the way out, where one is needed.
    """

    check: str
    finding: str
    state: str = OK
    hint: str = ""


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a process of its own answered: a JSON object, or the last line of its error."""

    answer: Mapping[str, Any]
    error: str = ""


def examine(timeout: float = 120) -> tuple[Line, ...]:
    """All checks, in the order they are shown. No exception and no crash of what is examined gets out.

    Args:
        timeout: seconds that each import may take.
    """
    return tuple(_lines(timeout))


def healthy(lines: tuple[Line, ...]) -> bool:
    """Whether nothing is broken."""
    return all(line.state != BROKEN for line in lines)


def to_dict(lines: tuple[Line, ...]) -> dict[str, object]:
    """The same for machines."""
    return {"schema": SCHEMA, "ok": healthy(lines), "checks": [dataclasses.asdict(line) for line in lines]}


def render(lines: tuple[Line, ...], console: Console) -> None:
    """The same for people: a table, ways out under their findings, and a verdict."""
    from rich.table import Table
    from rich.text import Text

    styles = {OK: "green", NOTE: "yellow", BROKEN: "bold red"}
    table = Table(pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("finding", overflow="fold")
    for line in lines:
        finding = Text(line.finding)
        if line.hint:
            finding.append(f"\nway out: {line.hint}", style="italic")
        table.add_row(line.check, Text(line.state, style=styles[line.state]), finding)
    console.print(table)
    broken = ", ".join(line.check for line in lines if line.state == BROKEN)
    verdict = f"broken: {broken}" if broken else "the host job can run: cppass run"
    console.print(Text(verdict, style="bold red" if broken else "green"))


def _lines(timeout: float) -> Iterator[Line]:
    cann = cann_found()
    torch, npu = _version("torch"), _version("torch_npu")
    yield Line("Python", f"{platform.python_version()}, {sys.executable}")
    yield _torch_line(torch)
    yield _torch_npu_line(torch, npu)
    for package in ("torchair", "npugraph_ex"):
        yield _part_line(package, npu)
    yield Line("CANN", f"found: {cann}" if cann else "not found")
    asked = _ask(ASK_NPU, timeout) if npu else Probe({})
    yield Line("NPU devices", _devices(asked))
    if torch:
        yield _plain_import(timeout, bool(npu and not cann))
    if npu:
        yield _npu_import(asked, cann)
    yield from _reach(bool(npu and not asked.error), cann)
    if torch:
        yield _gloo(_ask(ASK_TORCH, timeout))
    for package in NEEDED:
        version = _version(package)
        yield Line(package, version) if version else Line(package, "not installed", BROKEN, INSTALL)
    yield Line("cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))


def _torch_line(version: str) -> Line:
    if not version:
        return Line("torch", "not installed", BROKEN, INSTALL)
    if not version.startswith(f"{TORCH}."):
        return Line("torch", f"{version}; cppass needs {TORCH}", BROKEN, INSTALL)
    return Line("torch", f"{version}, {_place('torch')}")


def _torch_npu_line(torch: str, npu: str) -> Line:
    if not npu:
        return Line("torch_npu", "not installed; only NPU graphs need it", NOTE, INSTALL_NPU)
    if torch.partition("+")[0].split(".")[:3] != npu.partition("+")[0].split(".")[:3]:
        hint = f'{INSTALL_NPU}, or "pip uninstall torch_npu" for the host job alone'
        return Line("torch_npu", f"{npu} is for another torch than {torch or 'none'}", BROKEN, hint)
    return Line("torch_npu", f"{npu}, {_place('torch_npu')}")


def _part_line(package: str, npu: str) -> Line:
    if npu and (Path(_place("torch_npu")) / "dynamo" / package).is_dir():
        return Line(package, f"inside torch_npu {npu}")
    return Line(package, "not here; it comes inside torch_npu", NOTE, INSTALL_NPU)


def _devices(asked: Probe) -> str:
    files = len(list(Path("/dev").glob("davinci[0-9]*")))
    return f"{asked.answer.get('devices', 0)} that torch_npu sees, {files} in /dev"


def _plain_import(timeout: float, without_cann: bool) -> Line:
    """`import torch` as the shell would have it: with the shell's variable, not with the one cppass sets."""
    check, shell = "import torch", autoload_of_shell()
    error = _ask("import torch; print('{}')", timeout, autoload=shell).error
    hint = (
        f'put "export {AUTOLOAD}=0" into the shell, which torchrun needs in any case; and "import cppass" before torch '
        "in scripts"
    )
    if not error:
        return Line(check, f"works ({AUTOLOAD}={shell} in the shell)" if shell else "works")
    if without_cann:
        why = "fails by itself: torch loads torch_npu, which finds no CANN; it works after import cppass"
        return Line(check, why, NOTE, hint)
    return Line(check, f"fails: {error}", BROKEN, "install torch anew; " + INSTALL)


def _npu_import(asked: Probe, cann: str) -> Line:
    check = "import torch_npu"
    if asked.error:
        hint = (
            "source CANN's set_env.sh" if cann else f"{INSTALL_NPU}, or pip uninstall torch_npu for the host job alone"
        )
        return Line(check, f"fails: {asked.error}", BROKEN, hint)
    return Line(check, "works" if cann else "works after import cppass, on stubs of CANN's libraries")


def _reach(npu: bool, cann: str) -> Iterator[Line]:
    """What each target and inner compiler gives here."""
    yield Line("host, inner eager", "numerics")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))), "")
    if compiler:
        yield Line("host, inner inductor", f"numerics, compiled with {compiler}")
    else:
        yield Line("host, inner inductor", "no C++ compiler", NOTE, "install g++, or use --inner eager")
    if not npu:
        yield Line("npugraph_ex", "not run: no torch_npu that can be imported", NOTE)
        yield Line("torchair", "not run: no torch_npu that can be imported", NOTE)
    elif cann:
        yield Line("npugraph_ex", "left to torch_npu and CANN")
        yield Line("torchair", "left to torch_npu and CANN")
    else:
        yield Line(
            "npugraph_ex",
            "all graph passes; numerics on CPU kernels with force_eager; capture and replay are not run",
        )
        yield Line(
            "torchair",
            "conversion to GE; numerics on CPU kernels with debug.run_eagerly; GE compilation is not run",
        )


def _gloo(asked: Probe) -> Line:
    if asked.answer.get("gloo"):
        return Line("gloo", "available")
    return Line(
        "gloo", asked.error or "this torch was built without it", BROKEN, "install a torch with torch.distributed"
    )


def _ask(code: str, timeout: float, autoload: str | None = "0") -> Probe:
    """The last line of a process's output as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != AUTOLOAD}
    if autoload is not None:
        environment[AUTOLOAD] = autoload
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Probe({}, f"no answer within {timeout:g} s")
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("[ERROR]")]
        return Probe({}, _error_line(said) or f"the process ended with status {done.returncode}")
    try:
        return Probe(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        return Probe({}, "the process answered nothing that can be read")


def _error_line(said: list[str]) -> str:
    """The line of a traceback that names the error: the last one without indentation that has a colon."""
    return next((line for line in reversed(said) if line[0].isalpha() and "Error" in line), said[-1] if said else "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _place(package: str) -> str:
    spec = importlib.util.find_spec(package)
    return str(Path(spec.origin).parent) if spec and spec.origin else "not found"
