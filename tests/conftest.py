"""Shared fixtures: the real llama.cpp build, small real checkpoints, and one finished quant set made from one."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gemma_gguf import factory, llama_cpp
from gemma_gguf.llama_cpp import Build, RunLog
from gemma_gguf.session import Options, Report
from tests import checkpoints

CHUNKS = 8  # of calibration text; enough for every tensor of a test model to have data

FAMILY_STEPS = ("convert", "mmproj", "imatrix", "recipes", "verify", "load", "forward")

_ran_on_llama: set[str] = set()
_family_rows: dict[str, dict[str, str]] = {}  # what of each family's way was passed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks for the real build, directly or through another fixture, carries the marker."""
    for item in items:
        if "build" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.llama)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and "llama" in report.keywords:
        _ran_on_llama.add(report.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"{len(_ran_on_llama)} of these tests ran against the real llama.cpp build")
    if _family_rows:
        terminalreporter.section("Gemma families, each step as it was passed")
        cells: list[tuple[str, ...]] = [("checkpoint", *FAMILY_STEPS)]
        cells += [(name, *(row.get(step, "NOT PASSED") for step in FAMILY_STEPS)) for name, row in _family_rows.items()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            terminalreporter.write_line("  ".join(map(str.ljust, line, widths)).rstrip())


@pytest.fixture
def family_row() -> Callable[[str, str, str], None]:
    """(checkpoint, step, what was seen): note in the table of families that a step was passed.

    A row begins with the step `begin`, so that one that fails at once stands in the table, too.
    """

    def passed(name: str, step: str, what: str) -> None:
        assert step in ("begin", *FAMILY_STEPS)
        _family_rows.setdefault(name, {})[step] = what

    return passed


@pytest.fixture(scope="session", autouse=True)
def _no_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What whoever runs the tests has set for themselves is nothing to the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_GGUF_CONFIG", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(scope="session")
def build() -> Build:
    """The default llama.cpp build, made now if the cache has none."""
    return llama_cpp.build(wait=True)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[RunLog]:
    log = RunLog(tmp_path / "run.log")
    yield log
    log.close()


@pytest.fixture(scope="session")
def vision_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_gemma3_vision(tmp_path_factory.mktemp("checkpoints") / "tiny-vision")


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_gemma3_text(tmp_path_factory.mktemp("checkpoints") / "tiny-text")


@pytest.fixture(scope="session")
def set_options(vision_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    return Options(
        str(vision_checkpoint),
        name="test/tiny-vision",
        out=tmp_path_factory.mktemp("out"),
        chunks=CHUNKS,
        evaluate=False,
    )


@pytest.fixture(scope="session")
def finished(build: Build, set_options: Options) -> Report:
    """All 27 recipes of the multimodal test model. Shared: tests that change files copy them first."""
    return factory.run(set_options)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and beside it an empty config directory `config`."""
    (tmp_path / "here").mkdir()
    (tmp_path / "config").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("GEMMA_GGUF_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("GEMMA_GGUF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "here"
