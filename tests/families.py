"""A small checkpoint of every Gemma family, with seeded random weights, in the layout that `transformers` writes.

`write` makes them in a child process, `python -m tests.families DIRECTORY NAME...`: it alone imports torch. Weights and
configurations come from `save_pretrained` (two safetensors shards and their index); what Google's own checkpoints hold
beyond that is added: keys and values of layers that take them from earlier ones, and the tower of Gemma 3n, whose code
is another library's. All columns of quantised weights are divisible by 256. `save_again` loads some of them in such a
process and saves them, as those do who tune them.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import checkpoints, gemma4

SEED = 20261122
SAVE_AGAIN, CODE_NAMES = "--save-again", "--with-the-codes-names"
# The tokens of Gemma 1 and 2 that are no text, at the places they have there; Gemma 3 has one more before the turns.
_UNUSED = {"<fim_prefix>": 67, "<fim_middle>": 68, "<fim_suffix>": 69, "<file_separator>": 70}
_FIRST = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]")
GEMMA1_SPECIAL = (*_FIRST, *(f"<unused{n}>" for n in range(99)), "<start_of_turn>", "<end_of_turn>")
CODEGEMMA_SPECIAL = tuple({v: k for k, v in _UNUSED.items()}.get(n, t) for n, t in enumerate(GEMMA1_SPECIAL))
GEMMA3_SPECIAL = (*GEMMA1_SPECIAL[:6], *GEMMA1_SPECIAL[7:], "<start_of_image>", "<end_of_image>")
CHATML_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT: Mapping[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
# llama.cpp's Gemma 3n takes keys and values from layers 18 and 19 after the twentieth, whatever the file says.
GEMMA3N_LAYERS = 22


@dataclass(frozen=True)
class Checkpoint:
    """How one of them is made. `build` runs in the child: (what saves the configuration, the tensors)."""

    name: str
    family: str  # a row of gemma.FAMILIES
    build: Callable[[int], tuple[Any, Any]]
    tokenizer: Callable[[Path], int]  # writes its files, returns the size of the vocabulary
    preprocessor: Mapping[str, Any] | None = None


# --- tokenizers ----------------------------------------------------------------------------------------------------


def _sentencepiece(
    special: tuple[str, ...], template: str | None = checkpoints.CHAT_TEMPLATE, added: tuple[str, ...] = ()
) -> Callable[[Path], int]:
    """tokenizer.model beside a tokenizer_config.json that lists what is special, as the repositories of Gemma 1-3n;
    `added` are the tokens of a fine-tune, which only that list knows."""

    def write(directory: Path) -> int:
        model, pieces = checkpoints.sentencepiece_model(special=special)
        listed = {**dict(enumerate(special)), **dict(enumerate(added, start=len(pieces)))}
        checkpoints.write_tokenizer_files(directory, model, template, listed)
        return len(pieces) + len(added)

    return write


def _tokenizer_json(directory: Path) -> int:
    """tokenizer.json and a tokenizer_config.json of transformers 5, as Google's Gemma 4; no tokenizer.model."""
    return gemma4.write_tokenizer_files(directory)


# --- weights, in the child -----------------------------------------------------------------------------------------


def _gemma1(n_vocab: int) -> tuple[Any, Any]:
    import transformers as hf  # noqa: PLC0415

    config = hf.GemmaConfig(**TEXT, vocab_size=n_vocab)
    return _seeded_model(hf.GemmaForCausalLM(config))


def _gemma2(n_vocab: int) -> tuple[Any, Any]:
    import transformers as hf  # noqa: PLC0415

    config = hf.Gemma2Config(**TEXT, vocab_size=n_vocab, query_pre_attn_scalar=64, sliding_window=64)
    return _seeded_model(hf.Gemma2ForCausalLM(config))


def _gemma3_text(n_vocab: int) -> tuple[Any, Any]:
    import transformers as hf  # noqa: PLC0415

    config = hf.Gemma3TextConfig(**TEXT, vocab_size=n_vocab, query_pre_attn_scalar=64, sliding_window=64)
    return _seeded_model(hf.Gemma3ForCausalLM(config))


