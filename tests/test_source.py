"""MODEL -> a local checkpoint and its facts: names, local checkpoints, the hub (a real server on this machine)."""

import hashlib
import json
import math
import pickle
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from gemma_gguf import chat, gemma, source
from gemma_gguf.errors import BadInputError
from gemma_gguf.files import HashMemory
from gemma_gguf.source import ModelName, Source
from tests import checkpoints
from tests.hub import Hub, Reply, client_environment, serving

REPO = Path(__file__).parents[1]


# --- small checkpoints, written by hand --------------------------------------------------------------------------


def safetensors_bytes(tensors: Mapping[str, tuple[int, ...]]) -> bytes:
    """A safetensors file of BF16 zeros, written from the format's description alone."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


TOKENIZER_OF = dict.fromkeys(("GemmaForCausalLM", "Gemma2ForCausalLM"), "tokenizer.model")


def write_small(directory: Path, architecture: str = "Gemma3ForCausalLM", **config: Any) -> Path:
    """The least that is a checkpoint: config, a tokenizer, one weight file of 6 + 4 weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"architectures": [architecture], **config}))
    (directory / TOKENIZER_OF.get(architecture, "tokenizer.json")).write_text("{}")
    (directory / "model.safetensors").write_bytes(safetensors_bytes({"a": (2, 3), "b": (4,)}))
    return directory


def fetch(directory: Path, name: str | None = None) -> Source:
    memory = HashMemory(directory.parent / "hashes.json")
    return source.fetch(source.understand(str(directory), name), directory.parent / "work", memory)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_small(tmp_path / "small")


# --- understand --------------------------------------------------------------------------------------------------


def test_demo_is_gemma_3_270m() -> None:
    name = source.understand("demo")
    assert name == ModelName("demo", "google", "gemma-3-270m")
    assert name.stem == "google_gemma-3-270m"


