"""GGUF files with the attention of real Gemmas and no weights: headers that llama.cpp accepts, and a hole.

What a context takes depends on layers, heads, their widths and windows alone, so everything else is small. llama.cpp
simulates its allocations for such a file in a fraction of a second.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from sentencepiece import sentencepiece_model_pb2 as sp

from gemma_gguf import gguf_io
from tests import checkpoints

EMBEDDING, FEED_FORWARD, PER_LAYER = 256, 512, 256
Tensor = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shape:
    """The attention of one model. `pattern`: None (not in the file), or which layers keep a window."""

    arch: str
    layers: int
    heads: int
    kv_heads: int | Sequence[int]
    head: int
    context: int
    window: int | None = None
    head_windowed: int | None = None
    pattern: Sequence[bool] | None = None
    shared: int | None = None

    def kv_heads_of(self, layer: int) -> int:
        return self.kv_heads if isinstance(self.kv_heads, int) else self.kv_heads[layer]

    def head_of(self, layer: int) -> int:
        windowed = self.head_windowed is not None and self.pattern is not None and self.pattern[layer]
        return int(self.head_windowed or 0) if windowed else self.head


def every(n: int, layers: int) -> list[bool]:
    """A pattern in which each n-th layer sees the whole context."""
    return [layer % n < n - 1 for layer in range(layers)]


SHAPES = {
    "gemma-2b": Shape("gemma", 18, 8, 1, 256, 8192),
    "gemma-2-9b": Shape("gemma2", 42, 16, 8, 256, 8192, window=4096),
    "gemma-3-1b": Shape("gemma3", 26, 4, 1, 256, 32768, window=512),
    "gemma-3-4b": Shape("gemma3", 34, 8, 4, 256, 131072, window=1024),
    "gemma-3-27b": Shape("gemma3", 62, 32, 16, 128, 131072, window=1024),
    "gemma-3-without-window": Shape("gemma3", 12, 4, 2, 64, 32768),
    "gemma-3n-e4b": Shape("gemma3n", 35, 8, 2, 256, 32768, window=512, pattern=every(5, 35), shared=15),
    "gemma-4-shared": Shape(
        "gemma4", 35, 8, 1, 512, 131072, window=512, head_windowed=256, pattern=every(5, 35), shared=20
    ),
    "gemma-4-heads": Shape(
        "gemma4",
        30,
        16,
        [8 if windowed else 2 for windowed in every(6, 30)],
        512,
        131072,
        window=1024,
        head_windowed=256,
        pattern=every(6, 30),
        shared=0,
    ),
}


def write(path: Path, shape: Shape) -> Path:
    """A GGUF file of this shape in BF16, all of its weights a hole."""
    writer = GGUFWriter(path, shape.arch)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(EMBEDDING)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_layer_norm_rms_eps(1e-6)
    if shape.window is not None:
        writer.add_sliding_window(shape.window)
    if shape.pattern is not None:
        writer.add_sliding_window_pattern(list(shape.pattern))
    if shape.shared is not None:
        writer.add_shared_kv_layers(shape.shared)
    if shape.head_windowed is not None:
        writer.add_key_length_swa(shape.head_windowed)
        writer.add_value_length_swa(shape.head_windowed)
    if shape.arch == "gemma4":
        writer.add_embedding_length_per_layer_input(0)
    if shape.arch == "gemma3n":
        writer.add_embedding_length_per_layer_input(PER_LAYER)
        writer.add_altup_num_inputs(4)
        writer.add_altup_active_idx(0)
        writer.add_activation_sparsity_scale([0.0] * shape.layers)
    tokens = _add_tokenizer(writer)
    for name, size in _tensors(shape, tokens):
        dtype = GGMLQuantizationType.F32 if len(size) == 1 else GGMLQuantizationType.BF16
        numpy_type = np.dtype(np.float32 if len(size) == 1 else np.uint16)
        n_bytes = int(np.prod(size)) * numpy_type.itemsize
        writer.add_tensor_info(name, size[::-1], np.dtype(np.float32), n_bytes, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    _make_hole(path)
    return path


def _add_tokenizer(writer: GGUFWriter) -> int:
    model = sp.ModelProto()
    model.ParseFromString(checkpoints.sentencepiece_model()[0])
    kinds = {2: TokenType.UNKNOWN, 3: TokenType.CONTROL, 5: TokenType.UNUSED, 6: TokenType.BYTE}
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.piece for piece in model.pieces])
    writer.add_token_scores([piece.score for piece in model.pieces])
    writer.add_token_types([kinds.get(piece.type, TokenType.NORMAL) for piece in model.pieces])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    return len(model.pieces)


def _tensors(shape: Shape, n_vocab: int) -> Iterator[Tensor]:
    """Names and shapes in ggml's order, as the models' `load_arch_tensors` of llama.cpp ask for them."""
    yield "token_embd.weight", (EMBEDDING, n_vocab)
    yield "output_norm.weight", (EMBEDDING,)
    if shape.arch == "gemma3n":
        yield "altup_proj.weight", (EMBEDDING, EMBEDDING, 3)
        yield "altup_unembd_proj.weight", (EMBEDDING, EMBEDDING, 3)
        yield "per_layer_token_embd.weight", (PER_LAYER * shape.layers, n_vocab)
        yield "per_layer_model_proj.weight", (EMBEDDING, PER_LAYER * shape.layers)
        yield "per_layer_proj_norm.weight", (PER_LAYER,)
    if shape.arch == "gemma4":
        yield "rope_freqs.weight", (shape.head // 2,)
    for layer in range(shape.layers):
        head, kv = shape.head_of(layer), shape.kv_heads_of(layer)
        sizes: dict[str, tuple[int, ...]] = {
            "attn_norm": (EMBEDDING,),
            "attn_q": (EMBEDDING, head * shape.heads),
            "attn_k": (EMBEDDING, head * kv),
            "attn_v": (EMBEDDING, head * kv),
            "attn_output": (head * shape.heads, EMBEDDING),
            "ffn_norm": (EMBEDDING,),
            "ffn_gate": (EMBEDDING, FEED_FORWARD),
            "ffn_up": (EMBEDDING, FEED_FORWARD),
            "ffn_down": (FEED_FORWARD, EMBEDDING),
        }
        if shape.arch != "gemma":
            sizes |= {"post_attention_norm": (EMBEDDING,), "post_ffw_norm": (EMBEDDING,)}
        if shape.arch in {"gemma3", "gemma3n", "gemma4"}:
            sizes |= {"attn_q_norm": (head,), "attn_k_norm": (head,)}
        if shape.arch == "gemma3n":
            sizes |= {
                "inp_gate": (EMBEDDING, PER_LAYER),
                "proj": (PER_LAYER, EMBEDDING),
                "post_norm": (EMBEDDING,),
                "altup_correct_coef": (4, 4),
                "altup_correct_scale": (EMBEDDING,),
                "altup_predict_coef": (4, 16),
                "altup_router": (EMBEDDING, 4),
                "altup_router_norm": (EMBEDDING,),
                "laurel_l": (EMBEDDING, 64),
                "laurel_r": (64, EMBEDDING),
                "laurel_post_norm": (EMBEDDING,),
            }
        for name, size in sizes.items():
            yield f"blk.{layer}.{name}.weight", size


def _make_hole(path: Path) -> None:
    """Give the file the length that its header describes."""
    with path.open("r+b") as file:
        file.truncate(1 << 31)
    header = gguf_io.read_header(path)
    sizes = [tensor.n_bytes for tensor in header.tensors]
    with path.open("r+b") as file:
        file.truncate(gguf_io.expected_size(header.data_start, sizes, header.alignment))
