"""What is true of each Gemma generation, as one table. A new family is one row.

Consumes nothing, produces frozen rows. A checkpoint's own files win over the table wherever they say more: its chat
template over the turns, its tensors over the modalities of its class, its GGUF keys over windows and layers. What only
a model's tensors tell (experts, embeddings per layer, an output matrix of its own) has no column; `tests/test_gemma.py`
compares every column with the converter and the GGUF files of the real build.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gemma_gguf.gguf_io import Header
from gemma_gguf.manifest import Support

PER_LAYER_EMBEDDING = "per_layer_token_embd.weight"  # of E models, their largest tensor
# Tensors of towers and of what joins them to the text model, in the names of Hugging Face.
_VISION = re.compile(r"(^|\.)(vision_tower|vision_model|vision_embedder|embed_vision|multi_modal_projector)\.")
_AUDIO = re.compile(r"(^|\.)(audio_tower|embed_audio)\.")


@dataclass(frozen=True)
class Turns:
    """How a turn is written: `opening`, role, newline, text, `closing`, newline. The model's role is `model`."""

    opening: str
    closing: str


@dataclass(frozen=True)
class Projectors:
    """Which projectors the converter can make of a class, by llama.cpp's names (`clip.*projector_type`)."""

    vision: str | None = None
    audio: str | None = None


@dataclass(frozen=True)
class Window:
    """Sliding-window attention where the GGUF file has no key for it: constants in llama.cpp.

    Each `period`-th layer sees the whole context, the others the last `tokens` (0: the file says how many).
    """

    period: int
    tokens: int = 0


@dataclass(frozen=True)
class Family:
    """One row. `architectures` are the class names in `config.json`, `gguf_arch` the key `general.architecture`.

    `turns` is None where a model takes no turns. `vocabulary` is the file without which the converter cannot make a
    vocabulary. With `own_output` llama.cpp has a place for an output matrix; where it has none the converter drops it.
    `n_layers_with_cache` is how many layers compute keys and values, where llama.cpp does not ask the file.
    """

    name: str
    architectures: Mapping[str, Projectors]
    gguf_arch: str
    support: Support
    turns: Turns | None
    vocabulary: str | None = None
    own_output: bool = True
    window: Window | None = None
    n_layers_with_cache: int | None = None
    logits: bool = True


def _since(pull_request: int, merged: str, release: str | None = None) -> Support:
    return Support(pull_request=pull_request, merged=merged, release=release)


TEXT_ONLY = Projectors()
GEMMA_TURNS = Turns("<start_of_turn>", "<end_of_turn>")
GEMMA4_TURNS = Turns("<|turn>", "<turn|>")
_GEMMA4 = Projectors("gemma4v", "gemma4a")

# Since when llama.cpp loads each: the pull request that added the architecture, the day it was merged, and the first
# release where a source names it (ggml-org/llama.cpp#12345 tried b4875, abetlen/llama-cpp-python#2065 names b6384,
# notes of a project on Android name 26 June 2025 and b5769 for 14400, release notes of b8637 name 21309).
FAMILIES = (
    Family(
        "Gemma 1",
        {"GemmaForCausalLM": TEXT_ONLY},
        "gemma",
        _since(5631, "2024-02-21"),
        GEMMA_TURNS,
        vocabulary="tokenizer.model",
        own_output=False,
    ),
    Family(
        "Gemma 2",
        {"Gemma2ForCausalLM": TEXT_ONLY},
        "gemma2",
        _since(8156, "2024-06-28"),
        GEMMA_TURNS,
        vocabulary="tokenizer.model",
        own_output=False,
        window=Window(2, 4096),
    ),
    Family(
        "Gemma 3",
        {"Gemma3ForCausalLM": TEXT_ONLY, "Gemma3ForConditionalGeneration": Projectors("gemma3")},
        "gemma3",
        _since(12343, "2025-03-12", "b4875"),
        GEMMA_TURNS,
        window=Window(6),
    ),
    Family(
        "EmbeddingGemma",
        {"Gemma3TextModel": TEXT_ONLY},
        "gemma-embedding",
        _since(15798, "2025-09-04", "b6384"),
        None,
        window=Window(6),
        logits=False,
    ),
    Family(
        "Gemma 3n",
        {"Gemma3nForCausalLM": TEXT_ONLY, "Gemma3nForConditionalGeneration": Projectors("gemma3nv", "gemma3na")},
        "gemma3n",
        _since(14400, "2025-06-26", "b5769"),
        GEMMA_TURNS,
        window=Window(5),
        n_layers_with_cache=20,
    ),
    Family(
        "Gemma 4",
        {
            "Gemma4ForCausalLM": TEXT_ONLY,
            "Gemma4ForConditionalGeneration": _GEMMA4,
            "Gemma4UnifiedForConditionalGeneration": Projectors("gemma4uv", "gemma4ua"),
        },
        "gemma4",
        _since(21309, "2026-04-02", "b8637"),
        GEMMA4_TURNS,
        vocabulary="tokenizer.json",
    ),
)
# Drafts for speculative decoding: the converter knows them, but llama.cpp makes no context of one without the model
# that it drafts for. Each with the prefix by which llama-server's `-hf` tells such a file from a model.
DRAFTS: Mapping[str, str] = {
    "Gemma4AssistantForCausalLM": "mtp",
    "Gemma4UnifiedAssistantForCausalLM": "mtp",
    "Gemma4DSparkModel": "dspark",
}
_BY_ARCHITECTURE: Mapping[str, Family] = {name: family for family in FAMILIES for name in family.architectures}
_BY_GGUF_ARCH: Mapping[str, Family] = {family.gguf_arch: family for family in FAMILIES}
WITHOUT_LOGITS = frozenset(family.gguf_arch for family in FAMILIES if not family.logits)  # of general.architecture


