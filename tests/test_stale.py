"""What is judged of a file, by what was found out about it."""

import pytest

from gemma_gguf.manifest import FileDecision
from gemma_gguf.stale import (
    Conversion,
    Converted,
    Quant,
    counts,
    decide_converted,
    decide_quant,
    some,
    unchanged,
    unknown,
)

TYPES = {"Q4_K": ["blk.0.ffn_up.weight", "blk.1.ffn_up.weight"], "Q6_K": ["token_embd.weight"]}
SAME = "same plan, 9 sampled rows come out the same"


def decision(outcome: str, why: str, tensors: list[str] | None = None, keys: list[str] | None = None) -> FileDecision:
    return FileDecision(outcome=outcome, why=why, tensors=tensors or [], keys=keys or [], sha256=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param(
            Quant(types=TYPES, n_rows=9),
            decision("unchanged", f"{SAME}, same quantisers (Q4_K, Q6_K), same header"),
            id="nothing-differs",
        ),
        pytest.param(
            Quant(types=TYPES, n_rows=9, unhashed=("Q4_K",)),
            decision(
                "unchanged",
                f"{SAME}, same quantisers (Q6_K); of Q4_K the older quantiser was not recorded, so its rows alone were "
                "compared, same header",
            ),
            id="an-older-set-without-hashes",
        ),
        pytest.param(
            Quant(types=TYPES, n_rows=9, keys=("tokenizer.chat_template",)),
            decision(
                "keys",
                f"{SAME}, same quantisers (Q4_K, Q6_K); these keys of the header differ: tokenizer.chat_template",
                keys=["tokenizer.chat_template"],
            ),
            id="another-header",
        ),
        pytest.param(
            Quant(types=TYPES, n_rows=9, other_types=("Q4_K",), keys=("general.file_type",)),
            decision(
                "remake",
                "2 tensors of type Q4_K, whose quantiser makes other bytes of fixed rows: "
                "blk.0.ffn_up.weight, blk.1.ffn_up.weight",
                TYPES["Q4_K"],
            ),
            id="another-quantiser-weighs-more-than-keys",
        ),
        pytest.param(
            Quant(types=TYPES, n_rows=9, other_types=("Q4_K",), rows=("blk.0.ffn_up.weight",)),
            decision(
                "remake",
                "2 tensors of type Q4_K, whose quantiser makes other bytes of fixed rows: "
                "blk.0.ffn_up.weight, blk.1.ffn_up.weight",
                TYPES["Q4_K"],
            ),
            id="rows-of-a-type-that-is-known-to-differ-say-nothing-new",
        ),
        pytest.param(
            Quant(types=TYPES, n_rows=9, rows=("token_embd.weight",)),
            decision(
                "remake",
                "1 tensor of which a sampled row comes out otherwise: token_embd.weight",
                ["token_embd.weight"],
            ),
            id="a-row-differs-although-the-quantiser-looks-the-same",
        ),
        pytest.param(
            Quant(types=TYPES, retyped=("token_embd.weight",), source=("blk.1.ffn_up.weight",)),
            decision(
                "remake",
                "1 tensor of another type or place in llama-quantize's plan; 1 tensor of other weights in the base: "
                "token_embd.weight, blk.1.ffn_up.weight",
                ["token_embd.weight", "blk.1.ffn_up.weight"],
            ),
            id="another-plan-and-other-weights",
        ),
        pytest.param(
            Quant(types=TYPES, n_rows=9, other_types=("IQ1_M",)),
            decision("unchanged", f"{SAME}, same quantisers (Q4_K, Q6_K), same header"),
            id="a-type-the-file-does-not-hold",
        ),
    ],
)
def test_quants(found: Quant, expected: FileDecision) -> None:
    assert decide_quant(found) == expected


BECAUSE = "files of the converter changed (conversion/gemma.py)"


@pytest.mark.parametrize(
    ("conversion", "expected"),
    [
        pytest.param(Conversion(same="same converter"), decision("unchanged", "same converter"), id="same-converter"),
        pytest.param(
            Conversion(because=BECAUSE, outputs={"a.gguf": Converted()}),
            decision("unchanged", f"{BECAUSE}: converted again, every byte is the same"),
            id="converted-to-the-same",
        ),
        pytest.param(
            Conversion(because=BECAUSE, outputs={"a.gguf": Converted(keys=("general.name",))}),
            decision(
                "keys", f"{BECAUSE}: the tensors are the same, these keys are not: general.name", keys=["general.name"]
            ),
            id="other-keys",
        ),
        pytest.param(
            Conversion(because=BECAUSE, outputs={"a.gguf": Converted(tensors=("x",), keys=("general.name",))}),
            decision("remake", f"{BECAUSE}: it converts 1 tensor otherwise: x", ["x"]),
            id="other-tensors",
        ),
        pytest.param(
            Conversion(missing=f"{BECAUSE}, and the checkpoint is not at hand: gone"),
            decision("unknown", f"{BECAUSE}, and the checkpoint is not at hand: gone"),
            id="no-checkpoint",
        ),
        pytest.param(
            Conversion(because=BECAUSE, outputs={"b.gguf": Converted()}),
            decision("unknown", "the converter makes no such file any more"),
            id="a-file-that-is-not-made-any-more",
        ),
    ],
)
def test_base_and_projectors(conversion: Conversion, expected: FileDecision) -> None:
    assert decide_converted("a.gguf", conversion) == expected


def test_long_lists_are_cut() -> None:
    assert some("abc") == "a, b, c"
    assert some("abcde") == "a, b, c and 2 more"


def test_every_outcome_is_counted() -> None:
    assert counts([unchanged(""), unknown(""), unchanged("")]) == {"unchanged": 2, "keys": 0, "remake": 0, "unknown": 1}
