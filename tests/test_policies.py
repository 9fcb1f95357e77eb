"""Policies that hold for the whole package: which way imports go, how errors travel, that configs
load."""

import ast
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_growth import errors
from megatron_growth.config import load_config

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "megatron_growth"
MODULES = sorted(PACKAGE.rglob("*.py"))
GROWTH_FILES = sorted((REPOSITORY / "configs").glob("*.y*ml"))  # experiments: tests/launcher


def _name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def _of(*parts: str) -> list[Path]:
    return [path for path in MODULES if path.is_relative_to(PACKAGE.joinpath(*parts))]


def _imports(path: Path, *, at_runtime: bool) -> set[str]:
    """Modules that a file imports, anywhere in it, in full; `at_runtime` leaves out `if
    TYPE_CHECKING:`."""
    package = ".".join(path.relative_to(REPOSITORY).parts[:-1])
    return set(_imported(ast.parse(path.read_text(encoding="utf-8")), package, at_runtime))


def _imported(node: ast.AST, package: str, at_runtime: bool) -> Iterator[str]:
    if isinstance(node, ast.If) and at_runtime and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.orelse:
            yield from _imported(child, package, at_runtime)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.rsplit(".", node.level - 1)[0] if node.level else ""
        module = ".".join(part for part in (above, node.module) if part)
        yield module
        yield from (f"{module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
        "__import__",
        "importlib.import_module",
    ):
        first = node.args[0]
        yield first.value if isinstance(first, ast.Constant) else "<computed>"
    for child in ast.iter_child_nodes(node):
        yield from _imported(child, package, at_runtime)


def _inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    """The policies below are only as good as this."""
    text = """
import a.b, c as d
from typing import TYPE_CHECKING
from . import e
from .f import g
if TYPE_CHECKING:
    import h
else:
    import i
def function():
    import importlib
    from j import k
    importlib.import_module("l")
"""
    found = set(_imported(ast.parse(text), "megatron_growth.planning", True))
    here = "megatron_growth.planning"
    ours = {here, f"{here}.e", f"{here}.f", f"{here}.f.g"}
    others = {"a.b", "c", "typing", "typing.TYPE_CHECKING", "i", "importlib", "j", "j.k", "l"}
    assert found == ours | others
    assert "h" in set(_imported(ast.parse(text), "megatron_growth.planning", False))


@pytest.mark.parametrize("path", _of("planning"), ids=_name)
def test_planning_imports_the_standard_library_errors_and_itself_alone(path: Path) -> None:
    for module in _imports(path, at_runtime=True):
        own = _inside(module, "megatron_growth.planning") or _inside(
            module, "megatron_growth.errors"
        )
        assert own or module.split(".")[0] in sys.stdlib_module_names, module


@pytest.mark.parametrize("path", _of("checkpoint"), ids=_name)
def test_checkpoint_knows_neither_megatron_nor_training(path: Path) -> None:
    for module in _imports(path, at_runtime=False):
        assert not _inside(module, "megatron"), module
        for above in ("training", "launcher", "cli", "demo", "report"):
            assert not _inside(module, f"megatron_growth.{above}"), module


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p not in _of("training") + _of("demo")], ids=_name
)
def test_only_training_and_the_demos_scripts_import_megatron(path: Path) -> None:
    for module in _imports(path, at_runtime=False):
        assert not _inside(module, "megatron"), module


@pytest.mark.parametrize("path", _of("checkpoint") + _of("training") + _of("planning"), ids=_name)
def test_nothing_below_knows_the_launcher(path: Path) -> None:
    for module in _imports(path, at_runtime=True):
        assert not _inside(module, "megatron_growth.launcher"), module
        assert not _inside(module, "megatron_growth.cli"), module


def test_the_policies_looked_at_something() -> None:
    for folder in ("planning", "checkpoint", "training"):
        assert len(_of(folder)) >= 3
    assert any(
        _inside(m, "megatron") for path in _of("training") for m in _imports(path, at_runtime=True)
    )
    assert any(
        _inside(m, "torch") for path in _of("checkpoint") for m in _imports(path, at_runtime=True)
    )


@pytest.mark.skipif(not GROWTH_FILES, reason="configs/ holds no YAML")
@pytest.mark.parametrize("path", GROWTH_FILES, ids=_name)
def test_every_growth_file_of_ours_loads(path: Path) -> None:
    config = load_config(path)
    assert config.growth.depth or config.growth.width


def _error_classes() -> list[type[Exception]]:
    found = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ]
    assert len(found) >= 4
    return found


@pytest.mark.parametrize("error", _error_classes())
def test_errors_survive_the_way_from_rank_to_rank(error: type[Exception]) -> None:
    """DCP pickles what a rank raised and raises it on all."""
    again = pickle.loads(pickle.dumps(error("the value, why, and what to change")))
    assert type(again) is error
    assert str(again) == "the value, why, and what to change"
    assert issubclass(error, errors.GrowthError)
