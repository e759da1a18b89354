"""The rows of a card: what each file is, what was measured of it, and what the measurements say about it.

Consumes a `Manifest` and translations, produces frozen rows of text. Files are compared here and nowhere else: by
size and mean KL divergence (of embeddings: 1 - mean cosine similarity), two standard errors of the difference apart or
not at all. The standard error of a
difference is taken as if the two measurements were independent; they are made on the same tokens, so it is an upper
bound. Nothing is ranked where the base itself was quantised before.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from gettext import NullTranslations
from typing import TypeVar

from gemma_gguf import gates, recipes
from gemma_gguf.errors import BadInputError
from gemma_gguf.gates import Closeness, closeness, comparable, difference, distance
from gemma_gguf.manifest import FILE_NAME, FileEntry, Manifest, Measured, Quality, Similarity, Speed

NOTHING = "–"  # a cell of a row that is not made or not measured; its status says so
T = TypeVar("T")
SIGNIFICANT = 2.0  # standard errors of a difference


@dataclass(frozen=True)
class Row:
    """One row of the download table. `link` is None for a file that is not made."""

    name: str
    link: str | None
    quant: str
    size: str  # decimal GB
    n_bytes: int
    bpw: str
    kld: str
    same_top: str
    ppl: str
    cosine: str
    cosine_min: str
    same_nearest: str
    about: str
    status: str
    split: bool


@dataclass(frozen=True)
class LargeRow:
    """What a `_L` row pays for its larger tensors, and what it gets. `gain` is None where nothing can be said."""

    quant: str
    parent: str
    tensors: tuple[str, ...]
    cost: str
    gain: str


@dataclass(frozen=True)
class SpeedRow:
    quant: str
    size: str
    prompt: str
    prompt_share: str
    generate: str
    generate_share: str
    memory: str


@dataclass(frozen=True)
class SpeedTable:
    """Speeds that may be compared: one machine, one build, one test. `has_shares` when Q4_0 is among them."""

    cpu: str
    backend: str
    threads: int
    n_prompt: int
    n_generate: int
    has_shares: bool
    rows: tuple[SpeedRow, ...]

    @property
    def generates(self) -> bool:
        """False for a model that gives embeddings: it reads and pools."""
        return self.n_generate > 0


def gigabytes(n_bytes: int) -> str:
    """Decimal GB with two digits, as the Hub and the reference cards show sizes: `0.24GB`; MB below 10 MB."""
    return f"{n_bytes / 1e9:.2f}GB" if n_bytes >= 10_000_000 else megabytes(n_bytes)


def megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.2f}MB"


def plus_minus(measured: Measured, *, factor: float = 1.0, unit: str = "", signed: bool = False) -> str:
    """A number with its standard error to two digits of the error: `1.234 ± 0.012 %`, broken before the sign only."""
    value, sign = measured.value * factor, "+" if signed else ""
    tail = f"\u00a0{unit}" if unit else ""
    if not measured.se or measured.se < 1e-300:  # zero: the number is what it is; None: nobody knows how far it is off
        shown = f"{value:{sign}.3g}" if value else "0"
        return f"{shown}{tail}" if measured.se is not None else f"{shown} ±\u00a0?{tail}"
    se = measured.se * factor
    digits = 1 - math.floor(math.log10(se))
    if digits > 6:
        return f"{value:{sign}.1e} ±\u00a0{se:.0e}{tail}"
    digits = max(digits, 0)
    return f"{value:{sign}.{digits}f} ±\u00a0{se:.{digits}f}{tail}"


def need(value: T | None, fact: str) -> T:
    """A fact that a card cannot do without. Raises `BadInputError` naming it when it is not recorded."""
    if value is None:
        raise BadInputError(
            f"{FILE_NAME} does not say {fact}, which a card must show",
            next_step="Make the file again with: gemma-gguf run MODEL",
        )
    return value


# --- what was measured --------------------------------------------------------------------------------------------


def projector(manifest: Manifest) -> FileEntry | None:
    """The projector that cards tell to take: f16, which runs everywhere, else the smallest."""
    found = sorted((e for e in manifest.files if e.kind == "mmproj"), key=lambda e: (e.n_bytes, e.name))
    return next((entry for entry in found if entry.name.endswith("-f16.gguf")), found[0] if found else None)


def is_shown(measured: Measured) -> bool:
    """Whether a difference is positive beyond two of its standard errors."""
    return measured.se is not None and measured.value > SIGNIFICANT * measured.se


def beaten_by(entry: FileEntry, manifest: Manifest) -> FileEntry | None:
    """The closest to the base of all files that are smaller than `entry` and closer beyond two standard errors.

    None where the base was quantised before: there, sizes and divergences say nothing about other weights.
    """
    if manifest.model.base_is_dequantised:
        return None
    quality = closeness(manifest)
    mine = quality.get(entry.name)
    better = [
        other
        for other in manifest.files
        if mine is not None
        and other.n_bytes < entry.n_bytes
        and (theirs := quality.get(other.name)) is not None
        and comparable(mine, theirs)
        and is_shown(difference(distance(mine), distance(theirs)))
    ]
    return min(better, key=lambda other: distance(quality[other.name]).value, default=None)


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (size, KLD) points that no other one beats in both, the smallest file first."""
    order = sorted(range(len(points)), key=lambda number: points[number])
    best, kept = math.inf, []
    for number in order:
        if points[number][1] < best:
            best = points[number][1]
            kept.append(number)
    return kept


