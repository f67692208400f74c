"""The laws of the project's own code: who may import whom, and what library code never does."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gptq"
RANKS = [
    {
        "errors",
        "version",
        "grid",
        "packing",
        "walk",
        "threads",
        "vectors",
        "matmul",
        "charts",
        "shelf",
        "heap",
        "triton_solver",
        "triton_product",
    },
    {"folder", "ranks", "lanes", "pairs", "shorts", "gram", "loops", "unfinished"},
    {"hessian", "rows"},
    {"kernels", "experts"},
    {"config", "calibration", "solver", "checkpoint"},
    {"ahead", "formats", "names", "hub", "refine", "drift", "journal"},
    {"blocks"},
    {"schemes", "stream", "unread"},
    {"packed", "plan", "engines", "products"},
    {"linear", "record", "tune", "budget", "windows"},
    {"hf_quantizer", "layer"},
    {"routed", "memory", "progress"},
    {"sequence", "cost"},
    {"trials", "resume"},
    {"engine", "verify", "conversion", "integration", "evaluate"},
    {"demo", "report"},
    {"commands"},
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
        if isinstance(node, ast.Call) and module != "commands":
            assert ast.unparse(node.func) not in {"print", "hash"}


LENET = Path(__file__).parents[1] / "lenet_baseline"
LENET_RANKS = [{"model", "maxabs"}, {"data", "activations", "weight_only"}, {"train", "integer"}, {"compare", "plots"}]
LENET_RANK = {name: rank for rank, names in enumerate(LENET_RANKS) for name in names}


def test_the_lenet_baseline_imports_one_way_and_the_package_never_imports_it() -> None:
    for path in LENET.glob("*.py"):
        tree = ast.parse(path.read_text())
        assert imported(tree) <= {"errors", "hessian", "matmul", "solver"}
        if path.stem.startswith("__"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lenet_baseline."):
                assert LENET_RANK[node.module.split(".")[1]] < LENET_RANK[path.stem], f"{path.stem}: {node.module}"
    assert set(LENET_RANK) == {path.stem for path in LENET.glob("*.py") if not path.stem.startswith("__")}
    for path in PACKAGE.glob("*.py"):
        assert "lenet_baseline" not in path.read_text()


@pytest.mark.parametrize("module", sorted(LENET_RANK))
def test_the_lenet_baseline_keeps_the_same_laws(module: str) -> None:
    forbidden = {"torch.load", "pickle.load", "torch.manual_seed", "random.seed", "np.random", "os.environ"}
    for node in ast.walk(ast.parse((LENET / f"{module}.py").read_text())):
        assert not isinstance(node, ast.Assert)
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in forbidden
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"print", "hash"}
