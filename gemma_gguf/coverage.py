"""The coverage gate: whether an imatrix has data for every tensor that a requested recipe uses it for. Pure.

Consumes an imatrix, the base's header and the plans that llama-quantize printed for the requested recipes with this
very imatrix; produces the `Gap`s, the error that lists them with the choices, and the tensors that `--pin-uncovered`
raises. It stands between the imatrix and hours of quantising, because llama-quantize says nothing, or stops at the
first such tensor: one without data it quantises as if every column counted the same (and refuses the types of two
bits), an expert that no token reached gets equal weights in silence, and it refuses a whole file for one NaN. So data
with NaN or Inf is taken out of the set's imatrix, and what is missing for it is said here.

**Experts.** Some of many experts stay without a token on any text, and equal weights do them no harm that anybody would
notice while they are rarely used. How rarely is known: of N choices of an expert, one that was never chosen is chosen
less often than 3 in N with 95 % confidence (the rule of three, https://doi.org/10.1001/jama.1983.03330370053031). So
experts without data are let pass while together they stand for less than 1 % of what the layer computes; and no more
than 5 % of a layer's experts, since a text that misses more is not a sample of what the model is for, however long it
is. Those that pass are counted in the manifest and on the card.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gemma_gguf.errors import VerificationError
from gemma_gguf.gguf_io import Header
from gemma_gguf.imatrix import Entry, Imatrix
from gemma_gguf.manifest import Coverage
from gemma_gguf.plan import FilePlan
from gemma_gguf.recipes import NEED_IMATRIX_TYPES, Recipe

_T = GGMLQuantizationType
# Types whose quantisers do not look at an imatrix; a test asks ggml.
IGNORE_IMATRIX = frozenset(
    {_T.F32, _T.F16, _T.BF16, _T.Q8_0, _T.TQ1_0, _T.TQ2_0, _T.MXFP4, *(t for t in _T if t.name in {"NVFP4", "Q1_0"})}
)
# Types that llama-quantize makes of no tensor without data ("the result will be garbage"); a test asks it.
REQUIRE_IMATRIX = frozenset(_T[name] for name in NEED_IMATRIX_TYPES)
# What `--pin-uncovered` may raise a tensor to: types that lose little without an imatrix.
PIN_TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "BF16", "F16")
RULE_OF_THREE = 3.0
UNSEEN_USE = 0.01
UNSEEN_EXPERTS = 0.05
SHOWN = 12  # tensors in an error; the log has all


@dataclass(frozen=True)
class Gap:
    """A tensor without the data that some recipes would use."""

    tensor: str
    what: str
    recipes: tuple[str, ...]


def gaps(
    imatrix: Imatrix,
    base: Header,
    plans: Mapping[str, FilePlan],
    *,
    unread: frozenset[str] = frozenset(),
    safe: GGMLQuantizationType | None = None,
) -> list[Gap]:
    """What the files of these plans would want of the imatrix and do not get, in file order.

    `unread` are tensors that llama.cpp never reads: they have no data, and need some only in a type that cannot be made
    without. A tensor planned at `safe` or more bits is fine without data.
    """
    users: dict[str, list[tuple[str, GGMLQuantizationType]]] = {}
    for recipe, planned in plans.items():
        for tensor in planned.tensors:
            if (
                not planned.static
                and tensor.is_quantized
                and tensor.name.startswith("blk.")  # of the rest llama-imatrix collects nothing
                and tensor.target not in IGNORE_IMATRIX
                and (tensor.name not in unread or tensor.target in REQUIRE_IMATRIX)
            ):
                users.setdefault(tensor.name, []).append((recipe, tensor.target))
    found = []
    for name in (tensor.name for tensor in base.tensors if tensor.name in users):
        what = _problem(imatrix.entries.get(name))
        hit = [recipe for recipe, target in users[name] if safe is None or bits(target) < bits(safe)]
        if what is not None and hit:
            found.append(Gap(name, what, tuple(hit)))
    return found


def _problem(entry: Entry | None) -> str | None:
    if entry is None:
        return "is not in it"
    if not (np.isfinite(entry.sums).all() and np.isfinite(entry.counts).all()):
        return "has NaN or Inf"
    counts = entry.counts.astype(np.float64)
    if not counts.any():
        return "saw no token"
    unseen, n = int((counts == 0).sum()), len(counts)
    if unseen > UNSEEN_EXPERTS * n or RULE_OF_THREE * unseen > UNSEEN_USE * counts.sum():
        return f"has {unseen} of {n} experts that no token reached"
    return None


def bits(ggml_type: GGMLQuantizationType) -> float:
    """Bits per weight of a type."""
    block, n_bytes = GGML_QUANT_SIZES[ggml_type]
    return float(8 * n_bytes / block)


# --- what to do about it ------------------------------------------------------------------------------------------


def pins(
    found: Sequence[Gap], plans: Mapping[str, FilePlan], ggml_type: GGMLQuantizationType
) -> dict[str, dict[str, str]]:
    """{recipe: {tensor: type}}: where a tensor without data has fewer bits than the type it is to be raised to."""
    raised: dict[str, dict[str, str]] = {}
    for gap in found:
        for recipe in gap.recipes:
            if bits(plans[recipe].types[gap.tensor]) < bits(ggml_type):
                raised.setdefault(recipe, {})[gap.tensor] = ggml_type.name
    return raised


def pinned(recipe: Recipe, tensors: Mapping[str, str]) -> Recipe:
    """The recipe with these tensors at these types, in llama-quantize's own words.

    It searches names by pattern, and takes the first that matches: these stand before a recipe's own.
    """
    flags = [
        word
        for name, kind in sorted(tensors.items())
        for word in ("--tensor-type", f"^{re.escape(name)}$={kind.lower()}")
    ]
    return replace(recipe, flags=(*flags, *recipe.flags)) if flags else recipe


def refusal(
    path: Path, found: Sequence[Gap], wanted: Sequence[str], *, given: bool, pin: str | None
) -> VerificationError:
    """The error for an imatrix that does not cover the `wanted` recipes: which tensors, which recipes, what to do.

    `given` is True for a file of the user's, `pin` the type that was tried already.
    """
    hit = {recipe for gap in found for recipe in gap.recipes}
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for gap in found:
        groups.setdefault((gap.what, gap.recipes), []).append(gap.tensor)
    lines = []
    for (what, recipes), tensors in groups.items():
        lines.append(f"  {listed(tensors)}: {what}; used by {', '.join(recipes)}")
    text = "another imatrix, or none: one is computed" if given else "more calibration text (--calibration, --chunks)"
    choices = [text]
    if pin is None:
        choices.append("raise these tensors in these recipes to a type that is safe without: --pin-uncovered Q6_K")
    left = [name for name in wanted if name not in hit]
    choices.append(f"leave these recipes out: --recipes {','.join(left)}" if left else "every recipe is affected")
    tensors_word = "1 tensor" if len(found) == 1 else f"{len(found)} tensors"
    return VerificationError(
        f"{path.name} lacks data of {tensors_word} for {len(hit)} of {len(wanted)} recipes:\n" + "\n".join(lines),
        next_step="one of these:\n" + "\n".join(f"  {choice}" for choice in choices),
    )


# --- for people ---------------------------------------------------------------------------------------------------


def listed(names: Sequence[str]) -> str:
    """The first of many names, and how many more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def unseen_experts(coverage: Sequence[Coverage]) -> list[str]:
    """`2 of 128 in blk.7.ffn_down_exps` for every tensor with experts that no token reached."""
    return [
        f"{n} of {row.n_experts} in blk.{layer}.{row.kind}"
        for row in coverage
        for layer, n in zip(row.layers, row.unseen, strict=True)
        if n
    ]


COLUMNS = ("Layer", "Tensors", "Tokens", "Experts without", "Active columns", "Evenness")


def layer_rows(coverage: Sequence[Coverage]) -> list[tuple[str, ...]]:
    """One row per layer over all its kinds of weight, as `COLUMNS` names it; ranges where kinds differ."""
    seen: dict[int, list[tuple[int, int, int, float, float]]] = {}
    for row in coverage:
        for n, layer in enumerate(row.layers):
            figures = (row.tokens_min[n], row.tokens_max[n], row.unseen[n], row.active[n], row.evenness[n])
            seen.setdefault(layer, []).append(figures)
    rows: list[tuple[str, ...]] = []
    for layer, kinds in sorted(seen.items()):
        least, most, unseen, active, evenness = zip(*kinds, strict=True)
        rows.append(
            (
                str(layer),
                str(len(kinds)),
                _range(f"{min(least):,}", f"{max(most):,}"),
                str(max(unseen)),
                _range(f"{min(active):.1%}", f"{max(active):.1%}"),
                _range(f"{min(evenness):.3f}", f"{max(evenness):.3f}"),
            )
        )
    return rows


def _range(least: str, most: str) -> str:
    return least if least == most else f"{least} - {most}"
