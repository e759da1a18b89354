"""Build day: what a build or a corrected checkpoint changes is found out without making it, and changed alone."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gemma_gguf import factory, fanout, refresh
from gemma_gguf.files import sha256_bytes
from gemma_gguf.llama_cpp import Build
from gemma_gguf.manifest import Manifest
from gemma_gguf.session import Options
from tests import checkpoints

STEM = "test_model"
SOME = ("bf16", "Q8_0", "Q4_K_L", "Q4_K_M", "Q4_0")


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: sha256_bytes(path.read_bytes()) for path in sorted(directory.glob("*.gguf"))}


def fix_template(checkpoint: Path) -> None:
    """As Google does some weeks after a release."""
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = config["chat_template"].replace("| trim", "| string | trim")
    path.write_text(json.dumps(config))


def options_for(checkpoint: Path, out: Path, names: tuple[str, ...] = SOME) -> Options:
    return Options(str(checkpoint), name="test/model", out=out, recipes=names, chunks=8, proof=False, evaluate=False)


@pytest.fixture(scope="module")
def first(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A set of a few recipes, and the checkpoint it was made from."""
    assert build.key
    place = tmp_path_factory.mktemp("refresh")
    options = options_for(checkpoints.write_gemma3_text(place / "model"), place / "out")
    factory.run(options)
    return options


@pytest.fixture
def made(first: Options, tmp_path: Path) -> Iterator[tuple[Options, Path]]:
    """(options, set) of a copy that a test may change, its checkpoint, too."""
    checkpoint = shutil.copytree(first.model, tmp_path / "model")
    out = shutil.copytree(first.out, tmp_path / "out")
    (out / ".work" / STEM / "checkpoint.json").write_text(json.dumps({"path": str(checkpoint)}))
    yield replace(first, model=str(checkpoint), out=out), out / f"{STEM}-GGUF"
    shutil.rmtree(tmp_path)


def outcomes(result: refresh.Refreshed) -> dict[str, str]:
    assert result.error is None, result.error
    return {name.removeprefix(f"{STEM}-"): found.outcome for name, found in result.decisions.items()}


def stages(facts: Manifest) -> dict[str, str]:
    return {name: record.key for name, record in facts.stages.items()}


def test_a_corrected_template_costs_no_quantising(
    made: tuple[Options, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files get the new header around the tensor data they have: the bytes of a set made from scratch."""
    options, set_dir = made
    before = hashes(set_dir)
    (same,) = refresh.refresh_sets([set_dir], refresh.Asked())
    assert set(outcomes(same).values()) == {"unchanged"}
    fix_template(Path(options.model))
    (found,) = refresh.refresh_sets([set_dir], refresh.Asked())
    assert outcomes(found) == {"imatrix.gguf": "unchanged", **{f"{name}.gguf": "keys" for name in SOME}}
    assert {tuple(one.keys) for one in found.decisions.values()} == {(), ("tokenizer.chat_template",)}
    assert hashes(set_dir) == before
    monkeypatch.setattr(fanout, "prepare", None)  # the fan-out cannot start
    (done,) = refresh.refresh_sets([set_dir], refresh.Asked(apply=True))
    assert (done.error, done.applied) == (None, True)
    assert not (options.out / ".work" / STEM / "fanout").exists()
    (log,) = (options.out / ".work" / STEM / "logs").glob("*-refresh.log")
    print(log.read_text()[-3000:])
    monkeypatch.undo()
    scratch = replace(options, out=tmp_path / "scratch", imatrix=set_dir / f"{STEM}-imatrix.gguf")
    after = hashes(factory.run(scratch).set_dir)
    assert hashes(set_dir) == after
    assert {name for name in after if after[name] != before[name]} == {f"{STEM}-{name}.gguf" for name in SOME}
    again = factory.run(options)
    assert [one.name for one in again.done if one.made and one.stage != "card"] == []
