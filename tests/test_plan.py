"""What `llama-quantize --dry-run` prints, read line by line; anything not understood is an error."""

import pytest
from gguf.constants import GGMLQuantizationType as T

from gemma_gguf.errors import ToolFailedError
from gemma_gguf.gguf_io import TensorInfo
from gemma_gguf.plan import FilePlan, PlannedTensor, layout_of, layout_sha256, parse_dry_run_log

# A kept tensor has no arrow and three decimals; the loader's and the tool's own lines stand around and between.
LOG = """\
main: build = 0 (0c1e57098)
main: quantizing '../.work/m/m-bf16.gguf' to 'dry-run' as IQ2_XS using 2 threads
llama_model_loader: loaded meta data with 35 key-value pairs and 6 tensors from m-bf16.gguf (version GGUF V3 (latest))
llama_model_loader: - kv   0:                       general.architecture str              = gemma3
llama_model_loader: - kv  12:                      tokenizer.ggml.tokens arr[str,262144]  = ["<pad>", "[  1/  6]", ...
llama_model_loader: - type  f32:    2 tensors
llama_model_loader: - type bf16:    4 tensors
warning: blk.0.attn_k.weight                  - ncols    640 not divisible by 256 (required for type  iq2_xs) \
-> falling back to  iq4_nl
warning: blk.0.ffn_gate_inp_with_a_name_of_over_36_bytes.weight - ncols    640 not divisible by 256 \
(required for type    q4_K) -> falling back to    q5_0
[   1/   6] output_norm.weight                   - [   640,     1,     1,     1], type =    f32, size =    0.002 MiB
[   2/   6] token_embd.weight                    - [   640, 262144,     1,     1], type =   bf16, \
size =   320.00 MiB ->   170.00 MiB (q8_0)
[   3/   6] blk.0.attn_k.weight                  - [   640,   256,     1,     1], type =   bf16, \
size =     0.31 MiB ->     0.09 MiB (iq4_nl)
llama_tensor_get_type: some remark of the tool
[   4/   6] blk.0.ffn_gate_inp_with_a_name_of_over_36_bytes.weight - [   640,     1,   128,     1], type =   bf16, \
size =     0.16 MiB ->     0.05 MiB (q5_0)
[   5/   6] blk.0.ffn_down.weight                - [  2048,   640,     1,     1], type =   bf16, \
size =     2.50 MiB ->     0.36 MiB (iq2_xs)
[   6/   6] blk.0.rope_freqs.weight              - [     1,     1,     1,     1], type =    f32, size =    0.000 MiB
llama_model_quantize_impl: model size  =   322.97 MiB (16.00 BPW)
llama_model_quantize_impl: quant size  =   170.50 MiB (8.45 BPW)
llama_model_quantize_impl: WARNING: 2 of 6 tensor(s) required fallback quantization
"""
LONG = "blk.0.ffn_gate_inp_with_a_name_of_over_36_bytes.weight"


def _line(index: int, total: int, name: str, end: str = "type =    f32, size =    0.002 MiB") -> str:
    return f"[{index:4d}/{total:4d}] {name:<36} - [   640,     1,     1,     1], {end}\n"


def _planned(name: str, target: T, shape: tuple[int, ...] = (256, 2), wanted: T | None = None) -> PlannedTensor:
    return PlannedTensor(name, shape, T.BF16, target, wanted or target)


