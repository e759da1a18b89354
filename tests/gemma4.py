"""A small Gemma 4 mixture-of-experts text model, written as Hugging Face writes it, with seeded random weights.

`write_gemma4_moe` has what Google's 26B-A4B has and other Gemmas do not: experts beside the dense feed-forward, wider
heads and no value projection in the layers with full attention, and a tokenizer without `tokenizer.model`. Columns of
all quantised weights are divisible by 256, so every K- and I-quant applies.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.checkpoints import write_shards

HIDDEN, FEED_FORWARD, EXPERT_FEED_FORWARD, EXPERTS, TOP_K = 256, 512, 256, 4, 2
HEADS, SLIDING_HEAD_DIM, SLIDING_KV_HEADS, FULL_HEAD_DIM, FULL_KV_HEADS = 4, 64, 2, 128, 1
LAYERS, PATTERN = 3, 3  # every third layer and the last have full attention
NAMED = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "std_token": "<|tool>",
    "etd_token": "<tool|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
    "escape_token": '<|"|>',
    "think_token": "<|think|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "boi_token": "<|image>",
    "image_token": "<|image|>",
    "eoi_token": "<image|>",
    "boa_token": "<|audio>",
    "audio_token": "<|audio|>",
    "eoa_token": "<audio|>",
}
EXTRA = ("<|video|>",)
SPECIAL = (*NAMED.values(), *EXTRA)
# In the order of their ranks; what a pair joins to is a token of its own.
MERGES = (
    *("t h", "h e", "i n", "e r", "a n", "r e", "o n", "a t", "▁ t", "▁ a", "▁ s", "▁ w"),
    *("th e", "in g", "an d", "▁ the", "▁ and", "▁ ▁", "\n \n"),
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn>{{ 'model' if message['role'] == 'assistant' else "
    "message['role'] }}\n{{ message['content'] | trim }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)
CARD = """---
library_name: transformers
license: apache-2.0
license_link: https://ai.google.dev/gemma/docs/gemma_4_license
pipeline_tag: text-generation
tags: [gemma4, test]
---
# A test model
"""


def vocabulary() -> list[str]:
    """All tokens by id: specials, all bytes, merges, the newline and the printable ASCII characters."""
    merged = dict.fromkeys(pair.replace(" ", "") for pair in MERGES)
    characters = ["▁", "\n", *(chr(code) for code in range(33, 127))]
    return [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *characters]


def _is_full(layer: int, layers: int) -> bool:
    return (layer + 1) % PATTERN == 0 or layer == layers - 1


def _weights(rng: np.random.Generator, n_vocab: int, layers: int) -> dict[str, npt.NDArray[np.float32]]:
    def normal(*shape: int) -> npt.NDArray[np.float32]:
        return rng.normal(0, 0.05, shape).astype(np.float32)

    tensors = {"embed_tokens.weight": normal(n_vocab, HIDDEN), "norm.weight": 1 + normal(HIDDEN)}
    for layer in range(layers):
        block, full = f"layers.{layer}", _is_full(layer, layers)
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            tensors[f"{block}.{norm}_layernorm.weight"] = 1 + normal(HIDDEN)
        for norm in ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"):
            tensors[f"{block}.{norm}.weight"] = 1 + normal(HIDDEN)
        tensors[f"{block}.layer_scalar"] = 1 + normal(1)

        head_dim, kv_heads = (FULL_HEAD_DIM, FULL_KV_HEADS) if full else (SLIDING_HEAD_DIM, SLIDING_KV_HEADS)
        tensors[f"{block}.self_attn.q_proj.weight"] = normal(HEADS * head_dim, HIDDEN)
        tensors[f"{block}.self_attn.k_proj.weight"] = normal(kv_heads * head_dim, HIDDEN)
        if not full:  # attention_k_eq_v: layers with full attention use the keys as values
            tensors[f"{block}.self_attn.v_proj.weight"] = normal(kv_heads * head_dim, HIDDEN)
        tensors[f"{block}.self_attn.o_proj.weight"] = normal(HIDDEN, HEADS * head_dim)
        tensors[f"{block}.self_attn.q_norm.weight"] = 1 + normal(head_dim)
        tensors[f"{block}.self_attn.k_norm.weight"] = 1 + normal(head_dim)

        tensors[f"{block}.mlp.gate_proj.weight"] = normal(FEED_FORWARD, HIDDEN)
        tensors[f"{block}.mlp.up_proj.weight"] = normal(FEED_FORWARD, HIDDEN)
        tensors[f"{block}.mlp.down_proj.weight"] = normal(HIDDEN, FEED_FORWARD)
        tensors[f"{block}.router.proj.weight"] = 20 * normal(EXPERTS, HIDDEN)
        tensors[f"{block}.router.scale"] = 1 + normal(HIDDEN)
        tensors[f"{block}.router.per_expert_scale"] = 1 + normal(EXPERTS)
        tensors[f"{block}.experts.gate_up_proj"] = normal(EXPERTS, 2 * EXPERT_FEED_FORWARD, HIDDEN)
        tensors[f"{block}.experts.down_proj"] = normal(EXPERTS, HIDDEN, EXPERT_FEED_FORWARD)
    return tensors


def _config(tokens: list[str], layers: int) -> dict[str, Any]:
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "dtype": "bfloat16",
        "vocab_size": len(tokens),
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention" if _is_full(n, layers) else "sliding_attention" for n in range(layers)],
        "num_attention_heads": HEADS,
        "num_key_value_heads": SLIDING_KV_HEADS,
        "num_global_key_value_heads": FULL_KV_HEADS,
        "head_dim": SLIDING_HEAD_DIM,
        "global_head_dim": FULL_HEAD_DIM,
        "attention_k_eq_v": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": len(tokens),
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": TOP_K,
        "moe_intermediate_size": EXPERT_FEED_FORWARD,
        "use_double_wide_mlp": False,
        "max_position_embeddings": 2048,
        "sliding_window": 512,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "rms_norm_eps": 1e-06,
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "initializer_range": 0.02,
        "bos_token_id": tokens.index("<bos>"),
        "eos_token_id": tokens.index("<eos>"),
        "pad_token_id": tokens.index("<pad>"),
        "transformers_version": "5.23.0",
    }


def _tokenizer(tokens: list[str]) -> dict[str, Any]:
    """`tokenizer.json`: BPE with byte fallback over the whole text, with spaces as ▁."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    sequences = {name: {"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB")}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokens.index(text), "content": text, **flags} for text in SPECIAL],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [sequences["A"]],
            "pair": [sequences["A"], sequences["B"]],
            "special_tokens": {},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: number for number, text in enumerate(tokens)},
            "merges": [pair.split(" ") for pair in MERGES],
        },
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        **NAMED,
        "backend": "tokenizers",
        "extra_special_tokens": list(EXTRA),
        "model_max_length": 1000000000000000019884624838656,
        "padding_side": "left",
        "processor_class": "Gemma4Processor",
        "tokenizer_class": "GemmaTokenizer",
    }


