"""Every Gemma family through the whole factory on the real build, from a checkpoint as Hugging Face writes them."""

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from gemma_gguf import (
    convert,
    factory,
    gemma,
    gguf_io,
    imatrix,
    llama_cpp,
    manifest,
    memory,
    proof,
    quantize,
    recipes,
    source,
    verify,
)
from gemma_gguf.errors import BadInputError, ToolFailedError, VerificationError
from gemma_gguf.gguf_io import Header
from gemma_gguf.llama_cpp import Build, RunLog
from gemma_gguf.manifest import Manifest
from gemma_gguf.session import Options, Report
from tests import families, gemma4

FEW = ("bf16", "Q4_K_M", "IQ2_XXS")
WITH_LARGE = ("merge", "gemma-3n", "gemma-4-e")  # the row that differs from its parent is looked at, too
IN_SHORT = (
    "gemma-1",
    "gemma-2",
    "merge",
    "gemma-3n",
    "gemma-4-dense",
    "gemma-4-experts",
    "gemma-4-e",
    "gemma-4-unified",
)
# The converter of 0.3.36 knows no name for two norms of its audio tower; the day it does, a test here says so.
NO_MMPROJ = ("gemma-3n",)
CHUNKS = 4  # enough for every expert of a test model to be reached


@dataclass(frozen=True)
class Made:
    """A finished set of one family."""

    name: str
    options: Options
    report: Report
    facts: Manifest

    @property
    def stem(self) -> str:
        return self.facts.stem

    def header(self, recipe: str) -> Header:
        return gguf_io.read_header(self.report.set_dir / f"{self.stem}-{recipe}.gguf")


def make(name: str, checkpoint: Path, out: Path, wanted: tuple[str, ...], *, evaluate: bool = False) -> Made:
    options = Options(
        str(checkpoint),
        name=f"test/{name}",
        out=out,
        recipes=wanted,
        chunks=CHUNKS,
        mmproj=name not in NO_MMPROJ,
        evaluate=evaluate,
        eval_chunks=2,
        bench=("none",),
    )
    report = factory.run(options)
    return Made(name, options, report, manifest.load(report.set_dir))


def go_all_the_way(made: Made, passed: Callable[[str, str], None]) -> None:
    """Every step of the family table, said as it is passed."""
    facts = made.facts
    family = gemma.family_of(facts.model.architecture)
    assert family is not None
    base = made.header("bf16")
    assert (facts.model.family, base.get("general.architecture")) == (family.name, family.gguf_arch)
    assert facts.context is not None  # windows, and layers without keys and values of their own
    assert facts.context.measured
    for seen in facts.context.measured:  # llama.cpp prints each of two sizes in MiB with two decimals
        assert abs(seen.cache_bytes - memory.cache_bytes(facts.context, seen.n_ctx)) < 0.011 * (1 << 20)
    if family.turns is not None:
        tokens = set(base.get("tokenizer.ggml.tokens"))
        assert {family.turns.opening, family.turns.closing} <= tokens
    passed("convert", f"{len(base.tensors)} tensors")

    check_projectors(made, family)
    senses = "+".join(sense for sense in ("vision", "audio") if getattr(facts.model, sense)) or "no tower"
    passed("mmproj", "not by this llama.cpp" if made.name in NO_MMPROJ else senses)

    assert facts.imatrix is not None
    assert (facts.imatrix.n_chunks, facts.imatrix.datasets) == (CHUNKS, ["calibration-default.txt"])
    assert sum(sum(row.unseen) for row in facts.imatrix.coverage) == 0
    passed("imatrix", f"{facts.imatrix.n_entries} tensors")

    models = [entry for entry in facts.files if entry.kind == "model"]
    assert [entry.recipe for entry in models if entry.recipe not in made.options.recipes] == []
    assert len(models) == len(made.options.recipes)
    passed("recipes", str(len(models)))

    assert {found.name: found.problem for found in proof.verify_set(made.report.set_dir) if found.problem} == {}
    assert facts.stages["proof"].outputs  # one of them has the bytes of llama-quantize
    passed("verify", "whole, as llama-quantize")

    loads = {entry.name: entry.checks.load if entry.checks else None for entry in models}
    assert set(loads.values()) == {"bindings"}
    passed("load", str(len(loads)))
    passed("forward", "finite")  # the same check computes logits, of which none may be NaN or Inf


