"""How good and how fast the files of a set are: quality against a base, speed by llama-bench.

Consumes a build, a base and files, and a text that no calibration saw; produces `Quality` and `Speed` values for the
manifest. A base model reads plain text, in chunks that are scored as llama-perplexity scores them; an
instruction-tuned one reads conversations in its own turn format and is scored on what the model says in them
(llama-perplexity cannot do that: it does not parse special tokens, and raw text means little to such a model).

The base's distributions are written once and read for every file, or, where the disk has no room for them, computed
anew beside each file. The work itself is done by `bindings.py` in processes of the build.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from gemma_gguf import chat, scoring
from gemma_gguf.calibration import Conversation, Text
from gemma_gguf.embedding import Lines, Vectors, similarity
from gemma_gguf.errors import BadInputError, NoFiguresError, ToolFailedError, VerificationError
from gemma_gguf.files import scratch, sha256_bytes, write_atomic
from gemma_gguf.llama_cpp import Build, RunLog, ask_bindings, cpu_name, cpu_threads, run_tool
from gemma_gguf.manifest import Failed, FileEntry, Measured, Quality, Similarity, Speed
from gemma_gguf.progress import Progress, silent

CHUNK_TOKENS = 512
# Of plain text, and conversations: about as many tokens are computed.
DEFAULT_CHUNKS: Mapping[str, int] = {"plain": 10, "chat": 20}
DISK_BUDGET = 8_000_000_000  # bytes; the whole held-out text takes 6.6 GB with Gemma's vocabulary
FREE_RESERVE = 1_000_000_000  # bytes of the disk that stay free

# Speed is shown as the share of Q4_0's, so that one is always measured.
BENCH_REFERENCE = "Q4_0"
BENCH_DEFAULT = ("Q8_0", "Q6_K", "Q4_K_M", BENCH_REFERENCE, "IQ4_XS", "Q3_K_M")
BENCH_ROUNDS = 3
BENCH_PROMPT, BENCH_GENERATE = 512, 64  # tokens

# Templates may write the date into the prompt; the text must be the same tomorrow.
DAY = datetime(2026, 1, 1, tzinfo=UTC)

Pieces = list[tuple[str, bool]]  # of a conversation: text, and whether the model says it


# --- what is read -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Material:
    """What the models read: `data` is the text itself, or the conversations' pieces as JSON, as `mode` says."""

    name: str
    mode: str  # as in `manifest.Quality`
    data: bytes
    n_conversations: int | None  # None for plain text: only a tokenizer can count its chunks

    @property
    def sha256(self) -> str:
        return sha256_bytes(self.data)


def plain_material(text: Text) -> Material:
    """A text for a base model. The last newline is left out, as llama.cpp's tools do when they read a file."""
    return Material(text.name, "plain", text.data.removesuffix(b"\n"), None)


def chat_material(
    name: str, conversations: Sequence[Conversation], template: str, *, bos_token: str, eos_token: str
) -> Material:
    """Conversations in the turn format of a chat template.

    The template renders each of them twice: with marks in the place of what the model says, which shows where its
    turns are, and as it is. Where the two do not agree the template changed what is said, and the conversation is left
    out. Raises `BadInputError` when the template fails, or nothing is left.
    """

    def render(given: Sequence[Conversation]) -> list[str]:
        return chat.render_many(
            template, given, add_generation_prompt=False, bos_token=bos_token, eos_token=eos_token, now=DAY
        )

    marked = render([_marked(conversation) for conversation in conversations])
    candidates = [_cut_at_marks(text, turns) for text, turns in zip(marked, conversations, strict=True)]
    whole = render(conversations)
    cut = [pieces for pieces, text in zip(candidates, whole, strict=True) if _joined(pieces) == text]
    if not cut:
        raise BadInputError(
            "the chat template changes what the model says, so its turns cannot be told from the rest",
            next_step="Leave the evaluation out with --no-evaluate, or mend the checkpoint's chat template.",
        )
    return Material(name, "chat", json.dumps(cut, ensure_ascii=False).encode(), len(cut))


def _mark(turn: int) -> str:
    return f"\ue000{turn}\ue001"  # of Unicode's private use area: in no text


def _marked(conversation: Conversation) -> Conversation:
    return [
        {**message, "content": _mark(turn)} if message["role"] == "assistant" else message
        for turn, message in enumerate(conversation)
    ]