def _merge(n_vocab: int) -> tuple[Any, Any]:
    """A fine-tune as merge tools leave it: with an output matrix of its own."""
    import transformers as hf  # noqa: PLC0415

    config = hf.Gemma3TextConfig(
        **TEXT, vocab_size=n_vocab, query_pre_attn_scalar=64, sliding_window=64, tie_word_embeddings=False
    )
    return _seeded_model(hf.Gemma3ForCausalLM(config))


def _gemma3(n_vocab: int) -> tuple[Any, Any]:
    import transformers as hf  # noqa: PLC0415

    text = {**TEXT, "vocab_size": n_vocab, "query_pre_attn_scalar": 64, "sliding_window": 64}
    tower = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = hf.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4)
    config.architectures = ["Gemma3ForConditionalGeneration"]
    # Names of Google's files. The converter of 0.3.36 does not know those that transformers 5.23 gives the tower.
    published = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    tensors = {}
    for name, values in _seeded(hf.Gemma3ForConditionalGeneration(config)).items():
        root = next((root for root in published if name.startswith(root)), None)
        tensors[name if root is None else published[root] + name.removeprefix(root)] = values
    return config, tensors


def _gemma3n_text_config(n_vocab: int) -> Any:
    import transformers as hf  # noqa: PLC0415

    kinds = ["full_attention" if n in {4, 9, 14, 19, 21} else "sliding_attention" for n in range(GEMMA3N_LAYERS)]
    return hf.Gemma3nTextConfig(
        **{**TEXT, "num_hidden_layers": GEMMA3N_LAYERS, "intermediate_size": 256},
        vocab_size=n_vocab + 8,  # of sounds and pictures, which have no embedding of their own
        vocab_size_per_layer_input=n_vocab,
        hidden_size_per_layer_input=256,
        num_kv_shared_layers=GEMMA3N_LAYERS - 20,
        layer_types=kinds,
        laurel_rank=64,
        sliding_window=64,
        activation_sparsity_pattern=[0.95] * 10 + [0.0] * (GEMMA3N_LAYERS - 10),
    )


def _gemma3n_text(n_vocab: int) -> tuple[Any, Any]:
    import transformers as hf  # noqa: PLC0415

    config = _gemma3n_text_config(n_vocab)
    model = hf.Gemma3nForCausalLM(config)
    return model, _with_unread_keys(model, config, "model.")


def _gemma3n(n_vocab: int) -> tuple[Any, Any]:
    """The text model, the audio tower and both bridges by transformers; the MobileNet by hand."""
    import transformers as hf  # noqa: PLC0415
    from transformers.models.gemma3n import modeling_gemma3n as code  # noqa: PLC0415

    text = _gemma3n_text_config(n_vocab)
    audio = hf.Gemma3nAudioConfig(
        hidden_size=64,
        input_feat_size=32,
        conf_num_attention_heads=2,
        conf_num_hidden_layers=2,
        sscp_conv_channel_size=[16, 8],
        vocab_offset=n_vocab + 4,
        vocab_size=4,
    )
    vision = {"model_type": "gemma3n_vision", "hidden_size": 64, "vocab_offset": n_vocab, "vocab_size": 4}
    config = hf.Gemma3nConfig(text_config=text, audio_config=audio, vision_config=vision)
    config.architectures = ["Gemma3nForConditionalGeneration"]
    language = _with_unread_keys(hf.Gemma3nForCausalLM(text), text, "model.")
    tensors = {name.replace("model.", "model.language_model.", 1): value for name, value in language.items()}
    tensors.pop("lm_head.weight", None)
    parts = {
        "audio_tower": code.Gemma3nAudioEncoder(audio),
        "embed_audio": code.Gemma3nMultimodalEmbedder(audio, text),
        "embed_vision": code.Gemma3nMultimodalEmbedder(config.vision_config, text),
    }
    for name, part in parts.items():
        tensors |= {f"model.{name}.{key}": value for key, value in _seeded(part).items()}
    return config, tensors | _mobilenet(64)


