"""Small real checkpoints, written as Hugging Face writes them, with seeded random weights.

`write_gemma3_vision` has columns divisible by 256 (so every K- and I-quant applies), a SigLIP tower, two shards and
a chat template; it goes through the real converter, llama-imatrix and llama-quantize in seconds.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from sentencepiece import sentencepiece_model_pb2 as sp

from gemma_gguf.demo import to_bf16, write_bf16_safetensors

HIDDEN, FEED_FORWARD, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 512, 3, 4, 2, 64
VISION_HIDDEN, VISION_FEED_FORWARD, VISION_LAYERS, PATCH, IMAGE = 64, 128, 2, 14, 56
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")
TOKEN_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else "
    "message['role'] }}\n{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def sentencepiece_model(n_vocab: int = 0, special: Sequence[str] = SPECIAL) -> tuple[bytes, list[str]]:
    """(tokenizer.model, pieces): specials, all bytes, the printable ASCII characters and some merges of them.

    `special` begins with the four of `SPECIAL`. Unused pieces fill it up to `n_vocab`.
    """
    model = sp.ModelProto()
    model.trainer_spec.model_type = sp.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.pad_id, model.trainer_spec.eos_id = 0, 1
    model.trainer_spec.bos_id, model.trainer_spec.unk_id = 2, 3
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    kinds = sp.ModelProto.SentencePiece
    pieces: list[tuple[str, float, Any]] = [
        (text, -1000.0, kinds.UNKNOWN if text == "<unk>" else kinds.CONTROL) for text in special
    ]
    pieces += [(f"<0x{byte:02X}>", -1000.0, kinds.BYTE) for byte in range(256)]
    merges = ["th", "he", "in", "er", "an", "re", "on", "at", "▁t", "▁a", "▁s", "▁w", "the", "ing", "▁the", "and"]
    pieces += [(text, -float(rank), kinds.NORMAL) for rank, text in enumerate(merges)]
    characters = ["▁", "\n", *(chr(code) for code in range(33, 127))]
    pieces += [(text, -float(len(merges) + rank), kinds.NORMAL) for rank, text in enumerate(characters)]
    pieces += [(f"<unused{i}>", -2000.0, kinds.UNUSED) for i in range(n_vocab - len(pieces))]
    for text, score, kind in pieces:
        piece = model.pieces.add()
        piece.piece, piece.score, piece.type = text, score, kind
    model.trainer_spec.vocab_size = len(pieces)
    return model.SerializeToString(), [text for text, _, _ in pieces]


def _tower(rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
    def normal(*shape: int) -> npt.NDArray[np.float32]:
        return rng.normal(0, 0.05, shape).astype(np.float32)

    root = "vision_tower.vision_model"
    patches = (IMAGE // PATCH) ** 2
    tensors = {
        f"{root}.embeddings.patch_embedding.weight": normal(VISION_HIDDEN, 3, PATCH, PATCH),
        f"{root}.embeddings.patch_embedding.bias": normal(VISION_HIDDEN),
        f"{root}.embeddings.position_embedding.weight": normal(patches, VISION_HIDDEN),
        f"{root}.post_layernorm.weight": 1 + normal(VISION_HIDDEN),
        f"{root}.post_layernorm.bias": normal(VISION_HIDDEN),
        "multi_modal_projector.mm_input_projection_weight": normal(VISION_HIDDEN, HIDDEN),
        "multi_modal_projector.mm_soft_emb_norm.weight": normal(VISION_HIDDEN),
    }
    for layer in range(VISION_LAYERS):
        block = f"{root}.encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            tensors[f"{block}.{norm}.weight"] = 1 + normal(VISION_HIDDEN)
            tensors[f"{block}.{norm}.bias"] = normal(VISION_HIDDEN)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors[f"{block}.self_attn.{projection}.weight"] = normal(VISION_HIDDEN, VISION_HIDDEN)
            tensors[f"{block}.self_attn.{projection}.bias"] = normal(VISION_HIDDEN)
        tensors[f"{block}.mlp.fc1.weight"] = normal(VISION_FEED_FORWARD, VISION_HIDDEN)
        tensors[f"{block}.mlp.fc1.bias"] = normal(VISION_FEED_FORWARD)
        tensors[f"{block}.mlp.fc2.weight"] = normal(VISION_HIDDEN, VISION_FEED_FORWARD)
        tensors[f"{block}.mlp.fc2.bias"] = normal(VISION_HIDDEN)
    return tensors


def language_weights(
    rng: np.random.Generator, n_vocab: int, layers: int, hidden: int = HIDDEN
) -> dict[str, npt.NDArray[np.float32]]:
    def normal(*shape: int) -> npt.NDArray[np.float32]:
        return rng.normal(0, 0.05, shape).astype(np.float32)

    tensors = {"embed_tokens.weight": normal(n_vocab, hidden), "norm.weight": normal(hidden)}
    for layer in range(layers):
        block = f"layers.{layer}"
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            tensors[f"{block}.{norm}_layernorm.weight"] = normal(hidden)
        tensors[f"{block}.self_attn.q_proj.weight"] = normal(HEADS * HEAD_DIM, hidden)
        tensors[f"{block}.self_attn.k_proj.weight"] = normal(KV_HEADS * HEAD_DIM, hidden)
        tensors[f"{block}.self_attn.v_proj.weight"] = normal(KV_HEADS * HEAD_DIM, hidden)
        tensors[f"{block}.self_attn.o_proj.weight"] = normal(hidden, HEADS * HEAD_DIM)
        tensors[f"{block}.self_attn.q_norm.weight"] = normal(HEAD_DIM)
        tensors[f"{block}.self_attn.k_norm.weight"] = normal(HEAD_DIM)
        tensors[f"{block}.mlp.gate_proj.weight"] = normal(FEED_FORWARD, hidden)
        tensors[f"{block}.mlp.up_proj.weight"] = normal(FEED_FORWARD, hidden)
        tensors[f"{block}.mlp.down_proj.weight"] = normal(hidden, FEED_FORWARD)
    return tensors


def text_config(n_vocab: int, layers: int, hidden: int = HIDDEN) -> dict[str, Any]:
    return {
        "model_type": "gemma3_text",
        "vocab_size": n_vocab,
        "hidden_size": hidden,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "query_pre_attn_scalar": HEAD_DIM,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        **TOKEN_IDS,
    }


def _write_tokenizer(directory: Path) -> int:
    model, pieces = sentencepiece_model()
    write_tokenizer_files(directory, model)
    return len(pieces)


def write_tokenizer_files(
    directory: Path,
    model: bytes,
    chat_template: str | None = CHAT_TEMPLATE,
    listed: Mapping[int, str] = MappingProxyType(dict(enumerate(SPECIAL))),
) -> None:
    """tokenizer.model and the configuration that lists its special tokens; a base model has no chat template.

    `listed` may hold tokens beyond the model's: those of a fine-tune.
    """
    (directory / "tokenizer.model").write_bytes(model)
    decoder = {str(number): {"content": text, "special": True} for number, text in listed.items()}
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "added_tokens_decoder": decoder,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_shards(directory: Path, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Two BF16 shards and their index."""
    names = sorted(tensors)
    half = len(names) // 2
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        write_bf16_safetensors(directory / file, {name: to_bf16(tensors[name]) for name in part})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


