"""Checkpoints that were trained for Q4_0 (QAT): how exactly their weights lie on its grid, and their Q4_0 file.

Consumes the base and llama-quantize's own plan of Q4_0, produces `QatFacts`. A Q4_0 block is 32 weights, one scale and
levels from -8 to 7. llama.cpp takes the weight of the largest magnitude over -8 as the scale (`quantize_row_q4_0_ref`
in ggml/src/ggml-quants.c). Weights that were rounded to a grid while they were trained lie on it whatever their largest
level is, so the scale is fitted here, and llama.cpp's own is compared with it: where a grid fits that llama.cpp's
scales miss, its Q4_0 loses what the training was for.

The best scale is found exactly, not by trying some. For a scale d the best levels are those nearest to x/d; as 1/d
grows they change one at a time, where |x|/d passes a half. Between two such points levels are fixed and least squares
gives the scale, so the best of all 8 * 32 intervals is the best there is.

Ordinary weights leave some residual, too, and how much depends on their distribution. So each block is also measured
with its grid blurred: uniform noise as wide as a step is added, which leaves the distribution as good as it was and
destroys any grid in it.

A QAT set's Q4_0 is static: with an imatrix llama.cpp would move scales off the grid and some tensors to Q4_1.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from gemma_gguf import gguf_io
from gemma_gguf.errors import VerificationError
from gemma_gguf.gguf_io import Header, TensorInfo
from gemma_gguf.manifest import GridFit, QatFacts
from gemma_gguf.plan import FilePlan
from gemma_gguf.progress import Progress, silent
from gemma_gguf.recipes import Recipe

Floats = npt.NDArray[np.float32]
Levels = npt.NDArray[np.int8]
Verdict = Literal["ggml", "free", "near", "none"]

BLOCK = 32
LEVELS = 8  # -8 to 7, or -7 to 8 with a negative scale
EMBEDDINGS = ("Q6_K", "Q8_0")
BLOCKS_PER_TENSOR = 512  # of a 4B some 120,000 in all: ten seconds, and shares to a tenth of a percent
BLOCKS_AT_ONCE = 2048  # a few MB of intervals
# A checkpoint is on the grid when most of its blocks are; the rest may be tensors that were trained without it.
MOST = 0.5
# llama.cpp's scales hit the grid when they do so in as good as all blocks that lie on one.
AS_GOOD_AS_ALL = 0.99
# Of what weights with a blurred grid leave. Ordinary weights leave 0.99 to 1.01 of it (a test looks at several kinds).
DRAWN = 0.9


# --- one block ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """Blocks on their grids: `scales` (n,), signed `levels` (n, 32) and the squared residual (n,) of scale * level."""

    scales: npt.NDArray[np.float64]
    levels: Levels
    residual: npt.NDArray[np.float64]


def best_scales(blocks: Floats) -> Fitted:
    """The scale of least squared error for every block, shape (n, 32), with levels -8..7; it may be negative."""
    one, other = _best_positive(blocks), _best_positive(-blocks)
    better = other.residual < one.residual
    return Fitted(
        scales=np.where(better, -other.scales, one.scales),
        levels=np.where(better[:, None], other.levels, one.levels),
        residual=np.where(better, other.residual, one.residual),
    )


def _best_positive(blocks: Floats) -> Fitted:
    """The same with positive scales alone."""
    wide = blocks.astype(np.float64)
    size = np.abs(wide)
    steps = np.arange(LEVELS)
    # How often a weight can go one level up: to 7 above zero, to 8 below. One that is zero never does.
    allowed = (steps < np.where(blocks > 0, LEVELS - 1, LEVELS)[:, :, None]) & (size[:, :, None] > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        points = np.where(allowed, (steps + 0.5) / size[:, :, None], np.inf).reshape(len(blocks), -1)
    order = np.argsort(points, axis=1, kind="stable")
    gains = np.where(allowed, size[:, :, None], 0.0).reshape(points.shape)
    widths = np.where(allowed, 2.0 * steps + 1, 0.0).reshape(points.shape)
    products = np.cumsum(np.take_along_axis(gains, order, axis=1), axis=1)  # sum of |x| * level
    squares = np.cumsum(np.take_along_axis(widths, order, axis=1), axis=1)  # sum of level^2
    with np.errstate(divide="ignore", invalid="ignore"):
        explained = np.where(squares > 0, products**2 / squares, 0.0)
    best = explained.argmax(axis=1)[:, None]
    passed = np.zeros(points.shape, dtype=bool)
    np.put_along_axis(passed, order, np.arange(points.shape[1]) <= best, axis=1)
    counts = (passed.reshape(allowed.shape) & allowed).sum(axis=2)
    product = np.take_along_axis(products, best, axis=1)[:, 0]
    square = np.take_along_axis(squares, best, axis=1)[:, 0]
    scales = np.divide(product, square, out=np.zeros_like(product), where=square > 0)
    levels = (np.sign(wide) * counts).astype(np.int8)
    residual = ((wide - scales[:, None] * levels) ** 2).sum(axis=1)
    return Fitted(scales, levels, residual)


def ggml_scales(blocks: Floats) -> Fitted:
    """Scale and levels as llama.cpp's Q4_0 takes them, in its own arithmetic; the scale is kept in 16 bits."""
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = largest / np.float32(-LEVELS)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scale != 0, np.float32(1) / scale, np.float32(0)).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        shifted = np.trunc(blocks * inverse + np.float32(LEVELS + 0.5))
        kept = scale.astype(np.float16).astype(np.float64)
    levels = (np.minimum(shifted, 2 * LEVELS - 1) - LEVELS).astype(np.int8)
    residual = ((blocks.astype(np.float64) - kept * levels) ** 2).sum(axis=1)
    return Fitted(kept[:, 0], levels, residual)


