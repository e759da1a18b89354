"""How much memory a model takes with a context, and which file of a set fits. Pure.

Consumes the base's GGUF header (once, when it is converted), what llama.cpp said about contexts of it, and a
`Manifest`; produces `ContextFacts` for the manifest and `Choices` for the card. Weights alone mislead: Gemma's windowed
layers keep a few thousand tokens, the others the whole context, and some layers keep none of their own. The rules here
are llama.cpp's (`llama_kv_cache_iswa`, `llama_hparams` and the models' `load_arch_hparams` of commit 0c1e57098), and
tests compare the results with what its build reports.

All figures are for `llama-server` as it starts: four slots that share one cache in F16, 512 tokens at a time.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_gguf import gates, gemma, table
from gemma_gguf.errors import ToolFailedError
from gemma_gguf.gguf_io import Header
from gemma_gguf.manifest import CacheGroup, ContextFacts, ContextMemory, FileEntry, Manifest

SLOTS = 4
UBATCH = 512  # tokens computed at once
CELLS = 256  # llama.cpp rounds caches up to this many tokens
CACHE_TYPE_BYTES = 2  # F16
MARGIN = 1.1  # what is taken beside weights, cache and buffers: the program, the system's own
CONTEXTS = (4096, 8192, 32768, 131072)
GIB = 1 << 30
MEMORIES = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # GiB

NO_WINDOW = gemma.Window(1)  # every layer sees the whole context

# --- facts of a model --------------------------------------------------------------------------------------------


def context_facts(header: Header, measured: Sequence[ContextMemory], build: str) -> ContextFacts:
    """The numbers of a base's header that decide what a context takes; `measured` is added as it is."""
    arch = header.get("general.architecture")

    def get(name: str, default: Any = None) -> Any:
        return header.get(f"{arch}.{name}", default)

    def number(name: str, default: int = 0) -> int:
        value = get(name, default)
        return max(map(int, value), default=default) if isinstance(value, list) else int(value)

    n_layers, n_embd = number("block_count"), number("embedding_length")
    per_head = n_embd // max(1, number("attention.head_count"))
    family = gemma.by_gguf_arch(arch)
    rule = (family.window if family else None) or NO_WINDOW
    window = number("attention.sliding_window", rule.tokens)
    pattern = get("attention.sliding_window_pattern", rule.period)
    windowed = _windowed(pattern, n_layers) if window else [False] * n_layers
    heads = get("attention.head_count_kv", get("attention.head_count"))
    heads = heads if isinstance(heads, list) else [heads] * n_layers
    # A model of embeddings reads every text at once, in both directions, and keeps nothing.
    with_cache = 0 if arch in gemma.WITHOUT_LOGITS else gemma.layers_with_cache(header)
    full = number("attention.key_length", per_head), number("attention.value_length", per_head)
    local = number("attention.key_length_swa", full[0]), number("attention.value_length_swa", full[1])
    groups: dict[tuple[bool, int, int], int] = {}
    for layer in range(with_cache):
        key, value = local if windowed[layer] else full
        group = (windowed[layer], key * heads[layer], value * heads[layer])
        groups[group] = groups.get(group, 0) + 1
    return ContextFacts(
        n_ctx_train=number("context_length"),
        n_embd=n_embd,
        n_ff=number("feed_forward_length")
        + number("expert_feed_forward_length") * (number("expert_used_count") if number("expert_count") else 0),
        q_width=number("attention.head_count") * max(full[0], local[0]),
        n_embd_per_layer=number("embedding_length_per_layer_input") * n_layers,
        n_vocab=header.by_name["token_embd.weight"].shape[1],
        window=window if any(windowed) else 0,
        cache=[
            CacheGroup(n_layers=n, windowed=flag, k_width=k, v_width=v) for (flag, k, v), n in sorted(groups.items())
        ],
        measured=list(measured),
        build=build,
    )


