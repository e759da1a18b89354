"""What is bad is refused: one clear error each, exit code 1, and nothing under a final name.

One row per line of what users and hostile repositories bring, each through the command line. What happens inside a
reader (every way in which a file can be damaged) is in the tests of that reader.
"""

import json
import pickle
import shutil
import struct
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from gemma_gguf import imatrix, manifest, source
from gemma_gguf.files import HashMemory
from gemma_gguf.gguf_io import read_header
from gemma_gguf.session import Report
from tests.examples import example
from tests.test_card import _Page
from tests.test_cli import call
from tests.test_fanout import STEM
from tests.test_gguf_io import _gguf, _tensor
from tests.test_source import in_two_shards, write_small

Usage = namedtuple("Usage", "total used free")
NOT_GEMMA = (
    "Known are: GemmaForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, "
    "Gemma3TextModel, Gemma3nForCausalLM, Gemma3nForConditionalGeneration, Gemma4ForCausalLM, "
    "Gemma4ForConditionalGeneration, Gemma4UnifiedForConditionalGeneration."
)
AGAIN = "Download it again."
MAKE_AGAIN = "Make or download it again."
RESTORE = "Restore it, or delete it and run the same command again: the set is made anew."
OTHER_MODEL = "Use the imatrix of this very model, or leave --imatrix out to compute one."
NO_CODE = "Use the original Gemma checkpoint; Gemma needs no code of its own."


@dataclass
class Here:
    """Where a case is prepared: an empty working directory, and what it may ask for."""

    path: Path
    patch: pytest.MonkeyPatch
    ask: Callable[[str], Any]

    def checkpoint(self, architecture: str = "Gemma3ForCausalLM", **config: Any) -> Path:
        return write_small(self.path / "m", architecture, **config)

    def whole_checkpoint(self) -> Path:
        return Path(shutil.copytree(self.ask("text_checkpoint"), self.path / "m"))

    def made(self, name: str) -> Path:
        """A file of the finished set, copied."""
        report: Report = self.ask("finished")
        return Path(shutil.copy(report.set_dir / name, self.path))


@dataclass(frozen=True)
class Says:
    """What must come of a command line: error and next step, word for word."""

    argv: list[str | Path]
    what: str
    next_step: str | None = None
    leaves: str = "quantset.json"  # all that may be new in the set


Case = Callable[[Here], Says]
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    def keep(function: Case) -> Case:
        CASES[name] = function
        return function

    return keep


# --- what users bring --------------------------------------------------------------------------------------------


@case("no compiler")
def _(here: Here) -> Says:
    (here.path / "bin").mkdir()
    here.patch.setenv("PATH", str(here.path / "bin"))
    here.patch.delenv("CXX", raising=False)
    here.patch.setenv("GEMMA_GGUF_CACHE", str(here.path / "cache"))
    step = "Install a compiler: apt install g++, dnf install gcc-c++, or xcode-select --install."
    return Says(["run", here.checkpoint()], "building llama.cpp needs a C++ compiler", step)


@case("no such model")
def _(here: Here) -> Says:
    step = "Give demo, a checkpoint's directory, or a hub id such as google/gemma-3-4b-it."
    return Says(
        ["run", "no-such-model"], "there is no model 'no-such-model': no such directory, and not a hub id", step
    )


@case("not a Gemma architecture")
def _(here: Here) -> Says:
    path = here.checkpoint("LlamaForCausalLM")
    return Says(["run", path], f"{path} holds a LlamaForCausalLM, which is not a Gemma architecture", NOT_GEMMA)


@case("missing shard")
def _(here: Here) -> Says:
    path = in_two_shards(here.checkpoint())
    (path / "2.safetensors").unlink()
    return Says(["run", path], f"{path} lacks 1 of its weight files, first 2.safetensors", "Download them again.")


@case("truncated safetensors")
def _(here: Here) -> Says:
    path = here.checkpoint()
    shard = path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    what = f"{shard} is not a whole safetensors file: tensor 'b' ends 1 bytes past the end"
    return Says(["run", path], what, AGAIN)


@case("header length that lies")
def _(here: Here) -> Says:
    path = here.checkpoint()
    shard = path / "model.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(struct.pack("<Q", 1 << 40) + data[8:])
    what = f"{shard} is not a whole safetensors file: its header claims {1 << 40} bytes in a file of {len(data)}"
    return Says(["run", path], what, AGAIN)


@case("missing tokenizer")
def _(here: Here) -> Says:
    path = here.checkpoint()
    (path / "tokenizer.json").unlink()
    return Says(["run", path], f"{path} has no tokenizer (tokenizer.model or tokenizer.json)")