def is_on_frontier(entry: FileEntry, manifest: Manifest) -> bool:
    """Whether no comparable file beats it in both size and divergence."""
    quality = closeness(manifest)
    mine = quality.get(entry.name)
    if mine is None or manifest.model.base_is_dequantised:
        return False
    points = [
        (other.n_bytes, distance(theirs).value)
        for other in manifest.files
        if (theirs := quality.get(other.name)) is not None and comparable(mine, theirs)
    ]
    return (entry.n_bytes, distance(mine).value) in [points[number] for number in frontier(points)]


def pick(manifest: Manifest) -> FileEntry | None:
    """The file for those who do not want to choose: Q4_K_M, or what beats it; Q4_0 of a model trained for it.

    Without those the largest file of at most 5 bits per weight, else the smallest; never one that is held back.
    """
    held = gates.verdicts(manifest)
    models = {entry.recipe: entry for entry in manifest.files if entry.kind == "model" and entry.name not in held}
    if not models:
        return None
    if manifest.model.qat and "Q4_0" in models:
        return models["Q4_0"]
    usual = models.get("Q4_K_M")
    if usual is not None:
        better = beaten_by(usual, manifest)
        return better if better is not None and better.name not in held else usual
    by_size = sorted(models.values(), key=lambda entry: entry.n_bytes)
    return next((entry for entry in reversed(by_size) if entry.bpw is not None and entry.bpw <= 5), by_size[0])


# --- the download table -------------------------------------------------------------------------------------------


def is_partial(manifest: Manifest) -> bool:
    """Whether a recipe that was asked for is not made, or a model file not measured."""
    made = {entry.recipe for entry in manifest.files if entry.kind == "model"}
    return not made.issuperset(manifest.recipes) or len(closeness(manifest)) < len(
        [entry for entry in manifest.files if entry.kind == "model"]
    )


def download_rows(manifest: Manifest, words: NullTranslations, separator: str = " ") -> list[Row]:
    """mmproj first, then the models, each largest first; files of one size stay in the recipes' order.

    What was asked for and is not made comes last, in the recipes' order. `separator` stands between sentences.
    """
    order = {name: index for index, name in enumerate(recipes.TABLE)}

    def place(entry: FileEntry) -> tuple[int, int, int]:
        return (entry.kind != "mmproj", -entry.n_bytes, order.get(entry.recipe or "", len(order)))

    quality = closeness(manifest)
    shown = sorted((entry for entry in manifest.files if entry.kind != "imatrix"), key=place)
    rows = [_row(entry, manifest, quality, words, separator) for entry in shown]
    made = {entry.recipe for entry in shown if entry.kind == "model"}
    missing = sorted(set(manifest.recipes) - made, key=lambda name: (order.get(name, len(order)), name))
    return [*rows, *(_missing_row(name, manifest, words) for name in missing)]


def _row(
    entry: FileEntry,
    manifest: Manifest,
    quality: Mapping[str, Closeness],
    words: NullTranslations,
    separator: str,
) -> Row:
    is_model = entry.kind == "model"
    close = quality.get(entry.name)
    mine = close if isinstance(close, Quality) else None
    like = close if isinstance(close, Similarity) else None
    told = _sentences(entry, manifest, quality, words) if is_model else [_projector(entry, manifest, words)]
    name, link = name_and_link(entry, manifest)
    return Row(
        name=name,
        link=link,
        quant=need(entry.recipe, f"the recipe of {entry.name}") if is_model else _outtype(entry),
        size=gigabytes(entry.n_bytes),
        n_bytes=entry.n_bytes,
        bpw=f"{need(entry.bpw, f'the bits per weight of {entry.name}'):.2f}" if is_model else NOTHING,
        kld=plus_minus(mine.kld) if mine else NOTHING,
        same_top=plus_minus(mine.same_top_p, factor=100, unit="%") if mine else NOTHING,
        ppl=plus_minus(_minus_one(mine.ppl_ratio), factor=100, unit="%", signed=True) if mine else NOTHING,
        cosine=_cosine(like.cosine) if like else NOTHING,
        cosine_min=f"{like.cosine_min:.4f}" if like else NOTHING,
        same_nearest=plus_minus(like.same_nearest, factor=100, unit="%") if like else NOTHING,
        about=separator.join(told),
        status=_status(entry, manifest, close, words),
        split=bool(entry.shards),
    )


