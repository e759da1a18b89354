"""What is true of each Gemma generation, as one table. A new family is one row.

Consumes nothing, produces frozen rows; a checkpoint's own files win over the table wherever they say more.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from gemma_gguf.manifest import Support


@dataclass(frozen=True)
class Family:
    """One row. `architectures` are the class names in `config.json`, `gguf_arch` the key `general.architecture`."""

    name: str
    architectures: tuple[str, ...]
    gguf_arch: str
    support: Support


def _since(pull_request: int, merged: str, release: str | None = None) -> Support:
    return Support(pull_request=pull_request, merged=merged, release=release)


# Since when llama.cpp loads each: the pull request that added the architecture, the day it was merged, and the first
# release where a source names it (ggml-org/llama.cpp#12345 tried b4875; abetlen/llama-cpp-python#2065 names b6384).
FAMILIES = (
    Family("Gemma 1", ("GemmaForCausalLM",), "gemma", _since(5631, "2024-02-21")),
    Family("Gemma 2", ("Gemma2ForCausalLM",), "gemma2", _since(8156, "2024-06-28")),
    Family(
        "Gemma 3",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        "gemma3",
        _since(12343, "2025-03-12", "b4875"),
    ),
    Family("EmbeddingGemma", ("Gemma3TextModel",), "gemma-embedding", _since(15798, "2025-09-04", "b6384")),
    Family(
        "Gemma 3n",
        ("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"),
        "gemma3n",
        _since(14400, "2025-06-26"),
    ),
    Family(
        "Gemma 4",
        ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"),
        "gemma4",
        _since(21309, "2026-04-02"),
    ),
)
WITHOUT_LOGITS = frozenset({"gemma-embedding"})  # values of general.architecture
# Drafts for speculative decoding: the converter knows them, but llama.cpp makes no context of one without the model
# that it drafts for. Each with the prefix by which llama-server's `-hf` tells such a file from a model.
DRAFTS: Mapping[str, str] = {
    "Gemma4AssistantForCausalLM": "mtp",
    "Gemma4UnifiedAssistantForCausalLM": "mtp",
    "Gemma4DSparkModel": "dspark",
}
_BY_ARCHITECTURE: Mapping[str, Family] = {name: family for family in FAMILIES for name in family.architectures}


def family_of(architecture: str) -> Family | None:
    """The family of a class name such as `Gemma3ForCausalLM`, or None when it is not a Gemma we make sets of."""
    return _BY_ARCHITECTURE.get(architecture)