def _with_last_weight(here: Here, bits: bytes) -> Says:
    path = here.whole_checkpoint()
    shard = path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2] + bits)
    step = "Download the checkpoint again, or ask its author: no quant of it can work."
    # Sorted by name, a norm comes last.
    return Says(["convert", path], "the weights hold NaN or Inf, first in output_norm.weight", step)


@case("NaN in the weights")
def _(here: Here) -> Says:
    return _with_last_weight(here, b"\xc0\x7f")


@case("Inf in the weights")
def _(here: Here) -> Says:
    return _with_last_weight(here, b"\x80\xff")


@case("disk too small")
def _(here: Here) -> Says:
    path, out = here.checkpoint(), here.path / "out"
    # Ten weights of 16 bits; Q4_0 has 4.5 bits a weight, and one file is made twice.
    what = (
        f"30 to 36 bytes at the peak in {out} (convert 20, imatrix 0, quantize 5 to 8, proof 5 to 8); 20 are free: "
        "10 are missing"
    )
    here.patch.setattr("shutil.disk_usage", lambda _: Usage(10**12, 0, 20))
    step = "Make room, choose another place with --out."
    return Says(["run", path, "--recipes", "Q4_0"], what, step)


@case("disk budget too small")
def _(here: Here) -> Says:
    what = "the set needs at least 13 bytes, --disk-budget allows 7: 6 are missing"
    argv: list[str | Path] = ["run", here.checkpoint(), "--recipes", "Q4_0,Q6_K", "--disk-budget", "7"]
    return Says(argv, what, "Make fewer: --recipes Q4_0")


@case("unknown recipe")
def _(here: Here) -> Says:
    argv: list[str | Path] = ["run", here.checkpoint(), "--recipes", "Q4_K_M,Q4_K_MM"]
    return Says(argv, "unknown recipe 'Q4_K_MM'", "Nearest: Q4_K_M, Q5_K_M, Q4_K_S.")


@case("unknown calibration set")
def _(here: Here) -> Says:
    argv: list[str | Path] = ["run", here.checkpoint(), "--calibration", "bartowski-v2"]
    step = "Did you mean bartowski-v3? Give a text file or one of: default, bartowski-v3, groups-merged, technical."
    return Says(argv, "there is no calibration file or set called 'bartowski-v2'", step)


@case("empty calibration text")
def _(here: Here) -> Says:
    (here.path / "text.txt").write_text(" \n")
    argv: list[str | Path] = ["run", here.checkpoint(), "--calibration", "text.txt"]
    return Says(argv, "the calibration text text.txt is empty", "Give a file with some text in it.")


def _quantize(here: Here, given: Path) -> list[str | Path]:
    """The finished set's model again, with its base and another imatrix."""
    argv: list[str | Path] = ["quantize", here.ask("vision_checkpoint"), "--name", "test/tiny-vision"]
    return [*argv, "--base", here.made(f"{STEM}-bf16.gguf"), "--imatrix", given, "--recipes", "Q4_0"]


@case("truncated imatrix")
def _(here: Here) -> Says:
    path = here.made(f"{STEM}-imatrix.gguf")
    path.write_bytes(path.read_bytes()[:-1000])
    last = "a tensor"
    try:
        read_header(path)
    except Exception as error:  # noqa: BLE001 - the reader's own tests say that this message is right
        last = str(error)
    return Says(_quantize(here, path), last, MAKE_AGAIN)


@case("imatrix with NaN")
def _(here: Here) -> Says:
    path = here.made(f"{STEM}-imatrix.gguf")
    name = "blk.1.ffn_up.weight"
    tensor = read_header(path).by_name[f"{name}.in_sum2"]
    data = bytearray(path.read_bytes())
    data[tensor.offset + 40 : tensor.offset + 44] = np.float32("nan").tobytes()
    path.write_bytes(data)
    what = f"{STEM}-imatrix.gguf lacks data of 1 tensor for 1 of 1 recipes:\n  {name}: has NaN or Inf; used by Q4_0"
    choices = (
        "one of these:\n"
        "  another imatrix, or none: one is computed\n"
        "  raise these tensors in these recipes to a type that is safe without: --pin-uncovered Q6_K\n"
        "  every recipe is affected"
    )
    return Says(_quantize(here, path), what, choices, leaves=f"quantset.json {path.name}")  # without that tensor


@case("imatrix of another model")
def _(here: Here) -> Says:
    path = here.path / "other.gguf"
    base = read_header(here.made(f"{STEM}-bf16.gguf"))
    imatrix.write_placeholder(path, base, "t.txt")
    path.write_bytes(path.read_bytes().replace(b"blk.2.attn_q", b"blk.9.attn_q"))
    what = f"{path} is of another model: blk.9.attn_q.weight is not a tensor of this one"
    return Says(_quantize(here, path), what, OTHER_MODEL)


