"""What a trained model shows of the recipes (`make proof PART=trained`), and that the text it learns is sound.

The model learns, is calibrated and is measured on three disjoint parts of one kind of text (`stories.py`). Figures are
those of `evaluate`; whether one file is better than another is told by the differences of the same tokens under both
(`kld_oracle.py`), with standard errors over chunks, as tokens of one chunk are not independent. What lies within two
standard errors is reported as "not shown".
"""

import contextlib
import itertools
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import sentencepiece

from gemma_gguf import calibration, evaluate, factory, gguf_io, manifest, quantize, recipes
from gemma_gguf.calibration import Text
from gemma_gguf.evaluate import Against
from gemma_gguf.files import sha256_bytes, sha256_file
from gemma_gguf.llama_cpp import Build, RunLog, python_env, run_tool
from gemma_gguf.manifest import Manifest, Quality
from gemma_gguf.session import Options
from tests import stories, trained
from tests.stories import Dice
from tests.test_calibration import FILES, REPO, UNITS, windows

LADDER = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
LARGE = tuple(name for name in recipes.DEFAULT_NAMES if recipes.TABLE[name].parent is not None)
LOW = ("IQ2_XS", "IQ2_M", "IQ3_XXS")
WITHOUT_IMATRIX = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")
RECIPES = tuple(
    name
    for name in recipes.DEFAULT_NAMES
    if name in {"bf16", *LADDER, *LARGE, *LOW, *WITHOUT_IMATRIX, *(recipes.TABLE[large].parent for large in LARGE)}
)
CALIBRATION_CHARACTERS, CHUNKS = 250_000, 80
EVALUATION_CHARACTERS = CHUNKS * 512 * 4  # a token is shorter
ERRORS = 2.0  # standard errors from which on a difference is shown

Array = npt.NDArray[np.float64]


# --- the text ----------------------------------------------------------------------------------------------------


def test_the_text_is_the_same_everywhere() -> None:
    text = stories.text("evaluation", 20_000)
    assert sha256_bytes(text.encode()) == "41f382580b9d6ce602978bc8100c61f492af0de9f6186126958d2f46b97733be"


def learnt() -> str:
    """All text that training takes."""
    return stories.text("training", trained.N_CHARACTERS)


@UNITS
def test_the_text_shares_nothing_with_calibration_and_held_out_text(
    units: Callable[[str], list[str]], length: int
) -> None:
    ours = {window for path in FILES for window in windows(units(path.read_text(encoding="utf-8")), length)}
    texts = [learnt(), calibration_text().data.decode(), evaluation_text().data.decode()]
    assert [window for text in texts for window in windows(units(text), length) if window in ours] == []


def calibration_text() -> Text:
    return Text("stories", "tests/stories.py", stories.text("calibration", CALIBRATION_CHARACTERS).encode())


def evaluation_text() -> Text:
    return Text("stories-evaluation", "tests/stories.py", stories.text("evaluation", EVALUATION_CHARACTERS).encode())


def test_the_three_parts_share_no_document() -> None:
    parts = [learnt(), calibration_text().data.decode(), evaluation_text().data.decode()]
    documents = [set(part.rstrip("\n").split("\n\n")) for part in parts]
    assert all(len(part) > 100 for part in documents)
    assert [len(documents[a] & documents[b]) for a, b in ((0, 1), (0, 2), (1, 2))] == [0, 0, 0]


SEEDS = [f"test {number}" for number in range(50)]


def test_tills_are_added_up() -> None:
    for seed in SEEDS:
        text = stories.till(Dice(seed))
        price = {good.lower(): int(pence) for good, pence in re.findall(r"^(\w+) cost (\d+) pence each", text, re.M)}
        total = 0
        sales = re.findall(r"(\d+) (\w+) and paid (\d+) pence; .* (\d+)\.$", text, re.M)
        assert len(sales) >= 5
        for n, good, paid, now in sales:
            total += int(n) * price[good]
            assert (int(paid), int(now)) == (int(n) * price[good], total)
        assert text.endswith(f" earned {total} pence.")


