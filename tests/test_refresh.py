"""Build day: what a build or a corrected checkpoint changes is found out without making it, and changed alone."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from sentencepiece import sentencepiece_model_pb2 as sp

from gemma_gguf import (
    cli,
    convert,
    factory,
    fanout,
    gguf_io,
    llama_cpp,
    manifest,
    parity,
    production,
    proof,
    quantisers,
    recipes,
    refresh,
    session,
)
from gemma_gguf.differences import compare_files, sampled_rows, shape_of
from gemma_gguf.errors import BadInputError, ToolFailedError
from gemma_gguf.files import link_or_copy, sha256_bytes, sha256_file
from gemma_gguf.llama_cpp import Build
from gemma_gguf.manifest import FileDecision, ParityDifference, RefreshFacts
from gemma_gguf.progress import silent
from gemma_gguf.session import Options, Report
from gemma_gguf.stale import Converted
from tests import checkpoints
from tests.examples import example

STEM = "test_model"
SOME = ("bf16", "Q8_0", "Q6_K_L", "Q4_K_M", "Q4_0")  # Q6_K, the parent of one, is not among them
OLDER, NEWER = "pypi:0.3.35", "pypi:0.3.36"


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: sha256_bytes(path.read_bytes()) for path in sorted(directory.glob("*.gguf"))}


def fix_template(checkpoint: Path) -> None:
    """As authors do some weeks after a release."""
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = config["chat_template"].replace("| trim", "| string | trim")
    path.write_text(json.dumps(config))


def fix_token(checkpoint: Path) -> None:
    """One piece of the vocabulary was misspelt."""
    path = checkpoint / "tokenizer.model"
    model = sp.ModelProto.FromString(path.read_bytes())
    (piece,) = (piece for piece in model.pieces if piece.piece == "and")
    piece.piece = "And"
    path.write_bytes(model.SerializeToString())


def options_for(checkpoint: Path, out: Path, names: tuple[str, ...] = SOME) -> Options:
    return Options(str(checkpoint), name="test/model", out=out, recipes=names, chunks=2, proof=False, evaluate=False)


@pytest.fixture(scope="module")
def first(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A set of a few recipes, and the checkpoint it was made from."""
    assert build.key
    place = tmp_path_factory.mktemp("refresh")
    options = options_for(checkpoints.write_gemma3_text(place / "model", layers=1), place / "out")
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