CARD = """---
license: gemma
library_name: transformers
pipeline_tag: image-text-to-text
tags: [gemma3, test]
extra_gated_heading: Access Gemma on Hugging Face
---
# A test model
"""


def write_gemma3_vision(directory: Path, seed: int = 1, layers: int = LAYERS) -> Path:
    """A multimodal Gemma 3 (`Gemma3ForConditionalGeneration`) with random weights."""
    directory.mkdir(parents=True, exist_ok=True)
    n_vocab = _write_tokenizer(directory)
    rng = np.random.default_rng(seed)
    language = {f"language_model.model.{k}": v for k, v in language_weights(rng, n_vocab, layers).items()}
    write_shards(directory, {**language, **_tower(rng)})
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "torch_dtype": "bfloat16",
        "mm_tokens_per_image": 16,
        **TOKEN_IDS,
        "text_config": text_config(n_vocab, layers),
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": VISION_FEED_FORWARD,
            "num_hidden_layers": VISION_LAYERS,
            "num_attention_heads": 2,
            "image_size": IMAGE,
            "patch_size": PATCH,
            "num_channels": 3,
            "layer_norm_eps": 1e-06,
        },
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_seq_length": 16, "size": {"height": IMAGE}}
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (directory / "README.md").write_text(CARD)
    return directory


def write_gemma3_text(
    directory: Path, seed: int = 1, layers: int = LAYERS, hidden: int = HIDDEN, *, uneven: bool = False
) -> Path:
    """A text-only Gemma 3 (`Gemma3ForCausalLM`) with random weights, in two shards.

    A `hidden` of 160 makes columns that 256 does not divide, as in Gemma 3 270M: then llama.cpp falls back. `uneven`
    weights have blocks of very different scales, on which quantisers differ that hardly do on others.
    """
    directory.mkdir(parents=True, exist_ok=True)
    n_vocab = _write_tokenizer(directory)
    rng = np.random.default_rng(seed)
    language = language_weights(rng, n_vocab, layers, hidden)
    if uneven:
        for name, weights in language.items():
            if "mlp" in name:
                scales = np.exp2(rng.integers(-10, 1, weights.size // 32)).astype(np.float32)
                language[name] = weights * scales.repeat(32).reshape(weights.shape)
    tensors = {f"model.{k}": v for k, v in language.items()}
    write_shards(directory, tensors)
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "torch_dtype": "bfloat16",
        **text_config(n_vocab, layers, hidden),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    (directory / "README.md").write_text(CARD.replace("image-text-to-text", "text-generation"))
    return directory