def _cosine(measured: Measured) -> str:
    """Near 1 the digits after the nines count: never in powers of ten."""
    if measured.se and measured.se < 1e-6:
        return f"{measured.value:.8f} ±\u00a0{measured.se:.0e}"
    return plus_minus(measured)


def _status(entry: FileEntry, manifest: Manifest, close: Closeness | None, words: NullTranslations) -> str:
    if close is not None or entry.kind != "model":
        return words.gettext("complete")
    if entry.name in gates.failures(manifest):
        return words.gettext("no figures")
    return words.gettext("not measured")


def name_and_link(entry: FileEntry, manifest: Manifest) -> tuple[str, str]:
    """(name, link) of a file, or of a folder of shards; on the Hub a relative link is one to a file."""
    folder, _, file = entry.name.rpartition("/")
    if not entry.shards:
        return file, f"./{entry.name}"
    repo = manifest.card.repo
    return folder, f"https://huggingface.co/{repo}/tree/main/{folder}" if repo else f"./{folder}"


def _missing_row(recipe: str, manifest: Manifest, words: NullTranslations) -> Row:
    known = manifest.row(recipe)
    return Row(
        name=f"{manifest.stem}-{recipe}.gguf",
        link=None,
        quant=recipe,
        size=NOTHING,
        n_bytes=0,
        bpw=NOTHING,
        kld=NOTHING,
        same_top=NOTHING,
        ppl=NOTHING,
        cosine=NOTHING,
        cosine_min=NOTHING,
        same_nearest=NOTHING,
        about=_what_it_is(known.about, known.parent, words) if known else NOTHING,
        status=words.gettext("not made"),
        split=False,
    )


def _minus_one(ratio: Measured) -> Measured:
    return Measured(value=ratio.value - 1, se=ratio.se)


def _outtype(entry: FileEntry) -> str:
    """`f16` of `mmproj-<stem>-f16.gguf`."""
    return entry.name.removesuffix(".gguf").rpartition("-")[2]


def _projector(entry: FileEntry, manifest: Manifest, words: NullTranslations) -> str:
    about = {
        (True, False): words.gettext("Vision projector in %(outtype)s, needed beside any model file."),
        (False, True): words.gettext("Audio projector in %(outtype)s, needed beside any model file."),
    }.get(
        (manifest.model.vision, manifest.model.audio),
        words.gettext("Vision and audio projector in %(outtype)s, needed beside any model file."),
    )
    return about % {"outtype": _outtype(entry)}


def _what_it_is(about: str, parent: str | None, words: NullTranslations) -> str:
    if parent is not None:
        return words.gettext("%(parent)s with embedding and output at Q8_0.") % {"parent": parent}
    return words.gettext("%(about)s.") % {"about": words.gettext(about) if about else NOTHING}


def _sentences(
    entry: FileEntry, manifest: Manifest, quality: Mapping[str, Closeness], words: NullTranslations
) -> list[str]:
    """What a row says of its file: what it is, what it costs, what was measured, who beats it."""
    about = need(entry.about, f"what {entry.name} is")
    told: list[str] = []
    if entry.parent is not None and not entry.differs:
        told.append(
            words.gettext("Same tensors as %(parent)s: embedding and output have Q8_0 there already.")
            % {"parent": entry.parent}
        )
    else:
        told.append(_what_it_is(about, entry.parent, words))
        told += _large_sentences(entry, manifest, quality, words)
    told += _fallback_sentences(entry, words)
    told += [
        words.gettext("Set by hand: %(tensors)s at %(type)s.") % {"tensors": f"`{pattern}`", "type": kind}
        for pattern, kind in recipes.types_of(entry.flags).items()
        if entry.recipe not in manifest.pins
    ]
    if pinned := manifest.pins.get(entry.recipe or ""):
        text = words.ngettext(
            "%(n)d tensor without imatrix data is raised to %(kind)s.",
            "%(n)d tensors without imatrix data are raised to %(kind)s.",
            len(pinned),
        )
        told.append(text % {"n": len(pinned), "kind": ", ".join(sorted(set(pinned.values())))})
    mine = quality.get(entry.name)
    if mine is not None and entry.recipe == "bf16":
        told.append(words.gettext("The base that every figure compares with; its own figures are the noise floor."))
    elif mine is not None:
        if isinstance(mine, Quality):
            told.append(words.gettext("Δp %(rms)s RMS.") % {"rms": plus_minus(mine.delta_p_rms, factor=100, unit="%")})
        told += _rank_sentences(entry, manifest, quality, words)
    if (verdict := gates.verdicts(manifest).get(entry.name)) is not None:
        told.append(_held_sentence(verdict, manifest, words))
    if manifest.model.qat and entry.recipe == "Q4_0":
        told.append(words.gettext("The type this checkpoint was trained for."))
        if manifest.qat is not None:
            told.append(words.gettext("Made without the imatrix."))
    return told


