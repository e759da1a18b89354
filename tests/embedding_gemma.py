"""A small EmbeddingGemma as sentence-transformers writes the real one, with seeded random weights.

A Gemma 3 text model that looks both ways, mean pooling, two dense layers after it, and the prompts that it was trained
with. Its tokenizer ends every text with `<eos>`. Columns are divisible by 256; the backbone lies in two shards.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.checkpoints import HIDDEN, SPECIAL, language_weights, sentencepiece_model, text_config, write_shards

DENSE = 512  # between the two dense layers; four times the hidden size in the real one
PROMPTS = {
    "query": "task: search result | query: ",
    "document": "title: none | text: ",
    "Clustering": "task: clustering | query: ",
    "STS": "task: sentence similarity | query: ",
}
MODULES = (
    ("", "Transformer"),
    ("1_Pooling", "Pooling"),
    ("2_Dense", "Dense"),
    ("3_Dense", "Dense"),
    ("4_Normalize", "Normalize"),
)
CARD = """---
license: gemma
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, sentence-similarity, feature-extraction]
---
# A test model
"""


def write_embedding_gemma(directory: Path, seed: int = 1, layers: int = 6) -> Path:
    """The checkpoint of `Gemma3TextModel` with its sentence-transformers modules."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    model, pieces = sentencepiece_model()
    (directory / "tokenizer.model").write_bytes(model)
    tokenizer = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": True,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "added_tokens_decoder": {str(i): {"content": text, "special": True} for i, text in enumerate(SPECIAL)},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    write_shards(directory, language_weights(rng, len(pieces), layers))
    config = {
        "architectures": ["Gemma3TextModel"],
        "dtype": "bfloat16",
        **text_config(len(pieces), layers),
        "use_bidirectional_attention": True,
        **{f"{name}_token_id": SPECIAL.index(f"<{name}>") for name in ("bos", "eos", "pad")},
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    _write_modules(directory, rng)
    (directory / "README.md").write_text(CARD)
    return directory


def _write_modules(directory: Path, rng: np.random.Generator) -> None:
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(MODULES)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    described = {"prompts": PROMPTS, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(described))
    pooling = {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for path, rows, columns in (("2_Dense", DENSE, HIDDEN), ("3_Dense", HIDDEN, DENSE)):
        (directory / path).mkdir(exist_ok=True)
        features = {"in_features": columns, "out_features": rows, "bias": False}
        activation = {"activation_function": "torch.nn.modules.linear.Identity"}
        (directory / path / "config.json").write_text(json.dumps(features | activation))
        weight = rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
        save_file({"linear.weight": weight}, directory / path / "model.safetensors")