def test_every_tensor_of_a_log() -> None:
    plan = parse_dry_run_log(LOG, "IQ2_XS", 6)
    assert plan == FilePlan(
        "IQ2_XS",
        (
            PlannedTensor("output_norm.weight", (640,), T.F32, T.F32, T.F32),
            PlannedTensor("token_embd.weight", (640, 262144), T.BF16, T.Q8_0, T.Q8_0),
            PlannedTensor("blk.0.attn_k.weight", (640, 256), T.BF16, T.IQ4_NL, T.IQ2_XS),
            PlannedTensor(LONG, (640, 1, 128), T.BF16, T.Q5_0, T.Q4_K),
            PlannedTensor("blk.0.ffn_down.weight", (2048, 640), T.BF16, T.IQ2_XS, T.IQ2_XS),
            PlannedTensor("blk.0.rope_freqs.weight", (1,), T.F32, T.F32, T.F32),
        ),
    )
    assert [t.is_quantized for t in plan.tensors] == [False, True, True, True, True, False]
    assert [t.n_elements for t in plan.tensors] == [640, 167772160, 163840, 81920, 1310720, 1]
    # Per block: Q8_0 34 bytes of 32, IQ4_NL 18 of 32, Q5_0 22 of 32, IQ2_XS 74 of 256.
    assert [t.n_bytes for t in plan.tensors] == [2560, 178257920, 92160, 56320, 378880, 4]
    assert plan.types == {
        "output_norm.weight": T.F32,
        "token_embd.weight": T.Q8_0,
        "blk.0.attn_k.weight": T.IQ4_NL,
        LONG: T.Q5_0,
        "blk.0.ffn_down.weight": T.IQ2_XS,
        "blk.0.rope_freqs.weight": T.F32,
    }
    assert plan.fallbacks == {"IQ2_XS -> IQ4_NL": 1, "Q4_K -> Q5_0": 1}


def test_the_examples_beside_the_patterns() -> None:
    """The two lines that plan.py quotes."""
    text = (
        "warning: blk.0.attn_k.weight - ncols 640 not divisible by 256 (required for type iq2_xs)"
        " -> falling back to iq4_nl\n"
        "[   1/   2] blk.0.attn_k.weight - [   640,    256,     1,     1], type =  bf16,"
        " size = 0.31 MiB -> 0.09 MiB (iq4_nl)\n"
        "[   2/   2] token_embd.weight - [   640, 262144,     1,     1], type =  bf16,"
        " size = 320.00 MiB -> 170.00 MiB (q8_0)\n"
    )
    assert parse_dry_run_log(text, "IQ2_XS", 2).tensors == (
        PlannedTensor("blk.0.attn_k.weight", (640, 256), T.BF16, T.IQ4_NL, T.IQ2_XS),
        PlannedTensor("token_embd.weight", (640, 262144), T.BF16, T.Q8_0, T.Q8_0),
    )


def test_windows_line_ends_change_nothing() -> None:
    assert parse_dry_run_log(LOG.replace("\n", "\r\n"), "IQ2_XS", 6) == parse_dry_run_log(LOG, "IQ2_XS", 6)


def test_fallback_to_f16_is_a_fallback() -> None:
    """Columns that 32 does not divide either: llama-quant.cpp puts a remark between the two halves of its warning."""
    text = (
        "warning: v.patch_embd.weight                  - ncols     14 not divisible by 256 (required for type    q4_K) "
        "(WARNING: must use F16 due to unusual shape) -> falling back to     f16\n"
        "[   1/   1] v.patch_embd.weight                  - [    14,   192,     1,     1], type =    f32, "
        "size =     0.01 MiB ->     0.01 MiB (f16)\n"
    )
    plan = parse_dry_run_log(text, "Q4_K_M", 1)
    assert plan.tensors == (PlannedTensor("v.patch_embd.weight", (14, 192), T.F32, T.F16, T.Q4_K),)
    assert plan.fallbacks == {"Q4_K -> F16": 1}


def test_fallbacks_are_counted_and_the_most_frequent_comes_first() -> None:
    tensors = [_planned("a", T.Q8_0, wanted=T.Q6_K), _planned("e", T.Q4_K)]
    tensors += [_planned(name, T.Q5_0, wanted=T.Q4_K) for name in "bcd"]
    fallbacks = FilePlan("Q4_K_M", tuple(tensors)).fallbacks
    assert list(fallbacks.items()) == [("Q4_K -> Q5_0", 3), ("Q6_K -> Q8_0", 1)]


def test_no_fallbacks() -> None:
    assert FilePlan("Q4_K_M", (_planned("a", T.Q4_K), _planned("b", T.Q6_K))).fallbacks == {}


