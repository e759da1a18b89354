"""Every row a quant set can have, as one table. A recipe is an ftype of llama.cpp plus overrides.

Consumes nothing, produces frozen rows. Which tensor gets which type is llama.cpp's business (`llama-quantize
--dry-run` says it); here stands only what is typed on its command line. The default rows, and their names, are those
of bartowski's published Gemma repositories.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from gemma_gguf.errors import BadInputError


@dataclass(frozen=True)
class Recipe:
    """One row: `name` is what a file is called, `ftype` what llama-quantize is told, `flags` what is added.

    `parent` is the recipe that this one differs from by its flags alone. `about` says what the row is, without praise.
    A `static` one is made without the imatrix.
    """

    name: str
    ftype: str
    about: str
    flags: tuple[str, ...] = ()
    parent: str | None = None
    static: bool = False

    @property
    def is_base(self) -> bool:
        """True for the row that is the converter's output as it is."""
        return self.ftype == "BF16"

    @property
    def overrides(self) -> tuple[tuple[str, str], ...]:
        """(option, ggml type in capitals) of its flags: `--tensor-type ffn_down=q6_k` gives (--tensor-type, Q6_K)."""
        types = (value.rpartition("=")[2].upper() for value in self.flags[1::2])
        return tuple(zip(self.flags[::2], types, strict=True))

    @property
    def needs_imatrix(self) -> bool:
        """Whether llama-quantize refuses to make it without one."""
        return self.ftype in NEED_IMATRIX or not NEED_IMATRIX_TYPES.isdisjoint(kind for _, kind in self.overrides)


# The flags of the `_L` and `_XL` rows: embedding and output stay at 8 bits.
EMBED_OUTPUT_Q8 = ("--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0")


def _large(name: str, parent: str) -> Recipe:
    return Recipe(name, parent, f"{parent} with embedding and output at Q8_0", EMBED_OUTPUT_Q8, parent)


DEFAULT = (
    Recipe("bf16", "BF16", "Full BF16 weights, as converted"),
    Recipe("Q8_0", "Q8_0", "8 bits, one scale per 32 weights"),
    _large("Q6_K_L", "Q6_K"),
    Recipe("Q6_K", "Q6_K", "K-quant, 6 bits throughout"),
    _large("Q5_K_L", "Q5_K_M"),
    Recipe("Q5_K_M", "Q5_K_M", "K-quant mix, 5 bits with some tensors at 6"),
    Recipe("Q5_K_S", "Q5_K_S", "K-quant, 5 bits"),
    _large("Q4_K_L", "Q4_K_M"),
    Recipe("Q4_1", "Q4_1", "4 bits, scale and minimum per 32 weights"),
    Recipe("Q4_K_M", "Q4_K_M", "K-quant mix, 4 bits with some tensors at 6"),
    Recipe("Q4_K_S", "Q4_K_S", "K-quant, 4 bits"),
    Recipe("Q4_0", "Q4_0", "4 bits, one scale per 32 weights; repacked online for ARM and AVX"),
    Recipe("IQ4_NL", "IQ4_NL", "I-quant, 4 bits on a non-linear grid, blocks of 32; repacked online for ARM and AVX"),
    Recipe("IQ4_XS", "IQ4_XS", "I-quant, 4 bits on a non-linear grid, blocks of 256"),
    _large("Q3_K_XL", "Q3_K_L"),
    Recipe("Q3_K_L", "Q3_K_L", "K-quant mix, 3 bits with some tensors at 5"),
    Recipe("Q3_K_M", "Q3_K_M", "K-quant mix, 3 bits with some tensors at 4 and 5"),
    Recipe("Q3_K_S", "Q3_K_S", "K-quant, 3 bits"),
    Recipe("IQ3_M", "IQ3_M", "I-quant mix, 3 bits with some tensors at 4"),
    Recipe("IQ3_XS", "IQ3_XS", "I-quant mix of two 3-bit grids"),
    Recipe("IQ3_XXS", "IQ3_XXS", "I-quant, 3 bits on the smallest grid"),
    _large("Q2_K_L", "Q2_K"),
    Recipe("Q2_K", "Q2_K", "K-quant mix, 2 bits with some tensors at 3 and 4"),
    Recipe("IQ2_M", "IQ2_M", "I-quant mix around 2.7 bits"),
    Recipe("IQ2_S", "IQ2_S", "I-quant mix around 2.5 bits"),
    Recipe("IQ2_XS", "IQ2_XS", "I-quant, 2.31 bits"),
    Recipe("IQ2_XXS", "IQ2_XXS", "I-quant, 2.06 bits"),
)
ON_REQUEST = (
    Recipe("IQ3_S", "IQ3_S", "I-quant, 3.44 bits"),
    Recipe("Q2_K_S", "Q2_K_S", "K-quant, 2 bits"),
    Recipe("IQ1_M", "IQ1_M", "I-quant, 1.75 bits"),
    Recipe("IQ1_S", "IQ1_S", "I-quant, 1.56 bits"),
    Recipe("Q5_0", "Q5_0", "5 bits, one scale per 32 weights"),
    Recipe("Q5_1", "Q5_1", "5 bits, scale and minimum per 32 weights"),
)
TABLE: Mapping[str, Recipe] = {recipe.name: recipe for recipe in (*DEFAULT, *ON_REQUEST)}
DEFAULT_NAMES = tuple(recipe.name for recipe in DEFAULT)
# ftypes whose mixes hold a type that llama-quantize makes of no block without an imatrix; a test asks it.
NEED_IMATRIX = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"})
# The same of ggml types, in any tensor but the embedding (llama.cpp, src/llama-quant.cpp, tensor_requires_imatrix).
NEED_IMATRIX_TYPES = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})
# Names that stand for several rows.
SETS: Mapping[str, tuple[str, ...]] = {"default": DEFAULT_NAMES, "all": tuple(TABLE)}
# What tensors without imatrix data are kept at in such a file; llama-quantize makes Q2_K without, but not in Q2_K_S.
WITHOUT_DATA, WITHOUT_DATA_IN = "q2_K", {"Q2_K_S": "q3_K"}
# Of these a file is no quant of a BF16 base, or another name for a row.
NOT_RECIPES = frozenset({"BF16", "F16", "F32", "COPY", "Q3_K", "Q4_K", "Q5_K"})
# Cheap for llama-quantize, and each uses the imatrix, which Q8_0 does not: what the proof of a run takes first.
PROOF_FIRST = ("Q6_K", "Q4_0", "Q3_K_S", "Q6_K_L")


