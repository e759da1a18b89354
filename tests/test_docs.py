"""README, Makefile and CHANGELOG tell the truth about the code."""

import re
from pathlib import Path

from gemma_gguf import calibration, recipes
from gemma_gguf.cli import main
from gemma_gguf.manifest import FileEntry, Manifest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def test_tree_names_every_module_and_only_those() -> None:
    tree = README.partition("## The tree")[2].partition("## Working")[0]
    named = set(re.findall(r"^  (\w+\.py)", tree, re.MULTILINE))
    assert named | {"__init__.py"} == {path.name for path in (ROOT / "gemma_gguf").glob("*.py")}


def test_every_command_and_recipe_is_documented() -> None:
    for command in main.commands:
        assert f"| `gemma-gguf {command}" in README, command
    for name in recipes.TABLE:
        assert re.search(rf"\b{name}\b", README), name
    for name in calibration.PUBLIC_SETS:
        assert f"`{name}`" in README, name


def test_every_field_of_the_manifest_is_documented() -> None:
    table = README.partition("## quantset.json")[2].partition("## The tree")[0]
    for field in Manifest.model_fields:
        assert f"`{field}`" in table or f"`{field}[]`" in table, field
    words = {"n_bytes": "size", "bpw": "bits per weight", "types": "histogram", "differs": "differs"}
    for field in FileEntry.model_fields:
        assert words.get(field, field) in table, field


def test_make_targets_are_listed_and_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE))
    assert {"all-quants", "test", "proof", "bench", "check", "fmt", "build"} <= targets
    for target in re.findall(r"`make ([a-z-]+)", README):
        assert target in targets, target
    assert set(re.findall(r"\.PHONY: (.*)", MAKEFILE)[0].split()) == targets


def test_only_the_rooms_that_may_use_them_do() -> None:
    """`subprocess`, `ctypes`, `rich`, `llama_cpp` and torch each have one user at most."""
    users: dict[str, set[str]] = {}
    for path in (ROOT / "gemma_gguf").glob("*.py"):
        for module in re.findall(r"^\s*(?:import|from) ([\w.]+)", path.read_text(), re.MULTILINE):
            users.setdefault(module.partition(".")[0], set()).add(path.name)
    assert users["subprocess"] == {"llama_cpp.py"}
    assert users["ctypes"] == {"libggml.py"}
    assert users["rich"] == {"console.py"}
    assert users["llama_cpp"] == {"bindings.py"}
    assert "torch" not in users
    assert users["transformers"] == {"tokenizer.py"}