def test_programs_print_what_they_compute() -> None:
    """The programs, translated to Python, print what their comments say."""
    for seed in SEEDS:
        lines, depth, expected = [], 0, []
        for line in stories.program(Dice(seed)).splitlines()[1:-1]:
            code, _, comment = line.strip().partition("  # ")
            if code.startswith("end "):
                depth -= 1
                continue
            code = re.sub(r"^repeat (\d+) times$", r"for _ in range(\1):", code.replace(":=", "="))
            code = re.sub(r"^if (.*) then$", r"if \1:", code)
            code = re.sub(r"^print", "printed.append", code)
            lines.append("  " * depth + code)
            depth += code.endswith(":")
            expected += [int(comment)] if comment.isdigit() else []
        printed: list[int] = []
        exec("\n".join(lines), {"printed": printed})
        assert printed == expected != []


def test_days_are_counted() -> None:
    counted = 0
    for seed in SEEDS:
        text = stories.letter(Dice(seed))
        today = stories.DAYS.index(text.split("\n")[0])
        for ahead, day in re.findall(r"^In (\w+) days?, on (\w+),", text, re.M):
            assert stories.DAYS[(today + stories.COUNTS.index(ahead)) % 7] == day
            counted += 1
        for back, day in re.findall(r"^(\w+) days? ago, on (\w+),", text, re.M):
            assert stories.DAYS[(today - stories.COUNTS.index(back.lower())) % 7] == day
            counted += 1
    assert counted > len(SEEDS)


def test_stories_end_where_everything_is() -> None:
    """Each thing is told of once at the end, and it is where it was put, or with whom it was left, last."""
    for seed in SEEDS:
        *before, end = re.split(r" (?=At the end of the day:|When night fell:|In the end:)", stories.story(Dice(seed)))
        moves = re.findall(r"(\w+) (?:left|put down|forgot) the (\w+) in the (\w+)\.", before[-1])
        for _, thing, place in {thing: move for move in moves for thing in [move[1]]}.values():
            later = before[-1].rpartition(f"the {thing} in the {place}.")[2]
            if not re.search(rf"(?:gave|handed|passed|took|picked up|found) the \w+ {thing}\b", later):
                assert re.search(rf"In the {place} (?:was|were) [^.]*\b{thing}\b", end)


# --- tokenizer and shape -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=trained.tokenizer_model())


def test_the_tokenizer_is_made_the_same_way_each_time() -> None:
    assert trained.tokenizer_model() == trained.tokenizer_model()