@case("an imatrix in the old format")
def _(here: Here) -> Says:
    path = here.path / "imatrix.dat"
    path.write_bytes(struct.pack("<i", 1) + bytes(100))
    argv: list[str | Path] = ["run", here.checkpoint(), "--imatrix", path]
    step = "Convert an old one: llama-imatrix --in-file old.dat -o new.gguf --output-format gguf"
    return Says(argv, f"{path} is not an imatrix in GGUF format", step)


def _with_manifest(here: Here, text: str) -> tuple[list[str | Path], Path]:
    path = here.path / "out" / "local_m-GGUF" / "quantset.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return ["run", here.checkpoint()], path


@case("corrupt quantset.json")
def _(here: Here) -> Says:
    argv, path = _with_manifest(here, '{"schema_version": 1, ')
    what = f"{path} is not readable JSON: Expecting property name enclosed in double quotes: line 1 column 23 (char 22)"
    return Says(argv, what, RESTORE)


@case("newer schema of quantset.json")
def _(here: Here) -> Says:
    argv, path = _with_manifest(here, '{"schema_version": 99}')
    what = f"{path} has schema version 99, this gemma-gguf reads up to {manifest.SCHEMA_VERSION}"
    return Says(argv, what, "pip install --upgrade gemma-gguf")


def _base(here: Here, data: bytes, why: str) -> Says:
    path = here.path / "base.gguf"
    path.write_bytes(data)
    return Says(["run", here.checkpoint(), "--base", path], f"{path} is not a whole GGUF file: {why}", MAKE_AGAIN)


@case("cut GGUF")
def _(here: Here) -> Says:
    return _base(here, _gguf([], [_tensor("t")])[:-1], "tensor t reaches 1 bytes past the end")


@case("GGUF with overlapping tensors")
def _(here: Here) -> Says:
    data = _gguf([], [_tensor("a"), _tensor("b", offset=96)], data=256)
    return _base(here, data, "tensor b overlaps a")


@case("GGUF with absurd counts")
def _(here: Here) -> Says:
    data = _gguf(n_keys=1 << 60, n_tensors=1 << 60)
    return _base(here, data, f"it claims {1 << 60} keys and {1 << 60} tensors in {len(data)} bytes")


@case("GGUF with a path as a name")
def _(here: Here) -> Says:
    return _base(here, _gguf([], [_tensor("../../etc/passwd")]), "a tensor is named '../../etc/passwd'")


@case("a base that is quantised already")
def _(here: Here) -> Says:
    path = here.made(f"{STEM}-Q8_0.gguf")
    what = f"{path} is quantised already (Q8_0); quants of quants are not made here"
    return Says(["run", here.checkpoint(), "--base", path], what, "Give a BF16, F16 or F32 file.")


# --- what hostile repositories bring -----------------------------------------------------------------------------


@case("hostile: a path out of the checkpoint")
def _(here: Here) -> Says:
    path = in_two_shards(here.checkpoint())
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "../../secret.safetensors"}}))
    what = f"{index} names '../../secret.safetensors', a path out of the checkpoint"
    return Says(["run", path], what, "Do not use this checkpoint: a whole one names files beside the index.")


@case("hostile: a link out of the checkpoint")
def _(here: Here) -> Says:
    path, secret = here.checkpoint(), here.path / "id_rsa"
    secret.write_text("secret")
    (path / "README.md").symlink_to("../id_rsa")
    what = f"{path / 'README.md'} is a link out of the checkpoint, to {secret}"
    return Says(["run", path], what, "Copy the file into the directory if it belongs there.")


@case("hostile: auto_map")
def _(here: Here) -> Says:
    path = here.checkpoint(auto_map={"AutoModel": "evil.Model"})
    (path / "evil.py").write_text("raise SystemExit('executed')")
    what = f"{path / 'config.json'} asks to run the model's own code (auto_map); code of a model is never executed here"
    return Says(["run", path], what, NO_CODE)


@case("hostile: a module of its own")
def _(here: Here) -> Says:
    path = here.checkpoint()
    (path / "modules.json").write_text('[{"type": "os.system"}]')
    what = (
        f"{path / 'modules.json'} asks to run the model's own code (the module 'os.system'); code of a model is never "
        "executed here"
    )
    return Says(["run", path], what, NO_CODE)


@case("hostile: pickles")
def _(here: Here) -> Says:
    path = here.checkpoint()
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    step = "Use a revision with safetensors, or load and save it with transformers: that writes safetensors."
    what = f"{path} has its weights only as pickles, which can run code when they are loaded"
    return Says(["run", path], what, step)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


