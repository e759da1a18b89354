"""The importance matrix: computed by llama-imatrix, and checked before anything uses it.

Consumes the base and a calibration text, produces a GGUF with, for every weight that a matrix product reads, the sum
of squared activations per column (`<name>.in_sum2`, shape (experts, columns)) and how often it was hit
(`<name>.counts`, shape (experts, 1)). A file that exists is not a file that is finished: llama-imatrix saves every
ten chunks, so completeness is read from the content.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from gemma_gguf import gguf_io
from gemma_gguf.errors import BadInputError, VerificationError
from gemma_gguf.files import partial_path, replace_durably
from gemma_gguf.gguf_io import Header
from gemma_gguf.llama_cpp import Build, RunLog, ToolRun, run_tool
from gemma_gguf.manifest import Coverage
from gemma_gguf.progress import Progress, silent

CHUNK_TOKENS = 512
SEGMENT_CHUNKS = 32  # of one run: what a kill can cost
FIELDS = (".in_sum2", ".counts")
MAX_BYTES = 2_000_000_000  # of a file, all of which is read; of a Gemma 4 with 128 experts it is some 80 MB
ACTIVE = 1e-5  # mean squared activation above which llama-imatrix counts a column as active


@dataclass(frozen=True)
class Entry:
    """The data of one tensor. `sums`: float32 (experts, columns); `counts`: float32 (experts,)."""

    sums: npt.NDArray[np.float32]
    counts: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Imatrix:
    """A whole imatrix file, read. `chunk_size` is in tokens."""

    path: Path
    n_chunks: int
    chunk_size: int
    datasets: tuple[str, ...]
    entries: Mapping[str, Entry]


def file_name(stem: str) -> str:
    return f"{stem}-imatrix.gguf"


def imatrix_argv(
    build: Build,
    base: str,
    text: str,
    out: str,
    *,
    first_chunk: int = 0,
    chunks: int | None = None,
    continue_from: str | None = None,
    threads: int | None = None,
    gpu_layers: int = 0,
    flags: Sequence[str] = (),
) -> list[str]:
    """The command line of llama-imatrix. Names are bare: `text` ends in the key `quantize.imatrix.dataset`.

    `flags` are those of the model's architecture (`embedding.imatrix_flags`).
    One chunk of 512 tokens per batch keeps the logits of Gemma's 262,144-token vocabulary at 0.5 GB.
    """
    size = str(CHUNK_TOKENS)
    argv = [str(build.tool("llama-imatrix")), "-m", base, "-f", text, "-o", out, "--parse-special", *flags]
    argv += ["-c", size, "-b", size, "-ub", size]
    argv += ["--chunk", str(first_chunk)] if first_chunk else []
    argv += ["--chunks", str(chunks)] if chunks is not None else []
    argv += ["--in-file", continue_from] if continue_from is not None else []
    argv += ["-t", str(threads)] if threads is not None else []
    argv += ["-ngl", str(gpu_layers)] if gpu_layers else []
    return argv


def segments(n_chunks: int, size: int, cuts: Sequence[int] = ()) -> list[tuple[int, int]]:
    """(first chunk, chunks) of the runs that compute `n_chunks` together, each of about `size`; one ends at each cut.

    llama-imatrix refuses to start with two or fewer chunks left, so such a rest belongs to the run before it.
    """
    ends = sorted({*range(0, n_chunks, size), *(cut for cut in cuts if 0 < cut < n_chunks)})
    starts = [start for start in ends if start == 0 or n_chunks - start > 2]
    return [(start, end - start) for start, end in zip(starts, [*starts[1:], n_chunks], strict=True)]


def part_at(directory: Path, n_chunks: int, cut: int, cuts: Sequence[int], size: int = SEGMENT_CHUNKS) -> Path:
    """Where `compute` with the same `cuts` left the imatrix of the first `cut` chunks."""
    first = next(first for first, count in segments(n_chunks, size, cuts) if first + count == cut)
    return directory / f"part-{first}.gguf"


def compute(
    argv_of: Callable[[int, int | None, str | None, str], list[str]],
    *,
    n_chunks: int | None,
    directory: Path,
    cwd: Path,
    log: RunLog,
    progress: Progress = silent,
    segment_chunks: int = SEGMENT_CHUNKS,
    cuts: Sequence[int] = (),
) -> tuple[Path, int, float]:
    """Compute an imatrix in runs of `segment_chunks`, each going on from the file of the one before.

    What llama-imatrix saves while it runs cannot be continued exactly: it saves when the first tensor has seen a chunk
    and the others have not. So runs are short, and a killed one is done again; sums are 32-bit floats in memory and in
    the file, so the result has the bytes of one long run (a test compares them). Runs end at `cuts`, too: the file at
    one (`part_at`) is the imatrix of so many chunks. `argv_of(first, chunks, from, out)` gives a run's command line
    with names relative to `cwd`; `directory`, below it, keeps the parts. With `n_chunks`
    None (nobody could count the tokens) it is one run. Returns (file, chunks computed, seconds).
    """
    directory.mkdir(parents=True, exist_ok=True)
    seconds, computed = 0.0, 0
    previous: Path | None = None
    for first, count in segments(n_chunks, segment_chunks, cuts) if n_chunks else [(0, None)]:
        part = directory / f"part-{first}.gguf"
        if not part.exists():
            partial = partial_path(part)
            names = [None if path is None else path.relative_to(cwd).as_posix() for path in (previous, partial)]
            argv = argv_of(first, count, names[0], str(names[1]))
            done, said = run_segment(argv, first, n_chunks, cwd=cwd, log=log, progress=progress)
            seconds += done.seconds
            header, made = gguf_io.read_header(partial), read(partial).n_chunks
            if made != first + said or (count or said) != said:
                due = first + (count or said)
                raise VerificationError(f"llama-imatrix computed {made} chunks, {due} were due", log=log.path)
            datasets = header.get("imatrix.datasets", [])[-1:]  # every run adds the text's name once more
            fixed = partial_path(directory / f"fixed-{first}.gguf")
            gguf_io.write_with_values(header, fixed, {"imatrix.datasets": gguf_io.strings_value(datasets)})
            partial.unlink()
            replace_durably(fixed, part)
        computed = read(part).n_chunks
        previous = part
    assert previous is not None
    return previous, computed, seconds


def run_segment(
    argv: list[str], first: int, n_chunks: int | None, *, cwd: Path, log: RunLog, progress: Progress = silent
) -> tuple[ToolRun, int]:
    """One run of llama-imatrix; (the run, chunks it said it would compute). Progress comes per chunk."""
    planned = 0

    def show(piece: str) -> None:
        nonlocal planned
        if match := re.search(r"computing over (\d+) chunks", piece):
            planned = int(match[1])
        elif (match := re.match(r"\s*\[(\d+)\](\S+)$", piece)) and planned:
            progress("computing the imatrix", first + int(match[1]), n_chunks or planned, "chunks")

    done = run_tool(argv, log=log, cwd=cwd, on_piece=show, separators=r"[\r\n,]")
    if planned == 0:
        raise VerificationError("llama-imatrix did not say how many chunks it computes", log=log.path)
    return done, planned


def read(path: Path) -> Imatrix:
    """Read an imatrix file. Raises `BadInputError` when it is cut, no imatrix, or of the old binary format."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BadInputError(
                f"{path} is not an imatrix in GGUF format",
                next_step="Convert an old one: llama-imatrix --in-file old.dat -o new.gguf --output-format gguf",
            )
    header = gguf_io.read_header(path)
    _refuse_size(header)
    if header.get("general.type") != "imatrix":
        raise BadInputError(f"{path} is a GGUF file, but not an imatrix (general.type is not imatrix)")
    n_chunks, chunk_size = header.get("imatrix.chunk_count"), header.get("imatrix.chunk_size")
    if not isinstance(n_chunks, int) or not isinstance(chunk_size, int):
        raise BadInputError(f"{path} does not say how many chunks it was computed on")
    if "imatrix.datasets" not in header.keys:
        raise BadInputError(f"{path} does not say on what text it was computed")
    datasets = header.get("imatrix.datasets")
    if not isinstance(datasets, list) or not all(isinstance(name, str) for name in datasets):
        datasets = []  # llama.cpp passes over them, too
    for name, tensor in header.by_name.items():
        if name.endswith(FIELDS) and tensor.ggml_type is not GGMLQuantizationType.F32:
            raise BadInputError(f"{path} holds {name} as {tensor.ggml_type.name}, not F32")
    entries: dict[str, Entry] = {}
    for name, tensor in header.by_name.items():
        weight, dot, field = name.rpartition(".")
        if dot and field == "counts" and f"{weight}.in_sum2" not in header.by_name:
            raise BadInputError(f"{path} has {name} but not {weight}.in_sum2")
        if not dot or field != "in_sum2":
            continue
        counts = header.by_name.get(f"{weight}.counts")
        if counts is None:
            raise BadInputError(f"{path} has {name} but not {weight}.counts")
        sums = header.read(tensor).view(np.float32)
        entries[weight] = Entry(sums, header.read(counts).view(np.float32).reshape(-1))
    if not entries:
        raise BadInputError(f"{path} holds no data")
    return Imatrix(path, _chunks_read(n_chunks, entries), chunk_size, tuple(datasets), entries)


