"""What is different about a model that gives embeddings instead of logits, as EmbeddingGemma does. Pure.

Consumes the checkpoint's sentence-transformers files, the base's header and vectors that were computed elsewhere;
produces arguments for llama.cpp's tools, the lines that are embedded, and the figures of `manifest.Similarity`.

Such a model has layers after the pooling (`dense_2`, `dense_3`). The converter leaves them out unless it is told
otherwise, and the vectors are then not the model's. llama-imatrix sees `blk.*` alone, and llama-quantize makes no file
of few bits with a matrix that has no data, so they stay at 8 bits in every quant: 5 MB of EmbeddingGemma.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_gguf import gemma
from gemma_gguf.errors import BadInputError, VerificationError
from gemma_gguf.files import sha256_bytes
from gemma_gguf.gguf_io import Header
from gemma_gguf.manifest import EmbeddingFacts
from gemma_gguf.recipes import Recipe

Vectors = npt.NDArray[np.float32]  # (lines, width)

DENSE_TENSORS = ("dense_2", "dense_3")  # in the order in which they are applied
DENSE_TYPE = "q8_0"
CONVERTER_FLAGS = ("--sentence-transformers-dense-modules",)
# No perplexity without logits. And llama-imatrix refuses tokenizers that end texts with EOS, as this one does; the
# switch holds for its run alone and changes one token of the whole text.
IMATRIX_FLAGS = ("--no-ppl", "--override-kv", "tokenizer.ggml.add_eos_token=bool:false")
DEFAULT_LINES = 400  # of the held-out text
MIN_CHARACTERS = 12  # of a line: a bracket or a lone word says nothing
DOCUMENT, QUERY = "document", "query"  # names of prompts in config_sentence_transformers.json
SIMILARITY = "cosine"
MAX_PROMPT = 1000  # characters; EmbeddingGemma's longest has 38


# --- arguments ---------------------------------------------------------------------------------------------------


def converter_flags(gguf_arch: str) -> tuple[str, ...]:
    return CONVERTER_FLAGS if gguf_arch in gemma.WITHOUT_LOGITS else ()


def imatrix_flags(gguf_arch: str) -> tuple[str, ...]:
    return IMATRIX_FLAGS if gguf_arch in gemma.WITHOUT_LOGITS else ()


def fitted(recipe: Recipe, gguf_arch: str) -> Recipe:
    """The recipe as it is made for this architecture: matrices that no imatrix reaches keep 8 bits."""
    if recipe.is_base or gguf_arch not in gemma.WITHOUT_LOGITS:
        return recipe
    pins = [word for name in DENSE_TENSORS for word in ("--tensor-type", f"{name}={DENSE_TYPE}")]
    return replace(recipe, flags=(*recipe.flags, *pins))


# --- the checkpoint -----------------------------------------------------------------------------------------------


def facts(modules: Any, described: Mapping[str, Any]) -> EmbeddingFacts:
    """What `modules.json` and `config_sentence_transformers.json` say of a model.

    Raises `BadInputError` when there is no pooling: without one a model gives a vector for each token, not for a text.
    """
    rows = [row for row in modules if isinstance(row, dict)] if isinstance(modules, list) else []
    kinds = [(str(row.get("type", "")).rpartition(".")[2], str(row.get("path", ""))) for row in rows]
    if not any(kind == "Pooling" for kind, _ in kinds):
        raise BadInputError(
            "this embedding model has no modules.json that names its pooling",
            next_step="Download the whole repository: modules.json, 1_Pooling, 2_Dense and 3_Dense belong to it. "
            "What transformers saved lacks them: copy them from the model that it was tuned from.",
        )
    prompts = described.get("prompts")
    named = prompts.items() if isinstance(prompts, dict) else ()
    similarity = described.get("similarity_fn_name")
    return EmbeddingFacts(
        prompts={
            str(name): text
            for name, text in named
            if isinstance(text, str) and len(text) <= MAX_PROMPT and len(str(name)) <= MAX_PROMPT
        },
        similarity=similarity if isinstance(similarity, str) and len(similarity) <= 40 else None,
        dense=[path for kind, path in kinds if kind == "Dense"],
    )


def check_base(header: Header, said: EmbeddingFacts) -> None:
    """The base pools, and holds every dense layer that the checkpoint names.

    Raises `VerificationError` otherwise: its vectors would be other ones than the checkpoint's, and nothing else would
    tell.
    """
    arch = header.get("general.architecture")
    if header.get(f"{arch}.pooling_type") is None:
        raise VerificationError(f"{header.path} does not say how it pools: it would give no vector for a text")
    there = [name for name in DENSE_TENSORS if f"{name}.weight" in header.by_name]
    if len(there) != len(said.dense):
        raise VerificationError(
            f"{header.path} holds {len(there)} of the {len(said.dense)} dense layers that modules.json names",
            next_step="Download the checkpoint again, with model.safetensors and config.json of each of them.",
        )


# --- what is embedded ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lines:
    """The texts that all files embed: lines of `name`, each after the model's own `prompt`."""

    name: str
    prompt: str
    texts: tuple[str, ...]

    @property
    def data(self) -> bytes:
        """As the worker reads them: a JSON list."""
        return json.dumps([self.prompt + text for text in self.texts], ensure_ascii=False).encode()

    @property
    def sha256(self) -> str:
        return sha256_bytes(self.data)


