"""The laws of the project's own code: who may import whom, and what library code never does."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gptq"
RANKS = [
    {"errors", "version", "grid", "packing", "hessian", "walk"},
    {"config", "calibration", "solver", "checkpoint"},
    {"formats", "blocks"},
    {"linear", "plan"},
    {"record", "evaluate"},
    {"engine", "verify"},
    {"demo"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("__"))


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gptq":
            names |= {node.module.split(".")[1]} if "." in node.module else {alias.name for alias in node.names}
    return names


def test_every_module_has_a_rank() -> None:
    assert set(MODULES) == set(RANK)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    for name in imported(ast.parse((PACKAGE / f"{module}.py").read_text())):
        assert RANK[name] < RANK[module], f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_library_code_never_asserts_prints_unpickles_or_seeds_the_world(module: str) -> None:
    forbidden = {"torch.load", "pickle.load", "pickle.loads", "torch.manual_seed", "random.seed", "os.environ"}
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        assert not isinstance(node, ast.Assert)
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in forbidden
        if isinstance(node, ast.Call) and module != "cli":
            assert ast.unparse(node.func) not in {"print", "hash"}