def _chunks_read(counted: int, entries: Mapping[str, Entry]) -> int:
    """How many chunks of text were read, of those that llama-imatrix counted.

    It counts by the tensor that was used most, and Gemma 3n uses some of its own twice for every token. The queries of
    the first layer are used once. Counts that are no numbers say nothing; `coverage` tells of them.
    """
    once = entries.get("blk.0.attn_q.weight")
    most = max(float(entry.counts.max(initial=0, where=np.isfinite(entry.counts))) for entry in entries.values())
    if once is None or not most > once.counts.max(initial=0) > 0:
        return counted
    return round(counted * float(once.counts.max()) / most)


def _refuse_size(header: Header) -> None:
    if header.file_size > MAX_BYTES:
        raise BadInputError(f"{header.path} has {header.file_size:,} bytes, more than the {MAX_BYTES:,} that are read")


def check(imatrix: Imatrix, base: Header, *, n_chunks: int | None = None) -> None:
    """Refuse an imatrix that is incomplete or of another model; `coverage.gaps` says what is missing in it.

    `n_chunks` is how many chunks it must have seen. Raises `VerificationError` that names the first offending tensor.
    """
    for name, entry in imatrix.entries.items():
        tensor = base.by_name.get(name)
        experts = tensor.shape[2] if tensor is not None and len(tensor.shape) > 2 else 1
        if tensor is None or entry.sums.shape != (experts, tensor.shape[0]):
            raise VerificationError(
                f"{imatrix.path} is of another model: {name} "
                + ("is not a tensor of this one" if tensor is None else _shape_there(entry, experts)),
                next_step="Use the imatrix of this very model, or leave --imatrix out to compute one.",
            )
    if n_chunks is not None and imatrix.n_chunks != n_chunks:
        raise VerificationError(f"{imatrix.path} holds {imatrix.n_chunks} chunks, {n_chunks} were to be computed")