@pytest.mark.parametrize("typed", ["my-gemma", "./my-gemma", "my-gemma/", "../here/my-gemma", "~/here/my-gemma"])
def test_a_directory_is_local_however_it_is_typed(typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "here" / "my-gemma"
    directory.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    name = source.understand(typed)
    assert name == ModelName("local", "local", "my-gemma", directory.resolve())
    assert name.stem == "local_my-gemma"


@pytest.mark.parametrize(("naming", "stem"), [("org_model", "google_gemma-3-4b-it"), ("model", "gemma-3-4b-it")])
def test_the_naming_style_gives_the_stem(naming: str, stem: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    assert source.understand("google/gemma-3-4b-it", naming=naming).stem == stem
    assert source.understand(str(tmp_path / "here"), "google/gemma-3-4b-it", naming).stem == stem
    assert source.understand("demo", naming=naming).stem == stem.replace("4b-it", "270m")


def test_a_directory_with_a_name(tmp_path: Path) -> None:
    directory = tmp_path / "no name for files"
    directory.mkdir()
    name = source.understand(str(directory), "me/My_gemma-3.1")
    assert name == ModelName("local", "me", "My_gemma-3.1", directory.resolve())


def test_a_directory_whose_name_cannot_name_files_needs_one(tmp_path: Path) -> None:
    directory = tmp_path / "my gemma"
    directory.mkdir()
    with pytest.raises(BadInputError, match="the directory name 'my gemma' cannot name files") as caught:
        source.understand(str(directory))
    assert "--name ORG/MODEL" in (caught.value.next_step or "")


@pytest.mark.parametrize(
    ("typed", "revision"),
    [
        pytest.param("google/gemma-3-4b-it", None, id="no revision"),
        pytest.param("google/gemma-3-4b-it@", None, id="empty revision"),
        pytest.param("google/gemma-3-4b-it@main", "main", id="branch"),
        pytest.param("google/gemma-3-4b-it@refs/pr/3", "refs/pr/3", id="pull request"),
        pytest.param("google/gemma-3-4b-it@" + "0a" * 20, "0a" * 20, id="commit"),
    ],
)
def test_a_hub_id(typed: str, revision: str | None) -> None:
    assert source.understand(typed) == ModelName("hub", "google", "gemma-3-4b-it", revision=revision)


@pytest.mark.parametrize(
    "typed",
    [
        pytest.param("", id="empty"),
        pytest.param("gemma", id="no org"),
        pytest.param("@main", id="revision alone"),
        pytest.param("a/b/c", id="three parts"),
        pytest.param("no such/directory", id="space"),
        pytest.param("../b", id="a directory that is not there"),
        pytest.param("/b", id="an absolute path that is not there"),
        pytest.param(".hidden/b", id="leading dot"),
        pytest.param("https://huggingface.co/google/gemma-3-4b-it", id="address"),
        pytest.param("google/gemma\n", id="line end"),
        pytest.param("b" * 300, id="too long for a file name"),
    ],
)
def test_what_is_no_model(typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInputError) as caught:
        source.understand(typed)
    assert caught.value.what == f"there is no model {typed!r}: no such directory, and not a hub id"
    assert "google/gemma-3-4b-it" in (caught.value.next_step or "")


@pytest.mark.parametrize("name", ["", "gemma", "a/b/c", "../b", "a/..", "a/", "/b", "a/b c", "a/b\n", "a/" + "b" * 97])
def test_a_bad_name(name: str, small: Path) -> None:
    with pytest.raises(BadInputError) as caught:
        source.understand(str(small), name)
    assert caught.value.what == f"--name {name!r} is not ORG/MODEL"
    assert "--name my-org/my-gemma" in (caught.value.next_step or "")


# --- facts of a local checkpoint ---------------------------------------------------------------------------------


def weights_in(directory: Path) -> int:
    """Counted by the safetensors library."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="np") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def hashes_of(directory: Path, *names: str) -> dict[str, str]:
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}


TEXT_FILES = (
    "README.md",
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.model",
    "tokenizer_config.json",
)


def test_facts_of_a_text_model(text_checkpoint: Path) -> None:
    facts = fetch(text_checkpoint).facts
    assert (facts.org, facts.model, facts.origin, facts.repo, facts.revision) == (
        "local",
        "tiny-text",
        "local",
        None,
        None,
    )
    assert (facts.architecture, facts.family, facts.gguf_arch) == ("Gemma3ForCausalLM", "Gemma 3", "gemma3")
    assert (facts.vision, facts.audio, facts.qat, facts.base_is_dequantised) == (False, False, False, False)
    assert facts.n_parameters == weights_in(text_checkpoint)
    assert facts.license == "gemma"
    assert facts.chat_template == checkpoints.CHAT_TEMPLATE
    assert facts.front_matter == {
        "license": "gemma",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gemma3", "test"],
        "extra_gated_heading": "Access Gemma on Hugging Face",
    }
    assert facts.files == hashes_of(text_checkpoint, *TEXT_FILES)
    assert list(facts.files) == sorted(facts.files)


def test_facts_of_a_multimodal_model(vision_checkpoint: Path) -> None:
    found = fetch(vision_checkpoint, "me/tiny")
    facts = found.facts
    assert (found.name.stem, found.path) == ("me_tiny", vision_checkpoint.resolve())
    assert (facts.org, facts.model, facts.origin, facts.repo) == ("me", "tiny", "local", "me/tiny")
    assert (facts.architecture, facts.family, facts.gguf_arch) == (
        "Gemma3ForConditionalGeneration",
        "Gemma 3",
        "gemma3",
    )
    assert (facts.vision, facts.audio) == (True, False)
    assert facts.n_parameters == weights_in(vision_checkpoint)
    assert facts.files == hashes_of(vision_checkpoint, *TEXT_FILES, "preprocessor_config.json")
    assert found.files == facts.files


@pytest.mark.parametrize(
    ("architecture", "family", "gguf_arch"),
    [
        ("GemmaForCausalLM", "Gemma 1", "gemma"),
        ("Gemma2ForCausalLM", "Gemma 2", "gemma2"),
        ("Gemma3ForCausalLM", "Gemma 3", "gemma3"),
        ("Gemma3TextModel", "EmbeddingGemma", "gemma-embedding"),
        ("Gemma3nForConditionalGeneration", "Gemma 3n", "gemma3n"),
        ("Gemma4ForConditionalGeneration", "Gemma 4", "gemma4"),
    ],
)
def test_families(architecture: str, family: str, gguf_arch: str, tmp_path: Path) -> None:
    small = write_small(tmp_path / "m", architecture)
    if gguf_arch == "gemma-embedding":
        pooling = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
        (small / "modules.json").write_text(json.dumps([pooling]))
    facts = fetch(small).facts
    assert (facts.embedding is not None) == (gguf_arch == "gemma-embedding")
    assert (facts.architecture, facts.family, facts.gguf_arch) == (architecture, family, gguf_arch)
    assert facts.n_parameters == 10


@pytest.mark.parametrize(
    ("config", "vision", "audio"),
    [
        ({}, False, False),
        ({"vision_config": {"hidden_size": 8}}, True, False),
        ({"audio_config": {}}, False, True),
        ({"vision_config": {}, "audio_config": {}}, True, True),
        ({"vision_config": None, "audio_config": None}, False, False),
    ],
    ids=["text", "vision", "audio", "both", "null"],
)
def test_what_a_model_perceives(config: dict[str, Any], vision: bool, audio: bool, tmp_path: Path) -> None:
    made = write_small(tmp_path / "m", "Gemma3nForConditionalGeneration", **config)
    towers = {"model.vision_tower.a": (2, 3), "model.audio_tower.b": (4,)}
    (made / "model.safetensors").write_bytes(safetensors_bytes(towers))
    facts = fetch(made).facts
    assert (facts.vision, facts.audio) == (vision, audio)


@pytest.mark.parametrize(
    ("architecture", "there", "missing"),
    [
        ("GemmaForCausalLM", "tokenizer.json", "tokenizer.model"),
        ("Gemma2ForCausalLM", "tokenizer.json", "tokenizer.model"),
        ("Gemma4ForCausalLM", "tokenizer.model", "tokenizer.json"),
    ],
)
def test_a_vocabulary_that_the_converter_cannot_read(
    architecture: str, there: str, missing: str, tmp_path: Path
) -> None:
    """What transformers 5 saves of a fine-tuned Gemma 2 has no tokenizer.model; the converter would fail late."""
    made = write_small(tmp_path / "m", architecture)
    for file in ("tokenizer.model", "tokenizer.json"):
        (made / file).unlink(missing_ok=True)
    (made / there).write_text("{}")
    with pytest.raises(BadInputError, match=f"has no {missing}, from which") as caught:
        fetch(made)
    assert f"Copy {missing}" in (caught.value.next_step or "")


def write_seeing(directory: Path, architecture: str, tensors: Sequence[str], **files: object) -> Path:
    made = write_small(directory, architecture, vision_config={})
    (made / "model.safetensors").write_bytes(safetensors_bytes(dict.fromkeys(("model.norm.weight", *tensors), (4,))))
    for name, content in files.items():
        (made / f"{name}.json").write_text(json.dumps(content))
    return made


GEMMA3, UNIFIED = "Gemma3ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"
SIGLIP = "vision_tower.vision_model.post_layernorm.weight"
SCALED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
NAMES, SCALES = "names what it sees with otherwise", "says how it scales pictures"
PROJECTORS: dict[str, tuple[str, str, dict[str, Any], str | None]] = {
    "as Google's": (GEMMA3, SIGLIP, {"preprocessor_config": SCALED}, None),
    "as a processor of transformers 5 is saved": (
        GEMMA3,
        SIGLIP,
        {"processor_config": {"image_processor": SCALED}},
        None,
    ),
    "no processor": (GEMMA3, SIGLIP, {}, SCALES),
    "half of it": (GEMMA3, SIGLIP, {"preprocessor_config": {"image_mean": [0.5] * 3}}, SCALES),
    "Gemma 4 without a processor": ("Gemma4ForConditionalGeneration", "model.vision_tower.x", {}, SCALES),
    "Gemma 3n needs none": ("Gemma3nForConditionalGeneration", "model.vision_tower.x", {}, None),
    "the code's names": (GEMMA3, "vision_tower.post_layernorm.weight", {"preprocessor_config": SCALED}, NAMES),
    "not the original format": (
        GEMMA3,
        "model.vision_tower.post_layernorm.weight",
        {"processor_config": SCALED},
        NAMES,
    ),
    "unified": (UNIFIED, "model.vision_embedder.patch_dense.weight", {"preprocessor_config": SCALED}, None),
    "unified, the code's": (UNIFIED, "model.embed_vision.patch_dense.weight", {"preprocessor_config": SCALED}, NAMES),
    "no tower": (GEMMA3, "model.other.weight", {}, None),
}


@pytest.mark.parametrize("case", PROJECTORS)
def test_a_projector_that_cannot_be_made_is_refused_at_once(case: str, tmp_path: Path) -> None:
    """The converter would end after the base was written; without projectors the set can be made."""
    architecture, tensor, files, why = PROJECTORS[case]
    made = write_seeing(tmp_path / "m", architecture, [tensor], **files)
    name = source.understand(str(made))
    assert source.examine(made).architecture == architecture
    assert source.preview(name, tmp_path).n_parameters == 8
    if why is None:
        assert source.preview(name, tmp_path, projectors=True).n_parameters == 8
        return
    for look in (source.examine, lambda path, projectors: source.preview(name, path, projectors=projectors)):
        with pytest.raises(BadInputError, match=why) as caught:
            look(made, projectors=True)
        assert "--no-mmproj" in (caught.value.next_step or "")


def test_an_output_matrix_that_would_be_lost(tmp_path: Path) -> None:
    """llama.cpp's Gemma 1 and 2 compute with the embeddings: a copy of them is fine, another matrix is not."""
    made = write_small(tmp_path / "m", "Gemma2ForCausalLM")
    weights = made / "model.safetensors"
    same = safetensors_bytes({"model.embed_tokens.weight": (2, 3), "lm_head.weight": (2, 3)})
    weights.write_bytes(same)
    assert fetch(made).facts.n_parameters == 12
    weights.write_bytes(same[:-1] + b"\x01")
    with pytest.raises(BadInputError, match=r"output matrix \(lm_head\.weight\) that differs from its embeddings"):
        fetch(made)
    (made / "config.json").write_text(json.dumps({"architectures": ["Gemma3ForCausalLM"]}))
    assert fetch(made).facts.family == "Gemma 3"  # which has a place for it


def test_only_needed_files_are_taken(small: Path) -> None:
    expected = ["config.json", "model.safetensors", "tokenizer.json"]
    for name in ("modeling_gemma.py", "pytorch_model.bin", "training_args.bin", ".gitattributes", "original.gguf"):
        (small / name).write_text("no")
    for name in ("onnx/config.json", "original/model.safetensors", "1_Pooling/model.py", "2_Dense/pytorch_model.bin"):
        (small / name).parent.mkdir(exist_ok=True)
        (small / name).write_text("no")
    assert list(fetch(small).files) == expected
    # EmbeddingGemma: the dense layers of sentence-transformers
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json"):
        (small / name).write_text("{}")
    (small / "2_Dense/model.safetensors").write_bytes(safetensors_bytes({"linear.weight": (2, 2)}))
    found = fetch(small)
    assert sorted(set(found.files) - set(expected)) == [
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "modules.json",
    ]
    assert found.facts.n_parameters == 10


def test_hashing_is_told_to_the_caller(small: Path) -> None:
    told: list[tuple[str, float, float, str]] = []
    memory = HashMemory(small.parent / "hashes.json")
    source.fetch(
        source.understand(str(small)),
        small,
        memory,
        lambda label, done, n, unit="": told.append((label, done, n, unit)),
    )
    assert told == [("hashing the checkpoint", done, 3, "files") for done in range(3)]


# --- chat template, QAT, front matter ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "template"),
    [
        pytest.param({}, None, id="none"),
        pytest.param({"tokenizer_config.json": {}}, None, id="config without one"),
        pytest.param({"tokenizer_config.json": {"chat_template": "T"}}, "T", id="tokenizer_config"),
        pytest.param({"chat_template.json": {"chat_template": "J"}}, "J", id="json"),
        pytest.param({"chat_template.jinja": "{{ é }}\n"}, "{{ é }}\n", id="jinja"),
        pytest.param(
            {"tokenizer_config.json": {"chat_template": "T"}, "chat_template.json": {"chat_template": "J"}},
            "J",
            id="json before tokenizer_config",
        ),
        pytest.param(
            {
                "tokenizer_config.json": {"chat_template": "T"},
                "chat_template.json": {"chat_template": "J"},
                "chat_template.jinja": "X",
            },
            "X",
            id="jinja before all",
        ),
        pytest.param(
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "tool_use", "template": "U"}, {"name": "default", "template": "D"}]
                }
            },
            "D",
            id="the default of several",
        ),
    ],
)
def test_chat_template(files: dict[str, Any], template: str | None, small: Path) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (small / name).write_text(text, encoding="utf-8")
    found = fetch(small)
    assert found.facts.chat_template == template
    assert set(files) <= set(found.files)