@case("hostile: a tokenizer without end")
def _(here: Here) -> Says:
    path = here.checkpoint()
    with (path / "tokenizer.json").open("ab") as file:
        file.truncate(10**12)
    what = f"{path / 'tokenizer.json'} has 1,000,000,000,000 bytes, more than the 256,000,000 that are read"
    return Says(["run", path], what, "Download it again; no Gemma has one that large.")


@case("hostile: control characters in a name")
def _(here: Here) -> Says:
    """A terminal would obey them: they are shown as what they are."""
    path = here.checkpoint("Evil\x1b[2J\x1b]0;title\x07ForCausalLM")
    shown = r"Evil\x1b[2J\x1b]0;title\x07ForCausalLM"
    return Says(["run", path], f"{path} holds a {shown}, which is not a Gemma architecture", NOT_GEMMA)


# --- all of them -------------------------------------------------------------------------------------------------


def final_files(path: Path) -> set[str]:
    """Every file with a final name that a set could hold."""
    return {
        file.relative_to(path).as_posix()
        for file in path.rglob("*")
        if file.suffix in {".gguf", ".md", ".json", ".safetensors"}
        and ".partial" not in file.name
        and file.name not in {"hashes.json", ".lock.json"}
    }


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("build")
    monkeypatch.chdir(tmp_path)
    says = CASES[name](Here(tmp_path, monkeypatch, request.getfixturevalue))
    before = final_files(tmp_path)
    done = call(*says.argv)
    assert (done.exit_code, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    said = lines[next(n for n, line in enumerate(lines) if line.startswith("error: ")) :]
    told = f"error: {says.what}" + (f"\nnext:  {says.next_step}" if says.next_step else "")
    expected = told.splitlines()
    assert said[: len(expected)] == expected
    after = final_files(tmp_path)
    # A base that was given is linked into the work directory before its imatrix is looked at; no file of a set is new.
    allowed = {f"out/{STEM}-GGUF/{name}" for name in says.leaves.split()}
    assert {file for file in after - before if not file.startswith("out/.work/")} <= allowed
    bases = [file for file in after - before - allowed if file.endswith(".gguf")]
    assert bases == ([f"out/.work/{STEM}/{STEM}-bf16.gguf"] if "--base" in says.argv and bases else [])


HOSTILE_CARD = """---
license: "gemma\\nbase_model: evil/model"
license_name: "x\\n---\\n# Owned\\n<script>alert(1)</script>"
language: ["en", "]: javascript:alert(1)"]
pipeline_tag: "text-generation\\n- injected: true"
tags: ["<img src=x onerror=alert(1)>", "a](https://evil.example)", "!!python/object:os.system"]
datasets: ["evil/data\\nquantized_by: evil"]
extra_gated_heading: "| a | b |\\n| - | - |\\n{{ 7 * 7 }} {% include '/etc/passwd' %}"
extra_gated_prompt: "[click](javascript:alert(1)) <iframe src='https://evil.example'></iframe>"
base_model: evil/model
quantized_by: evil
---
# A card of theirs
"""


def test_hostile_a_model_card_cannot_write_into_ours(tmp_path: Path) -> None:
    """Front matter with line ends, YAML tags, Markdown, HTML and Jinja: it comes out as the same values, or not at all.

    The page has the elements of a page made from a harmless card, and the keys are ours.
    """
    checkpoint = write_small(tmp_path / "m")
    (checkpoint / "README.md").write_text(HOSTILE_CARD)
    memory = HashMemory(tmp_path / "hashes.json")
    facts = source.fetch(source.understand(str(checkpoint)), tmp_path, memory).facts
    pages: list[_Page] = []
    for name, model in (
        # Where the original came from is told by a link, to a hub id and nothing else.
        ("plain", facts.model_copy(update={"front_matter": {"base_model": "evil/model"}, "license": "x"})),
        ("hostile", facts),
    ):
        directory = tmp_path / name
        directory.mkdir()
        manifest.save(example().model_copy(update={"model": model}), directory)
        assert call("card", directory).exit_code == 0
        card = ModelCard((directory / "README.md").read_text())  # read as the Hub reads it
        pages.append(_Page(card.text))
        if name == "hostile":
            written = card.data.to_dict()  # type: ignore[no-untyped-call]
            original = yaml.safe_load(HOSTILE_CARD.split("---\n", 2)[1].replace("!!python", "python"))
            assert written["quantized_by"] == "gemma-gguf"
            assert "base_model" not in written
            assert "injected" not in written
            assert written["license"] == "gemma\nbase_model: evil/model"
            for key in ("license_name", "language", "pipeline_tag", "extra_gated_heading", "extra_gated_prompt"):
                assert written[key] == original[key]
    plain, hostile = pages
    assert hostile.tags == plain.tags
    assert hostile.links == plain.links
    assert not {"script", "iframe"} & set(hostile.tags)  # images are our own: as many as on the other page