def _windowed(pattern: list[bool] | int, n_layers: int) -> list[bool]:
    """Which layers keep a window: the file's list, or every layer but each n-th."""
    if isinstance(pattern, list):
        return [bool(flag) for flag in pattern[:n_layers]]
    period = pattern
    return [period == 0 or layer % period < period - 1 for layer in range(n_layers)]


def contexts_of(n_ctx_train: int) -> list[int]:
    """The context lengths a card is about: as far as the model was trained."""
    return [n for n in CONTEXTS if n <= n_ctx_train] or [n_ctx_train]


def parse_context_log(n_ctx: int, text: str) -> ContextMemory:
    """What llama.cpp wrote while it made a context. Raises `ToolFailedError` when it does not say everything.

    The cache is counted by its `size =` lines: a context that is only simulated has buffers of no size.
    """

    def mebibytes(pattern: str) -> int:
        return round(sum(float(value) for value in re.findall(pattern, text)) * (1 << 20))

    compute = mebibytes(r"compute buffer size = +([\d.]+) MiB")
    if not compute:
        raise ToolFailedError(f"llama.cpp did not say what a context of {n_ctx} tokens computes in")
    return ContextMemory(
        n_ctx=n_ctx,
        cache_bytes=mebibytes(r"llama_kv_cache: size = +([\d.]+) MiB"),
        compute_bytes=compute,
        output_bytes=mebibytes(r"output buffer size = +([\d.]+) MiB"),
    )


# --- bytes -------------------------------------------------------------------------------------------------------