def lines_of(name: str, text: bytes, said: EmbeddingFacts, wanted: int | None) -> Lines:
    """`wanted` lines of a text, evenly spread over it, each once, after the prompt for documents where there is one."""
    long = (line.strip() for line in text.decode("utf-8").splitlines())
    every = list(dict.fromkeys(line for line in long if len(line) >= MIN_CHARACTERS))
    count = min(wanted or DEFAULT_LINES, len(every))
    chosen = tuple(every[number * len(every) // count] for number in range(count))
    return Lines(name, said.prompts.get(DOCUMENT, ""), chosen)


# --- figures ------------------------------------------------------------------------------------------------------


def similarity(base: Vectors, mine: Vectors) -> dict[str, Any]:
    """The figures of `manifest.Similarity`: rows are the same lines, embedded by the base and by a quant.

    `cosine` is the mean over the lines, with its standard error; lines count as independent. `same_nearest` is the
    share of lines whose most similar other line is the same by both: what a search would find first. Its error is
    binomial. Raises `VerificationError` for vectors without direction, or with NaN or Inf.
    """
    if base.shape != mine.shape or len(base) < 2:
        raise VerificationError(f"vectors of shape {mine.shape} cannot be compared with those of shape {base.shape}")
    ours, theirs = _units(mine), _units(base)
    cosines = np.clip((ours * theirs).sum(axis=1), -1.0, 1.0)
    same = float((_nearest(ours) == _nearest(theirs)).mean())
    n = len(cosines)
    return {
        "n_lines": n,
        "n_embd": int(base.shape[1]),
        # Twelve digits: what is beyond them is the arithmetic's, and a file like the base has just 1.
        "cosine": {"value": round(float(cosines.mean()), 12), "se": round(float(cosines.std(ddof=1)) / n**0.5, 12)},
        "cosine_min": round(float(cosines.min()), 12),
        "same_nearest": {"value": same, "se": (same * (1 - same) / (n - 1)) ** 0.5},
    }


def _units(vectors: Vectors) -> npt.NDArray[np.float64]:
    """Vectors of length one."""
    wide: npt.NDArray[np.float64] = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise VerificationError("embeddings hold NaN or Inf, or have no direction")
    wide /= lengths[:, None]
    return wide


def _nearest(units: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """For each row the number of the other row most like it."""
    like = units @ units.T
    np.fill_diagonal(like, -np.inf)
    nearest: npt.NDArray[np.int64] = like.argmax(axis=1)
    return nearest
