"""`tokenizer.json` -> `tokenizer.model`: the vocabulary of Gemma 1 to 3n as llama.cpp's converter reads it. Pure.

Consumes the JSON of a `tokenizer.json`, produces the SentencePiece model and the list of added tokens that such a
checkpoint had when Google published it. transformers 5 saves neither: a fine-tune has `tokenizer.json` alone, and the
converter then ends with an error, or loses the added tokens. Nothing is lost on the way: transformers made its merges
of the pieces' scores, highest first, and the ranks of the merges are scores in the same order again. The parity gate
compares what llama.cpp makes of them with the checkpoint's own tokenizer, text by text.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of pieces, in SentencePiece and in GGUF
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
NO_TEXT = -1000.0  # score of what is no text; the converter gives added tokens the same


@dataclass(frozen=True)
class Piece:
    """One row of a SentencePiece model; its id is its place."""

    text: str
    score: float
    kind: int


def pieces_of(tokenizer: Mapping[str, Any]) -> list[Piece] | None:
    """The pieces of a tokenizer that was a SentencePiece model once; None of any other.

    A piece's score is minus the rank of the first merge that makes it. Pieces that no merge makes (single characters)
    come after all others; SentencePiece never looks for them.
    """
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback") is not True:
        return None
    vocab, merges, unknown = model.get("vocab"), model.get("merges"), model.get("unk_token")
    if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(unknown, str):
        return None
    if unknown not in vocab or "" in vocab or not all(type(number) is int for number in vocab.values()):
        return None
    if {*vocab.values()} != {*range(len(vocab))} or sum(map(bool, map(_BYTE.fullmatch, vocab))) != 256:
        return None
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge  # older files have both in one text
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            return None
        ranks.setdefault("".join(pair), rank)
    special = {token["content"]: token.get("special") is True for token in added_tokens(tokenizer).values()}
    behind = itertools.count(len(merges))
    found = []
    for text in sorted(vocab, key=vocab.__getitem__):
        kind = NORMAL
        if text == unknown:
            kind = UNKNOWN
        elif text in special:
            kind = CONTROL if special[text] else USER_DEFINED
        elif _BYTE.fullmatch(text):
            kind = BYTE
        if kind == NORMAL:
            found.append(Piece(text, -float(ranks[text] if text in ranks else next(behind)), kind))
        else:
            found.append(Piece(text, NO_TEXT, kind))
    return found


def added_tokens(tokenizer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`added_tokens_decoder` of a `tokenizer_config.json`: {id: {content, special}} of what `tokenizer.json` lists."""
    listed = tokenizer.get("added_tokens")
    rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
    return {
        str(row["id"]): {"content": row["content"], "special": row.get("special") is True}
        for row in rows
        if type(row.get("id")) is int and isinstance(row.get("content"), str)
    }


def sentencepiece_model(pieces: list[Piece], ids: Mapping[str, int] | None = None) -> bytes:
    """`tokenizer.model`: BPE with byte fallback, text as it is. `ids` are those of `bos`, `eos` and `pad`, if known.

    Needs the packages sentencepiece and protobuf, of the `convert` extra.
    """
    from sentencepiece import sentencepiece_model_pb2 as sp  # noqa: PLC0415 - an extra

    model = sp.ModelProto()
    spec, normalizer = model.trainer_spec, model.normalizer_spec
    spec.model_type = sp.TrainerSpec.BPE
    spec.byte_fallback = True
    spec.vocab_size = len(pieces)
    spec.unk_id = next(number for number, piece in enumerate(pieces) if piece.kind == UNKNOWN)
    for name, number in (ids or {}).items():
        setattr(spec, f"{name}_id", number)
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    for row in pieces:
        piece = model.pieces.add()
        piece.piece, piece.score, piece.type = row.text, row.score, row.kind
    return bytes(model.SerializeToString())
