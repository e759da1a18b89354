"""A finished file against its plan, before it gets its final name.

Consumes a partial file and the plan; produces the `Checks` that go into the manifest, or a `VerificationError` that
names the first thing that is wrong. Nothing that fails here is ever given a final name.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from gemma_gguf import embedding, gemma, gguf_io, shards
from gemma_gguf.errors import ToolFailedError, VerificationError
from gemma_gguf.files import sha256_file, write_atomic
from gemma_gguf.gguf_io import Header
from gemma_gguf.llama_cpp import Build, RunLog, ask_bindings, run_tool
from gemma_gguf.manifest import Checks
from gemma_gguf.plan import FilePlan, layout_of

CHECKED_ELEMENTS = 1 << 24  # looked at together
# Bounds of clipped layers in Gemma 4's towers: infinite where a layer is not clipped.
BOUNDS = re.compile(r"\.(input|output)_(min|max)$")
LOST_LINES_TRIES = 5
CHECKED_TEXTS, CHECKED_CHARACTERS = 4, 200


def check_file(path: Path, plan: FilePlan | None, *, build: Build, text: Path | None, log: RunLog) -> Checks:
    """All checks of one file, or of a folder of shards: header, layout, size, sampled rows, keys and, with `text`, a
    load in llama.cpp.

    `plan` is None for files whose layout no plan names (mmproj, base); `text` None skips the load.
    """
    parts = shards.read(sorted(path.iterdir()) if path.is_dir() else [path])
    header = shards.joined(parts)
    if plan is not None:
        check_layout(header, plan)
    rows = check_bytes(parts)
    if text is None:
        load = None
    elif header.get("general.architecture") in gemma.WITHOUT_LOGITS:
        load = check_embeds(parts[0].path, text, build=build, log=log)
    else:
        load = check_load(parts[0].path, text, build=build, log=log)
    return Checks(layout_sha256=layout_of(header.tensors), sampled_rows=rows, load=load)


def check_bytes(parts: Sequence[Header]) -> int:
    """Size, keys and sampled rows of a file, or of all its shards. Returns the number of rows."""
    rows = 0
    for part in parts:
        check_size(part)
        check_keys(part)
        rows += check_rows(part)
    return rows


def check_layout(header: Header, plan: FilePlan) -> None:
    """Tensor names, order, shapes and types are the planned ones."""
    if len(header.tensors) != len(plan.tensors):
        raise VerificationError(f"{header.path} holds {len(header.tensors)} tensors, {len(plan.tensors)} were planned")
    for actual, planned in zip(header.tensors, plan.tensors, strict=True):
        if actual.name != planned.name:
            raise VerificationError(f"{header.path} has {actual.name} where {planned.name} was planned")
        if math.prod(actual.shape) != planned.n_elements or actual.shape[0] != planned.shape[0]:
            raise VerificationError(
                f"{header.path}: {actual.name} has shape {list(actual.shape)}, {list(planned.shape)} was planned"
            )
        if actual.ggml_type is not planned.target:
            raise VerificationError(
                f"{header.path}: {actual.name} is {actual.ggml_type.name}, {planned.target.name} was planned"
            )


def check_size(header: Header) -> None:
    """The file ends exactly where its tensor data, padded to the alignment, ends."""
    expected = gguf_io.expected_size(header.data_start, [t.n_bytes for t in header.tensors], header.alignment)
    if header.file_size != expected:
        raise VerificationError(f"{header.path} has {header.file_size} bytes, its header describes {expected}")


def check_keys(header: Header) -> None:
    """No key holds an absolute path: provenance must not depend on, or tell of, this machine."""
    here = [str(Path.home()), str(Path.cwd())]
    for name, text in header.strings():
        if name == "tokenizer.chat_template":
            continue
        absolute = "\n" not in text and (PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute())
        if absolute or any(len(place) > 1 and place in text for place in here):
            raise VerificationError(f"{header.path}: key {name} holds a path of this machine: {text[:120]!r}")


def check_rows(header: Header) -> int:
    """Dequantise the first, middle and last row of every tensor; all values must be finite. Returns the row count."""
    sampled = 0
    for tensor in header.tensors:
        n_rows = tensor.n_elements // tensor.shape[0]
        for row in sorted({0, n_rows // 2, n_rows - 1}):
            values = gguf_io.dequantize(header.read(tensor, row, 1), tensor.ggml_type)
            finite = ~np.isnan(values) if BOUNDS.search(tensor.name) else np.isfinite(values)
            if not finite.all():
                raise VerificationError(
                    f"{header.path}: row {row} of {tensor.name} ({tensor.ggml_type.name}) holds NaN or Inf"
                )
            sampled += 1
    return sampled


def check_finite(header: Header) -> None:
    """Every value of every F32, F16 and BF16 tensor is finite: a checkpoint with NaN or Inf is found before its base
    has a name. An exponent of all ones is NaN or Inf in each of the three formats.
    """
    exponents: dict[GGMLQuantizationType, tuple[type[np.unsignedinteger[Any]], int]] = {
        GGMLQuantizationType.F32: (np.uint32, 0x7F800000),
        GGMLQuantizationType.F16: (np.uint16, 0x7C00),
        GGMLQuantizationType.BF16: (np.uint16, 0x7F80),
    }
    for tensor in header.tensors:
        if tensor.ggml_type not in exponents or BOUNDS.search(tensor.name):
            continue
        word, mask = exponents[tensor.ggml_type]
        columns = tensor.shape[0]
        step = max(1, CHECKED_ELEMENTS // columns)
        for row in range(0, tensor.n_elements // columns, step):
            bits = header.read(tensor, row, step).view(word) & word(mask)
            if (bits == mask).any():
                raise VerificationError(
                    f"the weights hold NaN or Inf, first in {tensor.name}",
                    next_step="Download the checkpoint again, or ask its author: no quant of it can work.",
                )


def check_load(path: Path, text: Path, *, build: Build, log: RunLog) -> str:
    """Load the file in llama.cpp and compute logits on a text; returns how: `bindings` or `llama-perplexity`.

    Builds without bindings of their own release (git:, dir:) are asked through llama-perplexity instead.
    """
    try:
        if build.bindings is not None:
            answer = ask_bindings(build, "check", path, text, log)
            if not (answer["all_finite"] and answer["varied"]):
                raise VerificationError(f"{path} loads in llama.cpp, but its logits are not finite", log=log.path)
            return "bindings"
        argv: list[str | Path] = [
            build.tool("llama-perplexity"),
            "-m",
            path,
            "-f",
            text,
            "-c",
            "64",
            "-b",
            "64",
            "--chunks",
            "1",
        ]
        # llama.cpp's own logger is not flushed when a tool ends: on a busy machine the last lines can be missing.
        for _ in range(LOST_LINES_TRIES):
            if (ppl := re.search(r"\[1\]([-\w.]+)", run_tool(argv, log=log).output)) is not None:
                break
    except ToolFailedError as error:
        raise VerificationError(f"{path} does not load in llama.cpp: {error.what}", log=log.path) from error
    if ppl is None or not math.isfinite(float(ppl[1])):
        raise VerificationError(f"{path} loads in llama.cpp, but its logits are not finite", log=log.path)
    return "llama-perplexity"


def check_embeds(path: Path, text: Path, *, build: Build, log: RunLog) -> str:
    """Load a model that gives embeddings and embed lines of a text; returns how: `bindings` or `llama-imatrix`.

    Builds without bindings are asked through llama-imatrix, which computes every layer and refuses what is not finite.
    """
    lines = text.with_name(f"{path.name}.lines")  # not beside a base that is the user's
    try:
        if build.bindings is not None:
            texts = text.read_text(encoding="utf-8").split("\n\n")[:CHECKED_TEXTS]
            write_atomic(lines, json.dumps([part[:CHECKED_CHARACTERS] for part in texts if part.strip()]))
            answer = ask_bindings(build, "embed", path, lines, log)
            if not (answer["all_finite"] and answer["varied"]):
                raise VerificationError(f"{path} loads in llama.cpp, but its embeddings are not finite", log=log.path)
            return "bindings"
        argv: list[str | Path] = [build.tool("llama-imatrix"), "-m", path, "-f", text, "-o", lines]
        run_tool([*argv, *embedding.IMATRIX_FLAGS, "-c", "64", "-b", "64", "-ub", "64", "--chunks", "1"], log=log)
    except ToolFailedError as error:
        raise VerificationError(f"{path} does not load in llama.cpp: {error.what}", log=log.path) from error
    finally:
        lines.unlink(missing_ok=True)
    return "llama-imatrix"


def check_projector(path: Path, base: Path, *, build: Build, log: RunLog) -> str:
    """Load a projector beside its model and let it see or hear something; returns how: `bindings` or `llama-mtmd-cli`.

    The bindings look at every number that it gives. Builds without them are asked through llama-mtmd-cli, which loads
    the whole model and fails when the projector is not one of it.
    """
    picture = path.with_name(f"{path.name}.ppm")
    try:
        if build.bindings is not None:
            asked = {"mmproj": str(path.resolve())}
            answer = ask_bindings(build, "perceive", base, None, log, settings=asked)
            towers = {name: found for name, found in answer.items() if found is not None}
            if bad := [name for name, found in towers.items() if not (found["all_finite"] and found["varied"])]:
                raise VerificationError(f"{path} loads in llama.cpp, but its {bad[0]} gives no finite numbers")
            if not towers:
                raise VerificationError(f"{path} loads in llama.cpp, but it neither sees nor hears")
            return "bindings"
        side = 64
        write_atomic(picture, b"P6 %d %d 255\n" % (side, side) + bytes(range(256)) * (3 * side * side // 256))
        argv: list[str | Path] = [build.tool("llama-mtmd-cli"), "-m", base, "--mmproj", path, "--image", picture]
        # Gemma 4's template is none of those that llama.cpp knows without Jinja.
        run_tool([*argv, "--jinja", "-p", "A picture.", "-n", "1", "-c", "2048", "--no-warmup"], log=log)
    except ToolFailedError as error:
        raise VerificationError(
            f"{path} does not work in llama.cpp as the projector of {base.name}: {error.what}", log=log.path
        ) from error
    finally:
        picture.unlink(missing_ok=True)
    return "llama-mtmd-cli"


def compare(made: Path, reference: Path) -> None:
    """Raise `VerificationError` unless two GGUF files are the same bytes, naming the first tensor that differs."""
    if sha256_file(made) == sha256_file(reference):
        return
    ours, theirs = gguf_io.read_header(made), gguf_io.read_header(reference)
    where = "their headers differ"
    for a, b in zip(ours.tensors, theirs.tensors, strict=False):
        if (a.name, a.ggml_type) != (b.name, b.ggml_type):
            where = f"{a.name} ({a.ggml_type.name}) stands where llama-quantize has {b.name} ({b.ggml_type.name})"
            break
        if not np.array_equal(ours.read(a), theirs.read(b)):
            where = f"the first tensor that differs is {a.name} ({a.ggml_type.name})"
            break
    raise VerificationError(
        f"{made} is not what llama-quantize of the same build writes: {where}",
        next_step="Make the set with --engine llama-quantize, and report this: it should never happen.",
    )