def _mobilenet(width: int) -> dict[str, Any]:
    """One block of each kind of MobileNetV5, as timm names their tensors."""
    import torch  # noqa: PLC0415

    shapes: dict[str, tuple[int, ...]] = {
        "conv_stem.conv.weight": (16, 3, 3, 3),
        "conv_stem.conv.bias": (16,),
        "conv_stem.bn.weight": (16,),
        "blocks.0.0.conv_exp.weight": (32, 16, 3, 3),
        "blocks.0.0.bn1.weight": (32,),
        "blocks.0.0.conv_pwl.weight": (16, 32, 1, 1),
        "blocks.0.0.bn2.weight": (16,),
    }
    for stage, (before, after) in enumerate(((16, 24), (24, 32), (32, width)), start=1):
        root = f"blocks.{stage}.0"
        shapes |= {
            f"{root}.dw_start.conv.weight": (before, 1, 3, 3),
            f"{root}.dw_start.bn.weight": (before,),
            f"{root}.pw_exp.conv.weight": (2 * before, before, 1, 1),
            f"{root}.pw_exp.bn.weight": (2 * before,),
            f"{root}.dw_mid.conv.weight": (2 * before, 1, 3, 3),
            f"{root}.dw_mid.bn.weight": (2 * before,),
            f"{root}.pw_proj.conv.weight": (after, 2 * before, 1, 1),
            f"{root}.pw_proj.bn.weight": (after,),
            f"{root}.layer_scale.gamma": (after,),
        }
    root = "blocks.3.1"
    shapes |= {
        f"{root}.norm.weight": (width,),
        f"{root}.attn.query.proj.weight": (width, width, 1, 1),
        f"{root}.attn.key.proj.weight": (width, width, 1, 1),
        f"{root}.attn.value.proj.weight": (width, width, 1, 1),
        f"{root}.attn.output.proj.weight": (width, width, 1, 1),
        f"{root}.layer_scale.gamma": (width,),
        "msfa.ffn.pw_exp.conv.weight": (2 * width, 32 + width, 1, 1),
        "msfa.ffn.pw_exp.bn.weight": (2 * width,),
        "msfa.ffn.pw_proj.conv.weight": (width, 2 * width, 1, 1),
        "msfa.ffn.pw_proj.bn.weight": (width,),
        "msfa.norm.weight": (width,),
    }
    return {
        f"model.vision_tower.timm_model.{name}": 0.05 * torch.randn(shape) + (1 if _is_norm(name) else 0)
        for name, shape in shapes.items()
    }


def _gemma4_text(**more: Any) -> dict[str, Any]:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    rows = {
        **TEXT,
        "layer_types": kinds,
        "sliding_window": 64,
        "global_head_dim": 128,
        "final_logit_softcapping": 30.0,
    }
    return {**rows, "hidden_size_per_layer_input": 0, **more}


_VISION4 = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "position_embedding_size": 64,
}
_AUDIO4 = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [128, 8],  # the first stands for the 128 mel bins
    "output_proj_dims": 96,
}


def _gemma4_dense(n_vocab: int) -> tuple[Any, Any]:
    """As the 31B: keys are values in layers with full attention, and it sees."""
    import transformers as hf  # noqa: PLC0415

    text = _gemma4_text(vocab_size=n_vocab, attention_k_eq_v=True, num_global_key_value_heads=1)
    config = hf.Gemma4Config(text_config=text, vision_config={**_VISION4, "standardize": True})
    return _seeded_model(hf.Gemma4ForConditionalGeneration(config))


def _gemma4_experts(n_vocab: int) -> tuple[Any, Any]:
    """As the 26B-A4B: experts beside the dense feed-forward."""
    import transformers as hf  # noqa: PLC0415

    experts = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 256}
    text = _gemma4_text(vocab_size=n_vocab, attention_k_eq_v=True, num_global_key_value_heads=1, **experts)
    config = hf.Gemma4Config(text_config=text, vision_config=_VISION4)
    return _seeded_model(hf.Gemma4ForConditionalGeneration(config))