def stop_after(n_files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when so many files have their new header; what runs afterwards is not stopped."""
    accept, accepted = production.accept, 0

    def counted(*args: Any, **named: Any) -> None:
        nonlocal accepted
        accepted += 1
        if accepted == n_files + 1:
            raise KeyboardInterrupt
        accept(*args, **named)

    monkeypatch.setattr(production, "accept", counted)


def one(set_dir: Path, asked: refresh.Asked) -> dict[str, FileDecision]:
    (result,) = refresh.refresh_sets([set_dir], asked)
    assert result.error is None, result.error
    assert result.applied == asked.apply
    return {name.removeprefix(f"{STEM}-").removesuffix(".gguf"): found for name, found in result.decisions.items()}


@pytest.mark.parametrize("stem", ["google_gemma-3-4b-it", "gemma-3-4b-it", "me_mine", "mine"])
def test_a_set_is_opened_under_the_name_that_its_files_have(stem: str, build: Build, tmp_path: Path) -> None:
    """Whatever --name and --naming they were given by; the model keeps its own."""
    set_dir = tmp_path / "out" / f"{stem}-GGUF"
    manifest.save(example().model_copy(update={"stem": stem}), set_dir)
    options = Options("", out=tmp_path / "out")
    with session.open_set(set_dir, options, build, progress=silent, say=lambda _: None) as state:
        assert (state.stem, state.base.name) == (stem, f"{stem}-bf16.gguf")
        assert (state.source.name.org, state.source.name.model) == ("google", "gemma-3-4b-it")


# --- the real thing ------------------------------------------------------------------------------------------------


def test_a_corrected_template_quantises_nothing(
    made: tuple[Options, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files get the new header around the tensor data they have: the bytes of a set made from scratch."""
    options, set_dir = made
    before = hashes(set_dir)
    assert {found.outcome for found in one(set_dir, refresh.Asked()).values()} == {"unchanged"}
    assert "6 of 6 files come out byte for byte the same" in (set_dir / "README.md").read_text()
    fix_template(Path(options.model))
    differs = ParityDifference(kind="template", where="a conversation", position=4, what="a conversation, character 4")
    with monkeypatch.context() as patch:
        patch.setattr(parity, "differences", lambda *_: [differs])
        (refused,) = refresh.refresh_sets([set_dir], refresh.Asked(apply=True))
    assert refused.error is not None
    assert "a conversation, character 4" in refused.error.what
    assert hashes(set_dir) == before
    monkeypatch.setattr(fanout, "prepare", None)  # a fan-out cannot start, nor write its journal
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        refresh.refresh_sets([set_dir], refresh.Asked(apply=True))
    assert len({name for name, digest in hashes(set_dir).items() if digest != before[name]}) == 2
    found = one(set_dir, refresh.Asked(apply=True))
    monkeypatch.undo()
    assert {name: one.outcome for name, one in found.items()} == {"imatrix": "unchanged", **dict.fromkeys(SOME, "keys")}
    assert {tuple(found[name].keys) for name in SOME} == {("tokenizer.chat_template",)}
    log = "".join(path.read_text() for path in (options.out / ".work" / STEM / "logs").glob("*-refresh.log"))
    assert "fan-out" not in log
    assert len(re.findall(r"new header, \d+ bytes of tensor data copied, none quantised", log)) == len(SOME) - 1
    assert "Metadata was corrected (`tokenizer.chat_template`)" in (set_dir / "README.md").read_text()

    scratch = factory.run(replace(options, out=tmp_path / "scratch", imatrix=set_dir / f"{STEM}-imatrix.gguf"))
    after = hashes(scratch.set_dir)
    assert hashes(set_dir) == after
    assert {name for name in after if after[name] != before[name]} == {f"{STEM}-{name}.gguf" for name in SOME}
    assert {result.problem for result in proof.verify_set(set_dir)} == {None}
    # A run with the same options has nothing left to do, not even the imatrix.
    again = factory.run(options)
    assert [done.name for done in again.done if done.made and done.stage != "card"] == []


def test_what_cannot_be_decided_is_left_alone(made: tuple[Options, Path]) -> None:
    """Without the checkpoint a changed converter leaves everything open; files that are damaged are made again."""
    options, set_dir = made
    path = set_dir / f"{STEM}-Q4_0.gguf"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    found = one(set_dir, refresh.Asked())
    assert found["Q4_0"].outcome == "remake"
    assert found["Q4_0"].why == "the file is not the one that quantset.json names"
    assert {found[name].outcome for name in found if name != "Q4_0"} == {"unchanged"}
    shutil.rmtree(options.model)
    facts = manifest.load(set_dir)
    assert facts.converter is not None
    files = {**facts.converter.files, "conversion/gemma.py": sha256_bytes(b"older")}
    older = facts.converter.model_copy(update={"build": "0" * 20, "files": files})
    manifest.save(facts.model_copy(update={"converter": older}), set_dir)
    before = hashes(set_dir)
    (result,) = refresh.refresh_sets([set_dir], refresh.Asked(apply=True))
    assert hashes(set_dir) == before
    assert result.error is not None
    assert "conversion/gemma.py" in result.error.what
    assert "the checkpoint is not at hand: its directory is gone" in result.error.what
    assert {found.outcome for name, found in result.decisions.items() if "imatrix" not in name} == {"unknown"}
    assert "is not known" in (set_dir / "README.md").read_text()


def test_a_projector_that_is_made_again_is_loaded_first(build: Build, tmp_path: Path) -> None:
    """As in a run: none gets its name that llama.cpp does not load beside its base, wherever the base lies by now."""
    assert build.key
    options = options_for(checkpoints.write_gemma3_vision(tmp_path / "model"), tmp_path / "out", ("bf16", "Q8_0"))
    report = factory.run(options)
    before, name = hashes(report.set_dir), f"mmproj-{STEM}-f16.gguf"
    (report.set_dir / name).unlink()
    (options.out / ".work" / STEM / f"{STEM}-bf16.gguf").unlink()
    found = one(report.set_dir, refresh.Asked(apply=True))
    decision = found[name.removesuffix(".gguf")]
    assert decision.outcome == "unchanged"
    assert decision.why == "made again, as the file is missing; every byte is the same"
    assert hashes(report.set_dir) == before
    entry = manifest.load(report.set_dir).file(name)
    assert entry is not None
    assert entry.checks is not None
    assert entry.checks.load == "bindings"


def test_a_changed_quantiser_is_found_by_its_hash_and_by_rows(made: tuple[Options, Path]) -> None:
    """Another build's files: one of its quantisers wrote other bytes of fixed rows, and one file holds another row."""
    _, set_dir = made
    facts = manifest.load(set_dir)
    old = dict(facts.quantisers[facts.llama_cpp.key])
    assert set(old) == {"Q4_0", "Q4_K", "Q6_K", "Q8_0"}
    old["Q4_K"] = sha256_bytes(b"other bytes")
    name = f"{STEM}-Q8_0.gguf"
    header = gguf_io.read_header(set_dir / name)
    first = header.by_name["blk.0.ffn_up.weight"]
    data = bytearray((set_dir / name).read_bytes())
    data[first.offset + 2] ^= 1  # in the first row, which is sampled
    (set_dir / name).write_bytes(data)
    files = [
        entry.model_copy(
            update={"build": "0" * 20, **({"sha256": sha256_bytes(bytes(data))} if entry.name == name else {})}
        )
        for entry in facts.files
    ]
    manifest.save(facts.model_copy(update={"files": files, "quantisers": {"0" * 20: old}}), set_dir)
    found = one(set_dir, refresh.Asked())
    assert {key: value.outcome for key, value in found.items()} == {
        **dict.fromkeys(("imatrix", "bf16", "Q4_0", "Q6_K_L"), "unchanged"),
        **dict.fromkeys(("Q4_K_M", "Q8_0"), "remake"),
    }
    assert found["Q8_0"].why == "1 tensor of which a sampled row comes out otherwise: blk.0.ffn_up.weight"
    assert "of type Q4_K, whose quantiser makes other bytes of fixed rows" in found["Q4_K_M"].why
    assert "token_embd.weight" not in found["Q4_K_M"].tensors  # it is Q6_K there


@pytest.mark.proof
@pytest.mark.parametrize(
    ("write", "names", "chunks", "differs"),
    [
        pytest.param(
            lambda path: checkpoints.write_gemma3_text(path, layers=4, uneven=True),
            (*SOME, "IQ1_M"),
            2,
            True,
            id="other-bytes",
        ),
        pytest.param(checkpoints.write_gemma3_vision, tuple(recipes.TABLE), 8, None, id="all-recipes"),
    ],
)
def test_refresh_from_the_older_release_to_the_newer(
    write: Callable[[Path], Path], names: tuple[str, ...], chunks: int, differs: bool | None, tmp_path: Path
) -> None:
    """Made by one release and refreshed to the next: what changes is named, made, and nothing else.

    `differs` is whether the file of the changed quantiser is known to come out otherwise for this model.
    """
    checkpoint = write(tmp_path / "model")
    options = replace(
        options_for(checkpoint, tmp_path / "out", names), llama_cpp=OLDER, chunks=chunks, evaluate=True, eval_chunks=2
    )
    old, new = (llama_cpp.build(spec, wait=True) for spec in (OLDER, NEWER))
    set_dir = factory.run(replace(options, bench=("none",))).set_dir
    before, facts = hashes(set_dir), manifest.load(set_dir)
    checked = one(set_dir, refresh.Asked(llama_cpp=NEWER))
    assert hashes(set_dir) == before
    applied = one(set_dir, refresh.Asked(llama_cpp=NEWER, apply=True))
    for name, found in applied.items():
        print(f"{found.outcome:<10}{name:<10}{found.why}")
    # 0.3.36 sums in another order in the quantiser of IQ1_M: in some models that changes a few bytes of the file, in
    # some none. Nothing else of these recipes changed.
    assert {name for name, found in checked.items() if found.outcome != "unchanged"} == {"IQ1_M"}
    assert "of type IQ1_M, whose quantiser makes other bytes of fixed rows" in checked["IQ1_M"].why
    assert {name for name, found in applied.items() if found.outcome != "unchanged"} <= {"IQ1_M"}
    assert applied["IQ1_M"].outcome == "remake" or "every byte is the same" in applied["IQ1_M"].why
    assert differs in (None, applied["IQ1_M"].outcome == "remake")

    scratch = replace(
        options, llama_cpp=NEWER, out=tmp_path / "scratch", imatrix=set_dir / f"{STEM}-imatrix.gguf", evaluate=False
    )
    after = hashes(factory.run(scratch).set_dir)
    assert hashes(set_dir) == after
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {
        f"{STEM}-{n}.gguf" if "mmproj" not in n else f"{n}.gguf" for n, d in applied.items() if d.outcome != "unchanged"
    }
    now = manifest.load(set_dir)
    for entry in now.files:
        if entry.kind == "model":
            kept = entry.sha256 in facts.evidence
            quality = now.evidence[entry.sha256].quality
            assert quality is not None
            assert quality.build == (old.key if kept else new.key), entry.name
            assert kept == (entry.name not in changed)
    again = factory.run(replace(options, llama_cpp=NEWER, bench=("none",)))
    assert [done.name for done in again.done if done.made and done.stage != "card"] == []

    # With another imatrix it is the set that the newer release makes on its own.
    one(set_dir, refresh.Asked(llama_cpp=NEWER, apply=True, new_imatrix=True, evaluate=False))
    alone = factory.run(replace(options, llama_cpp=NEWER, out=tmp_path / "alone", evaluate=False)).set_dir
    assert hashes(set_dir) == hashes(alone)


@pytest.mark.proof
def test_refresh_after_a_corrected_token(build: Build, tmp_path: Path) -> None:
    """27 files get another header, and no fan-out task is done; a second refresh after a kill finds them done."""
    assert build.key
    checkpoint = checkpoints.write_gemma3_text(tmp_path / "model")
    options = options_for(checkpoint, tmp_path / "out", recipes.DEFAULT_NAMES)
    set_dir = factory.run(options).set_dir
    fix_token(checkpoint)
    found = one(set_dir, refresh.Asked(apply=True))
    assert {n: d.outcome for n, d in found.items()} == {
        "imatrix": "unchanged",
        **dict.fromkeys(recipes.DEFAULT_NAMES, "keys"),
    }
    assert {tuple(found[name].keys) for name in recipes.DEFAULT_NAMES} == {("tokenizer.ggml.tokens",)}
    log = max((options.out / ".work" / STEM / "logs").glob("*-refresh.log")).read_text()
    assert "fan-out" not in log
    scratch = replace(options, out=tmp_path / "scratch", imatrix=set_dir / f"{STEM}-imatrix.gguf")
    assert hashes(set_dir) == hashes(factory.run(scratch).set_dir)


# --- its parts -----------------------------------------------------------------------------------------------------


def test_a_hundred_sets_in_one_command(build: Build, tmp_path: Path) -> None:
    """Each is one row of the table, with a card that tells of the comparison; nothing is downloaded for it."""
    assert build.key
    sets = [tmp_path / f"set-{number}" for number in range(100)]
    for directory in sets:
        manifest.save(example(), directory)
    done = CliRunner().invoke(
        cli.main, ["refresh", *map(str, sets), "--json"], env={"HF_HUB_CACHE": str(tmp_path / "hub")}
    )
    assert done.exit_code == 0, done.output
    counted = [result["counts"] for result in json.loads(done.stdout)["sets"]]
    assert counted == [{"unchanged": 0, "keys": 0, "remake": 0, "unknown": 8}] * 100
    assert len(re.findall(r"^set-\d+ +0 +0 +0 +8 .* card only", done.stderr, re.MULTILINE)) == 100
    assert all("is not known" in (directory / "README.md").read_text() for directory in sets)


@pytest.mark.proof
def test_refresh_of_a_hundred_finished_sets(finished: Report, set_options: Options, tmp_path: Path) -> None:
    """100 copies of a set of 27 recipes in one command: every file of each is compared with what the build would write.

    How long it takes is printed, with the cards alone beside it. Weights are links; hashes are remembered, as they are
    of sets that were made here.
    """
    n_sets = int(os.environ.get("REFRESH_SETS", "100"))
    sets: list[Path] = []
    for number in range(n_sets):
        out = tmp_path / f"{number:03}"
        shutil.copytree(set_options.out, out, copy_function=linked_weights, ignore=shutil.ignore_patterns("logs"))
        memory = out / ".work" / "test_tiny-vision" / "hashes.json"
        memory.write_text(memory.read_text().replace(f"{set_options.out}/", f"{out}/"))
        sets.append(out / finished.set_dir.name)

    def timed(*argv: str) -> tuple[str, float, float]:
        """(what was told, wall seconds, CPU seconds) of one command about all sets."""
        begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "gemma_gguf", argv[0], *map(str, sets), *argv[1:]]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return done.stderr, time.monotonic() - begun, spent

    before = {path: sha256_file(path) for path in sets[-1].glob("*.gguf")}
    table, *refreshed = timed("refresh")
    n_files = len(manifest.load(sets[0]).files)
    rows = re.findall(r"^test_tiny-vision-GGUF +(\d+) +0 +0 +0 .* card only", table, re.MULTILINE)
    assert rows == [str(n_files)] * n_sets
    assert {path: sha256_file(path) for path in sets[-1].glob("*.gguf")} == before
    logs = [path.read_text() for path in tmp_path.glob("*/.work/*/logs/*-refresh.log")]
    asked = [line for log in logs for line in log.splitlines() if re.match(r"## .*/llama-quantize --dry-run ", line)]
    assert len(asked) == len(recipes.DEFAULT_NAMES) - 1  # all sets are of one shape
    for directory in sets:
        facts = manifest.load(directory).refresh
        assert facts is not None
        assert {found.outcome for found in facts.files.values()} == {"unchanged"}
        assert f"{n_files} of {n_files} files come out byte for byte the same" in (directory / "README.md").read_text()
    _, *cards = timed("card", "--theme", "classic")
    print(
        f"\n{n_sets} sets of {n_files} files: refresh {refreshed[0]:.1f} s ({refreshed[1]:.1f} s of CPU), cards alone "
        f"{cards[0]:.1f} s ({cards[1]:.1f} s of CPU)"
    )


