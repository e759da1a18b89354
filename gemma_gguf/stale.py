"""What a llama.cpp build, or a corrected checkpoint, means for each file of a set: a pure judgement.

Consumes what `refresh` found out about a file without making it again, produces `FileDecision`s with their reasons. A
file is unchanged only when everything its bytes depend on was looked at and found the same; what could not be looked
at makes it unknown, with what is missing.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gemma_gguf.manifest import FileDecision

OUTCOMES: Mapping[str, str] = {"unchanged": "unchanged", "keys": "keys only", "remake": "re-make", "unknown": "unknown"}
SHOWN = 3  # names in a reason


@dataclass(frozen=True)
class Converted:
    """One output of the converter against the file of the set: names of tensors and of keys that differ."""

    tensors: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversion:
    """What the build's converter makes of the checkpoint.

    `same` says how it is known to make the same files; else `outputs` holds what was compared, by name, after the
    checkpoint was converted again for the reason `because`; else `missing` says what it would take to know.
    """

    same: str | None = None
    because: str = ""
    outputs: Mapping[str, Converted] | None = None
    missing: str | None = None


@dataclass(frozen=True)
class Quant:
    """What was found out about one quantised file. Names are of tensors where nothing else is said.

    `types` are the file's quantised types, tensors by type; `other_types` those whose quantiser makes other bytes of
    fixed rows, `unhashed` those whose older quantiser nobody hashed.
    """

    retyped: tuple[str, ...] = ()  # that the build's llama-quantize gives another type or place
    source: tuple[str, ...] = ()  # whose weights the new base holds otherwise
    types: Mapping[str, Sequence[str]] | None = None
    other_types: tuple[str, ...] = ()
    unhashed: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()  # of which a sampled row comes out otherwise
    n_rows: int = 0  # compared
    keys: tuple[str, ...] = ()  # of the header, that differ


def some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    every = list(names)
    more = len(every) - SHOWN
    return ", ".join(every[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def unchanged(why: str) -> FileDecision:
    return FileDecision(outcome="unchanged", why=why, tensors=[], keys=[], sha256=None)


def unknown(why: str) -> FileDecision:
    return FileDecision(outcome="unknown", why=why, tensors=[], keys=[], sha256=None)


def remake(why: str, tensors: Iterable[str] = ()) -> FileDecision:
    """To be made again; without `tensors` it is the whole file."""
    return FileDecision(outcome="remake", why=why, tensors=list(tensors), keys=[], sha256=None)


def keys_only(why: str, keys: Iterable[str]) -> FileDecision:
    return FileDecision(outcome="keys", why=why, tensors=[], keys=list(keys), sha256=None)


def decide_converted(name: str, conversion: Conversion) -> FileDecision:
    """The decision for the base or a projector."""
    if conversion.same is not None:
        return unchanged(conversion.same)
    if conversion.outputs is None or name not in conversion.outputs:
        return unknown(conversion.missing or "the converter makes no such file any more")
    found = conversion.outputs[name]
    if found.tensors:
        tensors = f"{len(found.tensors)} {'tensor' if len(found.tensors) == 1 else 'tensors'}"
        return remake(f"{conversion.because}: it converts {tensors} otherwise: {some(found.tensors)}", found.tensors)
    if found.keys:
        return keys_only(
            f"{conversion.because}: the tensors are the same, these keys are not: {some(found.keys)}", found.keys
        )
    return unchanged(f"{conversion.because}: converted again, every byte is the same")


def decide_quant(found: Quant) -> FileDecision:
    """The decision for a quantised file, when everything could be looked at."""
    types = found.types or {}
    reasons: Counter[str] = Counter()
    differing: dict[str, None] = {}

    def because(what: str, tensors: Iterable[str]) -> None:
        for name in tensors:
            differing[name] = None
            reasons[what] += 1

    because("of another type or place in llama-quantize's plan", found.retyped)
    because("of other weights in the base", found.source)
    for kind in found.other_types:
        because(f"of type {kind}, whose quantiser makes other bytes of fixed rows", types.get(kind, ()))
    explained = set(differing)
    because("of which a sampled row comes out otherwise", (name for name in found.rows if name not in explained))
    if differing:
        why = "; ".join(f"{n} {'tensor' if n == 1 else 'tensors'} {what}" for what, n in reasons.items())
        return remake(f"{why}: {some(differing)}", differing)
    same = f"same plan, {found.n_rows} sampled rows come out the same"
    hashed = sorted(set(types) - set(found.unhashed))
    same += f", same quantisers ({', '.join(hashed)})" if hashed else ""
    if found.unhashed:
        same += (
            f"; of {', '.join(found.unhashed)} the older quantiser was not recorded, so its rows alone were compared"
        )
    if found.keys:
        return keys_only(f"{same}; these keys of the header differ: {some(found.keys)}", found.keys)
    return unchanged(f"{same}, same header")


def counts(decisions: Iterable[FileDecision]) -> dict[str, int]:
    """{outcome: how many files}, every outcome in the order of `OUTCOMES`."""
    found = [decision.outcome for decision in decisions]
    return {outcome: sum(one == outcome for one in found) for outcome in OUTCOMES}