# By projector: those whose pictures the converter scales as the processor's files say (it has constants for 3n), and
# how the names of the tensors begin that it knows, where transformers has other names for them in its code.
SCALED_BY_PROCESSOR = frozenset({"gemma3", "gemma4v", "gemma4uv"})
TOWERS: Mapping[str, str] = {"gemma3": "vision_tower.vision_model.", "gemma4uv": "model.vision_embedder."}


def is_vision(tensor: str) -> bool:
    """Whether a tensor of a checkpoint, by its name, is one that it sees with."""
    return _VISION.search(tensor) is not None


def family_of(architecture: str) -> Family | None:
    """The family of a class name such as `Gemma3ForCausalLM`, or None when it is not a Gemma we make sets of."""
    return _BY_ARCHITECTURE.get(architecture)


def by_gguf_arch(gguf_arch: object) -> Family | None:
    """The family of a value of `general.architecture`."""
    return _BY_GGUF_ARCH.get(str(gguf_arch))


def modalities(architecture: str, config: Mapping[str, object], tensors: Iterable[str]) -> tuple[bool, bool]:
    """(sees, hears): what the class can, the configuration names and the weights hold.

    A text model that was cut out of a multimodal one often keeps the configuration, or the class, but not the tower.
    """
    family = family_of(architecture)
    projectors = family.architectures[architecture] if family else TEXT_ONLY
    names = list(tensors)

    def has(projector: str | None, key: str, pattern: re.Pattern[str]) -> bool:
        return projector is not None and config.get(key) is not None and any(map(pattern.search, names))

    return has(projectors.vision, "vision_config", _VISION), has(projectors.audio, "audio_config", _AUDIO)


def layers_with_cache(header: Header) -> int:
    """How many layers of a base compute keys and values; the others take those of earlier ones.

    From `load_arch_hparams` of llama.cpp's models, commit 0c1e57098.
    """
    arch = header.get("general.architecture")
    n_layers, n_shared = (_number(header, arch, key) for key in ("block_count", "attention.shared_kv_layers"))
    family = by_gguf_arch(arch)
    if family is not None and family.n_layers_with_cache is not None:
        return min(n_layers, family.n_layers_with_cache)
    return n_layers - n_shared


def unread_layers(header: Header) -> list[int]:
    """Layers of a base that hold keys and values which no computation reads, so no imatrix can have data for them."""
    with_cache = layers_with_cache(header)
    n_layers = _number(header, header.get("general.architecture"), "block_count")
    kinds = ("attn_k", "attn_v")
    return [
        layer
        for layer in range(with_cache, n_layers)
        if any(f"blk.{layer}.{kind}.weight" in header.by_name for kind in kinds)
    ]


def unread_tensors(header: Header) -> list[str]:
    """The weights of `unread_layers` that nothing reads."""
    names = [f"blk.{layer}.{kind}.weight" for layer in unread_layers(header) for kind in ("attn_k", "attn_v")]
    return [name for name in names if name in header.by_name]


def _number(header: Header, arch: object, key: str) -> int:
    value = header.get(f"{arch}.{key}")
    return value if isinstance(value, int) else 0