def linked_weights(source: str, target: str) -> None:
    """Copy a file of a set; weights, which nothing here changes, are linked."""
    if source.endswith(".gguf"):
        link_or_copy(Path(source), Path(target))
    else:
        shutil.copy2(source, target)


def test_one_checkpoint_is_not_that_of_several_sets() -> None:
    with pytest.raises(BadInputError, match="--model names the checkpoint of one set"):
        refresh.refresh_sets([Path("a"), Path("b")], refresh.Asked(model="demo"))


def test_a_directory_that_is_no_set_does_not_stop_the_others(build: Build, tmp_path: Path) -> None:
    assert build.key
    manifest.save(example(), tmp_path / "set")
    none, there = refresh.refresh_sets([tmp_path / "none", tmp_path / "set"], refresh.Asked())
    assert none.error is not None
    assert "is not a quant set" in none.error.what
    assert there.error is None


@pytest.mark.parametrize(
    ("n_rows", "per_expert", "expected"),
    [
        (1, 1, (0,)),
        (2, 2, (0, 1)),
        (100, 100, (0, 49, 99)),
        (12, 4, (0, 1, 3, 4, 5, 7, 8, 9, 11)),
        (8, 4, (0, 1, 3, 4, 5, 7)),
    ],
    ids=["norm", "two", "dense", "three-experts", "two-experts"],
)
def test_sampled_rows(n_rows: int, per_expert: int, expected: tuple[int, ...]) -> None:
    assert sampled_rows(n_rows, per_expert) == expected