def fits_bf16(blocks: Floats, levels: Levels) -> npt.NDArray[np.bool_]:
    """Which blocks some scale gives back with these levels, every weight to within half a unit of BF16's last place.

    A weight x at level q allows scales from (|x| - h) / |q| to (|x| + h) / |q|; at level 0 it must be 0.
    """
    size, steps = np.abs(blocks.astype(np.float64)), np.abs(levels.astype(np.float64))
    half = np.ldexp(1.0, np.frexp(size)[1] - 9)  # 8 bits of precision: x = m * 2^e with m in [0.5, 1)
    used = steps > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        least = np.where(used, (size - half) / steps, 0.0).max(axis=1)
        most = np.where(used, (size + half) / steps, np.inf).min(axis=1)
    return np.asarray((least <= most) & (used | (size == 0)).all(axis=1))


# --- a checkpoint -------------------------------------------------------------------------------------------------


def sample(header: Header, tensor: TensorInfo, n_blocks: int = BLOCKS_PER_TENSOR) -> Floats:
    """Up to `n_blocks` blocks of a tensor as float32, shape (n, 32), from rows spread evenly over all of it."""
    columns = tensor.shape[0]
    n_rows, per_row = tensor.n_elements // columns, columns // BLOCK
    wanted = min(n_rows, math.ceil(n_blocks / per_row))
    rows = [number * n_rows // wanted for number in range(wanted)]
    taken = [_widened(header.read(tensor, row, 1), tensor.ggml_type) for row in rows]
    return np.concatenate(taken).reshape(-1, BLOCK)[:n_blocks]


def _widened(raw: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType) -> Floats:
    if ggml_type is GGMLQuantizationType.BF16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return gguf_io.dequantize(raw, ggml_type)


@dataclass
class _Sums:
    """What is added up over the blocks of one kind."""

    tensors: int = 0
    blocks: int = 0
    energy: float = 0.0
    residual: float = 0.0
    residual_ggml: float = 0.0
    energy_none: float = 0.0
    residual_none: float = 0.0
    fits: int = 0
    fits_ggml: int = 0

    def add(self, blocks: Floats, rng: np.random.Generator) -> None:
        best, ggml = best_scales(blocks), ggml_scales(blocks)
        steps = np.abs(best.scales)[:, None]
        blurred = (blocks + steps * rng.uniform(-0.5, 0.5, blocks.shape)).astype(np.float32)
        self.blocks += len(blocks)
        self.energy += float((blocks.astype(np.float64) ** 2).sum())
        self.residual += float(best.residual.sum())
        self.residual_ggml += float(ggml.residual.sum())
        self.energy_none += float((blurred.astype(np.float64) ** 2).sum())
        self.residual_none += float(best_scales(blurred).residual.sum())
        self.fits += int(fits_bf16(blocks, best.levels).sum())
        self.fits_ggml += int(fits_bf16(blocks, ggml.levels).sum())

    def fit(self, kind: str) -> GridFit:
        def relative(residual: float, energy: float) -> float:
            return round((residual / energy) ** 0.5, 6) if energy else 0.0

        return GridFit(
            kind=kind,
            n_tensors=self.tensors,
            n_blocks=self.blocks,
            residual=relative(self.residual, self.energy),
            residual_ggml=relative(self.residual_ggml, self.energy),
            residual_none=relative(self.residual_none, self.energy_none),
            fits=round(self.fits / max(1, self.blocks), 6),
            fits_ggml=round(self.fits_ggml / max(1, self.blocks), 6),
        )


def measure(header: Header, planned: FilePlan, progress: Progress = silent) -> list[GridFit]:
    """How the tensors of the blocks that are Q4_0 in a plan lie on its grid, by kind of weight."""
    kinds: dict[str, _Sums] = {}
    rng = np.random.default_rng(0)  # the same figures every time
    asked = [
        (match[1], header.by_name[tensor.name])
        for tensor in planned.tensors
        if tensor.target is GGMLQuantizationType.Q4_0
        and (match := re.fullmatch(r"blk\.\d+\.([\w.]{1,60}?)(?:\.weight)?", tensor.name))
    ]
    for done, (kind, tensor) in enumerate(asked):
        progress("fitting the Q4_0 grid", done, len(asked), "tensors")
        sums = kinds.setdefault(kind, _Sums())
        sums.tensors += 1
        blocks = sample(header, tensor)
        for start in range(0, len(blocks), BLOCKS_AT_ONCE):
            sums.add(blocks[start : start + BLOCKS_AT_ONCE], rng)
    return [sums.fit(kind) for kind, sums in sorted(kinds.items())]


# --- what follows -------------------------------------------------------------------------------------------------


def verdict(grid: Sequence[GridFit]) -> Verdict:
    """What the weights lie on: a grid that llama.cpp's scales hit (`ggml`), one that only fitted scales hit (`free`),
    near one without being on it (`near`), or none that ordinary weights would not lie on as well (`none`)."""
    if overall(grid, "fits") >= MOST:
        return "ggml" if overall(grid, "fits_ggml") >= AS_GOOD_AS_ALL * overall(grid, "fits") else "free"
    return "near" if overall(grid, "residual") < DRAWN * overall(grid, "residual_none") else "none"


def overall(grid: Iterable[GridFit], figure: str) -> float:
    """A figure over all blocks that were looked at; residuals as root mean square."""
    rows = list(grid)
    total = sum(row.n_blocks for row in rows)
    if not total:
        return 0.0
    power = 2 if figure.startswith("residual") else 1
    mean = sum(row.n_blocks * float(getattr(row, figure)) ** power for row in rows) / total
    return math.sqrt(mean) if power == 2 else mean


def summary(facts: QatFacts) -> str:
    """What was found, in one line for people."""
    told = {
        "ggml": "the weights lie on the grid of Q4_0, and llama.cpp's scales hit it",
        "free": "the weights lie on a grid of Q4_0 that llama.cpp's scales miss",
        "near": "the weights lie near a grid of Q4_0, not on it",
        "none": "the weights lie on no grid of Q4_0",
    }[facts.verdict or "none"]
    figures = {name: overall(facts.grid, name) for name in ("residual", "residual_ggml", "residual_none", "fits")}
    return (
        f"{told}: {figures['fits']:.1%} of the blocks fit; residual {figures['residual']:.2%} with the best scales, "
        f"{figures['residual_ggml']:.2%} with llama.cpp's, {figures['residual_none']:.2%} of ordinary weights"
    )


def is_said(model: str, front_matter: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's name or its card's tags call it QAT."""
    tags = front_matter.get("tags")
    words = [model, *(tags if isinstance(tags, list) else [])]
    return any(re.search(r"(^|[-_ ])qat($|[-_ ])", str(word).lower()) for word in words)


def facts_for(says: bool, asked: bool | None, embedding: str | None, old: QatFacts | None) -> QatFacts | None:
    """What is known before the weights are looked at: None for an ordinary set.

    `says` is what the checkpoint's name and card say, `asked` what the user does; the user wins. What was measured and
    chosen before is kept.
    """
    if not (says if asked is None else asked):
        return None
    return QatFacts(
        said_by="checkpoint" if asked is None else "--qat",
        embedding=embedding or (old.embedding if old else EMBEDDINGS[0]),  # type: ignore[arg-type] # pydantic checks it
        verdict=old.verdict if old else None,
        grid=old.grid if old else [],
    )


def refuse_ordinary_weights(name: str, facts: QatFacts) -> None:
    """Raise `VerificationError` for a checkpoint that calls itself QAT and holds weights like any other's."""
    if facts.verdict != "none" or facts.said_by != "checkpoint":
        return
    residual, ordinary, fits = (overall(facts.grid, figure) for figure in ("residual", "residual_none", "fits"))
    raise VerificationError(
        f"{name} calls itself QAT (trained for Q4_0), but its weights lie on no Q4_0 grid: the best scales leave "
        f"{residual:.2%} of them (relative RMS; ordinary weights: {ordinary:.2%}), and {fits:.1%} of the blocks fit",
        next_step="For ordinary weights under such a name add --no-qat; if they are QAT weights from before the "
        "rounding, --qat makes the set of a QAT checkpoint all the same.",
    )


def applied(recipe: Recipe, facts: QatFacts | None) -> Recipe:
    """The recipe as a QAT set makes it: its Q4_0 is static, with the embedding (and the output) at 6 or 8 bits."""
    if facts is None or recipe.ftype != "Q4_0":
        return recipe
    kind = facts.embedding.lower()
    flags = ("--token-embedding-type", kind, "--output-tensor-type", kind)
    return replace(recipe, flags=(*flags, *recipe.flags), static=True)