@pytest.mark.parametrize(
    ("own", "parent", "differs"),
    [
        pytest.param({"a": T.Q4_K, "b": T.Q6_K}, {"a": T.Q4_K, "b": T.Q6_K}, [], id="same"),
        pytest.param({"a": T.Q4_K, "b": T.Q8_0}, {"a": T.Q4_K, "b": T.Q6_K}, ["b"], id="one"),
        pytest.param({"b": T.Q8_0, "a": T.Q8_0}, {"a": T.Q4_K, "b": T.Q6_K}, ["b", "a"], id="all, in file order"),
        pytest.param({"a": T.Q4_K, "b": T.Q6_K}, {"a": T.Q4_K}, ["b"], id="not in the parent"),
        pytest.param({"a": T.Q4_K}, {"a": T.Q4_K, "b": T.Q6_K}, [], id="only in the parent"),
    ],
)
def test_differs_from(own: dict[str, T], parent: dict[str, T], differs: list[str]) -> None:
    plans = [FilePlan("x", tuple(_planned(name, kind) for name, kind in types.items())) for types in (own, parent)]
    assert plans[0].differs_from(plans[1]) == differs


ROWS = [("a", (256, 2), T.Q4_K), ("b", (640,), T.F32)]
# sha256 of the line that the rows become: [["a",[256,2],"Q4_K"],["b",[640],"F32"]]
ROWS_SHA256 = "368bcc2d5a1fcf15e090b8a6708d00d31bf25b114de4af26203eb94d72b3455b"


def test_layout_hash_is_the_one_that_manifests_hold() -> None:
    """Written down, because a change of it would make every published set look damaged."""
    assert layout_sha256(ROWS) == ROWS_SHA256


def test_layout_hash_of_plan_and_file_agree() -> None:
    """Source and wanted types, offsets and trailing ones are not part of a layout."""
    planned = FilePlan("x", (_planned("a", T.Q4_K, wanted=T.Q6_K), PlannedTensor("b", (640,), T.F32, T.F32, T.F32)))
    held = [TensorInfo("a", (256, 2, 1, 1), T.Q4_K, 4096), TensorInfo("b", (640, 1), T.F32, 8192)]
    assert planned.layout_sha256 == layout_of(held) == ROWS_SHA256


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([("a", (256, 2, 1), T.Q4_K), ("b", (640,), T.F32)], id="one"),
        pytest.param([("a", (256, 2, 1, 1), T.Q4_K), ("b", (640, 1, 1, 1), T.F32)], id="all"),
    ],
)
def test_layout_hash_does_not_see_trailing_ones(rows: list[tuple[str, tuple[int, ...], T]]) -> None:
    assert layout_sha256(rows) == ROWS_SHA256


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(ROWS[::-1], id="order"),
        pytest.param([("a", (256, 2), T.Q5_K), ROWS[1]], id="type"),
        pytest.param([("a", (2, 256), T.Q4_K), ROWS[1]], id="shape turned"),
        pytest.param([("a", (512,), T.Q4_K), ROWS[1]], id="shape flattened"),
        pytest.param([("a", (256, 1, 2), T.Q4_K), ROWS[1]], id="a one inside the shape"),
        pytest.param([("A", (256, 2), T.Q4_K), ROWS[1]], id="name"),
        pytest.param(ROWS[:1], id="one less"),
        pytest.param([*ROWS, ROWS[1]], id="one more"),
        pytest.param([], id="none"),
    ],
)
def test_layout_hash_sees(rows: list[tuple[str, tuple[int, ...], T]]) -> None:
    assert layout_sha256(rows) != ROWS_SHA256


