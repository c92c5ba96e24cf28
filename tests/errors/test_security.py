"""No code or pickle of others is run. What could do so is looked up in the source; each place has its reason here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNS_TEXT = {"eval", "exec", "compile", "__import__", "execfile", "os.system", "os.popen"}
RUNS_WHAT_A_FILE_NAMES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "runpy", "codeop"}

ALLOWED = {
    ("cppass/tokens.py", "sympify"): "sizes: ints and expressions of torch's own symbols, no text",
    ("cppass/match/mask.py", "sympify"): "a bool, int or float of a graph, no text",
    ("cppass/cost/formulas.py", "sympify"): "a formula of this module",
    ("cppass/demo/prefill.py", "sympify"): "the formula of a report that this process made",
    ("cppass/inspection/build.py", "sympify"): "the formula of a report that this process made",
    (
        "cppass/demo/explained.py",
        "runs a file",
    ): "the file that `cppass explain --script FILE.py:function` is told to run",
    ("cppass/__init__.py", "import by a computed name"): "names of a table in that file",
    ("cppass/target.py", "import by a computed name"): "a lowering's name, which CPConfig has checked",
    ("cppass/bench/sections.py", "import by a computed name"): "names of a table in that file",
    ("lowering/npu/compilers.py", "import by a computed name"): "names that callers in that file spell out",
    ("lowering/cann_host/kernels/attention.py", "import by a computed name"): "names of a table in that file",
    ("lowering/cann_host/libraries.py", "loads a library"): "stubs that the same function has just written to memory",
}
"""(file, what) -> why no input of a user, model or file reaches it."""


def sources() -> list[Path]:
    return sorted(path for package in ("cppass", "lowering") for path in (ROOT / package).rglob("*.py"))


def suspicious(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {name}" for name in names if name.split(".")[0] in RUNS_WHAT_A_FILE_NAMES)
        elif isinstance(node, ast.Call):
            yield from _call(ast.unparse(node.func), node)


def _call(name: str, node: ast.Call) -> Iterator[str]:
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name in RUNS_TEXT:
        yield name
    if name == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if given.get("shell", "False") != "False":
        yield "a shell"
    if given.get("trust_remote_code", "False") != "False":
        yield "code of a model"
    if name.rpartition(".")[2] == "sympify":
        yield "sympify"  # evaluates a text
    if name.rpartition(".")[2] == "import_module" and not isinstance(node.args[0], ast.Constant):
        yield "import by a computed name"
    if name.rpartition(".")[2] == "exec_module":
        yield "runs a file"
    if name.rpartition(".")[2] in ("CDLL", "PyDLL", "load_library", "load_inline"):
        yield "loads a library"


def test_every_place_that_could_run_foreign_code_is_known() -> None:
    """Both ways: no place without a reason, no reason without a place."""
    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sources()}
    assert {(name, what) for name, tree in trees.items() for what in suspicious(tree)} == ALLOWED.keys()


def test_the_search_finds_what_it_looks_for() -> None:
    """Negative control."""
    dangerous = """
import pickle
from yaml import load
eval(x)
torch.load(p)
torch.load(p, weights_only=False)
os.system(c)
subprocess.run(c, shell=True)
AutoModel.from_pretrained(p, trust_remote_code=True)
sympy.sympify(text)
importlib.import_module(name)
ctypes.CDLL(path)
spec.loader.exec_module(module)
"""
    harmless = (
        "torch.load(p, weights_only=True)\nmodel.eval()\nre.compile(x)\njson.load(f)\nimportlib.import_module('a')"
    )
    assert len(list(suspicious(ast.parse(dangerous)))) == 12
    assert not list(suspicious(ast.parse(harmless)))
