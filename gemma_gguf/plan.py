"""What a file will hold, before it is made: llama.cpp's own decision, as frozen values.

Consumes the text that `llama-quantize --dry-run` prints, produces a `FilePlan`: every tensor in file order with its
shape, source type and target type. No type rule is re-implemented here. Parsing is strict (lines run 1..N, N is the
header's tensor count), because a plan that misses a tensor would verify a broken file.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gemma_gguf.errors import BadInputError, ToolFailedError
from gemma_gguf.files import sha256_json
from gemma_gguf.gguf_io import TensorInfo, n_bytes_of

# [   2/ 236] token_embd.weight - [   640, 262144,     1,     1], type =  bf16, size = 320.00 MiB -> 170.00 MiB (q8_0)
_TENSOR_LINE = re.compile(
    r"^\[ *(?P<index>[0-9]{1,9})/ *(?P<total>[0-9]{1,9})\] +(?P<name>\S+) +- "
    r"\[(?P<shape> *[0-9]{1,19}(?:, *[0-9]{1,19}){0,7})\], type = *(?P<source>\w+), "
    r"size = *[\d.]+ MiB(?: -> *[\d.]+ MiB \((?P<target>\w+)\))?\s*$",
    re.MULTILINE,
)
# warning: blk.0.attn_k.weight - ncols 640 not divisible by 256 (required for type iq2_xs) -> falling back to iq4_nl
_FALLBACK_LINE = re.compile(
    r"^warning: (?P<name>\S+) +- .*\(required for type +(?P<wanted>\w+)\).* -> falling back to +(?P<used>\w+)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a file to be made; `wanted` is the type it would have if its columns allowed it."""

    name: str
    shape: tuple[int, ...]  # ggml order, trailing ones left out
    source: GGMLQuantizationType
    target: GGMLQuantizationType
    wanted: GGMLQuantizationType

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return n_bytes_of(self.target, self.n_elements)

    @property
    def is_quantized(self) -> bool:
        """True when llama-quantize computes it, false when it copies it."""
        return self.source is not self.target


@dataclass(frozen=True)
class FilePlan:
    """Every tensor of one file, in file order. A `static` file is made without the imatrix."""

    recipe: str
    tensors: tuple[PlannedTensor, ...]
    static: bool = False

    @cached_property
    def types(self) -> dict[str, GGMLQuantizationType]:
        return {tensor.name: tensor.target for tensor in self.tensors}

    @property
    def fallbacks(self) -> dict[str, int]:
        """How many tensors could not have the type they should: {"Q4_K -> Q5_0": 54}."""
        pairs = Counter(f"{t.wanted.name} -> {t.target.name}" for t in self.tensors if t.wanted is not t.target)
        return dict(pairs.most_common())

    def differs_from(self, parent: "FilePlan") -> list[str]:
        """Names of the tensors that have another type in `parent`."""
        return [t.name for t in self.tensors if parent.types.get(t.name) is not t.target]

    @property
    def layout_sha256(self) -> str:
        return layout_sha256([(t.name, t.shape, t.target) for t in self.tensors])


def layout_sha256(rows: Sequence[tuple[str, tuple[int, ...], GGMLQuantizationType]]) -> str:
    """One hash over names, shapes and types in file order; recorded so that a file can be checked without a build."""
    return sha256_json([[name, list(_trimmed(shape)), ggml_type.name] for name, shape, ggml_type in rows])


def layout_of(tensors: Sequence[TensorInfo]) -> str:
    """`layout_sha256` of the tensors a file really holds."""
    return layout_sha256([(t.name, t.shape, t.ggml_type) for t in tensors])


