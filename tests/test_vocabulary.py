"""tokenizer.json -> tokenizer.model, with which SentencePiece reads as `tokenizers` does; and what is staged."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from gemma_gguf import convert, demo, gguf_io, source, vocabulary
from gemma_gguf.errors import BadInputError
from gemma_gguf.files import HashMemory
from gemma_gguf.source import Source
from gemma_gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Piece
from tests import checkpoints, gemma4
from tests.test_source import safetensors_bytes

TEXTS = (
    "the thing in the water and then on",
    "an hour, another; the other bathing hat",
    "tthhee  ininging   aanndd",
    "x = {'a': [1, 2]}\n\treturn Straße 日本語 👩‍👩‍👧 \u0301",
    "",
    " ",
    "the" * 50,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint whose vocabulary is a tokenizer.json, as transformers 5 saves it."""
    made = checkpoints.write_gemma3_text(tmp_path / "saved", layers=1)
    (made / "tokenizer.model").unlink()
    gemma4.write_tokenizer_files(made)
    return made


def document(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "tokenizer.json").read_text()))


def fetched(path: Path) -> Source:
    return source.fetch(source.understand(str(path)), path.parent / "work", HashMemory(path.parent / "hashes.json"))


def test_sentencepiece_reads_as_the_original(saved: Path) -> None:
    pieces = vocabulary.pieces_of(document(saved))
    assert pieces is not None
    ours = SentencePieceProcessor(model_proto=vocabulary.sentencepiece_model(pieces))
    theirs = Tokenizer.from_file(str(saved / "tokenizer.json"))
    assert [ours.IdToPiece(number) for number in range(ours.vocab_size())] == gemma4.vocabulary()
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