def test_plans_are_asked_again_for_another_shape(first: Options, tmp_path: Path) -> None:
    base, given = (gguf_io.read_header(first.out / f"{STEM}-GGUF" / f"{STEM}-{n}.gguf") for n in ("bf16", "imatrix"))

    def with_value(name: str, value: bytes) -> gguf_io.Header:
        gguf_io.write_with_values(base, tmp_path / "other.gguf", {name: value})
        return gguf_io.read_header(tmp_path / "other.gguf")

    shape = shape_of(base, given)
    assert shape_of(with_value("general.name", (5).to_bytes(8, "little") + b"Other"), given) == shape
    assert shape_of(with_value("gemma3.block_count", (7).to_bytes(4, "little")), given) != shape
    assert shape_of(base, replace(given, tensors=given.tensors[1:])) != shape
    assert shape_of(replace(base, tensors=base.tensors[1:]), given) != shape


def test_compared_files(first: Options, tmp_path: Path) -> None:
    base = first.out / f"{STEM}-GGUF" / f"{STEM}-bf16.gguf"
    header = gguf_io.read_header(base)
    assert compare_files(header, header) == Converted()
    keys, data = tmp_path / "keys.gguf", tmp_path / "data.gguf"
    renamed = {"general.name": (5).to_bytes(8, "little") + b"Other"}
    gguf_io.write_with_values(header, keys, renamed)
    assert compare_files(header, gguf_io.read_header(keys)) == Converted(keys=("general.name",))
    raw = bytearray(base.read_bytes())
    raw[header.by_name["blk.0.attn_q.weight"].offset + 1000] ^= 1
    data.write_bytes(raw)
    assert compare_files(header, gguf_io.read_header(data)) == Converted(tensors=("blk.0.attn_q.weight",))


