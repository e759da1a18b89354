"""Checkpoints that were trained for Q4_0: the grid that is fitted, what is refused, and the static Q4_0 of a run."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType as T

from gemma_gguf import card, factory, gguf_io, manifest, names, proof, qat, recipes, source, table
from gemma_gguf.demo import to_bf16, write_bf16_safetensors
from gemma_gguf.errors import VerificationError
from gemma_gguf.llama_cpp import Build
from gemma_gguf.manifest import GridFit
from gemma_gguf.session import Options, Report
from tests import checkpoints, examples

Floats = npt.NDArray[np.float32]
RNG = np.random.default_rng(7)


def bf16(values: npt.NDArray[np.floating]) -> Floats:
    """Rounded to BF16."""
    return (to_bf16(values.astype(np.float32)).astype(np.uint32) << 16).view(np.float32)


def ordinary(n: int = 200) -> Floats:
    return bf16(RNG.normal(0, 0.02, (n, 32)))


def on_grid(n: int = 200, low: int = -8, high: int = 7) -> Floats:
    """Levels from `low` to `high`, both in every block, at a scale of its own; half of the scales are negative."""
    levels = RNG.integers(low, high + 1, (n, 32))
    levels[:, 3], levels[:, 17] = low, high
    scales = RNG.uniform(0.001, 0.05, (n, 1)) * RNG.choice([-1, 1], (n, 1))
    return bf16(scales * levels)


# --- one block ----------------------------------------------------------------------------------------------------


def brute_force(block: Floats) -> float:
    """The least squared residual over 200,000 scales, each with the nearest levels."""
    largest = float(np.abs(block).max())
    best = np.inf
    for scales in np.array_split(np.concatenate([(d := np.linspace(largest / 8.6, largest / 0.4, 100_000)), -d]), 100):
        levels = np.clip(np.rint(block[None, :] / scales[:, None]), -8, 7)
        products, squares = levels @ block.astype(np.float64), (levels**2).sum(axis=1)
        explained = np.divide(products**2, squares, out=np.zeros_like(products), where=squares > 0)
        best = min(best, float((block.astype(np.float64) ** 2).sum() - explained.max()))
    return best


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(lambda: ordinary(1), id="normal"),
        pytest.param(lambda: bf16(RNG.standard_t(3, (1, 32))), id="heavy tails"),
        pytest.param(lambda: on_grid(1), id="on a grid"),
        pytest.param(lambda: on_grid(1, -3, 3), id="on a grid of few levels"),
        pytest.param(lambda: bf16(np.abs(RNG.normal(0, 1, (1, 32)))), id="of one sign"),
        pytest.param(lambda: bf16(np.where(np.arange(32) == 5, 1.0, RNG.normal(0, 1e-3, 32))[None]), id="one outlier"),
    ],
)
def test_the_best_scale_is_the_best_of_all(block: Callable[[], Floats]) -> None:
    made = block()
    found = qat.best_scales(made)
    assert found.residual[0] <= brute_force(made[0]) + 1e-12
    again = ((made.astype(np.float64) - found.scales[:, None] * found.levels) ** 2).sum()
    assert found.residual[0] == pytest.approx(again)
    assert (found.levels.min(), found.levels.max()) >= (-8, -8)
    assert found.levels.max() <= 7


def test_scales_of_ggml_are_ggmls() -> None:
    """The gguf package's quantiser, which is tested against ggml's, gives the same weights."""
    blocks = np.concatenate([ordinary(), on_grid(), on_grid(50, -7, 7), np.zeros((1, 32), np.float32)])
    back = quants.dequantize(quants.quantize(blocks, T.Q4_0), T.Q4_0)
    found = qat.ggml_scales(blocks)
    np.testing.assert_array_equal((found.scales[:, None] * found.levels).astype(np.float32), back)


def test_a_grid_is_found_to_the_last_place_of_bf16() -> None:
    blocks = on_grid()
    found = qat.best_scales(blocks)
    assert qat.fits_bf16(blocks, found.levels).all()
    nudged = blocks.copy()
    nudged.view(np.uint32)[:, 9] += 2 << 16  # two units in the last place of one weight
    still = qat.fits_bf16(nudged, qat.best_scales(nudged).levels)
    assert still.mean() < 0.2
    assert not qat.fits_bf16(ordinary(), qat.best_scales(ordinary()).levels).any()


def test_blocks_of_zeros_fit_any_grid() -> None:
    zeros = np.zeros((3, 32), np.float32)
    found = qat.best_scales(zeros)
    assert qat.fits_bf16(zeros, found.levels).all()
    assert (found.scales.tolist(), found.residual.tolist()) == ([0.0] * 3, [0.0] * 3)


# --- a checkpoint -------------------------------------------------------------------------------------------------


def fit(blocks: Floats) -> GridFit:
    sums = qat._Sums(tensors=1)
    sums.add(blocks, np.random.default_rng(0))
    return sums.fit("x")


@pytest.mark.parametrize(
    ("blocks", "verdict"),
    [
        pytest.param(on_grid, "ggml", id="levels to -8: ggml's scale"),
        pytest.param(lambda: on_grid(200, -7, 7), "free", id="levels to 7 alone: ggml's scale misses"),
        pytest.param(lambda: on_grid(200, -5, 6), "free", id="few levels"),
        pytest.param(lambda: np.concatenate([on_grid(190), on_grid(10, -7, 7)]), "free", id="one in twenty missed"),
        pytest.param(lambda: np.concatenate([on_grid(140), ordinary(60)]), "ggml", id="some tensors without a grid"),
        pytest.param(lambda: bf16(on_grid() + RNG.normal(0, 1e-3, (200, 32))), "near", id="drawn to it"),
        pytest.param(lambda: ordinary(2000), "none", id="normal weights"),
        pytest.param(lambda: bf16(RNG.laplace(0, 0.02, (2000, 32))), "none", id="Laplace weights"),
        pytest.param(lambda: bf16(RNG.standard_t(4, (2000, 32))), "none", id="heavy tails"),
        pytest.param(lambda: bf16(RNG.uniform(-0.1, 0.1, (2000, 32))), "none", id="uniform weights"),
    ],
)
def test_what_weights_lie_on(blocks: Callable[[], Floats], verdict: str) -> None:
    row = fit(blocks())
    assert qat.verdict([row]) == verdict
    if verdict == "none":
        assert row.residual / row.residual_none == pytest.approx(1, abs=0.03)
        assert (row.fits, row.fits_ggml) == (0, 0)
    if verdict == "free":
        assert row.residual < 0.1 * row.residual_none
        assert row.residual_ggml > 2 * row.residual


def test_figures_of_all_kinds_are_taken_over_their_blocks() -> None:
    rows = [
        examples.qat().grid[0].model_copy(update=given)
        for given in (
            {"n_blocks": 100, "residual": 0.03, "fits": 1.0},
            {"n_blocks": 300, "residual": 0.01, "fits": 0.2},
        )
    ]
    assert qat.overall(rows, "fits") == pytest.approx(0.4)
    assert qat.overall(rows, "residual") == pytest.approx(((100 * 9e-4 + 300 * 1e-4) / 400) ** 0.5)
    assert qat.overall([], "fits") == 0


@pytest.mark.parametrize(
    ("says", "asked", "said_by"),
    [
        (True, None, "checkpoint"),
        (False, True, "--qat"),
        (True, True, "--qat"),
        (False, None, None),
        (True, False, None),
    ],
)
def test_who_says_that_it_is_qat(says: bool, asked: bool | None, said_by: str | None) -> None:
    facts = qat.facts_for(says, asked, None, None)
    assert (facts.said_by if facts else None) == said_by
    if facts:
        assert (facts.embedding, facts.verdict, facts.grid) == ("Q6_K", None, [])
        old = examples.qat("free").model_copy(update={"embedding": "Q8_0"})
        kept = qat.facts_for(says, asked, None, old)
        assert kept is not None
        assert (kept.embedding, kept.verdict, kept.grid) == ("Q8_0", "free", old.grid)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("gemma-3-4b-it-qat-q4_0-unquantized", "gemma-3-4b-it-qat"),
        ("gemma-4-12B-it-qat-Q4_0-unquantized", "gemma-4-12B-it-qat"),
        ("gemma-3-4b-it-qat", "gemma-3-4b-it-qat"),
        ("q4_0-unquantized-merge", "q4_0-unquantized-merge"),
    ],
)
def test_file_names_drop_what_would_match_the_tag_of_a_quant(name: str, short: str) -> None:
    assert names.strip(name) == short
    assert source.ModelName("hub", "google", name).stem == f"google_{short}"


def test_only_q4_0_is_made_otherwise() -> None:
    facts = examples.qat()
    made = qat.applied(recipes.TABLE["Q4_0"], facts)
    assert made.static
    assert made.flags == ("--token-embedding-type", "q6_k", "--output-tensor-type", "q6_k")
    assert qat.applied(recipes.TABLE["Q4_1"], facts) is recipes.TABLE["Q4_1"]
    assert qat.applied(recipes.TABLE["Q4_0"], None) is recipes.TABLE["Q4_0"]


def test_embeddings_per_layer_keep_the_type_of_a_plain_q4_0() -> None:
    """Of E models they are several times the embedding, and would follow its type."""
    made = recipes.fitted(qat.applied(recipes.TABLE["Q4_0"], examples.qat()), (), "Q4_0")
    assert made.flags[:2] == ("--tensor-type", "per_layer_token_embd=Q4_0")
    assert recipes.fitted(recipes.TABLE["Q4_0"], (), None) == recipes.TABLE["Q4_0"]


# --- the card -----------------------------------------------------------------------------------------------------

TOLD = {
    "ggml": "llama.cpp's scales\nhit it.",
    "free": "part of what the training gave is lost in this file.",
    "near": "The weights lie near a grid of Q4_0, not on it",
    "none": "is what the maintainer of this set says.",
}


@pytest.mark.parametrize("verdict", ["ggml", "free", "near", "none"])
@pytest.mark.parametrize("theme", ["modern", "classic"])
def test_the_card_says_what_the_weights_lie_on(verdict: str, theme: str) -> None:
    made = examples.example()
    made = made.model_copy(
        update={
            "qat": examples.qat(verdict),  # type: ignore[arg-type]
            "model": made.model.model_copy(update={"qat": True}),
            "card": made.card.model_copy(update={"theme": theme}),
        }
    )
    text = " ".join(card.Renderer().render(made).split())
    assert " ".join(TOLD[verdict].split()) in text
    assert [other for other in TOLD if " ".join(TOLD[other].split()) in text] == [verdict]
    assert "made without an importance matrix, with the embedding at Q6_K." in text
    assert "Every quant but Q4_0 was made with an importance matrix" in text
    assert "The type this checkpoint was trained for. Made without the imatrix." in text
    assert "| attn_q | 34 | 69,632 | 100.0% |" in text
    picked = table.pick(made)
    assert picked is not None
    assert picked.recipe == "Q4_0"


def test_an_ordinary_card_says_nothing_of_it() -> None:
    text = card.Renderer().render(examples.example())
    assert "Quantisation-aware" not in text
    assert "Every quant was made with an importance matrix" in " ".join(text.split())


# --- a run --------------------------------------------------------------------------------------------------------


def read_bf16_safetensors(path: Path) -> dict[str, npt.NDArray[np.uint16]]:
    """{tensor: its BF16 bits} of one shard."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found: dict[str, npt.NDArray[np.uint16]] = {}
    for name, tensor in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, end = (start + offset for offset in tensor["data_offsets"])
            found[name] = np.frombuffer(data[first:end], np.uint16).reshape(tensor["shape"])
    return found