@pytest.mark.parametrize(
    ("text", "n_tensors", "message"),
    [
        pytest.param("", 2, "llama-quantize --dry-run for Q4_K_M printed 0 tensors, the base has 2", id="nothing"),
        pytest.param(
            "llama_model_loader: loaded meta data\nmain: failed\n",
            2,
            "llama-quantize --dry-run for Q4_K_M printed 0 tensors, the base has 2",
            id="only noise",
        ),
        pytest.param(
            _line(1, 3, "a") + _line(3, 3, "c"),
            3,
            f"llama-quantize --dry-run for Q4_K_M: expected tensor 2 of 3, it printed {_line(3, 3, 'c').strip()!r}",
            id="a line missing",
        ),
        pytest.param(
            _line(2, 3, "b") + _line(3, 3, "c"),
            3,
            f"llama-quantize --dry-run for Q4_K_M: expected tensor 1 of 3, it printed {_line(2, 3, 'b').strip()!r}",
            id="the first line missing",
        ),
        pytest.param(
            _line(1, 3, "a") + _line(2, 3, "b"),
            3,
            "llama-quantize --dry-run for Q4_K_M printed 2 tensors, the base has 3",
            id="the last line missing",
        ),
        pytest.param(
            _line(2, 2, "b") + _line(1, 2, "a"),
            2,
            f"llama-quantize --dry-run for Q4_K_M: expected tensor 1 of 2, it printed {_line(2, 2, 'b').strip()!r}",
            id="wrong order",
        ),
        pytest.param(
            _line(1, 2, "a") + _line(1, 2, "a") + _line(2, 2, "b"),
            2,
            f"llama-quantize --dry-run for Q4_K_M: expected tensor 2 of 2, it printed {_line(1, 2, 'a').strip()!r}",
            id="a line twice",
        ),
        pytest.param(
            _line(1, 2, "a") + _line(2, 2, "b"),
            3,
            f"llama-quantize --dry-run for Q4_K_M: expected tensor 1 of 3, it printed {_line(1, 2, 'a').strip()!r}",
            id="total of another file",
        ),
        pytest.param(
            _line(1, 2, "a") + _line(2, 3, "b"),
            2,
            f"llama-quantize --dry-run for Q4_K_M: expected tensor 2 of 2, it printed {_line(2, 3, 'b').strip()!r}",
            id="total changes",
        ),
        pytest.param(
            _line(1, 1, "a") + _line(2, 1, "b"),
            1,
            "llama-quantize --dry-run for Q4_K_M printed 2 tensors, the base has 1",
            id="one too many",
        ),
        pytest.param(
            _line(1, 1, "a", "type =   bf16, size =     0.31 MiB ->     0.09 MiB (q9_9)"),
            1,
            "llama-quantize names the type 'q9_9', which the gguf package does not know",
            id="unknown target type",
        ),
        pytest.param(
            _line(1, 1, "a", "type =   bf17, size =    0.002 MiB"),
            1,
            "llama-quantize names the type 'bf17', which the gguf package does not know",
            id="unknown source type",
        ),
        pytest.param(
            "warning: a                                    - ncols    640 not divisible by 256 (required for type"
            "    q9_K) -> falling back to    q5_0\n" + _line(1, 1, "a"),
            1,
            "llama-quantize names the type 'q9_K', which the gguf package does not know",
            id="unknown wanted type",
        ),
        pytest.param(
            _line(1, 2, "a") + _line(2, 2, "b", "type =   bf16, size =     0.31 MiB ->     0.09 MiB"),
            2,
            "llama-quantize --dry-run for Q4_K_M printed 1 tensors, the base has 2",
            id="an arrow without a type",
        ),
        pytest.param(
            _line(1, 2, "a") + _line(2, 2, "b")[:60],
            2,
            "llama-quantize --dry-run for Q4_K_M printed 1 tensors, the base has 2",
            id="cut in a line",
        ),
        pytest.param(
            _line(1, 2, "a") + "noise" + _line(2, 2, "b"),
            2,
            "llama-quantize --dry-run for Q4_K_M printed 1 tensors, the base has 2",
            id="noise before a line",
        ),
    ],
)
def test_a_log_that_is_not_understood(text: str, n_tensors: int, message: str) -> None:
    with pytest.raises(ToolFailedError) as caught:
        parse_dry_run_log(text, "Q4_K_M", n_tensors)
    assert caught.value.what == message


@pytest.mark.parametrize("shape", ["   640,,     1,     1", "   ,     1,     1", "   640 256,     1,     1", " "])
def test_a_shape_that_is_not_understood(shape: str) -> None:
    with pytest.raises(ToolFailedError, match="llama-quantize"):
        parse_dry_run_log(_line(1, 1, "a").replace("   640,     1,     1,     1", shape), "Q4_K_M", 1)


def test_a_log_of_no_tensors() -> None:
    assert parse_dry_run_log("noise\n", "Q4_K_M", 0) == FilePlan("Q4_K_M", ())