def test_differing_keys() -> None:
    assert gguf_io.differing_keys({"a": b"1", "b": b"2"}, {"a": b"1", "b": b"2"}) == ()
    assert gguf_io.differing_keys({"a": b"1", "b": b"2"}, {"b": b"3", "c": b"4"}) == ("a", "b", "c")
    assert gguf_io.differing_keys({"a": b"1", "b": b"2"}, {"b": b"2", "a": b"1"}) == ("a", "b")


def test_the_converter_lists_the_files_it_imported(first: Options, build: Build) -> None:
    facts = manifest.load(first.out / f"{STEM}-GGUF").converter
    assert facts is not None
    assert facts.build == build.key
    assert {"convert_hf_to_gguf.py", "conversion/gemma.py", "gguf-py/gguf/gguf_writer.py"} <= set(facts.files)
    assert "conversion/bert.py" not in facts.files
    for name, digest in facts.files.items():
        assert sha256_file(build.converter.parent / name) == digest


@pytest.mark.parametrize("text", ["", "Model exported\n", '{"other": 1}\n'])
def test_a_converter_without_its_list_failed(text: str) -> None:
    with pytest.raises(ToolFailedError, match="without the list of its files"):
        convert.parse_converter_log(text)


def test_fixed_rows_are_the_same_everywhere() -> None:
    """Recorded hashes depend on them; they look like weights."""
    rows, weights = next(quantisers.cases())
    assert weights is not None
    assert rows.shape == (quantisers.ROWS, quantisers.COLUMNS)
    assert np.isfinite(rows).all()
    assert (rows[7] == 0).all()
    assert 0.01 < rows[0].std() < 0.03
    assert (weights > 0).all()
    assert (
        sha256_bytes(rows.tobytes() + weights.tobytes())
        == "58f81d0ccdd3394de309c1bb9c8c1f1a69abfc1eb9e9946fb9bc7f99d4ae5e1a"
    )


