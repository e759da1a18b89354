"""The table of families against the converter of the real build, and what a model's own files say over it."""

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemma_gguf import gemma
from gemma_gguf.llama_cpp import Build


@dataclass(frozen=True)
class Converts:
    """One class of the converter: the checkpoints it is registered for, and its body."""

    architectures: tuple[str, ...]
    body: str

    @property
    def is_projector(self) -> bool:
        return "model_arch =" not in self.body


@pytest.fixture(scope="module")
def classes(build: Build) -> list[Converts]:
    """The classes of `conversion/gemma.py`, read, not run."""
    text = (build.converter.parent / "conversion" / "gemma.py").read_text()
    starts = [match.start() for match in re.finditer(r"^(?=@ModelBase\.register)", text, re.MULTILINE)]
    blocks = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    found = [Converts(tuple(re.findall(r'"(\w+)"', block[: block.index(")")])), block) for block in blocks]
    assert sum(map(len, (row.architectures for row in found))) > 12
    return found


def test_every_gemma_that_the_converter_knows_is_in_the_table(classes: list[Converts], build: Build) -> None:
    constants = (build.converter.parent / "gguf-py" / "gguf" / "constants.py").read_text()
    known: dict[str, str] = {}
    for row in classes:
        if not row.is_projector:
            (member,) = re.findall(r"^    model_arch = gguf\.MODEL_ARCH\.(\w+)", row.body, re.MULTILINE)
            (value,) = re.findall(rf'^ +MODEL_ARCH\.{member}: +"([\w-]+)"', constants, re.MULTILINE)
            known |= dict.fromkeys(row.architectures, value)
    ours = {name: family.gguf_arch for family in gemma.FAMILIES for name in family.architectures}
    assert {name: arch for name, arch in known.items() if name not in gemma.DRAFTS} == ours
    assert set(gemma.DRAFTS) <= set(known)


def test_projectors_are_those_that_the_converter_writes(classes: list[Converts], build: Build) -> None:
    constants = (build.converter.parent / "gguf-py" / "gguf" / "constants.py").read_text()
    names = dict(re.findall(r'^    (GEMMA\w+) += "(\w+)"', constants, re.MULTILINE))
    written: dict[str, gemma.Projectors] = {}
    for row in classes:
        if row.is_projector:
            kinds = re.findall(r"add_clip_(vision_|audio_|)projector_type\(gguf\.VisionProjectorType\.(\w+)", row.body)
            by_sense = {sense.rstrip("_") or "vision": names[member] for sense, member in kinds}
            written |= dict.fromkeys(row.architectures, gemma.Projectors(**by_sense))
    ours = {name: row for family in gemma.FAMILIES for name, row in family.architectures.items()}
    assert written == {name: row for name, row in ours.items() if row != gemma.TEXT_ONLY}


def text_class(classes: list[Converts], family: gemma.Family) -> Converts:
    (found,) = (
        row for row in classes if not row.is_projector and next(iter(family.architectures)) in row.architectures
    )
    return found


@pytest.mark.parametrize("family", gemma.FAMILIES, ids=lambda family: family.name)
def test_what_the_converter_drops_and_reads(family: gemma.Family, classes: list[Converts]) -> None:
    body = text_class(classes, family).body
    assert ('if name == "lm_head.weight":' in body) == (not family.own_output)
    vocabulary = re.search(r"def set_vocab\(self\):\n(.*?)\n    def ", body, re.DOTALL)
    reads = None
    if vocabulary is not None and "is_file()" not in vocabulary[1]:
        reads = {True: "tokenizer.model", False: None}["_set_vocab_sentencepiece" in vocabulary[1]]
        reads = "tokenizer.json" if "LlamaHfVocab" in vocabulary[1] else reads
    assert reads == family.vocabulary


FIRST = {"gemma3": "embeddings.patch_embedding", "gemma4uv": "patch_dense"}  # a tensor behind what TOWERS says


def test_names_of_towers_are_those_that_the_converter_knows(classes: list[Converts], build: Build) -> None:
    """The day it knows those of transformers' code, too, nobody has to be refused for them."""
    mapping = (build.converter.parent / "gguf-py" / "gguf" / "tensor_mapping.py").read_text()
    assert set(FIRST) == set(gemma.TOWERS)
    for projector, first in FIRST.items():
        assert f'"{gemma.TOWERS[projector]}{first}"' in mapping
    for unknown in ("vision_tower.embeddings.patch_embedding", "model.embed_vision.patch_dense"):
        assert f'"{unknown}"' not in mapping
    (body,) = (row.body for row in classes if "VisionProjectorType.GEMMA3)" in row.body)
    (roots,) = re.findall(r"if not name\.startswith\(\((.*?)\)\):\n +return None", body)
    assert [root for root in re.findall(r'"([\w.]+)"', roots) if root.startswith("model.")] == []