def _gemma4_e(n_vocab: int) -> tuple[Any, Any]:
    """As E2B: embeddings per layer, the last layers take keys and values from earlier ones, and it sees and hears."""
    import transformers as hf  # noqa: PLC0415

    text = _gemma4_text(
        vocab_size=n_vocab,
        vocab_size_per_layer_input=n_vocab,
        hidden_size_per_layer_input=256,
        num_hidden_layers=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=3,
        use_double_wide_mlp=True,
    )
    config = hf.Gemma4Config(
        text_config=text, vision_config={**_VISION4, "use_clipped_linears": True}, audio_config=_AUDIO4
    )
    model = hf.Gemma4ForConditionalGeneration(config)
    return model, _with_unread_keys(model, config.text_config, "model.language_model.")


def _gemma4_unified(n_vocab: int) -> tuple[Any, Any]:
    """It sees and hears without towers: pictures and sounds become tokens by one matrix each."""
    import transformers as hf  # noqa: PLC0415

    text = _gemma4_text(vocab_size=n_vocab, attention_k_eq_v=True, num_global_key_value_heads=1)
    vision = {"patch_size": 4, "mm_embed_dim": 256, "mm_posemb_size": 16, "output_proj_dims": 256}
    config = hf.Gemma4UnifiedConfig(text_config=text, vision_config=vision, audio_config={"audio_embed_dim": 640})
    return _seeded_model(hf.Gemma4UnifiedForConditionalGeneration(config))


def _with_unread_keys(model: Any, config: Any, root: str) -> dict[str, Any]:
    """The tensors of a model, with the keys and values of layers that share those of earlier ones: transformers drops
    them, Google's files hold them."""
    import torch  # noqa: PLC0415

    tensors = _seeded(model)
    first = config.num_hidden_layers - config.num_kv_shared_layers
    for layer in range(first, config.num_hidden_layers):
        same = next(n for n in reversed(range(first)) if config.layer_types[n] == config.layer_types[layer])
        for part in ("k_proj", "v_proj", "k_norm"):
            other = tensors[f"{root}layers.{same}.self_attn.{part}.weight"]
            values = 0.05 * torch.randn(other.shape) + (1 if part == "k_norm" else 0)
            tensors[f"{root}layers.{layer}.self_attn.{part}.weight"] = values
    return tensors


def _seeded_model(model: Any) -> tuple[Any, dict[str, Any]]:
    return model, _seeded(model)


def _is_norm(name: str) -> bool:
    return "norm" in name or ".bn" in name or "scal" in name or "gamma" in name


def _seeded(model: Any) -> dict[str, Any]:
    """Every tensor that is saved, with weights large enough that quantising them shows."""
    import torch  # noqa: PLC0415

    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    shared = set(getattr(model, "_tied_weights_keys", None) or ()) if tied else set()
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors = {}
    for name, value in model.state_dict().items():
        if name in shared:
            continue
        if name.endswith(("_min", "_max")):  # of clipped layers, infinite until they are trained
            tensors[name] = value.new_tensor(-20.0 if name.endswith("_min") else 20.0)
        elif name not in trained:
            tensors[name] = value.float()
        elif _is_norm(name):
            tensors[name] = value.float() + 0.05 * torch.randn(value.shape)
        else:
            tensors[name] = (1.0 if "router" in name else 0.05) * torch.randn(value.shape)
    return tensors


def _save(checkpoint: Checkpoint, directory: Path) -> None:
    """Everything of one checkpoint, into an empty directory."""
    import torch  # noqa: PLC0415
    from huggingface_hub import save_torch_state_dict  # noqa: PLC0415

    directory.mkdir(parents=True)
    torch.manual_seed(SEED)
    saves, seeded = checkpoint.build(checkpoint.tokenizer(directory))
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in seeded.items()}
    n_bytes = int(0.6 * sum(value.numel() * 2 for value in tensors.values()))
    if isinstance(saves, torch.nn.Module):  # with the names of published checkpoints, which are not those of the code
        saves.config.dtype = torch.bfloat16
        saves.save_pretrained(directory, state_dict=tensors, max_shard_size=n_bytes)
    else:
        saves.dtype = torch.bfloat16
        saves.save_pretrained(directory)
        save_torch_state_dict(tensors, directory, max_shard_size=n_bytes, metadata={"format": "pt"})
    if checkpoint.preprocessor is not None:
        (directory / "preprocessor_config.json").write_text(json.dumps(checkpoint.preprocessor))
    (directory / "README.md").write_text(checkpoints.CARD.replace("image-text-to-text", "text-generation"))


