"""The laws of the project's own code: who may import whom, and what library code never does."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gptq"
ROOMS = [  # each imports only what stands before it
    "compute", "checkpoint", "solver", "models", "calibration", "formats", "inference", "planning", "output",
    "pipeline", "evaluation", "polishing", "cli",
]  # fmt: skip
BELOW = {"errors", "version", "config"}  # may be imported by every room
ABOVE = {"demo", "__main__", "__init__"}  # import what they like
MODULES = {
    str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}  # fmt: skip


def imported(tree: ast.AST) -> set[str]:
    """Modules of the package that a file imports anywhere in it, without `gptq.` in front."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gptq":
            base = node.module.removeprefix("gptq").removeprefix(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}".removeprefix(".")
                names.add(whole if whole in MODULES or f"{whole}.__init__" in MODULES else base)
        if isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("gptq.") for alias in node.names if alias.name.startswith("gptq.")}
    return names


IMPORTS = {module: imported(ast.parse(path.read_text())) for module, path in MODULES.items()}
CODE = [module for module in MODULES if not module.endswith("__init__")]


def room(module: str) -> str:
    return module.partition(".")[0]


def test_the_rooms_are_the_folders() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(ROOMS)
    assert {module for module in MODULES if "." not in module} == BELOW | ABOVE


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_import_downwards(name: str) -> None:
    lower = {*ROOMS[: ROOMS.index(name) + 1], *BELOW}
    for module in MODULES:
        if room(module) == name:
            found = {room(target) for target in IMPORTS[module]}
            assert found <= ({*lower, "demo"} if name == "cli" else lower), module


def test_what_every_room_may_import_imports_no_room() -> None:
    for module in BELOW:
        assert {room(target) for target in IMPORTS[module]} <= BELOW


def test_the_solver_imports_compute_alone() -> None:
    for module in CODE:
        if room(module) == "solver":
            assert {room(target) for target in IMPORTS[module]} <= {"solver", "compute"}, module


def test_quantizing_and_inference_do_not_import_each_other() -> None:
    for module in CODE:
        if room(module) in ("pipeline", "planning", "calibration", "output"):
            assert "inference" not in map(room, IMPORTS[module]), module
        if room(module) == "inference":
            assert {room(target) for target in IMPORTS[module]}.isdisjoint({"pipeline", "planning", "output"}), module


def test_only_the_models_room_imports_from_inside_transformers() -> None:
    """Elsewhere names come from transformers itself; the quantizer that it is given extends a class of its own."""
    for module in CODE:
        if room(module) != "models" and module != "inference.hf_quantizer":
            for node in ast.walk(ast.parse(MODULES[module].read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert not (node.module or "").startswith("transformers."), module


def test_there_is_no_circle() -> None:
    left = {module: {target for target in IMPORTS[module] if target in CODE} for module in CODE}
    while left:
        free = {module for module, targets in left.items() if not targets & left.keys()}
        assert free, f"these import each other: {sorted(left)}"
        left = {module: targets for module, targets in left.items() if module not in free}


@pytest.mark.parametrize("module", CODE)
def test_library_code_never_asserts_prints_unpickles_or_seeds_the_world(module: str) -> None:
    forbidden = {"torch.load", "pickle.load", "pickle.loads", "torch.manual_seed", "random.seed", "os.environ"}
    if module == "__main__":
        return
    if module == "checkpoint.unpickle":  # runs in a process of its own, with weights_only
        forbidden -= {"torch.load"}
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        assert not isinstance(node, ast.Assert)
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in forbidden
        if isinstance(node, ast.Call) and not module.startswith("cli."):
            assert ast.unparse(node.func) not in {"print", "hash"}


FORMAT_NAMES = {
    "gptq", "gptq_v2", "pack-quantized", "pack-quantized-a8", "int-quantized", "mlx", "compressed-tensors", "gguf",
    "gguf-k", "gguf-iq4",
}  # fmt: skip
OWN_FILES = {
    "config", "formats.gptq", "formats.pack_quantized", "formats.int_quantized", "formats.mlx", "formats.gguf",
}  # fmt: skip


@pytest.mark.parametrize("module", sorted({*CODE} - OWN_FILES))
def test_a_format_is_known_by_name_in_its_own_file_alone(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Compare | ast.MatchValue) and "method" not in ast.unparse(node):  # "gptq" is one too
            constants = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)}
            assert not constants & FORMAT_NAMES, ast.unparse(node)


LENET = Path(__file__).parents[1] / "lenet_baseline"
LENET_RANKS = [{"model", "maxabs"}, {"data", "activations", "weight_only"}, {"train", "integer"}, {"compare", "plots"}]
LENET_RANK = {name: rank for rank, names in enumerate(LENET_RANKS) for name in names}


def test_the_lenet_baseline_imports_one_way_and_the_package_never_imports_it() -> None:
    for path in LENET.glob("*.py"):
        tree = ast.parse(path.read_text())
        assert imported(tree) <= {"errors", "solver.solve", "solver", "solver.hessian", "compute.matmul"}
        if path.stem.startswith("__"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lenet_baseline."):
                assert LENET_RANK[node.module.split(".")[1]] < LENET_RANK[path.stem], f"{path.stem}: {node.module}"
    assert set(LENET_RANK) == {path.stem for path in LENET.glob("*.py") if not path.stem.startswith("__")}
    for path in MODULES.values():
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


FACTORIES = {"zeros", "empty", "ones", "full", "rand", "randn", "eye", "linspace", "logspace", "tensor", "normal"}


def test_every_new_tensor_says_its_dtype() -> None:
    """The default is one for all threads; and compiled loops get addresses, and know nothing of dtypes."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}:
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                says = {"dtype", None} & given.keys() or given.get("device") == "'meta'"
                assert says, f"{module}: {ast.unparse(node)}"