NOTHING = dict.fromkeys(("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"))


@pytest.mark.parametrize(
    ("stated", "found"),
    [
        pytest.param(None, {}, id="no file"),
        pytest.param({}, {}, id="nothing in it"),
        pytest.param(
            {"do_sample": True, "temperature": 1, "top_k": 64, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.1},
            {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95, "min_p": 0, "repetition_penalty": 1.1},
            id="everything",
        ),
        pytest.param({"do_sample": False, "eos_token_id": [1, 106]}, {"do_sample": False}, id="greedy"),
        pytest.param({"temperature": "hot", "top_k": 6.4, "top_p": None, "do_sample": 1}, {}, id="no numbers"),
        pytest.param({"temperature": True, "top_k": True, "top_p": [0.9]}, {}, id="truth values"),
        pytest.param({"temperature": -1, "top_k": -1, "top_p": -0.5}, {}, id="below zero"),
        pytest.param({"temperature": 1e308, "top_k": 2**40}, {}, id="beyond any sense"),
    ],
)
def test_recommended_sampling(stated: dict[str, Any] | None, found: dict[str, Any], small: Path) -> None:
    if stated is not None:
        (small / "generation_config.json").write_text(json.dumps(stated))
    sampling = fetch(small).facts.sampling
    assert sampling is not None
    assert sampling.model_dump() == {**NOTHING, **found}