def _trimmed(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without trailing ones: [640] and [640, 1, 1, 1] are one tensor to ggml."""
    dims = list(shape)
    while len(dims) > 1 and dims[-1] == 1:
        dims.pop()
    return tuple(dims)


def parse_dry_run_log(text: str, recipe: str, n_tensors: int) -> FilePlan:
    """The plan that `llama-quantize --dry-run` printed, which must name `n_tensors` tensors.

    Raises `ToolFailedError` when lines are missing, out of order or name an unknown type: then the text is not
    understood, and nothing may be built on it.
    """
    wanted = {match["name"]: _ggml_type(match["wanted"]) for match in _FALLBACK_LINE.finditer(text)}
    tensors: list[PlannedTensor] = []
    for match in _TENSOR_LINE.finditer(text):
        if int(match["index"]) != len(tensors) + 1 or int(match["total"]) != n_tensors:
            raise ToolFailedError(
                f"llama-quantize --dry-run for {recipe}: expected tensor {len(tensors) + 1} of {n_tensors}, "
                f"it printed {match[0].strip()!r}"
            )
        source = _ggml_type(match["source"])
        target = _ggml_type(match["target"]) if match["target"] else source
        shape = _trimmed([int(dim) for dim in match["shape"].split(",")])
        name = match["name"]
        tensors.append(PlannedTensor(name, shape, source, target, wanted.get(name, target)))
    if len(tensors) != n_tensors:
        raise ToolFailedError(
            f"llama-quantize --dry-run for {recipe} printed {len(tensors)} tensors, the base has {n_tensors}"
        )
    return FilePlan(recipe, tuple(tensors))


def _ggml_type(name: str) -> GGMLQuantizationType:
    try:
        return GGMLQuantizationType[name.upper()]
    except KeyError:
        raise ToolFailedError(f"llama-quantize names the type {name!r}, which the gguf package does not know") from None


# --- the work of a whole set -------------------------------------------------------------------------------------

_Piece = tuple[str, GGMLQuantizationType, bool]  # of work: tensor, type, and whether without the imatrix


@dataclass(frozen=True)
class Work:
    """What making several files asks for, per ggml type, in elements quantised.

    `asked` counts a (tensor, type) once for every file that wants it, as a loop over llama-quantize computes it;
    `distinct` counts it once. Copied tensors cost no quantising and are in neither.
    """

    asked: dict[str, int]
    distinct: dict[str, int]

    def seconds(self, speeds: Mapping[str, float]) -> tuple[float, float]:
        """CPU seconds (asked, distinct) at measured speeds in elements per second and core."""
        return (
            sum(n / speeds[name] for name, n in self.asked.items()),
            sum(n / speeds[name] for name, n in self.distinct.items()),
        )


def work_of(plans: Iterable[FilePlan]) -> Work:
    """The work of a set of files over one base."""
    asked: Counter[str] = Counter()
    distinct: Counter[str] = Counter()
    seen: set[_Piece] = set()
    for plan in plans:
        for tensor in plan.tensors:
            if tensor.is_quantized:
                asked[tensor.target.name] += tensor.n_elements
                if (piece := (tensor.name, tensor.target, plan.static)) not in seen:
                    seen.add(piece)
                    distinct[tensor.target.name] += tensor.n_elements
    return Work(dict(asked), dict(distinct))


def that_fit(sizes: Mapping[str, int], budget: int) -> list[str]:
    """Names whose files fit `budget` bytes together: greedily from the smallest, so that as many as possible do."""
    chosen: list[str] = []
    for name, size in sorted(sizes.items(), key=lambda item: item[1]):
        if size > budget:
            break
        budget -= size
        chosen.append(name)
    return chosen


def phases(plans: Sequence[FilePlan], speeds: Mapping[str, float], share: float = 0.1) -> dict[str, int]:
    """{recipe: phase}: in which order files are made, the cheapest first.

    A file is whole when its phase is done, so that it can be checked, named and kept while the rest is made. A phase
    holds at least `share` of the whole work, because the base is read once per phase.
    """

    def cost(tensor: PlannedTensor) -> float:
        return tensor.n_elements / speeds[tensor.target.name] if tensor.is_quantized else 0.0

    seen: set[_Piece] = set()
    steps: list[tuple[str, float]] = []
    for plan in sorted(plans, key=lambda plan: sum(map(cost, plan.tensors))):
        new = [tensor for tensor in plan.tensors if (tensor.name, tensor.target, plan.static) not in seen]
        seen |= {(tensor.name, tensor.target, plan.static) for tensor in new}
        steps.append((plan.recipe, sum(map(cost, new))))
    total = sum(seconds for _, seconds in steps)
    chosen: dict[str, int] = {}
    phase, spent = 0, 0.0
    for recipe, seconds in steps:
        chosen[recipe] = phase
        spent += seconds
        if spent >= share * total:
            phase, spent = phase + 1, 0.0
    return chosen


def waves(
    plans: Sequence[FilePlan], sizes: Mapping[str, int], speeds: Mapping[str, float], budget: int
) -> list[list[str]]:
    """Recipes in groups whose files fit `budget` bytes together, such that files sharing work share a group.

    Each group starts with the most expensive recipe left and takes, while there is room, the one that shares the most
    work with what is in it. Raises `BadInputError` when a single file exceeds the budget.
    """
    costs = {
        plan.recipe: {
            (t.name, t.target, plan.static): t.n_elements / speeds[t.target.name]
            for t in plan.tensors
            if t.is_quantized
        }
        for plan in plans
    }
    too_large = [name for name in costs if sizes[name] > budget]
    if too_large:
        raise BadInputError(
            f"{too_large[0]} alone needs {sizes[too_large[0]]:,} bytes, the budget is {budget:,}",
            next_step="Raise --disk-budget, or leave that recipe out.",
        )
    left = sorted(costs, key=lambda name: -sum(costs[name].values()))
    groups: list[list[str]] = []
    while left:
        group = [left.pop(0)]
        work = dict(costs[group[0]])
        room = budget - sizes[group[0]]
        while fitting := [name for name in left if sizes[name] <= room]:
            best = max(fitting, key=lambda name: sum(c for pair, c in costs[name].items() if pair in work))
            group.append(best)
            left.remove(best)
            work |= costs[best]
            room -= sizes[best]
        groups.append(group)
    return groups


def nominal_bits(ftype: str) -> float:
    """Bits per weight of the type an ftype is named after (Q4_K_M: 4.5): an estimate for a set nothing is known of."""
    stem = re.sub(r"_(XXS|XS|S|M|L)$", "", ftype)
    for name in (ftype, stem, f"{stem}_S"):
        if name in GGMLQuantizationType.__members__:
            block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
            return float(8 * n_bytes / block)
    return 16.0