SAVE = """
import sys
from transformers import AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""


@pytest.mark.proof
def test_proof_of_families_with_gemmas_own_vocabulary(tmp_path: Path) -> None:
    """All 262,144 tokens: what transformers saves of them gives the types and the order of the published model."""
    original = gguf_io.read_header(demo.packaged_gguf(tmp_path))
    demo.rebuild_checkpoint(original.path, tmp_path / "demo")
    argv = [sys.executable, "-W", "ignore", "-c", SAVE, str(tmp_path / "demo"), str(tmp_path / "saved")]
    subprocess.run(argv, check=True, capture_output=True)
    pieces = vocabulary.pieces_of(source.tokenizer_json(tmp_path / "saved"))
    assert pieces is not None
    tokens, scores, kinds = (original.get(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type"))
    assert (len(pieces), [number for number, piece in enumerate(pieces) if piece.kind == UNKNOWN]) == (262144, [3])
    assert [CONTROL if piece.kind == UNKNOWN else piece.kind for piece in pieces] == kinds
    normal = [number for number, kind in enumerate(kinds) if kind == NORMAL]
    assert [pieces[number].text for number in normal] == [tokens[number] for number in normal]
    ranked = sorted(normal, key=lambda number: -scores[number])
    assert sorted(normal, key=lambda number: -pieces[number].score) == ranked


def small(**model: Any) -> dict[str, Any]:
    """The least that was SentencePiece once: `b` is never merged, `ab` is merged in two ways."""
    tokens = ["<unk>", "<bos>", "\n\n", "a", "aab", "ab", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    rows: dict[str, Any] = {
        "type": "BPE",
        "byte_fallback": True,
        "unk_token": "<unk>",
        "vocab": {text: number for number, text in enumerate(tokens)},
        "merges": [["a", "b"], ["a", "ab"], ["aa", "b"]],
    }
    added = [{"id": 1, "content": "<bos>", "special": True}, {"id": 2, "content": "\n\n", "special": False}]
    return {"added_tokens": [*added, {"id": 263, "content": "<|new|>", "special": True}], "model": {**rows, **model}}


def test_pieces_and_added_tokens() -> None:
    pieces = vocabulary.pieces_of(small())
    assert pieces is not None
    assert pieces[:8] == [
        Piece("<unk>", -1000.0, UNKNOWN),
        Piece("<bos>", -1000.0, CONTROL),
        Piece("\n\n", -1000.0, USER_DEFINED),
        Piece("a", -3.0, NORMAL),
        Piece("aab", -1.0, NORMAL),
        Piece("ab", -0.0, NORMAL),
        Piece("b", -4.0, NORMAL),
        Piece("<0x00>", -1000.0, BYTE),
    ]
    assert len(pieces) == 263
    assert vocabulary.pieces_of(small(merges=["a b", "a ab", "aa b"])) == pieces
    assert vocabulary.added_tokens(small()) == {
        "1": {"content": "<bos>", "special": True},
        "2": {"content": "\n\n", "special": False},
        "263": {"content": "<|new|>", "special": True},
    }
    assert vocabulary.added_tokens({"added_tokens": [3, {"id": "1"}, {"id": 2, "content": None}]}) == {}


OTHERS: dict[str, dict[str, Any]] = {
    "empty": {},
    "no model": {"model": None},
    "of words": small(type="WordPiece"),
    "bytes as letters": small(byte_fallback=False),
    "a byte missing": small(vocab={t: n for n, t in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(255))])}),
    "ids with a gap": small(vocab={**small()["model"]["vocab"], "c": 300}),
    "an id twice": small(vocab={**small()["model"]["vocab"], "c": 3}),
    "ids that are none": small(vocab={**small()["model"]["vocab"], "c": "263"}),
    "lists for ids": small(vocab={**small()["model"]["vocab"], "c": [263]}),
    "no unknown token": small(unk_token="<oov>"),
    "an unknown token that is no text": small(unk_token={}),
    "a token without text": small(vocab={**small()["model"]["vocab"], "": 263}),
    "a merge of three": small(merges=["a b b"]),
    "merges that are none": small(merges=[{"a": "b"}]),
    "a list for a vocabulary": small(vocab=[["a", 1.0]]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_no_pieces_of_another_kind(case: str) -> None:
    assert vocabulary.pieces_of(OTHERS[case]) is None


def staged(path: Path) -> dict[str, Path]:
    directory = convert.stage_checkpoint(fetched(path), path.parent / "work")
    return {file.name: file for file in directory.iterdir()}


def test_what_is_staged_of_a_saved_fine_tune(saved: Path) -> None:
    files = staged(saved)
    added = json.loads(files["tokenizer_config.json"].read_text())["added_tokens_decoder"]
    assert {row["content"] for row in added.values()} == set(gemma4.SPECIAL)
    assert [name for name, file in sorted(files.items()) if not file.is_symlink()] == [
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert not (saved / "tokenizer.model").exists()
    assert "added_tokens_decoder" not in json.loads((saved / "tokenizer_config.json").read_text())


def test_what_is_staged_where_nothing_lacks(tmp_path: Path) -> None:
    assert all(file.is_symlink() for file in staged(checkpoints.write_gemma3_text(tmp_path / "a", layers=1)).values())
    assert all(file.is_symlink() for file in staged(gemma4.write_gemma4_moe(tmp_path / "b", layers=2)).values())


def test_a_vocabulary_of_another_kind_is_left_to_the_converter(saved: Path) -> None:
    """It has a way of its own for Gemma 3 models with another tokenizer."""
    (saved / "tokenizer.json").write_text(json.dumps(small(byte_fallback=False)))
    assert all(file.is_symlink() for file in staged(saved).values())


def gemma3n(directory: Path, with_cache: int = 20, *, whole: bool = False) -> Path:
    """Attention of two layers, the first and one that takes its keys of earlier ones; in two files."""
    made = checkpoints.write_gemma3_text(directory, layers=1)
    for file in made.glob("*.safetensors"):
        file.unlink()
    (made / "config.json").write_text(json.dumps({"architectures": ["Gemma3nForCausalLM"]}))
    shapes = {"q_proj": (8, 4), "k_proj": (6, 4), "v_proj": (6, 4), "k_norm": (3,)}
    parts = {0: shapes, with_cache: shapes if whole else {"q_proj": (8, 4)}}
    weight_map: dict[str, str] = {}
    for layer, rows in parts.items():
        tensors = {f"model.layers.{layer}.self_attn.{name}.weight": shape for name, shape in rows.items()}
        (made / f"model-{layer}.safetensors").write_bytes(safetensors_bytes(tensors))
        weight_map |= dict.fromkeys(tensors, f"model-{layer}.safetensors")
    (made / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return made


def test_zeros_stand_for_keys_and_values_that_nothing_reads(tmp_path: Path) -> None:
    files = staged(gemma3n(tmp_path / "m"))
    written = files["model-unread-layers.safetensors"]
    with safe_open(written, "np") as opened:  # the reference implementation of the format
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - no dict
    root = "model.layers.20.self_attn"
    assert shapes == {f"{root}.k_proj.weight": (6, 4), f"{root}.v_proj.weight": (6, 4), f"{root}.k_norm.weight": (3,)}
    assert written.read_bytes().endswith(b"}" + bytes(2 * (24 + 24 + 3)))
    weight_map = json.loads(files["model.safetensors.index.json"].read_text())["weight_map"]
    assert {name for name, file in weight_map.items() if file == written.name} == set(shapes)
    assert len(weight_map) == 4 + 1 + 3


def test_zeros_beyond_any_gemma_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "MAX_UNREAD", 101)  # they take 102 bytes
    with pytest.raises(BadInputError, match="lacks the keys and values of layers"):
        staged(gemma3n(tmp_path / "m"))


@pytest.mark.parametrize(("layer", "whole"), [(20, True), (19, False)], ids=["they are there", "they are read"])
def test_no_zeros_where(layer: int, whole: bool, tmp_path: Path) -> None:
    files = staged(gemma3n(tmp_path / "m", layer, whole=whole))
    assert all(file.is_symlink() for file in files.values())


@pytest.mark.parametrize(
    ("text", "written"),
    [({"a": 1}, {"a": 1, "moe_intermediate_size": None}), ({"moe_intermediate_size": 256}, None), (None, None)],
)
def test_the_key_that_the_converter_looks_for_in_gemma_4(text: object, written: object, tmp_path: Path) -> None:
    made = gemma4.write_gemma4_moe(tmp_path / "m", layers=2)
    config = {"architectures": ["Gemma4UnifiedForConditionalGeneration"], "text_config": text, "b": 2}
    (made / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    found = convert.completed(fetched(made))
    assert {name: json.loads(content) for name, content in found.items()} == (
        {"config.json": {**config, "text_config": written}} if written else {}
    )