def test_numbers_that_json_does_not_have_are_no_sampling(small: Path) -> None:
    (small / "generation_config.json").write_text('{"temperature": NaN, "top_p": Infinity, "top_k": 64}')
    sampling = fetch(small).facts.sampling
    assert sampling is not None
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (None, None, 64)


def test_a_broken_generation_config_is_refused(small: Path) -> None:
    (small / "generation_config.json").write_text('{"top_k": ')
    with pytest.raises(BadInputError, match="generation_config"):
        fetch(small)


@pytest.mark.parametrize("family", gemma.FAMILIES, ids=lambda family: family.name)
def test_every_family_says_since_when_llama_cpp_loads_it(family: gemma.Family) -> None:
    assert family.support.pull_request > 5000
    assert "2024-02-21" <= family.support.merged <= "2026-11-22"
    assert sorted(gemma.FAMILIES, key=lambda f: f.support.merged) == sorted(
        gemma.FAMILIES, key=lambda f: f.support.pull_request
    )


@pytest.mark.parametrize(
    ("name", "tags", "qat"),
    [
        ("me/gemma-3-4b-it", [], False),
        ("me/gemma-3-4b-it-qat-q4_0-unquantized", [], True),
        ("me/gemma-QAT", [], True),
        ("me/aquatic-gemma", [], False),
        ("qat/gemma", [], False),
        ("me/gemma", ["gemma", "qat"], True),
        ("me/gemma", ["QAT q4_0"], True),
        ("me/gemma", ["qatar", "equate"], False),
        ("me/gemma", "qat", False),
    ],
    ids=["plain", "name", "name in capitals", "part of a word", "the org", "tag", "tag of words", "other tags", "text"],
)
def test_quantisation_aware_training_is_seen(name: str, tags: object, qat: bool, small: Path) -> None:
    (small / "README.md").write_text(f"---\ntags: {json.dumps(tags)}\n---\n")
    assert fetch(small, name).facts.qat is qat


@pytest.mark.parametrize(
    ("readme", "front_matter", "licence"),
    [
        pytest.param("---\nlicense: apache-2.0\n---\n# A", {"license": "apache-2.0"}, "apache-2.0", id="plain"),
        pytest.param("---\r\nlicense: gemma\r\n---\r\n# A", {"license": "gemma"}, "gemma", id="line ends of Windows"),
        pytest.param("---\nlicense: [a, b]\n---\n", {"license": ["a", "b"]}, None, id="licence list"),
        pytest.param("---\ndate: 2025-03-01\n---\n", {"date": "2025-03-01"}, None, id="date"),
        pytest.param("# A\n---\nlicense: mit\n---\n", {}, None, id="not at the top"),
        pytest.param("---\n- license\n---\n", {}, None, id="a list"),
        pytest.param("---\nlicense: [\n---\n", {}, None, id="not YAML"),
        pytest.param("---\nlicense: !!python/object/apply:os.getcwd []\n---\n", {}, None, id="code"),
        pytest.param("---\ndate: 2025-02-30\n---\n", {}, None, id="a date that is none"),
        pytest.param("---\na: &a [*a]\n---\n", {}, None, id="a list in itself"),
        pytest.param("", {}, None, id="empty"),
    ],
)
def test_front_matter(readme: str, front_matter: dict[str, Any], licence: str | None, small: Path) -> None:
    (small / "README.md").write_bytes(readme.encode())
    facts = fetch(small).facts
    assert (facts.front_matter, facts.license) == (front_matter, licence)