def write_tokenizer_files(directory: Path) -> int:
    """`tokenizer.json`, its configuration and the chat template; returns the size of the vocabulary."""
    tokens = vocabulary()
    for name, document in {"tokenizer.json": _tokenizer(tokens), "tokenizer_config.json": _tokenizer_config()}.items():
        _write_json(directory / name, document)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return len(tokens)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")


def write_gemma4_moe(directory: Path, seed: int = 1, layers: int = LAYERS) -> Path:
    """A text-only Gemma 4 with experts (`Gemma4ForCausalLM`), in two shards.

    `layers` is at least 2: llama.cpp wants a sliding layer beside the last one, which always has full attention.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokens = vocabulary()
    weights = _weights(np.random.default_rng(seed), len(tokens), layers)
    write_shards(directory, {f"model.{name}": values for name, values in weights.items()})
    generation = {
        "bos_token_id": tokens.index("<bos>"),
        "do_sample": True,
        "eos_token_id": [tokens.index(text) for text in ("<eos>", "<turn|>", "<|tool_response>")],
        "pad_token_id": tokens.index("<pad>"),
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
        "transformers_version": "5.23.0",
    }
    _write_json(directory / "config.json", _config(tokens, layers))
    _write_json(directory / "generation_config.json", generation)
    write_tokenizer_files(directory)
    (directory / "README.md").write_text(CARD, encoding="utf-8")
    return directory