def _cut_at_marks(text: str, conversation: Conversation) -> Pieces:
    """A rendered conversation, cut where marks stand; each is what the model says there."""
    pieces: Pieces = []
    for turn, message in enumerate(conversation):
        before, mark, after = text.partition(_mark(turn))
        if mark:
            pieces += [(before, False), (message["content"], True)]
            text = after
    return [*pieces, (text, False)]


def _joined(pieces: Pieces) -> str:
    return "".join(text for text, _ in pieces)


# --- quality -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Against:
    """What every quality of a set has in common: the build that measures, the base, the text and its depth."""

    build: Build
    base: Path
    base_sha256: str
    material: Material
    n_chunks: int
    threads: int
    gpu_layers: int
    other_builds: frozenset[str] = frozenset()  # whose measurements of unchanged files were kept

    def current(self, found: Quality | Similarity | Failed | None) -> Quality | Failed | None:
        """What was found earlier, if it is of just this base, text and depth, by a build that counts as this one."""
        if isinstance(found, Quality | Failed) and _is_of(found, self.facts, self.other_builds):
            return found
        return None

    @property
    def facts(self) -> dict[str, Any]:
        """What `Quality` and `Failed` say of how it was measured."""
        return {
            "base_sha256": self.base_sha256,
            "text": self.material.name,
            "text_sha256": self.material.sha256,
            "mode": self.material.mode,
            "chunk_size": CHUNK_TOKENS,
            "n_chunks": self.n_chunks,
            "build": self.build.key,
        }

    @property
    def settings(self) -> dict[str, object]:
        return {
            "mode": self.material.mode,
            "n_chunks": self.n_chunks,
            "chunk_size": CHUNK_TOKENS,
            "threads": self.threads,
            "gpu_layers": self.gpu_layers,
        }


def _is_of(found: Quality | Similarity | Failed, facts: Mapping[str, Any], other_builds: frozenset[str]) -> bool:
    """Whether something was measured as these facts say, by the build they name or one of the others."""
    same = all(getattr(found, name) == value for name, value in facts.items() if name != "build")
    return same and found.build in {facts["build"], *other_builds}


def count_chunks(build: Build, model: Path, material: Material, directory: Path, log: RunLog) -> tuple[int, int]:
    """(chunks that a material has, tokens in the model's vocabulary). Raises `BadInputError` when there is none."""
    path = directory / "count.txt"
    write_atomic(path, material.data)
    try:
        answer = ask_bindings(build, "tokens", model, path, log, settings={"parse_special": False})
    finally:
        path.unlink()
    n_chunks = material.n_conversations or int(answer["n_tokens"]) // CHUNK_TOKENS
    if n_chunks == 0:
        raise BadInputError(
            f"the text {material.name} has only {answer['n_tokens']} tokens, no chunk of {CHUNK_TOKENS}",
            next_step="Give a longer text.",
        )
    return n_chunks, int(answer["n_vocab"])


@contextlib.contextmanager
def comparing(
    against: Against,
    *,
    directory: Path,
    n_vocab: int,
    disk_budget: int = DISK_BUDGET,
    log: RunLog,
    progress: Progress = silent,
    note: Callable[[Sequence[tuple[int, float]]], None] = lambda _: None,
) -> Iterator[Callable[[Path], Quality]]:
    """A function that measures a file; it raises `NoFiguresError` for one whose logits are not finite.

    `note` gets (scored tokens, sum of their divergences) of every chunk, too.

    `directory` is for this alone: what an earlier run left in it goes first, and all of it goes last. The base's
    distributions are written with the first file, unless they take more than `disk_budget` bytes or would
    leave too little of the disk; then the base runs beside every file.
    """
    scored = CHUNK_TOKENS // 2 if against.material.mode == "plain" else CHUNK_TOKENS
    needed = scoring.base_bytes(against.n_chunks * scored, n_vocab)
    with scratch(directory):
        text, logits = directory / "text", directory / "base.logits"
        stored = needed <= min(disk_budget, shutil.disk_usage(directory).free - FREE_RESERVE)
        log.note(
            f"base distributions: {needed:,} bytes at most, {'stored' if stored else 'computed beside every file'}"
        )
        write_atomic(text, against.material.data)

        def ask(command: str, model: Path, label: str, place: Mapping[str, str]) -> dict[str, Any]:
            answer = ask_bindings(
                against.build,
                command,
                model,
                text,
                log,
                settings={**against.settings, **place},
                on_progress=lambda done, total: progress(label, done, total, "chunks"),
            )
            if "error" in answer:
                raise _not_measurable(model, answer["error"], log)
            return answer

        def measure(file: Path) -> Quality:
            place = {"logits": str(logits)} if stored else {"base": str(against.base.resolve())}
            if stored and not logits.exists():
                ask("base_logits", against.base, "reading the text with the base", place)
            answer = ask("score", file, f"evaluating {file.stem}", place)
            note([(int(n), float(kld)) for n, kld in answer.pop("by_chunk")])
            return Quality(**against.facts, **answer)

        yield measure


