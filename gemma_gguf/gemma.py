"""What is true of each Gemma generation, as one table. A new family is one row.

Consumes nothing, produces frozen rows; a checkpoint's own files win over the table wherever they say more.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One row. `architectures` are the class names in `config.json`, `gguf_arch` the key `general.architecture`."""

    name: str
    architectures: tuple[str, ...]
    gguf_arch: str


FAMILIES = (
    Family("Gemma 1", ("GemmaForCausalLM",), "gemma"),
    Family("Gemma 2", ("Gemma2ForCausalLM",), "gemma2"),
    Family("Gemma 3", ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"), "gemma3"),
    Family("EmbeddingGemma", ("Gemma3TextModel",), "gemma-embedding"),
    Family("Gemma 3n", ("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"), "gemma3n"),
    Family(
        "Gemma 4",
        ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"),
        "gemma4",
    ),
)
_BY_ARCHITECTURE: Mapping[str, Family] = {name: family for family in FAMILIES for name in family.architectures}


def family_of(architecture: str) -> Family | None:
    """The family of a class name such as `Gemma3ForCausalLM`, or None when it is not a Gemma we make sets of."""
    return _BY_ARCHITECTURE.get(architecture)