def test_front_matter_that_grows_without_end_counts_as_none(small: Path) -> None:
    """Nine aliases of nine aliases ...: one more line of text is nine times the memory. Seven lines are 24 MB."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 7)]
    (small / "README.md").write_text("---\n" + "\n".join(lines) + "\n---\n")
    n_bytes = len(json.dumps(fetch(small).facts.front_matter))
    assert n_bytes == len("{}")


# --- refusals ----------------------------------------------------------------------------------------------------


def refusal(directory: Path, hint: str = "") -> str:
    """What is said about a checkpoint that is refused; `hint` must be part of the next step."""
    with pytest.raises(BadInputError) as caught:
        fetch(directory)
    assert hint in (caught.value.next_step or "")
    return caught.value.what.replace(str(directory.resolve()), "HERE")


def test_a_lora_adapter_is_refused(small: Path) -> None:
    (small / "adapter_config.json").write_text("{}")
    assert refusal(small, "merge_and_unload") == "HERE is a LoRA adapter, not a model"


def test_a_directory_without_config_is_refused(small: Path) -> None:
    (small / "config.json").unlink()
    assert refusal(small) == "HERE has no config.json: it is not a Hugging Face checkpoint"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickles_are_refused(name: str, small: Path) -> None:
    (small / "model.safetensors").rename(small / name)
    assert refusal(small, "safetensors") == (
        "HERE has its weights only as pickles, which can run code when they are loaded"
    )


@pytest.mark.parametrize("left", [None, "training_args.bin", "model.gguf"])
def test_a_directory_without_weights_is_refused(left: str | None, small: Path) -> None:
    (small / "model.safetensors").unlink()
    if left:
        (small / left).write_bytes(b"x")
    assert refusal(small, "Download the weights") == "HERE has no *.safetensors files"


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"]
)
def test_code_of_a_model_is_refused(file: str, small: Path) -> None:
    content = {"architectures": ["Gemma3ForCausalLM"], "auto_map": {"AutoModel": "evil.Model"}}
    (small / file).write_text(json.dumps(content))
    assert refusal(small, "original Gemma checkpoint") == (
        f"HERE/{file} asks to run the model's own code (auto_map); code of a model is never executed here"
    )


def test_code_anywhere_in_a_configuration_is_refused(small: Path) -> None:
    config = {"architectures": ["Gemma3ForCausalLM"], "text_config": {"auto_map": {"AutoModel": "evil.Model"}}}
    (small / "config.json").write_text(json.dumps(config))
    assert refusal(small).startswith("HERE/config.json asks to run the model's own code (auto_map)")
    write_small(small)
    (small / "generation_config.json").write_text('{"auto_map": {}}')
    assert refusal(small).startswith("HERE/generation_config.json asks to run the model's own code (auto_map)")


def test_a_module_of_the_models_own_is_refused(small: Path) -> None:
    """sentence-transformers imports the class that `modules.json` names."""
    known = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    (small / "modules.json").write_text(json.dumps([known]))
    fetch(small)
    (small / "modules.json").write_text(json.dumps([known, {**known, "type": "evil.Module"}]))
    assert refusal(small, "original Gemma checkpoint") == (
        "HERE/modules.json asks to run the model's own code (the module 'evil.Module'); code of a model is never "
        "executed here"
    )


def test_a_pickled_part_of_an_embedding_model_is_refused(small: Path) -> None:
    (small / "modules.json").write_text("[]")
    (small / "2_Dense").mkdir()
    (small / "2_Dense" / "pytorch_model.bin").write_bytes(b"x")
    assert refusal(small) == ("HERE/2_Dense has its weights only as pickles, which can run code when they are loaded")


def test_a_pickle_called_safetensors_is_refused(small: Path) -> None:
    (small / "model.safetensors").write_bytes(pickle.dumps({"a": [1.0] * 100}))
    assert refusal(small).startswith("HERE/model.safetensors is not a whole safetensors file: its header claims ")


# --- paths and links out of a checkpoint, sizes ------------------------------------------------------------------

OUT = {
    "config": "config.json",
    "weights": "model.safetensors",
    "tokenizer": "tokenizer.json",
    "card": "README.md",
    "part": "2_Dense/model.safetensors",
}


@pytest.mark.parametrize("file", OUT.values(), ids=OUT)
def test_a_link_out_of_the_checkpoint_is_refused(file: str, small: Path) -> None:
    secret = small.parent / "secret"
    secret.write_bytes(WHOLE)
    (small / file).parent.mkdir(exist_ok=True)
    (small / file).unlink(missing_ok=True)
    (small / file).symlink_to(f"{'../' * (1 + file.count('/'))}secret")
    assert refusal(small, "Copy the file") == f"HERE/{file} is a link out of the checkpoint, to {secret}"


def test_a_linked_directory_is_refused(small: Path) -> None:
    (small.parent / "other").mkdir()
    (small.parent / "other" / "config.json").write_text("{}")
    (small / "1_Pooling").symlink_to(small.parent / "other")
    assert refusal(small) == (
        f"HERE/1_Pooling/config.json is a link out of the checkpoint, to {small.parent}/other/config.json"
    )


def test_links_inside_a_checkpoint_are_fine(small: Path) -> None:
    (small / "weights").mkdir()
    (small / "model.safetensors").rename(small / "weights" / "w")
    (small / "model.safetensors").symlink_to("weights/w")
    linked = small.parent / "linked"
    linked.symlink_to(small)
    assert fetch(linked).facts.n_parameters == 10


def test_the_hubs_cache_is_fine_and_nothing_else_that_looks_like_it(small: Path) -> None:
    """snapshots/<commit>/<file> -> ../../blobs/<hash>, as huggingface_hub lays out its cache."""
    repo = small.parent / "models--org--m"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    (repo / "blobs").mkdir()
    small.rename(snapshot)
    for file in list(snapshot.iterdir()):
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        file.symlink_to(f"../../blobs/{blob.name}")
    assert fetch(snapshot).facts.n_parameters == 10
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("{}")
    (snapshot / "generation_config.json").symlink_to("../../refs/main")
    assert refusal(snapshot) == (f"HERE/generation_config.json is a link out of the checkpoint, to {repo}/refs/main")


@pytest.mark.parametrize("shard", ["../2.safetensors", "/etc/passwd", "a/../../2.safetensors", "..\\2.safetensors"])
def test_a_path_out_of_the_checkpoint_in_the_index_is_refused(shard: str, small: Path) -> None:
    index = {"weight_map": {"a": "1.safetensors", "b": shard}}
    (in_two_shards(small) / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(small, "Do not use this checkpoint") == (
        f"HERE/model.safetensors.index.json names {shard!r}, a path out of the checkpoint"
    )


@pytest.mark.parametrize(
    ("file", "n_bytes", "limit"),
    [
        ("config.json", 16_000_001, 16_000_000),
        ("model.safetensors.index.json", 16_000_001, 16_000_000),
        ("preprocessor_config.json", 10**12, 16_000_000),
        ("tokenizer.json", 256_000_001, 256_000_000),
        ("tokenizer.model", 10**12, 256_000_000),
    ],
)
def test_a_file_that_is_too_large_is_refused_unread(file: str, n_bytes: int, limit: int, small: Path) -> None:
    with (small / file).open("ab") as opened:
        opened.truncate(n_bytes)  # a hole: no bytes on the disk
    assert refusal(small, "Download it again") == (
        f"HERE/{file} has {n_bytes:,} bytes, more than the {limit:,} that are read"
    )


def test_a_safetensors_header_that_is_too_large_is_refused_unread(small: Path) -> None:
    with (small / "model.safetensors").open("wb") as opened:
        opened.write(struct.pack("<Q", 16_000_001))
        opened.truncate(10**12)
    assert refusal(small) == (
        "HERE/model.safetensors is not a whole safetensors file: its header claims 16,000,001 bytes, more than the "
        "16,000,000 that are read"
    )


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_chat_template_that_is_too_long_is_refused(file: str, small: Path) -> None:
    assert source.MAX_TEMPLATE == chat.MAX_TEMPLATE_BYTES
    text = "x" * (source.MAX_TEMPLATE + 1)
    (small / file).write_text(text if file.endswith("jinja") else json.dumps({"chat_template": text}))
    assert refusal(small) == (f"the chat template in HERE/{file} has more than the 1,000,000 characters that are read")


def test_a_checkpoint_without_tokenizer_is_refused(small: Path) -> None:
    (small / "tokenizer.json").unlink()
    assert refusal(small) == "HERE has no tokenizer (tokenizer.model or tokenizer.json)"


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    checkpoint = write_small(tmp_path / "m", "LlamaForCausalLM")
    what = refusal(checkpoint, "GemmaForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM, ")
    assert what == "HERE holds a LlamaForCausalLM, which is not a Gemma architecture"


@pytest.mark.parametrize(
    "config", ["{}", '{"architectures": []}', '{"architectures": "Gemma"}', '{"architectures": [1]}']
)
def test_a_config_without_architecture_is_refused(config: str, small: Path) -> None:
    (small / "config.json").write_text(config)
    assert refusal(small) == "HERE/config.json names no architecture"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        pytest.param(b'{"architectures": ', "HERE/config.json is not readable JSON: Expecting value", id="cut"),
        pytest.param(b"\xff\xfe{}", "HERE/config.json is not readable JSON: 'utf-8' codec", id="not UTF-8"),
        pytest.param(b"[" * 100_000, "HERE/config.json is not readable JSON: maximum recursion", id="deep"),
        pytest.param(b"[]", "HERE/config.json is not a JSON object", id="a list"),
    ],
)
def test_a_config_that_is_not_json_is_refused(data: bytes, what: str, small: Path) -> None:
    (small / "config.json").write_bytes(data)
    assert refusal(small, "Download it again").startswith(what)


def in_two_shards(directory: Path) -> Path:
    (directory / "model.safetensors").unlink()
    (directory / "1.safetensors").write_bytes(safetensors_bytes({"a": (2, 3)}))
    (directory / "2.safetensors").write_bytes(safetensors_bytes({"b": (4,)}))
    weight_map = {"a": "1.safetensors", "b": "2.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_shards_are_counted_together(small: Path) -> None:
    assert fetch(in_two_shards(small)).facts.n_parameters == 10


def test_a_missing_shard_is_refused(small: Path) -> None:
    (in_two_shards(small) / "2.safetensors").unlink()
    assert refusal(small, "Download them again") == "HERE lacks 1 of its weight files, first 2.safetensors"


def test_a_tensor_in_no_shard_is_refused(small: Path) -> None:
    (in_two_shards(small) / "2.safetensors").write_bytes(safetensors_bytes({"c": (4,)}))
    assert refusal(small) == "no weight file of HERE holds b, which model.safetensors.index.json names"


def test_an_index_without_map_is_refused(small: Path) -> None:
    (in_two_shards(small) / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    assert refusal(small) == "HERE/model.safetensors.index.json has no weight_map"


def with_header(header: object, data: int = 20) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


WHOLE = safetensors_bytes({"a": (2, 3), "b": (4,)})
HEADER_LENGTH = len(WHOLE) - 8 - 20


def tensor(shape: object, offsets: object) -> dict[str, Any]:
    return {"a": {"dtype": "BF16", "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        pytest.param(b"", "its header claims 0 bytes in a file of 0", id="empty"),
        pytest.param(b"\1\0\0", "its header claims 1 bytes in a file of 3", id="no length"),
        pytest.param(WHOLE[:-1], "tensor 'b' ends 1 bytes past the end", id="data cut"),
        pytest.param(WHOLE[:40], f"its header claims {HEADER_LENGTH} bytes in a file of 40", id="header cut"),
        pytest.param(
            struct.pack("<Q", 1 << 63) + WHOLE[8:],
            f"its header claims {1 << 63} bytes in a file of {len(WHOLE)}",
            id="header longer than the file",
        ),
        pytest.param(with_header(b'{"a": '), "its header is not JSON (Expecting value", id="not JSON"),
        pytest.param(with_header(b"\xff\xff"), "its header is not JSON ('utf-8' codec", id="not UTF-8"),
        pytest.param(with_header(b"[" * 100_000), "its header is not JSON (maximum recursion", id="deep"),
        pytest.param(with_header([]), "its header is not a JSON object", id="a list"),
        pytest.param(with_header({"a": {}}), "tensor 'a' has no shape and offsets", id="nothing known"),
        pytest.param(with_header({"a": 1}), "tensor 'a' has no shape and offsets", id="a number"),
        pytest.param(with_header(tensor([2], [0])), "tensor 'a' has no shape and offsets", id="one offset"),
        pytest.param(with_header(tensor([2], [0, 30])), "tensor 'a' ends 10 bytes past the end", id="past the end"),
        pytest.param(with_header(tensor([2], [4, 0])), "tensor 'a' has impossible numbers", id="backwards"),
        pytest.param(with_header(tensor([2], [-4, 0])), "tensor 'a' has impossible numbers", id="negative offset"),
        pytest.param(with_header(tensor([2.5], [0, 5])), "tensor 'a' has impossible numbers", id="half a weight"),
        pytest.param(with_header(tensor([-2, -5], [0, 20])), "tensor 'a' has impossible numbers", id="negative shape"),
    ],
)
def test_a_broken_weight_file_is_refused(data: bytes, why: str, small: Path) -> None:
    (small / "model.safetensors").write_bytes(data)
    what = refusal(small, "Download it again")
    assert what.startswith(f"HERE/model.safetensors is not a whole safetensors file: {why}")


def test_a_header_is_read_as_the_library_reads_it(vision_checkpoint: Path) -> None:
    path = vision_checkpoint / "model-00001-of-00002.safetensors"
    with safe_open(path, framework="np") as tensors:
        expected = {name: math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    assert source.read_safetensors_header(path) == expected


# --- the hub -----------------------------------------------------------------------------------------------------

# The client reads its settings when it is imported, so it runs in another process. One process asks for everything.
ASK = """
import json, sys, traceback
from pathlib import Path
from gemma_gguf import chat, source
from gemma_gguf.errors import GemmaGGUFError
from gemma_gguf.files import HashMemory
work, *models = sys.argv[1:]
answers = {}
for model in models:
    try:
        found = source.fetch(source.understand(model), Path(work), HashMemory(Path(work) / "hashes.json"))
        answers[model] = {"facts": found.facts.model_dump(mode="json"), "path": str(found.path)}
    except GemmaGGUFError as error:
        answers[model] = {"error": type(error).__name__, "what": error.what, "next_step": error.next_step}
    except Exception:
        answers[model] = {"traceback": traceback.format_exc()}
