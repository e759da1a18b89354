"""The built wheel, installed away from the checkout, is whole: code, templates and calibration text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_gguf import calibration, card, manifest
from gemma_gguf.files import sha256_tree
from gemma_gguf.llama_cpp import KERNEL_SOURCE
from tests.examples import example

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which the wheel was installed without its dependencies, which this environment has."""
    dist, target = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = dist.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return target


def gemma_gguf(installed: Path, cwd: Path, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "gemma_gguf", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, check=True, capture_output=True, text=True).stdout


def test_wheel_runs_and_renders_the_same_card(installed: Path, tmp_path: Path) -> None:
    where = "import gemma_gguf; print(gemma_gguf.__file__)"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    shown = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=env, check=True, capture_output=True, text=True
    )
    assert Path(shown.stdout.strip()).is_relative_to(installed)
    manifest.save(example(), tmp_path / "set")
    assert json.loads(gemma_gguf(installed, tmp_path, "card", "set", "--json")) == {"cards": {"set": True}}
    assert (tmp_path / "set" / "README.md").read_text() == card.render(example())


def test_wheel_holds_the_calibration_text(installed: Path, tmp_path: Path) -> None:
    show = "from gemma_gguf import calibration as c; print(c.load('default', None).sha256, c.held_out().sha256)"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    printed = subprocess.run(
        [sys.executable, "-c", show], cwd=tmp_path, env=env, check=True, capture_output=True, text=True
    )
    assert printed.stdout.split() == [calibration.load("default", tmp_path).sha256, calibration.held_out().sha256]


def test_wheel_holds_the_kernels_as_source(installed: Path) -> None:
    shipped = sorted(path.name for path in (installed / "gemma_gguf" / "kernels").iterdir())
    assert shipped == sorted(path.name for path in KERNEL_SOURCE.iterdir())
    assert {"CMakeLists.txt", "kernels.h", "dispatch.cpp"} <= set(shipped)
    assert sha256_tree(installed / "gemma_gguf" / "kernels") == sha256_tree(KERNEL_SOURCE)


def test_wheel_holds_no_tests_and_no_compiled_files(installed: Path) -> None:
    names = {path.relative_to(installed).parts[0] for path in installed.rglob("*") if path.is_file()}
    assert {name for name in names if not name.endswith(".dist-info") and name != "bin"} == {"gemma_gguf"}