def test_the_tokenizer_reads_every_text(tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    """Its own text in few tokens; others still in pieces of words, and without a loss."""
    own = evaluation_text().data.decode()
    other = calibration.held_out().data.decode()
    for text, shortest in ((own, 2.8), (other, 1.2)):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.unk_id() not in tokens
        assert len(text) / len(tokens) > shortest
    assert tokenizer.vocab_size() == trained.VOCABULARY


def test_every_column_is_divisible_by_256() -> None:
    assert [n % 256 for n in (trained.HIDDEN, trained.FEED_FORWARD, trained.HEADS * trained.HEAD_DIM)] == [0, 0, 0]


# --- what is shown -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How much more KLD one file has than another, in nats per token, and the standard error of that."""

    mean: float
    se: float

    @classmethod
    def of(cls, more: Array, less: Array) -> "Difference":
        """From KLD per token, shape (chunks, tokens), of two files on the same text."""
        chunks = (more - less).mean(axis=1)
        return cls(float(chunks.mean()), float(chunks.std(ddof=1)) / math.sqrt(len(chunks)))

    @property
    def verdict(self) -> str:
        if abs(self.mean) <= ERRORS * self.se:
            return "not shown"
        return "shown" if self.mean > 0 else "contradicted"

    def __str__(self) -> str:
        return f"{self.mean:+.6f} ± {self.se:.6f}  {self.verdict}"


@pytest.mark.parametrize(
    ("shift", "spread", "verdict"),
    [(1.0, 0.1, "shown"), (-1.0, 0.1, "contradicted"), (0.01, 1.0, "not shown"), (0.0, 0.0, "not shown")],
    ids=["better", "worse", "within errors", "equal"],
)
def test_a_verdict(shift: float, spread: float, verdict: str) -> None:
    less = np.random.default_rng(1).normal(size=(50, 20))
    more = less + shift + spread * np.random.default_rng(2).normal(size=(50, 1))
    assert Difference.of(more, less).verdict == verdict


@dataclass(frozen=True)
class Row:
    """One measured file. `kld`: nats per token, shape (chunks, tokens), by the oracle."""

    name: str
    n_bytes: int
    bpw: float
    quality: Quality
    kld: Array


@dataclass(frozen=True)
class Proof:
    """Everything that was measured. `nll` and `came` of the base: shape (chunks, tokens).

    `facts` is the set's manifest; its evidence is what `run` measured on the project's held-out text.
    """

    facts: Manifest
    rows: Mapping[str, Row]
    floor: Quality
    nll: Array
    came: npt.NDArray[np.int64]

    def difference(self, more: str, less: str) -> Difference:
        return Difference.of(self.rows[more].kld, self.rows[less].kld)


def without(recipe: str) -> str:
    """What a file that was made without an imatrix is called here."""
    return f"{recipe} without imatrix"


STEPS = tuple(itertools.pairwise(LADDER))
CLAIMS = (
    *(("more bits", more, less) for more, less in STEPS),
    *(("imatrix", without(name), name) for name in WITHOUT_IMATRIX),
    *(("large", str(recipes.TABLE[name].parent), name) for name in LARGE),
    *(("more bits", more, less) for more, less in itertools.pairwise(LOW)),
)
# These must be shown; the others must not be contradicted.
SURE = {("more bits", more, less) for more, less in STEPS} | {("imatrix", without("Q2_K"), "Q2_K")}


@pytest.fixture(scope="module")
def proof(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Proof:
    """The trained model, its set, and the same without an imatrix, measured; some minutes, the training not counted."""
    work = tmp_path_factory.mktemp("trained")
    with contextlib.closing(RunLog(work / "proof.log")) as log:
        done = make_and_measure(build, work, log)
    print("\n" + table(done))
    return done


def make_and_measure(build: Build, work: Path, log: RunLog) -> Proof:
    text, calibrating = work / "evaluation.txt", work / "stories.txt"
    text.write_bytes(evaluation_text().data)
    calibrating.write_bytes(calibration_text().data)
    report = factory.run(
        Options(
            str(trained.checkpoint()),
            name=trained.NAME,
            out=work / "out",
            recipes=RECIPES,
            calibration=str(calibrating),
            eval_chunks=8,
            bench=("none",),
        )
    )
    facts = manifest.load(report.set_dir)
    paths = {str(entry.recipe): report.set_dir / entry.name for entry in facts.files if entry.kind == "model"}
    base = paths.pop("bf16")
    for name in WITHOUT_IMATRIX:
        paths[without(name)] = out = work / f"{name}-without.gguf"
        argv = quantize.quantize_argv(build, recipes.TABLE[name], str(base), str(out), imatrix=None)
        quantize.run_llama_quantize(argv, name, cwd=work, log=log)
    qualities = measure(build, base, [base, *paths.values()], work, log)
    arrays = ask_oracle(build, base, list(paths.values()), text=text, work=work, log=log)
    rows = {}
    for name, path in paths.items():
        header = gguf_io.read_header(path)
        rows[name] = Row(name, header.file_size, header.bits_per_weight, qualities[path], arrays[path.name])
    by_size = dict(sorted(rows.items(), key=lambda item: -item[1].n_bytes))
    return Proof(facts, by_size, qualities[base], arrays["nll"], arrays["came"])


def measure(build: Build, base: Path, files: Sequence[Path], work: Path, log: RunLog) -> dict[Path, Quality]:
    """What `evaluate` says of files, on the evaluation text."""
    material = evaluate.plain_material(evaluation_text())
    n_available, n_vocab = evaluate.count_chunks(build, base, material, work, log)
    assert n_available >= CHUNKS
    threads = evaluate.threads_or_default(None)
    against = Against(build, base, sha256_file(base), material, CHUNKS, threads=threads, gpu_layers=0)
    with evaluate.comparing(against, directory=work / "evaluate", n_vocab=n_vocab, log=log) as quality_of:
        return {file: quality_of(file) for file in files}


def ask_oracle(
    build: Build, base: Path, files: Sequence[Path], *, text: Path, work: Path, log: RunLog
) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `kld_oracle`, run in a process of the build."""
    out = work / "oracle.npz"
    argv: list[str | Path] = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.kld_oracle",
        out,
        text,
        str(CHUNKS),
        base,
        *files,
    ]
    run_tool(argv, log=log, cwd=REPO, env=python_env(build))
    with np.load(out) as arrays:
        return dict(arrays)


def unigram_ppl(proof: Proof) -> float:
    """Perplexity of token frequencies on what the model was scored on: what a model without context reaches.

    The frequencies are those of the scored tokens themselves, which flatters it.
    """
    counts = np.bincount(proof.came.ravel())
    share = counts[counts > 0] / counts.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def table(proof: Proof) -> str:
    """All rows, then all claims."""
    first = proof.floor
    lines = [
        f"{trained.NAME}: {proof.nll.size} tokens scored, PPL {first.ppl.value:.4f} ± {first.ppl.se:.4f}"
        f" (token frequencies alone: {unigram_ppl(proof):.1f});"
        f" the base against itself: KLD {first.kld.value:.1e}",
        f"{'file':24}{'MB':>6}{'bpw':>7}{'PPL':>9}{'mean KLD ± se':>23}{'99 %':>10}{'same top':>10}",
    ]
    for row in proof.rows.values():
        quality = row.quality
        lines.append(
            f"{row.name:24}{row.n_bytes / 1e6:6.2f}{row.bpw:7.3f}{quality.ppl.value:9.4f}"
            f"{quality.kld.value:12.6f} ± {quality.kld.se:.6f}{quality.kld_p99:10.5f}"
            f"{100 * quality.same_top_p.value:8.2f} %"
        )
    lines.append("Difference in KLD of the same tokens, nats, ± standard error over chunks:")
    for kind, more, less in CLAIMS:
        lines.append(f"{kind:10} {more + ' - ' + less:36} {proof.difference(more, less)}")
    return "\n".join(lines)


@pytest.mark.proof
def test_trained_model_has_learnt(proof: Proof) -> None:
    assert 10 * math.exp(proof.nll.mean()) < unigram_ppl(proof)


@pytest.mark.proof
def test_trained_figures_are_the_oracles(proof: Proof) -> None:
    """`evaluate` packs the base in 16 bits and sums in single precision; the oracle does neither."""
    assert proof.floor.kld.value < 1e-6
    assert proof.floor.ppl.value == pytest.approx(math.exp(proof.nll.mean()), rel=1e-4)
    for row in proof.rows.values():
        assert row.quality.n_tokens == row.kld.size
        assert row.quality.kld.value == pytest.approx(row.kld.mean(), rel=0.005, abs=1e-6), row.name


@pytest.mark.proof
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim[1]} - {claim[2]}")
def test_trained_model_shows(claim: tuple[str, str, str], proof: Proof) -> None:
    _, more, less = claim
    verdict = proof.difference(more, less).verdict
    assert verdict == "shown" if claim in SURE else verdict != "contradicted", str(proof.difference(more, less))


@pytest.mark.proof
def test_trained_model_is_measurable_on_the_held_out_text(proof: Proof) -> None:
    """A text in languages it has never read: `run` measured every file there, and the ends of the ladder lie right."""
    found = {}
    for entry in proof.facts.files:
        if entry.kind == "model":
            quality = proof.facts.evidence[entry.sha256].quality
            assert quality is not None
            assert (quality.text, quality.mode, quality.n_tokens) == ("heldout", "plain", 8 * 255)
            found[entry.recipe] = quality.kld
    low, high = found["Q2_K"], found["Q8_0"]
    assert low.value - high.value > ERRORS * math.hypot(low.se or 0, high.se or 0)