def _padded(n_tokens: int) -> int:
    return -(-n_tokens // CELLS) * CELLS


def cache_bytes(facts: ContextFacts, n_ctx: int, *, slots: int = SLOTS) -> int:
    """Bytes of the key-value cache in F16 for `n_ctx` tokens that `slots` conversations share.

    A windowed layer keeps a window for each conversation and room for the tokens that are being computed.
    """
    cells = _padded(n_ctx)
    window_cells = _padded(min(cells, facts.window * slots + UBATCH))
    return (
        sum(
            group.n_layers * (group.k_width + group.v_width) * (window_cells if group.windowed else cells)
            for group in facts.cache
        )
        * CACHE_TYPE_BYTES
    )


def estimated_buffer_bytes(facts: ContextFacts, n_ctx: int) -> int:
    """What llama.cpp computes in, and the logits it returns, where it was not asked: its largest tensors.

    Two masks in F16 and, in F32, the activations of a layer for every token computed at once.
    """
    cells = _padded(n_ctx)
    widest = max((group.k_width + group.v_width for group in facts.cache), default=0)
    activations = 2 * (facts.n_ff + facts.q_width + widest) + 4 * facts.n_embd_per_layer + 8 * facts.n_embd
    if not facts.cache:  # a text that is read in both directions is computed at once, without logits
        return 4 * cells * cells + 4 * cells * activations
    masks = 2 * UBATCH * (cells + _padded(min(cells, facts.window * SLOTS + UBATCH)))
    return masks + 4 * UBATCH * activations + 3 * 4 * SLOTS * facts.n_vocab


def context_bytes(facts: ContextFacts, n_ctx: int) -> tuple[int, bool]:
    """(bytes a context takes beside the weights, whether llama.cpp said so rather than this module)."""
    for said in facts.measured:
        if said.n_ctx == n_ctx:
            return said.cache_bytes + said.compute_bytes + said.output_bytes, True
    return cache_bytes(facts, n_ctx) + estimated_buffer_bytes(facts, n_ctx), False


def short_tokens(n_ctx: int) -> str:
    """`32k` for 32768: as context lengths are spoken of."""
    return f"{n_ctx // 1024}k" if n_ctx % 1024 == 0 else str(n_ctx)


# --- which file --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The best file that fits one memory with one context, and the bytes it takes there; None when none fits."""

    entry: FileEntry | None
    n_bytes: int
    measured: bool  # its distance from the base was, and decided


@dataclass(frozen=True)
class ChoiceRow:
    memory: int  # GiB
    cells: tuple[Choice, ...]  # one for each context


@dataclass(frozen=True)
class Choices:
    """Memory against context. `by_kld` is False where quality was not measured, or must not be ranked."""

    contexts: tuple[int, ...]  # tokens
    rows: tuple[ChoiceRow, ...]
    by_kld: bool
    said: bool  # llama.cpp said what contexts take; else it is estimated
    projector: FileEntry | None  # counted in every cell
    base: FileEntry | None  # the unquantised file, which is no candidate
    base_memory: int | None  # GiB from which on it fits with the longest context
    context_bytes: Mapping[int, int]  # beside weights and projector

    @property
    def some_unmeasured(self) -> bool:
        """Whether a file stands in the table whose KLD was not measured while that of others was."""
        return self.by_kld and any(cell.entry and not cell.measured for row in self.rows for cell in row.cells)


def choices(manifest: Manifest) -> Choices | None:
    """Which file to choose, or None for a set whose context facts were not recorded or that has no models.

    Best is the lowest measured KLD; among files that were not measured, the largest. The unquantised file is what
    the others are measured against and is no candidate unless it is alone. A file that is held back is none either.
    """
    facts = manifest.context
    held = gates.verdicts(manifest)
    models = [entry for entry in manifest.files if entry.kind == "model" and entry.name not in held]
    if facts is None or not models:
        return None
    bases = [entry for entry in models if entry.recipe == "bf16"]
    candidates = [entry for entry in models if entry not in bases] or models
    base = bases[0] if bases and bases[0] not in candidates else None
    projector = table.projector(manifest)
    quality = {} if manifest.model.base_is_dequantised else gates.closeness(manifest)
    klds = {entry.name: gates.distance(quality[entry.name]).value for entry in candidates if entry.name in quality}
    ranked = sorted(candidates, key=lambda entry: _rank(entry, klds))
    lengths = contexts_of(facts.n_ctx_train)
    beside = {n_ctx: context_bytes(facts, n_ctx) for n_ctx in lengths}

    def needs(entry: FileEntry, n_ctx: int) -> int:
        return entry.n_bytes + (projector.n_bytes if projector else 0) + beside[n_ctx][0]

    def best(memory: int, n_ctx: int) -> Choice:
        fits = (entry for entry in ranked if needs(entry, n_ctx) * MARGIN <= memory * GIB)
        entry = next(fits, None)
        if entry is None:
            return Choice(None, 0, measured=False)
        return Choice(entry, needs(entry, n_ctx), measured=entry.name in klds)

    rows = [ChoiceRow(memory, tuple(best(memory, n_ctx) for n_ctx in lengths)) for memory in MEMORIES]
    return Choices(
        contexts=tuple(lengths),
        rows=tuple(_telling(rows, ranked[0])),
        by_kld=bool(klds),
        said=all(said for _, said in beside.values()),
        projector=projector,
        base=base,
        base_memory=next((m for m in MEMORIES if base and needs(base, lengths[-1]) * MARGIN <= m * GIB), None),
        context_bytes={n_ctx: n_bytes for n_ctx, (n_bytes, _) in beside.items()},
    )


def _rank(entry: FileEntry, klds: Mapping[str, float]) -> tuple[bool, float, int, bool]:
    """Measured files by KLD, then the others, largest first; of equals the smaller, of the same bytes the parent."""
    kld = klds.get(entry.name)
    return kld is None, -entry.n_bytes if kld is None else kld, entry.n_bytes, entry.parent is not None


def _telling(rows: Sequence[ChoiceRow], best: FileEntry) -> list[ChoiceRow]:
    """Without rows in which nothing fits, and without those after the first in which the best fits everywhere."""
    shown = list(itertools.dropwhile(lambda row: all(cell.entry is None for cell in row.cells), rows))
    enough = next((n for n, row in enumerate(shown) if all(cell.entry is best for cell in row.cells)), len(shown))
    return shown[: enough + 1]