def trained_for_q4_0(directory: Path, low: int) -> Path:
    """The tiny text checkpoint with every matrix of its blocks on a Q4_0 grid whose levels go down to `low`."""
    checkpoints.write_gemma3_text(directory)
    for shard in sorted(directory.glob("*.safetensors")):
        tensors = read_bf16_safetensors(shard)
        for name, values in tensors.items():
            if "layers." in name and name.endswith("_proj.weight"):
                blocks = on_grid(values.size // 32, low, 7)
                tensors[name] = to_bf16(blocks.reshape(values.shape))
        write_bf16_safetensors(shard, tensors)
    return directory


@pytest.fixture(scope="module")
def options(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Options:
    checkpoint = trained_for_q4_0(tmp_path_factory.mktemp("qat") / "on-grid", -8)
    return Options(
        str(checkpoint),
        name="test/tiny-qat-q4_0-unquantized",
        out=tmp_path_factory.mktemp("out"),
        recipes=("Q4_0", "IQ4_NL", "Q4_1"),
        chunks=4,
        evaluate=False,
        kernels="ggml",
    )


@pytest.fixture(scope="module")
def qat_set(options: Options) -> Report:
    return factory.run(options)


def test_a_qat_set_has_a_static_q4_0(qat_set: Report) -> None:
    """No imatrix in its keys, its blocks ggml's without one; the others use it. llama-quantize writes the same."""
    facts = manifest.load(qat_set.set_dir)
    assert facts.stem == "test_tiny-qat"
    assert facts.qat is not None
    assert (facts.qat.said_by, facts.qat.embedding, facts.qat.verdict) == ("checkpoint", "Q6_K", "ggml")
    kinds = ("attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up")
    assert [(row.kind, row.n_tensors, row.fits) for row in facts.qat.grid] == [(kind, 3, 1.0) for kind in kinds]
    files = {recipe: qat_set.set_dir / f"test_tiny-qat-{recipe}.gguf" for recipe in ("Q4_0", "IQ4_NL", "Q4_1")}
    headers = {recipe: gguf_io.read_header(path) for recipe, path in files.items()}
    assert "quantize.imatrix.file" not in headers["Q4_0"].keys
    assert "quantize.imatrix.file" in headers["Q4_1"].keys
    types = headers["Q4_0"].type_histogram()
    assert (types["Q4_0"], types["Q6_K"], "Q4_1" in types) == (21, 1, False)
    entry = facts.file(files["Q4_0"].name)
    assert entry is not None
    assert "--imatrix" not in entry.argv
    assert entry.argv[1:5] == ["--token-embedding-type", "q6_k", "--output-tensor-type", "q6_k"]
    base = gguf_io.read_header(qat_set.set_dir.parent / ".work" / "test_tiny-qat" / "test_tiny-qat-bf16.gguf")
    tensor = "blk.1.ffn_up.weight"
    rows = qat._widened(base.read(base.by_name[tensor]), T.BF16)
    made = headers["Q4_0"].read(headers["Q4_0"].by_name[tensor])
    np.testing.assert_array_equal(made, quants.quantize(rows, T.Q4_0))
    assert sorted(proof.prove_set(qat_set.set_dir)) == ["IQ4_NL", "Q4_0", "Q4_1"]


def test_the_same_run_again_measures_and_makes_nothing(qat_set: Report, options: Options) -> None:
    report = factory.run(options)
    assert [done.name for done in report.done if done.made] == []
    assert [done.name for done in report.done if done.stage == "qat"] == ["Q4_0 grid"]


def test_another_embedding_makes_q4_0_alone_again(qat_set: Report, options: Options, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(options.out, out)
    report = factory.run(replace(options, out=out, qat_embedding="Q8_0", proof=False))
    assert [done.name for done in report.done if done.made and done.stage == "quantize"] == ["test_tiny-qat-Q4_0.gguf"]
    header = gguf_io.read_header(report.set_dir / "test_tiny-qat-Q4_0.gguf")
    assert header.by_name["token_embd.weight"].ggml_type is T.Q8_0
    facts = manifest.load(report.set_dir)
    assert "--qat-embedding Q8_0" in card.reproduce_command(facts)


def test_an_ordinary_set_of_it_has_an_ordinary_q4_0(qat_set: Report, options: Options, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(options.out, out)
    report = factory.run(replace(options, out=out, qat=False, proof=False, recipes=("Q4_0",)))
    facts = manifest.load(report.set_dir)
    assert (facts.qat, facts.model.qat) == (None, False)
    assert "quantize.imatrix.file" in gguf_io.read_header(report.set_dir / "test_tiny-qat-Q4_0.gguf").keys
    assert "--no-qat" in card.reproduce_command(facts)


def test_a_grid_that_llama_cpp_misses_is_told_apart(build: Build, tmp_path: Path) -> None:
    """As of Gemma 4: levels to -7, so the largest weight over -8 is no scale of theirs."""
    checkpoint = trained_for_q4_0(tmp_path / "free", -7)
    report = factory.run(Options(str(checkpoint), name="test/tiny-qat", out=tmp_path / "out", until="convert"))
    facts = manifest.load(report.set_dir).qat
    assert facts is not None
    assert facts.verdict == "free"
    assert all(row.fits == 1 and row.fits_ggml < 0.01 for row in facts.grid)
    (said,) = (done.why for done in report.done if done.stage == "qat")
    assert said.startswith("the weights lie on a grid of Q4_0 that llama.cpp's scales miss: 100.0% of the blocks fit; ")


def test_ordinary_weights_under_a_qat_name_are_refused(build: Build, text_checkpoint: Path, tmp_path: Path) -> None:
    options = Options(str(text_checkpoint), name="test/tiny-qat", out=tmp_path / "out", until="imatrix", chunks=4)
    with pytest.raises(VerificationError) as caught:
        factory.run(options)
    figures = qat.overall(manifest.load(tmp_path / "out" / "test_tiny-qat-GGUF").qat.grid, "residual")  # type: ignore[union-attr]
    assert caught.value.what.startswith(
        "tiny-qat calls itself QAT (trained for Q4_0), but its weights lie on no Q4_0 grid: the best scales leave "
        f"{figures:.2%} of them (relative RMS; ordinary weights: "
    )
    assert caught.value.what.endswith("), and 0.0% of the blocks fit")
    assert caught.value.next_step == (
        "For ordinary weights under such a name add --no-qat; if they are QAT weights from before the rounding, --qat "
        "makes the set of a QAT checkpoint all the same."
    )
    assert not list((tmp_path / "out" / "test_tiny-qat-GGUF").glob("*imatrix*"))
    for insisted, expected in ((False, None), (True, "none")):
        report = factory.run(replace(options, qat=insisted, until="convert"))
        facts = manifest.load(report.set_dir).qat
        assert (facts.verdict if facts else None) == expected