def _large_sentences(
    entry: FileEntry, manifest: Manifest, quality: Mapping[str, Closeness], words: NullTranslations
) -> list[str]:
    parent = _parent(entry, manifest)
    if parent is None:
        return []
    cost = {"size": megabytes(entry.n_bytes - parent.n_bytes), "tensors": ", ".join(entry.differs)}
    gain = _gain(entry, parent, manifest, quality)
    if gain is None:
        return [words.gettext("Pays %(size)s for %(tensors)s.") % cost]
    embeds = manifest.model.embedding is not None
    if is_shown(gain):
        text = (
            words.gettext("Pays %(size)s for %(tensors)s and raises the cosine by %(gain)s.")
            if embeds
            else words.gettext("Pays %(size)s for %(tensors)s and lowers KLD by %(gain)s.")
        )
    elif is_shown(Measured(value=-gain.value, se=gain.se)):
        text = (
            words.gettext("Pays %(size)s for %(tensors)s, and the cosine is lower than %(parent)s's (by %(loss)s).")
            if embeds
            else words.gettext("Pays %(size)s for %(tensors)s, and KLD is higher than %(parent)s's (change %(loss)s).")
        )
    else:
        text = (
            words.gettext("Pays %(size)s for %(tensors)s; a gain in the cosine is not shown (%(gain)s).")
            if embeds
            else words.gettext("Pays %(size)s for %(tensors)s; a gain in KLD is not shown (%(gain)s).")
        )
    loss = plus_minus(Measured(value=-gain.value, se=gain.se), signed=True)
    return [text % {**cost, "gain": plus_minus(gain), "loss": loss, "parent": parent.recipe}]


def _parent(entry: FileEntry, manifest: Manifest) -> FileEntry | None:
    """The file of the recipe that a `_L` row was made from, when the set has it."""
    if entry.parent is None:
        return None
    return next((other for other in manifest.files if other.kind == "model" and other.recipe == entry.parent), None)


def _gain(entry: FileEntry, parent: FileEntry, manifest: Manifest, quality: Mapping[str, Closeness]) -> Measured | None:
    """By how much closer to the base a `_L` file is than its parent; None where that means nothing."""
    mine, theirs = quality.get(entry.name), quality.get(parent.name)
    if mine is None or theirs is None or not comparable(mine, theirs) or manifest.model.base_is_dequantised:
        return None
    return difference(distance(theirs), distance(mine))


def _fallback_sentences(entry: FileEntry, words: NullTranslations) -> list[str]:
    n = sum(entry.fallbacks.values())
    if n == 0:
        return []
    if all("_K" in pair.partition(" ")[0] or pair.startswith("IQ") for pair in entry.fallbacks):
        text = words.ngettext(
            "%(n)d tensor has another type because its columns are not divisible by 256.",
            "%(n)d tensors have another type because their columns are not divisible by 256.",
            n,
        )
    else:
        text = words.ngettext(
            "%(n)d tensor has another type because its columns do not allow the usual one.",
            "%(n)d tensors have another type because their columns do not allow the usual one.",
            n,
        )
    return [text % {"n": n}]


def _rank_sentences(
    entry: FileEntry, manifest: Manifest, quality: Mapping[str, Closeness], words: NullTranslations
) -> list[str]:
    better = beaten_by(entry, manifest)
    if better is not None:
        mine, theirs = quality[entry.name], quality[better.name]
        text = (
            words.gettext("⚠ Beaten by %(other)s, which is %(size)s smaller and higher in cosine by %(kld)s.")
            if manifest.model.embedding is not None
            else words.gettext("⚠ Beaten by %(other)s, which is %(size)s smaller and lower in KLD by %(kld)s.")
        )
        return [
            text
            % {
                "other": better.recipe,
                "size": gigabytes(entry.n_bytes - better.n_bytes),
                "kld": plus_minus(difference(distance(mine), distance(theirs))),
            }
        ]
    if is_on_frontier(entry, manifest):
        return [words.gettext("Nothing smaller is closer.")]
    return []


