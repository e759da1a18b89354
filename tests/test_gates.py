"""The quality gate: which measured files are held back, at the edges of its bounds, and what is recorded of it."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma_gguf import card, evidence, gates, gguf_io, manifest, memory, scoring, table
from gemma_gguf.errors import NoFiguresError
from gemma_gguf.evidence import Measuring
from gemma_gguf.files import sha256_file
from gemma_gguf.gates import Bounds
from gemma_gguf.llama_cpp import Build
from gemma_gguf.manifest import EmbeddingFacts, Failed, Manifest, Measured, Similarity
from gemma_gguf.session import Done, Report
from tests.examples import STEM, sha
from tests.test_table import BASE, a_set, of, with_kld

TINY = "test_tiny-vision"

# sqrt(0.004^2 + (2 * 0.002)^2) = 0.005657: three standard errors of mine - 2 * theirs are 0.01697.
SMALL = ("IQ4_XS", 2.0, 0.030, 0.002)


def held(made: Manifest) -> dict[str, str]:
    return {str(verdict.entry.recipe): str(verdict) for verdict in gates.verdicts(made).values()}


@pytest.mark.parametrize(
    ("kld", "se", "out"),
    [
        pytest.param(0.0769, 0.004, False, id="twice and within three standard errors"),
        pytest.param(0.0771, 0.004, True, id="twice and beyond three standard errors"),
        pytest.param(0.0590, 0.0001, False, id="less than twice, however sure"),
        pytest.param(0.2, None, False, id="no standard error known"),
    ],
)
def test_a_file_farther_than_twice_a_smaller_one(kld: float, se: float, out: bool) -> None:
    made = a_set(SMALL, ("Q4_K_M", 2.5, 0.03, 0.002))
    made.evidence[of(made, "Q4_K_M").sha256] = with_kld(kld, se)
    assert list(held(made)) == (["Q4_K_M"] if out else [])
    if out:
        told = f"KLD {kld:.4g} ± 0.004 nats is above 0.06, the bound by {STEM}-IQ4_XS.gguf, which is smaller"
        assert gates.refusals(made) == [f"{STEM}-Q4_K_M.gguf: {told} (0.03 ± 0.002)"]


def test_a_file_of_the_same_size_or_larger_is_no_measure() -> None:
    assert held(a_set(SMALL, ("Q4_K_M", 2.0, 0.9, 0.001))) == {}
    assert held(a_set(SMALL, ("Q3_K_S", 1.9, 0.9, 0.001))) == {}


@pytest.mark.parametrize(("kld", "out"), [(1.0, False), (1.0001, True), (2.5, True)])
def test_no_file_is_farther_than_one_nat(kld: float, out: bool) -> None:
    made = a_set(("IQ2_XXS", 1.0, kld, 0.01))
    assert held(made) == ({"IQ2_XXS": f"KLD {kld:.4g} ± 0.01 nats is above the bound of 1"} if out else {})


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        pytest.param(Bounds(), ["Q4_K_M", "IQ2_XXS"], id="defaults"),
        pytest.param(Bounds(max_kld=2.0), ["Q4_K_M"], id="a higher limit"),
        pytest.param(Bounds(max_kld_ratio=4.0), ["IQ2_XXS"], id="a higher ratio"),
        pytest.param(Bounds(errors=100.0), ["IQ2_XXS"], id="more errors"),
        pytest.param(Bounds(max_kld=0.02, max_kld_ratio=9.0), ["IQ4_XS", "Q4_K_M", "IQ2_XXS"], id="a lower limit"),
    ],
)
def test_bounds_are_the_sets_own(bounds: Bounds, expected: list[str]) -> None:
    made = a_set(SMALL, ("Q4_K_M", 2.5, 0.1, 0.001), ("IQ2_XXS", 1.0, 1.5, 0.1))
    made = made.model_copy(update={"gates": bounds.chosen(made.gates)})
    assert list(held(made)) == expected


def test_what_was_measured_otherwise_is_no_measure() -> None:
    made = a_set(SMALL, ("Q4_K_M", 2.5, 0.5, 0.001))
    assert list(held(made)) == ["Q4_K_M"]
    made.evidence[of(made, "IQ4_XS").sha256] = with_kld(0.03, 0.002, n_chunks=1)
    assert held(made) == {}


def test_divergences_below_the_bases_own_noise_are_no_measure() -> None:
    """Two files that are the base but for rounding: one nat in a hundred million is not twice the other."""
    made = a_set(("Q6_K", 3.0, 1e-8, 1e-10), ("Q8_0", 4.0, 3.9e-8, 1e-10))
    made.evidence[BASE] = with_kld(2e-8, 1e-9)
    assert held(made) == {}
    made.evidence[BASE] = with_kld(1e-8, 1e-9)
    assert list(held(made)) == ["Q8_0"]


def test_no_bound_holds_where_the_base_was_quantised_before() -> None:
    made = a_set(SMALL, ("Q4_K_M", 2.5, 1.5, 0.001), base_is_dequantised=True)
    assert gates.refusals(made) == []


def test_a_file_without_finite_figures_is_broken_whatever_the_base() -> None:
    made = with_failure(a_set(SMALL, ("Q4_K_M", 2.5, 0.03, 0.001), base_is_dequantised=True), "Q4_K_M")
    assert gates.refusals(made) == [f"{STEM}-Q4_K_M.gguf: gives no finite figures: its logits hold NaN or Inf"]
    elsewhere = with_failure(a_set(SMALL, ("Q4_K_M", 2.5, 0.03, 0.001)), "Q4_K_M", base_sha256=sha("a Q8_0"))
    assert gates.refusals(elsewhere) == gates.refusals(made)


def with_failure(made: Manifest, recipe: str, base_sha256: str = BASE) -> Manifest:
    found = made.evidence[of(made, recipe).sha256]
    assert found.quality is not None
    how = {name: getattr(found.quality, name) for name in Failed.model_fields if name not in ("why", "base_sha256")}
    failed = Failed(**how, base_sha256=base_sha256, why="its logits hold NaN or Inf")
    broken = found.model_copy(update={"quality": None, "failed": failed})
    return made.model_copy(update={"evidence": {**made.evidence, of(made, recipe).sha256: broken}})


@pytest.mark.parametrize(("qat", "expected"), [(False, ["Q4_K_M", "Q5_K_M"]), (True, [])])
def test_files_on_the_grid_of_a_qat_checkpoint_are_no_measure_for_others(qat: bool, expected: list[str]) -> None:
    """Its Q4_0 is next to lossless; a K-quant of it is as far away as of any model, and not broken for it."""
    files = (("Q4_0", 2.0, 0.001, 0.0001), ("Q4_1", 2.2, 0.001, 0.0001), ("Q4_K_M", 2.4, 0.03, 0.001))
    made = a_set(*files, ("Q5_K_M", 2.8, 0.015, 0.001), qat=qat)
    assert list(held(made)) == expected


def test_the_q4_0_of_a_qat_checkpoint_is_measured_by_the_others() -> None:
    made = a_set(("Q4_0", 2.0, 0.5, 0.001), ("Q3_K_M", 1.8, 0.05, 0.001), qat=True)
    assert list(held(made)) == ["Q4_0"]


def with_embeddings(made: Manifest) -> Manifest:
    """The set as one of a model that gives embeddings: what was a divergence is 1 - cosine."""
    found = {}
    for digest, known in made.evidence.items():
        assert known.quality is not None
        far = known.quality.kld
        near = Similarity(
            base_sha256=known.quality.base_sha256,
            text="heldout",
            text_sha256=sha("lines"),
            prompt="",
            n_lines=100,
            n_embd=64,
            cosine=Measured(value=1 - far.value, se=far.se),
            cosine_min=0.5,
            same_nearest=Measured(value=0.9, se=0.01),
            build="b",
        )
        found[digest] = known.model_copy(update={"quality": None, "similarity": near})
    said = EmbeddingFacts(prompts={}, similarity="cosine", dense=[])
    return made.model_copy(update={"evidence": found, "model": made.model.model_copy(update={"embedding": said})})


def test_embeddings_are_held_against_smaller_files() -> None:
    made = with_embeddings(a_set(SMALL, ("Q4_K_M", 2.5, 0.0771, 0.004), ("IQ2_XXS", 1.0, 1.5, 0.1)))
    told = f"1 - cosine of 0.0771 ± 0.004 is above 0.06, the bound by {STEM}-IQ4_XS.gguf, which is smaller"
    assert held(made) == {"Q4_K_M": f"{told} (0.03 ± 0.002)"}  # no bound in nats
    text = card.Renderer().render(made).replace("\u00a0", " ")
    assert "⛔ Out of line: 1 - cosine 0.0771 ± 0.0040 is more than 2 times that of IQ4_XS, which is smaller." in text


def test_the_noise_of_embeddings_is_no_measure() -> None:
    made = with_embeddings(a_set(("Q6_K", 3.0, 1e-6, 1e-8), ("Q8_0", 4.0, 3.9e-6, 1e-8)))
    assert list(held(made)) == ["Q8_0"]
    own = with_embeddings(a_set(("bf16", 8.0, 2e-6, 1e-8))).evidence
    (of_base,) = own.values()
    made.evidence[BASE] = of_base
    assert held(made) == {}


def test_what_is_held_back_is_recorded_beside_its_bounds() -> None:
    made = a_set(SMALL, ("Q4_K_M", 2.5, 0.5, 0.001))
    noted = gates.recorded(made)
    assert noted.gates.held == {f"{STEM}-Q4_K_M.gguf": str(gates.verdicts(made)[f"{STEM}-Q4_K_M.gguf"])}
    assert gates.recorded(noted) is noted
    mended = noted.model_copy(update={"files": [of(made, "IQ4_XS")]})
    assert gates.recorded(mended).gates.held == {}


# --- the card ------------------------------------------------------------------------------------------------------


def test_the_card_marks_what_is_held_back_and_recommends_none_of_it() -> None:
    made = a_set(SMALL, ("Q4_K_M", 2.5, 0.5, 0.001), ("IQ2_XXS", 1.0, 1.5, 0.1))
    made = with_failure(made, "IQ4_XS")
    text = card.Renderer().render(made).replace("\u00a0", " ")
    assert "**Some files must not be used.**" in text
    names = ", ".join(f"{STEM}-{recipe}.gguf" for recipe in ("IQ2_XXS", "IQ4_XS"))
    assert f"not published while they are in it: {names}." in text
    assert "⛔ Out of line: KLD 1.50 ± 0.10 is above 1 nats." in text
    assert "| no figures | what it is. ⛔ Broken: it gives no finite figures. |" in text
    picked, choices = table.pick(made), memory.choices(made)
    assert picked is not None
    assert choices is not None
    assert picked.recipe == "Q4_K_M"
    assert {cell.entry.recipe for row in choices.rows for cell in row.cells if cell.entry} == {"Q4_K_M"}


def test_the_card_says_by_which_file_another_is_out_of_line() -> None:
    text = card.Renderer().render(a_set(SMALL, ("Q4_K_M", 2.5, 0.5, 0.001))).replace("\u00a0", " ")
    assert "⛔ Out of line: KLD 0.5000 ± 0.0010 is more than 2 times that of IQ4_XS, which is smaller." in text


def test_a_set_in_line_says_nothing_of_the_gate() -> None:
    text = card.Renderer().render(a_set(SMALL, ("Q4_K_M", 2.5, 0.02, 0.001)))
    assert "⛔" not in text
    assert "must not be used" not in text


# --- measuring -----------------------------------------------------------------------------------------------------


def test_a_perplexity_beyond_any_number_is_no_figure() -> None:
    logits = np.zeros((4, 8), np.float32)
    logits[:, 0] = 3000.0
    targets = np.ones(4, np.int32)
    with ThreadPoolExecutor(1) as pool:
        tokens = scoring.score(logits, targets, *scoring.encode_base(logits, targets, pool), pool)
    with pytest.raises(scoring.NotMeasurableError, match=r"its perplexity is beyond any number \(exp of 3000\)"):
        scoring.summary(tokens)


def broken(path: Path) -> None:
    """NaN in the last norm: it loads, and every logit is NaN."""
    tensor = gguf_io.read_header(path).by_name["output_norm.weight"]
    data = bytearray(path.read_bytes())
    data[tensor.offset : tensor.offset + 4 * tensor.n_elements] = b"\x00\x00\xc0\x7f" * tensor.n_elements
    path.write_bytes(data)


def test_an_evaluation_notes_a_broken_file_and_goes_on(build: Build, finished: Report, tmp_path: Path) -> None:
    """The file is marked, the others are measured, a second evaluation knows it; a new base starts over."""
    copied = Path(shutil.copytree(finished.set_dir, tmp_path / finished.set_dir.name))
    facts = manifest.load(copied)
    names = [f"{TINY}-{recipe}.gguf" for recipe in ("bf16", "Q8_0", "IQ2_XXS")]
    for entry in facts.files:
        if entry.name not in names:
            (copied / entry.name).unlink()
    path = copied / names[1]
    broken(path)
    kept = [entry for entry in facts.files if entry.name in names]
    digest = sha256_file(path)
    kept = [entry.model_copy(update={"sha256": digest}) if entry.name == path.name else entry for entry in kept]
    manifest.save(facts.model_copy(update={"files": kept}), copied)
    said: list[Done] = []
    how = Measuring(chunks=1, bench=("none",), bounds=Bounds(max_kld=50.0, max_kld_ratio=1e6))
    measured = evidence.evaluate_set(copied, how, say=said.append)
    failed = measured.evidence[digest].failed
    assert failed is not None
    assert (measured.evidence[digest].quality, failed.why) == (None, "its logits hold NaN or Inf")
    assert sorted(gates.qualities(measured)) == sorted([names[0], names[2]])
    assert measured.gates.held == {path.name: "gives no finite figures: its logits hold NaN or Inf"}
    assert (measured.gates.max_kld, measured.gates.max_kld_ratio, measured.gates.errors) == (50.0, 1e6, 3.0)
    assert [(done.stage, done.name, done.why) for done in said if done.stage == "gate"] == [
        ("gate", path.name, "gives no finite figures: its logits hold NaN or Inf")
    ]
    again: list[Done] = []
    assert evidence.evaluate_set(copied, replace(how, bounds=Bounds()), say=again.append) == measured
    assert not any(done.made for done in again)


def test_a_broken_base_stops_the_evaluation(build: Build, finished: Report, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(finished.set_dir, tmp_path / finished.set_dir.name))
    facts = manifest.load(copied)
    path = copied / f"{TINY}-bf16.gguf"
    broken(path)
    digest = sha256_file(path)
    entries = [e.model_copy(update={"sha256": digest}) if e.name == path.name else e for e in facts.files]
    manifest.save(facts.model_copy(update={"files": [e for e in entries if e.name == path.name]}), copied)
    with pytest.raises(NoFiguresError, match="the base's logits hold NaN or Inf"):
        evidence.evaluate_set(copied, Measuring(chunks=1, bench=("none",)))
    assert manifest.load(copied).evidence == {}
