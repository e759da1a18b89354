"""Comparing calibration texts: the statistics, the table, and a real comparison on a small model."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gemma_gguf import calibrate, calibration, cli, evaluate, factory, imatrix, quantize, recipes
from gemma_gguf.calibrate import Asked, Chunks, Comparison, Mean, Row
from gemma_gguf.errors import BadInputError
from gemma_gguf.evaluate import Against
from gemma_gguf.files import sha256_file
from gemma_gguf.llama_cpp import Build, RunLog, run_tool
from gemma_gguf.manifest import Quality
from gemma_gguf.session import Done, Options
from tests import checkpoints, examples

# --- statistics --------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(20261122)


def test_a_mean_over_chunks_of_one_size_is_the_mean_of_their_means() -> None:
    means = RNG.gamma(2, 0.1, 40)
    found = calibrate.mean_of([(255, 255 * mean) for mean in means])
    assert found.value == pytest.approx(means.mean())
    assert found.se == pytest.approx(means.std(ddof=1) / math.sqrt(40))


def test_the_error_of_chunks_of_many_sizes_is_that_of_the_jackknife() -> None:
    counts = RNG.integers(50, 500, 200)
    chunks = [(int(n), float(n * RNG.gamma(2, 0.1))) for n in counts]

    def mean(these: Sequence[tuple[int, float]]) -> float:
        return sum(total for _, total in these) / sum(n for n, _ in these)

    left = np.array([mean([*chunks[:i], *chunks[i + 1 :]]) for i in range(len(chunks))])
    jackknife = math.sqrt((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum())
    found = calibrate.mean_of(chunks)
    assert found.value == pytest.approx(mean(chunks))
    assert found.se == pytest.approx(jackknife, rel=0.02)


def test_one_chunk_has_no_error() -> None:
    assert calibrate.mean_of([(4, 2.0)]) == Mean(0.5, None)
    assert not Mean(0.5, None).is_shown


def test_what_both_read_the_same_way_does_not_blur_a_difference() -> None:
    """Chunks differ a hundred times as much as the two files do; paired, the difference shows all the same."""
    hard = RNG.gamma(2, 0.5, 50)
    theirs: Chunks = tuple((255, 255 * float(h)) for h in hard)
    mine: Chunks = tuple((255, 255 * float(h + 0.01 + RNG.normal(0, 0.005))) for h in hard)
    found = calibrate.difference_of(mine, theirs)
    assert found.value == pytest.approx(0.01, abs=0.003)
    assert found.is_shown
    alone = calibrate.mean_of(theirs)
    assert alone.se is not None
    assert alone.se > 0.01


@pytest.mark.parametrize(
    ("value", "se", "shown"), [(0.2, 0.1, False), (0.201, 0.1, True), (-0.201, 0.1, True), (0.0, 0.0, False)]
)
def test_a_difference_is_shown_beyond_two_errors(value: float, se: float, shown: bool) -> None:
    assert Mean(value, se).is_shown == shown


# --- what is to be done ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "asked", "whole", "cuts"),
    [
        pytest.param({"a": 100}, (16, 32), True, {"a": [16, 32, 100]}, id="curve and all of it"),
        pytest.param({"a": 100}, (32, 16), False, {"a": [16, 32]}, id="the curve alone"),
        pytest.param({"a": 100, "b": 20}, (16,), True, {"a": [16, 20, 100], "b": [16, 20]}, id="where the other ends"),
        pytest.param({"a": 100, "b": 20}, (32,), False, {"a": [32], "b": [20]}, id="no cut in a short one"),
        pytest.param({"a": 100, "b": 32}, (32,), False, {"a": [32], "b": [32]}, id="just as long"),
        pytest.param({"a": 20}, (16, 64), True, {"a": [16, 20]}, id="no more than there is"),
        pytest.param({"a": 20, "b": 19}, (18,), True, {"a": [20], "b": [19]}, id="too near to the end"),
        pytest.param({"a": 100, "b": 100}, (), True, {"a": [100], "b": [100]}, id="the same length"),
    ],
)
def test_cuts(lengths: dict[str, int], asked: tuple[int, ...], whole: bool, cuts: dict[str, list[int]]) -> None:
    assert calibrate.cuts_of(lengths, asked, whole) == cuts


@pytest.mark.parametrize(
    ("n_chunks", "size", "cuts", "expected"),
    [
        pytest.param(100, 32, (), [(0, 32), (32, 32), (64, 32), (96, 4)], id="none"),
        pytest.param(100, 32, (16, 64), [(0, 16), (16, 16), (32, 32), (64, 32), (96, 4)], id="between and on a border"),
        pytest.param(40, 32, (40, 50, 0), [(0, 32), (32, 8)], id="at the ends"),
        pytest.param(40, 32, (38, 37), [(0, 32), (32, 5), (37, 3)], id="two left do not start"),
    ],
)
def test_segments_end_at_cuts(n_chunks: int, size: int, cuts: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    assert imatrix.segments(n_chunks, size, cuts) == expected


def test_the_imatrix_at_a_cut_is_the_part_that_ends_there() -> None:
    directory = Path("x")
    assert [imatrix.part_at(directory, 100, cut, (16, 64), 32).name for cut in (16, 64, 100)] == [
        "part-0.gguf",
        "part-32.gguf",
        "part-96.gguf",
    ]


def test_a_kind_of_the_mix_is_a_set() -> None:
    prose, mix = calibrate.load_set("prose"), calibrate.load_set("default")
    names = [part.name for part in calibration.parts("mix") if part.kind == "prose"]
    documents = [text for name, text in calibration.part_documents("mix").items() if name.partition("/")[0] in names]
    text = prose.data.decode()
    assert documents != []
    assert all(document.strip("\n") in text for document in documents)
    assert abs(len(text) - sum(map(len, documents))) < 4 * len(documents)
    assert len(prose.data) < len(mix.data) / 4


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"there is no calibration file or set called 'prosa'"):
        calibrate.load_set("prosa")
    with pytest.raises(BadInputError, match=r"there is no text"):
        calibration.from_file(tmp_path / "none.txt")


# --- the table ---------------------------------------------------------------------------------------------------


def row(set_name: str, n_chunks: int, *kld: float) -> Row:
    quality = next(iter(examples.example().evidence.values())).quality
    assert quality is not None
    return Row(set_name, n_chunks, "Q2_K", 1000, tuple((100, 100 * value) for value in kld), quality)


COMPARISON = Comparison(
    model="test/model",
    text="heldout",
    mode="plain",
    n_tokens=200,
    eval_chunks=2,
    sets={"default": 100, "prose": 20},
    rows=(
        row("none", 0, 0.5, 0.7),
        row("default", 20, 0.4, 0.5),
        row("default", 100, 0.35, 0.45),
        row("prose", 20, 0.45, 0.5501),
    ),
    refused=("IQ2_XXS",),
    is_dequantised=False,
)


def test_the_table() -> None:
    assert calibrate.markdown(COMPARISON).splitlines() == [
        "test/model, heldout text (plain), 200 tokens scored in 2 chunks; chunks of 512 tokens in each set: "
        "default 100, prose 20. KL divergence from the BF16 base in nats per token, ± standard error over chunks; "
        "* marks differences beyond two of them.",
        "",
        "| Recipe | Set | Chunks | KLD | minus none's | minus default's at as many chunks |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| Q2_K | none |  | 0.60000 ± 0.10000 |  |  |",
        "| Q2_K | default | 20 | 0.45000 ± 0.05000 | -0.15000 ± 0.05000 * |  |",
        "| Q2_K | default | 100 | 0.40000 ± 0.05000 | -0.20000 ± 0.05000 * |  |",
        "| Q2_K | prose | 20 | 0.50005 ± 0.05005 | -0.09995 ± 0.04995 * | +0.05005 ± 0.00005 * |",
        "",
        "llama.cpp does not make IQ2_XXS without an imatrix.",
    ]


def test_the_document_has_what_the_table_has() -> None:
    document = json.loads(json.dumps(COMPARISON.document()))
    assert document["sets"] == {"default": 100, "prose": 20}
    first, *_, last = document["rows"]
    assert first["against_none"] is first["against_first"] is None
    assert last["against_first"]["value"] == pytest.approx(0.05005)
    assert (last["set"], last["chunks"], last["recipe"]) == ("prose", 20, "Q2_K")


@pytest.mark.parametrize(
    ("argv", "exit_code", "said"),
    [
        (["--chunks", "16,x"], 2, "'16,x' is no list of numbers"),
        (["--chunks", "0"], 2, "'0' is no list of numbers"),
        (["--held-out", "."], 2, "is a directory"),
    ],
)
def test_wrong_usage(argv: list[str], exit_code: int, said: str) -> None:
    result = CliRunner().invoke(cli.main, ["calibrate", "demo", *argv])
    assert (result.exit_code, said in result.output) == (exit_code, True), result.output


# --- a real comparison -------------------------------------------------------------------------------------------


def test_a_comparison(build: Build, tmp_path: Path, log: RunLog) -> None:
    """Two texts of different length on a small model; its figures are those of llama-imatrix, llama-quantize and
    `evaluate` by themselves, and the same command measures nothing twice.
    """
    checkpoint = checkpoints.write_gemma3_text(tmp_path / "tiny-calibrate", layers=1)
    heldout = calibration.held_out().data.decode()
    words, numbers = tmp_path / "words.txt", tmp_path / "numbers.txt"
    words.write_text(" ".join(f"the word {n} and the other" for n in range(700)))
    numbers.write_text(" ".join(str(n**3) for n in range(600)))
    (tmp_path / "measured.txt").write_text(heldout[:6000])
    options = Options(str(checkpoint), name="test/tiny-calibrate", out=tmp_path / "out", until="convert")
    asked = Asked(
        sets=(str(words), str(numbers)),
        recipes=("Q2_K", "IQ2_XXS"),
        chunks=(3,),
        held_out=tmp_path / "measured.txt",
        eval_chunks=4,
    )
    said: list[Done] = []
    found = factory.calibrate_sets(options, asked, say=said.append)
    first, second = found.sets
    assert found.sets[first] > found.sets[second] + 2 > 5
    cuts = calibrate.cuts_of(found.sets, (3,), True)
    expected = [("none", 0, "Q2_K")]
    expected += [(name, cut, recipe) for name in found.sets for cut in cuts[name] for recipe in ("Q2_K", "IQ2_XXS")]
    order = {"Q2_K": 0, "IQ2_XXS": 1}
    made = [(r.set_name, r.n_chunks, r.recipe) for r in found.rows]
    assert sorted(made, key=lambda r: (r[0], r[1], order[r[2]])) == sorted(
        expected, key=lambda r: (r[0], r[1], order[r[2]])
    )
    assert found.refused == ("IQ2_XXS",)
    assert found.n_tokens == 4 * 255
    assert all(r.kld.value == pytest.approx(r.quality.kld.value, rel=1e-9) for r in found.rows)
    measured = found.find(first, 3, "Q2_K")
    assert measured is not None
    assert found.against_first(measured) is None
    other = found.find(second, 3, "Q2_K")
    assert other is not None
    assert found.against_first(other) == calibrate.difference_of(other.chunks, measured.chunks)

    base = options.out / ".work" / "test_tiny-calibrate" / "test_tiny-calibrate-bf16.gguf"
    assert alone(build, base, words, tmp_path, log).kld == measured.quality.kld

    said.clear()
    again = factory.calibrate_sets(options, asked, say=said.append)
    assert again == found
    assert [done.why[:15] for done in said if done.stage == "evaluate"] == ["measured before"] * len(found.rows)
    assert not any(done.made for done in said if done.stage == "evaluate")
    fewer = factory.calibrate_sets(options, replace(asked, eval_chunks=2), say=said.append)
    assert fewer.n_tokens == 2 * 255


def alone(build: Build, base: Path, text: Path, work: Path, log: RunLog) -> Quality:
    """The quality of Q2_K with three chunks of a text, by the tools themselves."""
    made, quant = work / "alone-imatrix.gguf", work / "alone.gguf"
    run_tool(imatrix.imatrix_argv(build, str(base), str(text), str(made), chunks=3), log=log)
    (recipe,) = recipes.select(["Q2_K"], {})
    argv = quantize.quantize_argv(build, recipe, str(base), str(quant), imatrix=str(made))
    quantize.run_llama_quantize(argv, "alone", cwd=work, log=log)
    material = evaluate.plain_material(calibration.from_file(work / "measured.txt"))
    against = Against(build, base, sha256_file(base), material, 4, threads=1, gpu_layers=0)
    _, n_vocab = evaluate.count_chunks(build, base, material, work, log)
    with evaluate.comparing(against, directory=work / "alone", n_vocab=n_vocab, log=log) as quality_of:
        return quality_of(quant)