def _shape_there(entry: Entry, experts: int) -> str:
    n_experts, columns = entry.sums.shape
    return f"has {columns} columns there" if n_experts == experts else f"has {n_experts} experts there"


def coverage(imatrix: Imatrix) -> list[Coverage]:
    """What the imatrix saw, by kind of weight and layer: tokens, experts without data, and how its columns compare.

    Every token reaches every column of a dense weight, so tokens differ between experts alone. What differs everywhere
    is how unevenly importance lies on the columns: `active` and `evenness` are the figures that
    `llama-imatrix --show-statistics` prints as "% Active" and "E(norm)".
    """
    layers: dict[str, dict[int, Entry]] = {}
    for name, entry in imatrix.entries.items():
        if match := re.fullmatch(r"blk\.(\d+)\.([\w.]{1,60}?)(?:\.weight)?", name):
            layers.setdefault(match[2], {})[int(match[1])] = entry
    rows = []
    for kind, by_layer in sorted(layers.items()):
        entries = [by_layer[layer] for layer in sorted(by_layer)]
        figures = [_importance(entry) for entry in entries]
        counts = [np.sort(entry.counts) for entry in entries]
        rows.append(
            Coverage(
                kind=kind,
                layers=sorted(by_layer),
                n_experts=max(len(count) for count in counts),
                tokens_min=[int(count[0]) for count in counts],
                tokens_median=[int(count[len(count) // 2]) for count in counts],
                tokens_max=[int(count[-1]) for count in counts],
                unseen=[int((count == 0).sum()) for count in counts],
                active=[round(active, 6) for active, _ in figures],
                evenness=[round(evenness, 6) for _, evenness in figures],
            )
        )
    return rows


def _importance(entry: Entry) -> tuple[float, float]:
    """(share of columns whose mean squared activation is above 1e-5, their normalised entropy), of seen experts."""
    seen = entry.counts > 0
    if not seen.any():
        return 0.0, 0.0
    means = (entry.sums[seen].astype(np.float64) / entry.counts[seen, None]).reshape(-1)
    total = means.sum()
    if not total or means.size < 2:
        return float((means > ACTIVE).mean()), 0.0
    shares = means[means > 0] / total
    return float((means > ACTIVE).mean()), float(max(0.0, -(shares * np.log2(shares)).sum() / np.log2(means.size)))


def write_placeholder(path: Path, base: Header, dataset: str) -> None:
    """An imatrix of ones over every matrix of the blocks, for planning before the real one exists.

    llama-quantize chooses some types by whether there is an imatrix, and writes its name, data set and counts into
    keys; with the names of the real one the planned sizes come out exact.
    """
    entries: dict[str, Entry] = {}
    for tensor in base.tensors:
        if tensor.name.startswith("blk.") and tensor.name.endswith(".weight") and len(tensor.shape) > 1:
            experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
            sums = np.ones((experts, tensor.shape[0]), dtype=np.float32)
            entries[tensor.name] = Entry(sums, np.ones(experts, dtype=np.float32))
    write(Imatrix(path, 1, CHUNK_TOKENS, (dataset,), entries), path)


def write(imatrix: Imatrix, path: Path) -> None:
    """Write an imatrix in llama-imatrix's layout."""
    from gguf import GGUFWriter  # noqa: PLC0415 - only needed here

    writer = GGUFWriter(path, arch="")
    writer.kv_data[0].clear()  # an imatrix has no architecture
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", list(imatrix.datasets))
    writer.add_uint32("imatrix.chunk_count", imatrix.n_chunks)
    writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size)
    for name, entry in imatrix.entries.items():
        writer.add_tensor(f"{name}.in_sum2", entry.sums)
        writer.add_tensor(f"{name}.counts", entry.counts.reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def finite(imatrix: Imatrix) -> Imatrix:
    """Without the tensors whose data holds NaN or Inf: llama-quantize refuses a file with any, whatever it makes."""
    kept = {
        name: entry
        for name, entry in imatrix.entries.items()
        if np.isfinite(entry.sums).all() and np.isfinite(entry.counts).all()
    }
    return replace(imatrix, entries=kept)