def _held_sentence(verdict: gates.Verdict, manifest: Manifest, words: NullTranslations) -> str:
    """Why the quality gate holds a file back."""
    if verdict.far is None or verdict.bound is None:
        return words.gettext("⛔ Broken: it gives no finite figures.")
    facts = {"kld": plus_minus(verdict.far), "bound": f"{verdict.bound:g}"}
    if verdict.than is None:
        return words.gettext("⛔ Out of line: KLD %(kld)s is above %(bound)s nats.") % facts
    facts |= {"ratio": f"{manifest.gates.max_kld_ratio:g}", "other": str(verdict.than.recipe)}
    if verdict.embeddings:
        text = words.gettext(
            "⛔ Out of line: 1 - cosine %(kld)s is more than %(ratio)s times that of %(other)s, which is smaller."
        )
    else:
        text = words.gettext(
            "⛔ Out of line: KLD %(kld)s is more than %(ratio)s times that of %(other)s, which is smaller."
        )
    return text % facts


# --- smaller tables -----------------------------------------------------------------------------------------------


def large_rows(manifest: Manifest) -> list[LargeRow]:
    """The `_L` rows that differ from their parent, with what that costs and gains; only where both are made."""
    quality = closeness(manifest)
    rows = []
    for entry in in_order(manifest):
        parent = _parent(entry, manifest)
        if parent is not None and entry.differs:
            gain = _gain(entry, parent, manifest, quality)
            rows.append(
                LargeRow(
                    quant=need(entry.recipe, f"the recipe of {entry.name}"),
                    parent=need(parent.recipe, f"the recipe of {parent.name}"),
                    tensors=tuple(entry.differs),
                    cost=megabytes(entry.n_bytes - parent.n_bytes),
                    gain=plus_minus(gain) if gain is not None else NOTHING,
                )
            )
    return rows


def speed_tables(manifest: Manifest) -> list[SpeedTable]:
    """What llama-bench measured, one table for each machine, build and test; shares are against Q4_0 of that table."""
    groups: dict[tuple[object, ...], list[tuple[FileEntry, Speed]]] = {}
    for entry in in_order(manifest):
        evidence = manifest.evidence.get(entry.sha256)
        if evidence is not None and (speed := evidence.speed) is not None:
            test = (speed.cpu, speed.backend, speed.threads, speed.n_prompt, speed.n_generate, speed.build)
            groups.setdefault(test, []).append((entry, speed))
    return [_speed_table(measured) for measured in groups.values()]


def _speed_table(measured: list[tuple[FileEntry, Speed]]) -> SpeedTable:
    first = measured[0][1]
    reference = next((speed for entry, speed in measured if entry.recipe == "Q4_0"), None)

    def share(mine: Measured | None, its: Measured | None) -> str:
        return f"{mine.value / its.value:.0%}" if mine is not None and its is not None and its.value > 0 else NOTHING

    rows = tuple(
        SpeedRow(
            quant=need(entry.recipe, f"the recipe of {entry.name}"),
            size=gigabytes(entry.n_bytes),
            prompt=_spread(speed.prompt_per_second),
            prompt_share=share(speed.prompt_per_second, reference.prompt_per_second if reference else None),
            generate=_spread(speed.generate_per_second) if speed.generate_per_second else NOTHING,
            generate_share=share(speed.generate_per_second, reference.generate_per_second if reference else None),
            memory=gigabytes(speed.peak_memory_bytes) if speed.peak_memory_bytes is not None else NOTHING,
        )
        for entry, speed in measured
    )
    return SpeedTable(
        cpu=first.cpu,
        backend=first.backend,
        threads=first.threads,
        n_prompt=first.n_prompt,
        n_generate=first.n_generate,
        has_shares=reference is not None,
        rows=rows,
    )


def _spread(measured: Measured) -> str:
    """Tokens per second with two digits, as llama-bench prints them."""
    spread = f"{measured.se:.2f}" if measured.se is not None else "?"
    return f"{measured.value:.2f} ±\u00a0{spread}"


def in_order(manifest: Manifest) -> list[FileEntry]:
    """Model files, largest first, files of one size in the recipes' order."""
    order = {name: index for index, name in enumerate(recipes.TABLE)}
    models = [entry for entry in manifest.files if entry.kind == "model"]
    return sorted(models, key=lambda entry: (-entry.n_bytes, order.get(entry.recipe or "", len(order))))