def test_hashes_differ_by_type_and_are_remembered(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(llama_cpp, "cache_dir", lambda: tmp_path)
    found = quantisers.hashes(build, ["Q4_0", "Q8_0"])
    assert len(set(found.values())) == 2
    monkeypatch.setattr(fanout, "local_executor", None)
    assert quantisers.hashes(build, ["Q8_0"]) == found == quantisers.recorded(build.key)
    assert quantisers.recorded("0" * 20) == {}


def test_kept_measurements_and_files_count_for_the_build_they_were_compared_with() -> None:
    facts = example()
    entry = next(entry for entry in facts.files if entry.recipe == "Q4_K_M")
    other = facts.llama_cpp.model_copy(update={"key": "1" * 20})

    def after(state: str, outcome: str, sha256: str) -> manifest.Manifest:
        decision = FileDecision(outcome=outcome, why="", tensors=[], keys=[], sha256=sha256)  # type: ignore[arg-type]
        done = RefreshFacts(
            before=facts.llama_cpp,
            build=other,
            state=state,  # type: ignore[arg-type]
            files={entry.name: decision},
            evidence_builds=[entry.build],
        )
        return facts.model_copy(update={"refresh": done})

    whole = after("applied", "unchanged", entry.sha256)
    assert whole.is_of_build(entry, entry.build)
    assert whole.is_of_build(entry, other.key)
    assert not whole.is_of_build(entry, "2" * 20)
    assert not after("checked", "unchanged", entry.sha256).is_of_build(entry, other.key)
    assert not after("applied", "keys", entry.sha256).is_of_build(entry, other.key)
    assert not after("applied", "unchanged", sha256_bytes(b"")).is_of_build(entry, other.key)
    assert whole.evidence_builds(other.key) == {entry.build}
    assert after("checked", "unchanged", entry.sha256).evidence_builds(other.key) == frozenset()
    assert whole.evidence_builds(entry.build) == frozenset()
