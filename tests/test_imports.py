"""Imports run one way: every package may import those below it, and there is no circle."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent / "fedpeft"
SYSTEMS = {"engine", "client", "server", "simulation", "deployment", "export"}
# Make runs: they stand above the other packages, and count as one of their own.
APP = "server/app.py"
# Names of the classes that ``_target_`` may name, which Hydra imports when it makes one.
TARGETS = ("config/compose.py", "config/load.py")
NAME = re.compile(r"fedpeft(\.\w+)+(:\w+)?")
# By package: the packages and modules of fedpeft that it must not import.
FORBIDDEN = {
    **dict.fromkeys(("data", "models", "methods", "algorithms", "compression"), SYSTEMS),
    "config": SYSTEMS | {"reporting"},
    "engine": {"client", "server", "simulation", "deployment", "export", "reporting"},
    "client": {"server", "simulation", "deployment", "export", "reporting"},
    "server": {"client", "simulation", "deployment", "export", APP},
    APP: {"client", "simulation", "deployment"},
    "simulation": {"deployment", "export"},
    "deployment": {"engine", "server", "simulation", "export", "reporting"},
    "export": {"simulation", "deployment"},
    "reporting": SYSTEMS
    | {"methods", "models", "algorithms", "compression", "nn", "wire", "state"},
}
# These start processes or answer a command, so they import the other modules when they need them.
LATE = (
    "commands/planning.py",
    "commands/study.py",
    "simulation/ahead.py",
    "simulation/launch.py",
    "simulation/ray.py",
    "client/app.py",
)


# Take a part of a second or more, or are extras, so functions import them.
HEAVY = {
    *("torch", "transformers", "datasets", "flwr_datasets", "evaluate", "ray"),
    *("rich", "pyarrow", "matplotlib", "scipy", "sklearn", "sacrebleu", "rouge_score"),
    *("mlflow", "wandb", "tensorboard", "prometheus_client", "onnx"),
}


def files() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))


def package(name: str) -> str:
    """Return the package of a file below fedpeft, or the module at the top level."""
    return APP if name == APP else name.split("/")[0].removesuffix(".py")


def imports(path: Path, inner: bool = False) -> Iterator[str]:
    """Yield the modules that a file imports; with ``inner``, only those inside of functions."""
    tree = ast.parse(path.read_text())
    typing = {id(n) for block in ast.walk(tree) if _for_types(block) for n in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in typing:
            if inner and node.col_offset == 0:
                continue
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno} imports by a relative name"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield from (alias.name for alias in node.names)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def named(path: Path) -> Iterator[str]:
    """Yield the modules and members of fedpeft that a file names in strings, as imports do."""
    for node in ast.walk(ast.parse(path.read_text())):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and NAME.fullmatch(text) and _is_there(text.split(".")[1]):
            yield text.replace(":", ".")


def _is_there(module: str) -> bool:
    return (ROOT / module).is_dir() or (ROOT / f"{module}.py").is_file()


def ours(name: str) -> set[str]:
    """Return the packages of fedpeft that a file imports, also by a name in a string."""
    names = {*imports(ROOT / name), *(() if name in TARGETS else named(ROOT / name))}
    parts = [n.split(".") for n in names if n.startswith("fedpeft.")]
    packages = {APP if p[1:3] == ["server", "app"] else p[1] for p in parts}
    return packages - {package(name)}


def test_a_module_named_in_a_string_counts_as_imported(tmp_path: Path) -> None:
    (tmp_path / "hidden.py").write_text(
        'get_method("fedpeft.export.run.open_run")\n"fedpeft.json"\n"fedpeft.server.app:app"'
    )
    assert sorted(named(tmp_path / "hidden.py")) == [
        *("fedpeft.export.run.open_run", "fedpeft.server.app.app")
    ]


@pytest.mark.parametrize("name", files())
def test_no_arrow_up(name: str) -> None:
    assert not ours(name) & FORBIDDEN.get(package(name), set())
    assert "cli" not in ours(name)
    assert "commands" not in ours(name) or name == "cli.py"
    if package(name) == "nn":
        assert ours(name) <= {"seeding"}
    if name == "state.py":
        assert ours(name) <= {"files"}
    if package(name) == "reporting":
        assert "torch" not in {module.split(".")[0] for module in imports(ROOT / name)}


@pytest.mark.parametrize("name", [name for name in files() if name not in (*LATE, "__init__.py")])
def test_own_modules_are_imported_at_the_top(name: str) -> None:
    late = [module for module in imports(ROOT / name, True) if module.startswith("fedpeft.")]
    assert not late


@pytest.mark.parametrize("name", files())
def test_functions_import_what_is_heavy_and_the_file_says_so(name: str) -> None:
    """A comment beside an import, or a sentence on the library with "because"."""
    text = (ROOT / name).read_text()
    late = {module.split(".")[0] for module in imports(ROOT / name, True)}
    assert late <= HEAVY | {"fedpeft"}
    for library in late:
        words = "import" if library == "fedpeft" else library
        beside = rf"^ +(from|import) {library}\b.*  # (?!noqa)"
        assert re.search(beside, text, re.MULTILINE) or re.search(
            rf"\b{words}[^.]*\bbecause\b", text, re.IGNORECASE
        ), f"{name} imports {library} in a function and does not say why"


def test_loading_an_exported_folder_imports_no_federation() -> None:
    reached, left = set[str](), {"export.load"}
    while left:
        name = left.pop()
        reached.add(name)
        path = ROOT / f"{name.replace('.', '/')}.py"
        if path.is_file():
            ours_of = {_module(m) for m in imports(path) if m.startswith("fedpeft.")}
            left |= ours_of - reached
    assert "engine.replica" in reached
    assert not {name for name in reached if name.split(".")[0] in ("server", "client")}
    assert not {name for name in reached if name.split(".")[0] == "wire"}


def _module(name: str) -> str:
    """Return the module of an imported name, without ``fedpeft.``."""
    parts = name.split(".")[1:]
    while len(parts) > 1 and not (ROOT / "/".join(parts)).with_suffix(".py").is_file():
        parts.pop()
    return ".".join(parts)


def test_packages_form_no_circle() -> None:
    arrows: dict[str, set[str]] = {}
    for name in files():
        if name != "__init__.py":
            arrows.setdefault(package(name), set()).update(ours(name))
    left = dict(arrows)
    while left:
        lowest = [name for name, targets in left.items() if not targets & left.keys()]
        assert lowest, f"a circle among {', '.join(sorted(left))}"
        for name in lowest:
            del left[name]


def files_of_tests() -> list[str]:
    return sorted(str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py"))


@pytest.mark.parametrize("name", files_of_tests())
def test_a_test_file_imports_no_other(name: str) -> None:
    """Helpers of several test files stand in modules of other names."""
    parts = {part for module in imports(TESTS / name) for part in module.split(".")}
    assert not {part for part in parts if part.startswith("test_")}