def check_projectors(made: Made, family: gemma.Family) -> None:
    """An mmproj for each type where the model sees or hears, with the projectors that the table names."""
    model = made.facts.model
    expected = family.architectures[model.architecture]
    found = [entry for entry in made.facts.files if entry.kind == "mmproj"]
    assert (len(found) > 0) == (model.vision or model.audio)
    for entry in found:
        header = gguf_io.read_header(made.report.set_dir / entry.name)
        plain = header.get("clip.projector_type")
        assert header.get("clip.vision.projector_type", plain) == expected.vision
        assert header.get("clip.audio.projector_type") == (expected.audio if model.audio else None)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return families.write(tmp_path_factory.mktemp("families"), IN_SHORT)


@pytest.fixture(scope="module")
def sets(build: Build, written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """The set of a family, made when it is asked for first. Of projectors only one type: `finished` has all three."""
    out, known = tmp_path_factory.mktemp("out"), {}

    def set_of(name: str) -> Made:
        if name not in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(convert, "MMPROJ_TYPES", ("f16",))
                wanted = (*FEW, "Q4_K_L") if name in WITH_LARGE else FEW
                known[name] = make(name, written[name], out, wanted)
        return known[name]

    return set_of


@pytest.mark.parametrize("name", IN_SHORT)
def test_every_family_goes_all_the_way(
    name: str, sets: Callable[[str], Made], family_row: Callable[[str, str, str], None]
) -> None:
    family_row(name, "begin", "")
    go_all_the_way(sets(name), lambda step, what: family_row(name, step, what))


def test_gemma_3_with_vision_goes_all_the_way(
    finished: Report, set_options: Options, family_row: Callable[[str, str, str], None]
) -> None:
    made = Made("gemma-3", replace(set_options), finished, manifest.load(finished.set_dir))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.test_families.CHUNKS", set_options.chunks)
        go_all_the_way(made, lambda step, what: family_row("gemma-3 vision", step, what))


# --- fine-tunes, as transformers saves them -------------------------------------------------------------------------

SAVED = ("gemma-2", "merge", "gemma-4-unified")  # a tokenizer.model, added tokens beside one, a processor
SAVED_TEXT = "gemma-3n-text"  # keys and values that nothing reads are not saved


@pytest.fixture(scope="module")
def saved(written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints that were loaded and saved by transformers 5; of the processor's files, what it needs to see."""
    originals = {name: written[name] for name in SAVED}
    made = families.save_again(originals, tmp_path_factory.mktemp("saved"))
    shutil.copy(written["gemma-4-unified"] / "preprocessor_config.json", made["gemma-4-unified"])
    return made


@pytest.mark.parametrize("name", SAVED)
def test_what_transformers_saved_converts_to_the_same_base(
    name: str, saved: dict[str, Path], sets: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tokenizer.json alone is left of the vocabulary; what is made of it has the same tokens, types and order."""
    assert not (saved[name] / "tokenizer.model").exists()
    assert "added_tokens_decoder" not in json.loads((saved[name] / "tokenizer_config.json").read_text())
    monkeypatch.setattr(convert, "MMPROJ_TYPES", ("f16",))
    again = factory.run(
        Options(str(saved[name]), name=f"test/{name}", out=tmp_path, recipes=("bf16",), until="convert")
    )
    facts, original = manifest.load(again.set_dir), sets(name)
    assert facts.parity is not None
    assert facts.parity.differences == []
    (path,) = tmp_path.rglob("*-bf16.gguf")
    ours, theirs = gguf_io.read_header(path), original.header("bf16")
    assert set(ours.by_name) == set(theirs.by_name)  # in the order in which transformers saved them
    for tensor in ours.tensors:
        assert np.array_equal(ours.read(tensor), theirs.read(theirs.by_name[tensor.name])), tensor.name
    for key in ("tokens", "token_type", "merges", "add_bos_token", "add_eos_token", "bos_token_id", "eos_token_id"):
        assert ours.get(f"tokenizer.ggml.{key}") == theirs.get(f"tokenizer.ggml.{key}"), key
    projectors = [entry for entry in original.facts.files if entry.kind == "mmproj"]
    assert len(list(tmp_path.rglob("mmproj-*.gguf"))) == len(projectors)


def base_of_gemma_3n(checkpoint: Path, out: Path) -> Header:
    """Converted, compared with its checkpoint and loaded."""
    factory.run(Options(str(checkpoint), name="test/n", out=out, recipes=("bf16",), until="convert"))
    (base,) = out.rglob("*-bf16.gguf")
    return gguf_io.read_header(base)


def unread_zeros(header: Header) -> list[bool]:
    """Of every weight that nothing reads, whether it is all zeros."""
    unread = [header.by_name[name] for name in gemma.unread_tensors(header)]
    return [not header.read(tensor).any() for tensor in unread]


def test_a_saved_gemma_3n_loads_though_keys_that_nothing_reads_are_gone(build: Build, tmp_path: Path) -> None:
    saved = families.save_again(families.write(tmp_path / "original", [SAVED_TEXT]), tmp_path / "saved")
    assert unread_zeros(base_of_gemma_3n(saved[SAVED_TEXT], tmp_path / "out")) == [True] * 4


@pytest.mark.proof
def test_proof_of_families_that_nothing_reads_what_zeros_stand_for(build: Build, tmp_path: Path) -> None:
    """With them a file gives the same logits, bit by bit, as with the original's random numbers."""
    original = families.write(tmp_path / "original", [SAVED_TEXT])
    saved = families.save_again(original, tmp_path / "saved")
    whole, filled = (base_of_gemma_3n(row[SAVED_TEXT], tmp_path / str(n)) for n, row in enumerate((original, saved)))
    assert (unread_zeros(whole), unread_zeros(filled)) == ([False] * 4, [True] * 4)
    one, other = (logits(build, header.path, tmp_path) for header in (whole, filled))
    assert np.isfinite(one).all()
    assert np.array_equal(one, other)


@pytest.mark.proof
@pytest.mark.parametrize("name", ["gemma-3-vision", "gemma-4-unified"])
def test_proof_of_the_command_that_gives_tensors_their_published_names(name: str, tmp_path: Path) -> None:
    """A fine-tune with names that the converter does not know is refused with a command; it does what it says."""
    original = families.write(tmp_path / "original", [name])[name]
    renamed = families.save_again({name: original}, tmp_path / "saved", families.CODE_NAMES)[name]
    shutil.copy(original / "preprocessor_config.json", renamed)
    with pytest.raises(BadInputError, match="names what it sees with otherwise") as caught:
        source.examine(renamed, projectors=True)
    (command,) = (line for line in str(caught.value.next_step).splitlines() if line.startswith("python -c "))
    command = command.replace("ORIGINAL", str(original)).replace("RENAMED", str(tmp_path / "RENAMED"))
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True, capture_output=True)
    for file in (*original.glob("tokenizer*"), original / "preprocessor_config.json"):
        shutil.copy(file, tmp_path / "RENAMED")
    assert set(source.examine(renamed).tensors) != set(source.examine(original).tensors)
    assert source.examine(tmp_path / "RENAMED", projectors=True).tensors == source.examine(original).tensors


LOGITS = """
import sys
import llama_cpp, numpy as np
llama = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_batch=64, n_threads=1, logits_all=True, verbose=False)
llama.eval(list(range(120, 160)))
np.asarray(llama.scores[:40], np.float32).tofile(sys.argv[2])
"""


def logits(build: Build, model: Path, directory: Path) -> npt.NDArray[np.float32]:
    out = directory / "logits"
    argv = [sys.executable, "-W", "ignore", "-c", LOGITS, str(model), str(out)]
    subprocess.run(argv, env=llama_cpp.python_env(build), check=True, capture_output=True)
    return np.fromfile(out, np.float32)


def test_tokens_that_the_converter_makes_visible_are_said_to_be_left_out(sets: Callable[[str], Made]) -> None:
    """llama.cpp reads Gemma 4's marks of thoughts and tools in plain text, too, so that was not compared."""
    made = sets("gemma-4-experts")
    assert made.facts.parity is not None
    told = {where: why for where, why in made.facts.parity.left_out.items() if where.startswith("token ")}
    visible = (
        "<|channel>",
        "<channel|>",
        "<|tool_call>",
        "<tool_call|>",
        "<|tool_response>",
        "<tool_response|>",
        '<|"|>',
    )
    tokens = made.header("bf16").get("tokenizer.ggml.tokens")
    assert set(told) == {f"token {tokens.index(text)} {text!r} in plain text" for text in visible}
    assert set(told.values()) == {
        "llama.cpp reads it in any text, as the file types it; where special tokens are parsed it was compared"
    }
    assert (made.facts.parity.differences, made.facts.parity.n_added) == ([], len(gemma4.SPECIAL))


# --- E models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma-3n", "gemma-4-e"])
def test_large_row_leaves_embeddings_per_layer_as_they_are(name: str, sets: Callable[[str], Made]) -> None:
    """They are several times as large as what `_L` is about, and would follow --token-embedding-type."""
    made = sets(name)
    plain, large = made.header("Q4_K_M"), made.header("Q4_K_L")
    differing = [a.name for a, b in zip(plain.tensors, large.tensors, strict=True) if a.ggml_type is not b.ggml_type]
    assert differing == ["token_embd.weight"]
    entry = made.facts.file(large.path.name)
    assert entry is not None
    kind = plain.by_name[gemma.PER_LAYER_EMBEDDING].ggml_type.name
    assert (entry.differs, recipes.types_of(entry.flags)) == (differing, {"per_layer_token_embd": kind})


@pytest.mark.parametrize("name", ["gemma-3n", "gemma-4-e"])
def test_keys_and_values_that_nothing_reads_need_no_data(
    name: str, sets: Callable[[str], Made], build: Build, tmp_path: Path
) -> None:
    """llama-quantize itself refuses them in a very low-bit file; with a type of their own it makes ours."""
    made = sets(name)
    header = made.header("bf16")
    unread = gemma.unread_tensors(header)
    assert len(unread) == {"gemma-3n": 4, "gemma-4-e": 6}[name]
    data = imatrix.read(made.report.set_dir / imatrix.file_name(made.stem))
    assert [tensor for tensor in unread if tensor in data.entries] == []
    low = made.header("IQ2_XXS")
    assert {low.by_name[tensor].ggml_type.name for tensor in unread} == {"Q2_K"}
    log = RunLog(tmp_path / "run.log")
    try:
        argv = quantize.quantize_argv(
            build, recipes.TABLE["IQ2_XXS"], str(header.path), str(tmp_path / "o.gguf"), imatrix=str(data.path)
        )
        with pytest.raises(ToolFailedError, match=f"Missing importance matrix for tensor {unread[0]}"):
            quantize.run_llama_quantize(argv, "", cwd=tmp_path, log=log)
    finally:
        log.close()
    assert proof.prove_set(made.report.set_dir) == ["IQ2_XXS", "Q4_K_M", "Q4_K_L"]


@pytest.mark.parametrize("name", NO_MMPROJ)
def test_a_projector_that_the_converter_cannot_make(name: str, written: dict[str, Path], tmp_path: Path) -> None:
    options = Options(str(written[name]), name=f"test/{name}", out=tmp_path, until="convert")
    with pytest.raises(ToolFailedError, match=r"cannot make the projector of this model") as caught:
        factory.run(options)
    assert "--no-mmproj" in (caught.value.next_step or "")
    assert caught.value.log is not None
    assert "Can not map tensor 'model.audio_tower.subsample_conv_projection" in caught.value.log.read_text()


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_layer_that_is_not_clipped_has_infinite_bounds(value: float, tmp_path: Path) -> None:
    path = tmp_path / "bounds.gguf"
    writer = gguf.GGUFWriter(path, "clip")
    for name in ("v.blk.0.attn_q.input_max", "v.blk.0.attn_q.output_min"):
        writer.add_tensor(name, np.array([value], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = gguf_io.read_header(path)
    verify.check_finite(header)
    with contextlib.nullcontext() if value == np.inf else pytest.raises(VerificationError, match="holds NaN or Inf"):
        verify.check_rows(header)


def test_merge_keeps_its_output_matrix_and_its_tokens(sets: Callable[[str], Made]) -> None:
    made = sets("merge")
    header = made.header("bf16")
    assert "output.weight" in header.by_name
    assert header.get("tokenizer.ggml.tokens")[-2:] == ["<|im_start|>", "<|im_end|>"]
    assert made.header("Q4_K_L").by_name["output.weight"].ggml_type.name == "Q8_0"
    assert made.facts.calibration is not None
    assert made.facts.calibration.source == (
        "gemma-gguf calibration/mix, conversations in the turns of the chat template"
    )


# --- all recipes ---------------------------------------------------------------------------------------------------


@pytest.mark.proof
@pytest.mark.parametrize("name", families.CHECKPOINTS)
def test_proof_of_families_with_all_recipes(
    name: str, build: Build, tmp_path: Path, family_row: Callable[[str, str, str], None]
) -> None:
    """All recipes, those on request, too, each file compared with llama-quantize's; measured against the base."""
    family_row(name, "begin", "")
    checkpoint = families.write(tmp_path, [name])[name]
    made = make(name, checkpoint, tmp_path / "out", tuple(recipes.TABLE), evaluate=True)
    go_all_the_way(made, lambda step, what: family_row(name, step, what))
    compared = proof.prove_set(made.report.set_dir)
    assert sorted(compared) == sorted(set(recipes.TABLE) - {"bf16"})
    family_row(name, "verify", f"{len(compared)} as llama-quantize")
    figures = [made.facts.evidence[entry.sha256].quality for entry in made.facts.files if entry.kind == "model"]
    assert all(quality is not None for quality in figures)
    family_row(name, "forward", f"KLD of {len(figures)}")