_IMAGES: Mapping[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 56, "width": 56}}
_SIGLIP = {**_IMAGES, "image_seq_length": 4}
CHECKPOINTS: Mapping[str, Checkpoint] = {
    row.name: row
    for row in (
        Checkpoint("gemma-1", "Gemma 1", _gemma1, _sentencepiece(GEMMA1_SPECIAL)),
        Checkpoint("codegemma", "Gemma 1", _gemma1, _sentencepiece(CODEGEMMA_SPECIAL, None)),
        Checkpoint("gemma-2", "Gemma 2", _gemma2, _sentencepiece(GEMMA1_SPECIAL)),
        Checkpoint("gemma-3-text", "Gemma 3", _gemma3_text, _sentencepiece(GEMMA3_SPECIAL)),
        Checkpoint(
            "merge", "Gemma 3", _merge, _sentencepiece(GEMMA3_SPECIAL, CHATML_TEMPLATE, ("<|im_start|>", "<|im_end|>"))
        ),
        Checkpoint("gemma-3-vision", "Gemma 3", _gemma3, _sentencepiece(GEMMA3_SPECIAL), _SIGLIP),
        Checkpoint("gemma-3n-text", "Gemma 3n", _gemma3n_text, _sentencepiece(GEMMA3_SPECIAL)),
        Checkpoint("gemma-3n", "Gemma 3n", _gemma3n, _sentencepiece(GEMMA3_SPECIAL), _IMAGES),
        Checkpoint("gemma-4-dense", "Gemma 4", _gemma4_dense, _tokenizer_json, _IMAGES),
        Checkpoint("gemma-4-experts", "Gemma 4", _gemma4_experts, _tokenizer_json, _IMAGES),
        Checkpoint("gemma-4-e", "Gemma 4", _gemma4_e, _tokenizer_json, _IMAGES),
        Checkpoint("gemma-4-unified", "Gemma 4", _gemma4_unified, _tokenizer_json, _IMAGES),
    )
}


def write(directory: Path, names: Iterable[str] = tuple(CHECKPOINTS)) -> dict[str, Path]:
    """{name: its directory}, made in a child process; those that are there already are taken as they are."""
    paths = {name: directory / name for name in names}
    if missing := [name for name, path in paths.items() if not path.exists()]:
        subprocess.run([sys.executable, "-m", "tests.families", str(directory), *missing], check=True)
    return paths


def save_again(originals: Mapping[str, Path], directory: Path, how: str = SAVE_AGAIN) -> dict[str, Path]:
    """{name: a fine-tune of it}: loaded and saved by transformers, the model and its tokenizer, in a child process."""
    pairs = [word for name, path in originals.items() for word in (str(path), str(directory / name))]
    subprocess.run([sys.executable, "-m", "tests.families", how, *pairs], check=True)
    return {name: directory / name for name in originals}


def _save_again(original: Path, directory: Path, how: str) -> None:
    import torch  # noqa: PLC0415
    import transformers as hf  # noqa: PLC0415

    (architecture,) = json.loads((original / "config.json").read_text())["architectures"]
    model = getattr(hf, architecture).from_pretrained(original, dtype=torch.bfloat16)
    model.save_pretrained(directory, save_original_format=how == SAVE_AGAIN)
    hf.AutoTokenizer.from_pretrained(original).save_pretrained(directory)


def main(arguments: list[str]) -> None:
    if arguments[0] in (SAVE_AGAIN, CODE_NAMES):
        for original, directory in zip(arguments[1::2], arguments[2::2], strict=True):
            _save_again(Path(original), Path(directory), arguments[0])
        return
    for name in arguments[1:]:
        _save(CHECKPOINTS[name], Path(arguments[0]) / name)


if __name__ == "__main__":
    main(sys.argv[1:])