def test_projectors_are_scaled_by_what_the_processor_says(classes: list[Converts], build: Build) -> None:
    base = (build.converter.parent / "conversion" / "base.py").read_text()
    assert 'self.preprocessor_config["image_mean"]' in base  # a KeyError without it
    own = [row.architectures for row in classes if 'self.preprocessor_config["image_mean"] =' in row.body]
    assert own == [("Gemma3nForConditionalGeneration",)]
    kinds = {row.vision for family in gemma.FAMILIES for row in family.architectures.values() if row.vision}
    assert kinds - gemma.SCALED_BY_PROCESSOR == {"gemma3nv"}


# --- what the files say --------------------------------------------------------------------------------------------

SIGLIP, SOUND = "vision_tower.vision_model.post_layernorm.weight", "model.audio_tower.output_proj.weight"
UNIFIED = "model.vision_embedder.patch_dense.weight"
BOTH: dict[str, object] = {"vision_config": {}, "audio_config": {}}


@pytest.mark.parametrize(
    ("architecture", "config", "tensors", "expected"),
    [
        ("Gemma3ForConditionalGeneration", BOTH, [SIGLIP], (True, False)),
        ("Gemma3ForConditionalGeneration", BOTH, ["model.norm.weight"], (False, False)),
        ("Gemma3ForCausalLM", BOTH, [SIGLIP], (False, False)),
        ("Gemma4ForConditionalGeneration", BOTH, [f"model.{SIGLIP}", SOUND], (True, True)),
        ("Gemma4ForConditionalGeneration", {"vision_config": {}, "audio_config": None}, [SIGLIP], (True, False)),
        ("Gemma4UnifiedForConditionalGeneration", BOTH, [UNIFIED, "model.embed_audio.x"], (True, True)),
        ("Gemma4ForConditionalGeneration", {}, [SIGLIP, SOUND], (False, False)),
        ("Gemma5ForCausalLM", BOTH, [SIGLIP], (False, False)),
    ],
    ids=["sees", "tower-cut-out", "class-cannot", "both", "no-audio", "without-towers", "no-config", "unknown"],
)
def test_modalities_are_what_class_configuration_and_weights_agree_on(
    architecture: str, config: dict[str, object], tensors: list[str], expected: tuple[bool, bool]
) -> None:
    assert gemma.modalities(architecture, config, tensors) == expected


def header(arch: str, layers: int, shared: int | None, kinds: tuple[str, ...] = ("attn_k", "attn_v")) -> Any:
    keys = {"general.architecture": arch, f"{arch}.block_count": layers}
    if shared is not None:
        keys[f"{arch}.attention.shared_kv_layers"] = shared
    names = {f"blk.{layer}.{kind}.weight": None for layer in range(layers) for kind in kinds}
    return SimpleNamespace(get=lambda name, default=None: keys.get(name, default), by_name=names)


@pytest.mark.parametrize(
    ("base", "with_cache", "unread"),
    [
        (header("gemma3", 6, None), 6, []),
        (header("gemma4", 6, 0), 6, []),
        (header("gemma4", 6, 2), 4, [4, 5]),
        (header("gemma4", 6, 2, kinds=()), 4, []),
        (header("gemma3n", 22, 2), 20, [20, 21]),
        (header("gemma3n", 22, 5), 20, [20, 21]),
        (header("gemma3n", 12, 0), 12, []),
        (header("unheard-of", 4, 1), 3, [3]),
    ],
    ids=["none", "zero", "two", "left-out", "3n", "3n-constant", "3n-short", "unknown"],
)
def test_layers_whose_keys_nothing_reads(base: Any, with_cache: int, unread: list[int]) -> None:
    assert gemma.layers_with_cache(base) == with_cache
    assert gemma.unread_layers(base) == unread
    assert gemma.unread_tensors(base) == [f"blk.{n}.{kind}.weight" for n in unread for kind in ("attn_k", "attn_v")]


def test_names_of_checkpoints_and_files_lead_to_one_row() -> None:
    for family in gemma.FAMILIES:
        assert gemma.by_gguf_arch(family.gguf_arch) is family
        assert all(gemma.family_of(name) is family for name in family.architectures)
    assert gemma.family_of("LlamaForCausalLM") is None
    assert gemma.by_gguf_arch(None) is None
    assert {"gemma-embedding"} == gemma.WITHOUT_LOGITS


def test_every_family_has_a_small_checkpoint() -> None:
    text = (Path(__file__).parent / "families.py").read_text()
    for family in gemma.FAMILIES:
        assert f'"{family.name}"' in text or not family.logits, family.name  # EmbeddingGemma's is in its own file