def types_of(flags: Sequence[str]) -> dict[str, str]:
    """{pattern: ggml type in capitals} of the `--tensor-type` options among flags of llama-quantize."""
    given = [value.rpartition("=") for option, value in pairwise(flags) if option == "--tensor-type"]
    return {pattern: kind.upper() for pattern, _, kind in given}


def fitted(recipe: Recipe, unread_layers: Sequence[int], per_layer_type: str | None) -> Recipe:
    """The recipe for a model with peculiarities that llama-quantize has no rule for.

    `unread_layers` hold keys and values that nothing reads, so no imatrix has data for them, and llama-quantize refuses
    to make very low-bit types of them: they get a type that needs none. `per_layer_type` is what the parent of a `_L`
    row, or a QAT set's Q4_0 without its flags, makes of the embeddings per layer (None where there are none): they
    would follow `--token-embedding-type`, and are several times as large as the embeddings that it is about.
    """
    types: dict[str, str] = {}
    if unread_layers and recipe.needs_imatrix:
        layers = "|".join(map(str, unread_layers))
        types[rf"blk\.({layers})\.attn_[kv]"] = WITHOUT_DATA_IN.get(recipe.ftype, WITHOUT_DATA)
    if per_layer_type is not None and (recipe.static or recipe.flags == EMBED_OUTPUT_Q8):
        types["per_layer_token_embd"] = per_layer_type
    # The first pattern that a name holds is taken: ours come before those of a recipe of the user's own.
    added = [part for pattern, kind in types.items() for part in ("--tensor-type", f"{pattern}={kind}")]
    return replace(recipe, flags=(*added, *recipe.flags))


def for_proof(sizes: Mapping[str, int]) -> str:
    """Which of these recipes is made once more by llama-quantize to prove a run; `sizes` are bytes of their files."""
    return next((name for name in PROOF_FIRST if name in sizes), min(sizes, key=lambda name: sizes[name]))


def parse_quantize_help(text: str) -> dict[str, str]:
    """{ftype: description} from what `llama-quantize --help` lists as allowed quantization types."""
    rows = re.findall(r"^(?: *\d+ +or +| {10})([A-Z][A-Z0-9_]+) *: *(.+)$", text, re.MULTILINE)
    return {name: " ".join(about.split()) for name, about in rows}


def expand(names: Iterable[str], sets: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """`names` with every set of recipes in its place; each name once. `sets` may name those of `SETS`."""
    found: list[str] = []
    for name in names:
        if name in sets:
            found += expand(sets[name], {})
        else:
            found += SETS.get(name, (name,))
    return tuple(dict.fromkeys(found))


def select(names: Iterable[str], offered: Mapping[str, str], custom: Iterable[Recipe] = ()) -> tuple[Recipe, ...]:
    """The recipes called `names`, in the table's order, checked against what the build's llama-quantize offers.

    `custom` are recipes of the user's own; they come after the table's. A name outside both is fine when the build
    offers an ftype of that name: a new quant of llama.cpp can be made before it has a row here. Raises `BadInputError`
    naming the nearest known recipes.
    """
    wanted = list(dict.fromkeys(names))
    extra = {name: Recipe(name, name, about) for name, about in offered.items() if name not in NOT_RECIPES}
    own = {recipe.name: recipe for recipe in custom}
    known = {**extra, **own, **TABLE}
    folded = {name.upper(): name for name in known}
    chosen: list[Recipe] = []
    for name in wanted:
        recipe = known.get(folded.get(name.upper(), ""))
        if recipe is None:
            near = difflib.get_close_matches(name.upper(), folded, n=3, cutoff=0.5)
            hint = f"Nearest: {', '.join(folded[n] for n in near)}." if near else f"Known: {', '.join(known)}."
            raise BadInputError(f"unknown recipe {name!r}", next_step=hint)
        if offered and recipe.ftype not in offered:
            raise BadInputError(
                f"this llama.cpp build cannot make {recipe.name}: its llama-quantize does not offer {recipe.ftype}",
                next_step="Leave the recipe out, or use another build with --llama-cpp.",
            )
        chosen.append(recipe)
    table_order = list(dict.fromkeys([*TABLE, *own, *known]))
    return tuple(sorted(set(chosen), key=lambda recipe: table_order.index(recipe.name)))