print(json.dumps(answers))
"""
Answers = dict[str, dict[str, Any]]


def ask(work: Path, environment: Mapping[str, str], *models: str) -> Answers:
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(work), *models],
        env=dict(environment),
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: Answers = json.loads(done.stdout)
    return answers


PORTAL = Reply(200, b"<html>Please log in to the hotel's network</html>", {"Content-Type": "text/html"})
BAD_IDS = ("org/two--dashes", "org/two..dots", "org/ends-", "org/model.git")
LORA_FILES = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json")
COMMIT = "f" * 40
BIG_SHAPE = (11_000, 1000)  # 22 MB: the client keeps what it has of a file in pieces of 10 MiB


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, text_checkpoint: Path) -> Iterator[Hub]:
    """Repositories for every case; each test looks at the traffic of its own."""
    root = tmp_path_factory.mktemp("hub")
    full = shutil.copytree(text_checkpoint, root / "full")
    for name in ("modeling_gemma.py", "pytorch_model.bin", ".gitattributes", "tf_model.h5", "sub/config.json"):
        (full / name).parent.mkdir(exist_ok=True)
        (full / name).write_bytes(b"no")
    (full / "original").mkdir()
    (full / "original" / "consolidated.safetensors").write_bytes(WHOLE)
    plain = write_small(root / "plain")
    pickled = write_small(root / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    code = write_small(root / "code", auto_map={"AutoModel": "evil.Model"})
    (code / "evil.py").write_text("raise SystemExit('executed')")
    lora = root / "lora"
    lora.mkdir()
    for name in LORA_FILES:
        (lora / name).write_bytes(WHOLE if name.endswith(".safetensors") else b"{}")
    mixed = shutil.copytree(plain, root / "mixed")
    for name in LORA_FILES[:2]:
        shutil.copy(lora / name, mixed / name)
    with serving() as served:
        full_repo = served.repo("org/full")
        full_repo.commit(full, "main", "v1.0")
        full_repo.commit(plain, "dev", "refs/pr/1")
        full_repo.commits[COMMIT] = plain
        served.repo("org/gated", gated=True, readers=frozenset({"hf_friend"})).commit(plain, "main")
        cut = write_small(root / "cut")
        (cut / "model.safetensors").write_bytes(safetensors_bytes({"big": BIG_SHAPE}))
        served.repo("org/cut", cut_once={"model.safetensors"}).commit(cut, "main")
        served.repo("org/broken", fault=Reply(500, b"out of order")).commit(plain, "main")
        served.repo("org/portal", fault=PORTAL).commit(plain, "main")
        for name, directory in (("pickled", pickled), ("code", code), ("lora", lora), ("mixed", mixed)):
            served.repo(f"org/{name}").commit(directory, "main")
        yield served


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def answers(hub: Hub, home: Path) -> Answers:
    """What a stranger without a token gets."""
    full = [f"org/full{at}" for at in ("", "@dev", "@v1.0", "@refs/pr/1", f"@{COMMIT}", "@nowhere")]
    others = [f"org/{name}" for name in ("gated", "unknown", "cut", "broken", "portal", "pickled", "code", "lora")]
    return ask(home, hub.environment(home), *full, *others, "org/mixed", *BAD_IDS)


def test_a_hub_model_is_downloaded_at_its_commit(answers: Answers, hub: Hub, home: Path, text_checkpoint: Path) -> None:
    commit = hub.commit_of("org/full")
    answer = answers["org/full"]
    facts = answer["facts"]
    assert answer["path"] == str(home / "hub" / "models--org--full" / "snapshots" / commit)
    assert (facts["origin"], facts["repo"], facts["revision"]) == ("hub", "org/full", commit)
    assert facts["files"] == hashes_of(text_checkpoint, *TEXT_FILES)
    assert facts["n_parameters"] == weights_in(text_checkpoint)
    assert facts["chat_template"] == checkpoints.CHAT_TEMPLATE


@pytest.mark.parametrize("ref", ["dev", "v1.0", "refs/pr/1", COMMIT])
def test_a_revision_is_resolved_to_its_commit(ref: str, answers: Answers, hub: Hub) -> None:
    facts = answers[f"org/full@{ref}"]["facts"]
    assert facts["revision"] == hub.commit_of("org/full", ref)
    assert ("model.safetensors" in facts["files"]) == (ref != "v1.0")


def test_code_and_pickles_are_not_downloaded(answers: Answers, hub: Hub, home: Path) -> None:
    assert "facts" in answers["org/full"]
    asked = hub.asked("/org/full/resolve/")
    assert asked
    assert not [r.path for r in asked if r.path.endswith((".py", ".bin", ".h5", ".gitattributes", "sub/config.json"))]
    assert not [path for path in home.rglob("*") if path.suffix in {".py", ".bin"}]


def test_only_needed_files_are_downloaded(answers: Answers, hub: Hub) -> None:
    commit = hub.commit_of("org/full")
    assert "facts" in answers["org/full"]
    asked = [request.path.partition(f"/resolve/{commit}/")[2] for request in hub.asked(f"/resolve/{commit}/")]
    assert sorted(set(asked)) == sorted(TEXT_FILES)


def test_a_download_that_breaks_off_is_resumed(answers: Answers, hub: Hub) -> None:
    facts = answers["org/cut"]["facts"]
    expected = hashlib.sha256(safetensors_bytes({"big": BIG_SHAPE})).hexdigest()
    assert (facts["files"]["model.safetensors"], facts["n_parameters"]) == (expected, 11_000_000)
    asked = hub.asked("/large/models/org/cut/")
    assert [request.headers.get("range") for request in asked] == [None, f"bytes={10 << 20}-"]


GATED = {
    "error": "GemmaGGUFError",
    "what": "org/gated is gated and this account has no access to it",
    "next_step": "Accept the terms on https://huggingface.co/org/gated, then run: hf auth login",
}
UNKNOWN = {
    "error": "BadInputError",
    "what": "there is no model org/unknown on the hub, or it is private",
    "next_step": "Check the name; for a private model run: hf auth login",
}


def test_a_gated_model_names_its_page(answers: Answers) -> None:
    assert answers["org/gated"] == GATED


def test_an_unknown_model(answers: Answers) -> None:
    assert answers["org/unknown"] == UNKNOWN


def test_an_unknown_revision(answers: Answers) -> None:
    answer = answers["org/full@nowhere"]
    assert (answer["error"], answer["what"]) == ("BadInputError", "org/full has no revision 'nowhere'")


def test_with_a_token(hub: Hub, tmp_path: Path) -> None:
    friend = ask(tmp_path, hub.environment(tmp_path / "friend", token="hf_friend"), "org/gated")
    assert friend["org/gated"]["facts"]["revision"] == hub.commit_of("org/gated")
    other = ask(tmp_path, hub.environment(tmp_path / "other", token="hf_other"), "org/gated", "org/unknown")
    assert other == {"org/gated": GATED, "org/unknown": UNKNOWN}


@pytest.mark.parametrize("model", ["org/broken", "org/portal"])
def test_a_server_that_is_no_hub_now(model: str, answers: Answers) -> None:
    answer = answers[model]
    assert answer.get("error") == "GemmaGGUFError", answer
    assert answer["what"].startswith(f"cannot reach the hub for {model}: ")
    assert "HF_ENDPOINT" in answer["next_step"]


def test_a_server_that_is_down(tmp_path: Path) -> None:
    with socket.socket() as closed:  # bound, not listening: nobody else can answer at this address
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        answer = ask(tmp_path, client_environment(url, tmp_path), "org/full")["org/full"]
    assert answer.get("error") == "GemmaGGUFError", answer
    assert answer["what"].startswith("cannot reach the hub for org/full: ")
    assert "HF_ENDPOINT" in answer["next_step"]


def test_pickles_on_the_hub_are_refused_before_anything_is_downloaded(answers: Answers, hub: Hub) -> None:
    answer = answers["org/pickled"]
    assert answer["error"] == "BadInputError"
    assert answer["what"] == "org/pickled has its weights only as pickles, which can run code when they are loaded"
    assert hub.asked("/org/pickled/resolve/") == []


def test_code_on_the_hub_is_refused(answers: Answers, hub: Hub) -> None:
    answer = answers["org/code"]
    assert answer["error"] == "BadInputError"
    assert answer["what"].endswith(
        "config.json asks to run the model's own code (auto_map); code of a model is never executed here"
    )
    assert not [request.path for request in hub.asked("/org/code/resolve/") if request.path.endswith(".py")]


@pytest.mark.parametrize("model", ["org/lora", "org/mixed"])
def test_a_lora_adapter_on_the_hub_is_refused(model: str, answers: Answers) -> None:
    answer = answers[model]
    assert answer.get("error") == "BadInputError", answer
    assert "is a LoRA adapter, not a model" in answer["what"]


@pytest.mark.parametrize("model", BAD_IDS)
def test_an_id_that_the_hub_does_not_allow(model: str, answers: Answers) -> None:
    answer = answers[model]
    assert answer.get("error") == "BadInputError", answer
    assert model in answer["what"]