def _not_measurable(file: Path, why: str, log: RunLog) -> NoFiguresError:
    return NoFiguresError(
        f"{file} cannot be measured: {why}",
        why=why,
        next_step="Delete it and run the same command again; --no-evaluate leaves the evaluation out.",
        log=log.path,
    )


# --- embeddings ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedding:
    """What every similarity of a set has in common: the build that measures, the base, and the lines."""

    build: Build
    base: Path
    base_sha256: str
    lines: Lines
    threads: int
    gpu_layers: int
    other_builds: frozenset[str] = frozenset()  # whose measurements of unchanged files were kept

    def current(self, found: Quality | Similarity | Failed | None) -> Similarity | Failed | None:
        """What was found earlier, if it is of just this base and lines, by a build that counts as this one."""
        if isinstance(found, Failed) and _is_of(found, self.facts, self.other_builds):
            return found
        if isinstance(found, Similarity) and _is_of(found, self.of_lines, self.other_builds):
            return found
        return None

    @property
    def facts(self) -> dict[str, Any]:
        """What `Failed` says of how it was measured: lines are its chunks."""
        return {**self.of_lines, "mode": "embedding", "chunk_size": None, "n_chunks": len(self.lines.texts)}

    @property
    def of_lines(self) -> dict[str, Any]:
        """What `Similarity` says of how it was measured."""
        return {
            "base_sha256": self.base_sha256,
            "text": self.lines.name,
            "text_sha256": self.lines.sha256,
            "build": self.build.key,
        }


@contextlib.contextmanager
def embedding_files(
    against: Embedding, *, directory: Path, log: RunLog, progress: Progress = silent
) -> Iterator[Callable[[Path], Similarity]]:
    """A function that measures a file: its vectors of all lines against those of the base, which are computed once.

    `directory` is for this alone: what an earlier run left in it goes first, and all of it goes last.
    """
    base: list[Vectors] = []
    with scratch(directory):
        lines, out = directory / "lines.json", directory / "vectors"
        write_atomic(lines, against.lines.data)

        def vectors(model: Path, label: str) -> Vectors:
            settings = {"out": str(out), "threads": against.threads, "gpu_layers": against.gpu_layers}
            answer = ask_bindings(
                against.build,
                "embed",
                model,
                lines,
                log,
                settings=settings,
                on_progress=lambda done, total: progress(label, done, total, "lines"),
            )
            return np.fromfile(out, np.float32).reshape(int(answer["n_texts"]), int(answer["n_embd"]))

        def measure(file: Path) -> Similarity:
            if not base:
                base.append(vectors(against.base, "embedding the lines with the base"))
            try:
                figures = similarity(base[0], vectors(file, f"evaluating {file.stem}"))
            except VerificationError as error:
                raise _not_measurable(file, error.what, log) from error
            return Similarity(**against.of_lines, prompt=against.lines.prompt, **figures)

        yield measure


# --- speed ---------------------------------------------------------------------------------------------------------


def bench_choice(entries: Sequence[FileEntry], wanted: Sequence[str] | None) -> list[FileEntry]:
    """The files whose speed is measured: those of the recipes `wanted`, the default handful for None.

    `("all",)` means every file and `("none",)` no file. Where any is measured Q4_0 is, too: speed is shown as its
    share. Raises `BadInputError` for a recipe that the set does not have.
    """
    by_recipe = {str(entry.recipe).upper(): entry for entry in entries}
    if wanted == ("none",):
        return []
    if wanted == ("all",):
        return list(entries)
    if wanted is None:
        names = [name.upper() for name in BENCH_DEFAULT if name.upper() in by_recipe]
    else:
        names = [name.upper() for name in wanted]
        missing = [name for name in wanted if name.upper() not in by_recipe]
        if missing:
            raise BadInputError(
                f"this set has no {missing[0]} to measure the speed of",
                next_step=f"Choose from: {', '.join(str(entry.recipe) for entry in entries)}, all, none.",
            )
        if BENCH_REFERENCE in by_recipe and BENCH_REFERENCE not in names:
            names.append(BENCH_REFERENCE)
    return [by_recipe[name] for name in dict.fromkeys(names)]


