"""Imports: directions between modules, and what `import cppass` may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = [  # a module imports from its own row and the rows above it
    {"environment", "errors", "checked", "collector", "process"},
    {"cost"},
    {"config", "torch_private"},
    {
        "layout",
        "tokens",
        "explain_node",
        "graph_text",
        "arithmetic",
        "halves",
        "fused_meaning",
        "fused_op",
        "sharded_ops",
    },
    {"ops", "rules", "target"},
    {"shapes", "axes", "registry", "logs"},
    {"party", "fingerprint", "contents"},
    {"guard", "step_tag"},
    {"emitter", "schedule"},
    {"site", "npu_rules"},
    {
        "moe_rules",
        "op_rules",
        "match",
        "prepare",
        "capture",
        "ranks",
        "sharded_inputs",
        "builder",
        "step_checks",
    },
    {"shard", "step", "order", "runner"},
    {"plan", "sharded_plan", "gate", "replicated"},
    {"rewrite", "sharded_rewrite", "report"},
    {"value_numbers", "site_values", "values"},
    {"verify", "sharded_verify"},
    {"pipeline"},
    {"inspection"},
    {"api", "backend", "hook"},
    {"simulator"},
    {"extend"},
    {"cppass"},
    {"bench", "demo", "cli", "cli_explain", "usage", "doctor"},
]
SEEN_BY_LOWERING = {"environment", "errors", "config", "layout", "site", "ops", "target", "torch_private"} | {
    "arithmetic",
    "collector",
    "emitter",
    "schedule",
    "fused_op",
    "sharded_ops",
    "halves",
}


def imported(path: Path) -> set[str]:
    """Names of the project's modules that a file imports, as "cppass.x" or "lowering.x"."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} if node.module != "cppass" else {f"cppass.{a.name}" for a in node.names}
    return {n for n in names if n.split(".")[0] in ("cppass", "lowering")}


def level(module: str) -> int:
    return next(i for i, row in enumerate(LAYERS) if module in row)


@pytest.mark.parametrize("path", sorted((ROOT / "cppass").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_import_downwards(path: Path) -> None:
    parts = path.relative_to(ROOT / "cppass").parts
    own = level("cppass" if parts == ("__init__.py",) else parts[0].removesuffix(".py"))
    for name in imported(path):
        assert name.startswith("cppass"), f"{path.name} reaches {name}: lowerings are loaded by name, in target.py"
        module = name.split(".")[-1] if name == "cppass" else name.split(".")[1]
        if any(module in row for row in LAYERS):
            assert level(module) <= own, f"{'/'.join(parts)} imports {name}, which is above it"


@pytest.mark.parametrize("path", sorted((ROOT / "lowering").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_lowerings_see_little(path: Path) -> None:
    target = path.relative_to(ROOT / "lowering").parts[0]
    for name in imported(path):
        package, *rest = name.split(".")
        allowed = rest[0] in SEEN_BY_LOWERING if package == "cppass" else rest[0] == target
        assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/").stdout


def test_import_cppass_imports_no_torch() -> None:
    assert run("import sys, cppass; print('torch' in sys.modules)") == "False\n"


def test_the_backend_needs_torch_and_sympy_alone() -> None:
    extras = ("transformers", "numpy", "typer", "rich", "jinja2", "psutil", "torch_npu")
    blocked = f"import sys\nfor name in {extras}: sys.modules[name] = None\n"
    assert run(blocked + "import cppass; cppass.npu_cp, cppass.run_pass, cppass.simulate; print('ok')") == "ok\n"


def test_torch_finds_the_backend_without_an_import() -> None:
    assert run("import torch; print('npu_cp' in torch.compiler.list_backends())") == "True\n"