def speed_is_current(
    speed: Speed | None,
    build: Build,
    threads: int,
    other_builds: frozenset[str] = frozenset(),
    *,
    n_generate: int = BENCH_GENERATE,
) -> bool:
    """Whether a speed that is known already is of this build (or of `other_builds`, whose measurements are kept) and
    of this machine, with so many threads."""
    return (
        speed is not None
        and speed.build in {build.key, *other_builds}
        and (speed.cpu, speed.backend, speed.threads, speed.n_prompt, speed.n_generate)
        == (cpu_name(), build.backend, threads, BENCH_PROMPT, n_generate)
    )


def bench_argv(
    build: Build, model: Path, *, threads: int, gpu_layers: int, n_generate: int = BENCH_GENERATE
) -> list[str]:
    """One visit of llama-bench to a file: prompt processing and generation, once each after a warm-up.

    A model that gives embeddings generates nothing: with `n_generate` 0 it reads and pools.
    It says what it does, because its memory is looked at whenever it says something.
    """
    argv = [str(build.tool("llama-bench")), "-m", str(model), "-p", str(BENCH_PROMPT), "-n", str(n_generate)]
    argv += [] if n_generate else ["-embd", "1"]
    return [*argv, "-r", "1", "-t", str(threads), "-ngl", str(gpu_layers), "-o", "jsonl", "--progress"]


def parse_bench_log(output: str, n_generate: int = BENCH_GENERATE) -> tuple[list[float], list[float]]:
    """(prompt, generation) speeds in tokens per second from llama-bench's `jsonl`, one object per line and test."""
    prompt: list[float] = []
    generate: list[float] = []
    for line in output.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            (generate if row["n_gen"] else prompt).extend(float(value) for value in row["samples_ts"])
    if not prompt or bool(generate) != bool(n_generate):
        raise ToolFailedError(f"llama-bench did not say how fast it was: {output.strip()[-300:]!r}")
    return prompt, generate


def bench(
    build: Build,
    files: Sequence[Path],
    *,
    threads: int,
    gpu_layers: int = 0,
    n_generate: int = BENCH_GENERATE,
    rounds: int = BENCH_ROUNDS,
    log: RunLog,
    progress: Progress = silent,
) -> list[Speed]:
    """Speed and memory of files, in `rounds` visits to all of them in turn: what else the machine does hits all alike.

    Standard errors come from the spread over the visits. Memory is the most that llama-bench had resident whenever it
    said what it does: weights (also those mapped from the file, as far as they are in memory), KV cache and buffers.
    """
    prompt: list[list[float]] = [[] for _ in files]
    generate: list[list[float]] = [[] for _ in files]
    memory = [0] * len(files)
    for visit in range(rounds * len(files)):
        number = visit % len(files)
        progress("measuring speed", visit, rounds * len(files), "visits")
        argv = bench_argv(build, files[number], threads=threads, gpu_layers=gpu_layers, n_generate=n_generate)
        done = run_tool(argv, log=log)
        fast = parse_bench_log(done.output, n_generate)
        prompt[number] += fast[0]
        generate[number] += fast[1]
        memory[number] = max(memory[number], done.peak_memory)
    return [
        Speed(
            build=build.key,
            cpu=cpu_name(),
            backend=build.backend,
            threads=threads,
            n_prompt=BENCH_PROMPT,
            n_generate=n_generate,
            prompt_per_second=_mean(prompt[number]),
            generate_per_second=_mean(generate[number]) if n_generate else None,
            peak_memory_bytes=memory[number] or None,
        )
        for number in range(len(files))
    ]


def _mean(samples: Sequence[float]) -> Measured:
    value, error = scoring.mean_and_error(np.array(samples))
    return Measured(value=round(value, 4), se=None if error is None else round(error, 4))


def threads_or_default(threads: int | None) -> int:
    """What was asked for, or one thread per physical core."""
    return threads or cpu_threads()
