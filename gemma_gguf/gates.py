"""The quality gate: which measured files are out of line, and must not be published. Pure.

Consumes a `Manifest`, produces a `Verdict` for every file that is held back. A file is held back when it gave no
finite figures, when its mean KL divergence from the base is above `max_kld`, or when it is more than `max_kld_ratio`
times that of a smaller file and more by over `errors` standard errors of the difference: such a file is broken, or
nobody should download it. Of a model that gives embeddings the distance is 1 - mean cosine similarity, and files are
held against smaller ones alone. The bounds are recorded in the set (`Manifest.gates`), so whoever reads it judges
alike.

What is known of divergences beside the numbers: where the base itself was quantised before, they are inverted by its
own grid, and no bound holds (a file without finite figures is broken all the same). Weights that were trained for Q4_0
lie on its grid, so files of the types that hold this grid (Q4_0, Q4_1, Q5_0, Q5_1) are closer to such a base than
larger ones of other types, and are no measure for them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gemma_gguf.manifest import FileEntry, GateFacts, Manifest, Measured, Quality, Similarity

Closeness = Quality | Similarity  # to the base
HOLD_Q4_0_GRID = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1"})


# --- what was measured, and what may be compared ------------------------------------------------------------------


def base_sha256(manifest: Manifest) -> str | None:
    """The base that the set was made from: the converter's output or what was given, else the bf16 row."""
    record = manifest.stages.get("convert")
    for name, digest in (record.outputs if record else {}).items():
        if name.startswith(".work/") and name.endswith("-bf16.gguf"):
            return digest
    return next((entry.sha256 for entry in manifest.files if entry.recipe == "bf16"), None)


def qualities(manifest: Manifest) -> dict[str, Quality]:
    """{file name: quality} of the models measured against the base of this set; older measurements do not count."""
    base, found = base_sha256(manifest), {}
    for entry in manifest.files:
        evidence = manifest.evidence.get(entry.sha256)
        quality = evidence.quality if evidence is not None and entry.kind == "model" else None
        if quality is not None and base in (None, quality.base_sha256):
            found[entry.name] = quality
    return found


def failures(manifest: Manifest) -> dict[str, str]:
    """{file name: why} of the models that gave no finite figures, whatever they were compared with."""
    found: dict[str, str] = {}
    for entry in manifest.files:
        evidence = manifest.evidence.get(entry.sha256)
        if entry.kind == "model" and evidence is not None and evidence.failed is not None:
            found[entry.name] = evidence.failed.why
    return found


def closeness(manifest: Manifest) -> dict[str, Closeness]:
    """{file name: how close it is to the base}, by logits or, of a model that gives them, by embeddings."""
    if manifest.model.embedding is None:
        return {**qualities(manifest)}
    base, found = base_sha256(manifest), {}
    for entry in manifest.files:
        evidence = manifest.evidence.get(entry.sha256)
        similarity = evidence.similarity if evidence is not None and entry.kind == "model" else None
        if similarity is not None and base in (None, similarity.base_sha256):
            found[entry.name] = similarity
    return {**found}


def distance(close: Closeness) -> Measured:
    """How far a file is from the base: mean KL divergence in nats, or 1 - mean cosine similarity."""
    if isinstance(close, Quality):
        return close.kld
    return Measured(value=max(0.0, 1 - close.cosine.value), se=close.cosine.se)


def comparable(one: Closeness, other: Closeness) -> bool:
    """Whether both were measured on the same tokens, or lines, in the same way."""
    facts = ("mode", "chunk_size", "n_chunks") if isinstance(one, Quality) else ("n_lines",)
    return type(one) is type(other) and all(
        getattr(one, fact) == getattr(other, fact) for fact in ("base_sha256", "text_sha256", *facts)
    )


def difference(one: Measured, other: Measured) -> Measured:
    """one - other, with the standard error of independent measurements."""
    se = None if one.se is None or other.se is None else math.hypot(one.se, other.se)
    return Measured(value=one.value - other.value, se=se)


# --- the gate -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Why one file is held back: it gave no figures (`why`), or it is `far` from the base, beyond a bound.

    `than` is the smaller file it is measured by, `than_far` how far that one is; None where the bound holds for every
    file. Distances and `bound` are in nats of KL divergence, or 1 - cosine of `embeddings`.
    """

    entry: FileEntry
    why: str | None = None
    far: Measured | None = None
    embeddings: bool = False
    bound: float | None = None
    than: FileEntry | None = None
    than_far: Measured | None = None

    def __str__(self) -> str:
        if self.far is None:
            return f"gives no finite figures: {self.why}"
        far = f"1 - cosine of {_shown(self.far)}" if self.embeddings else f"KLD {_shown(self.far)} nats"
        if self.than is None or self.than_far is None:
            return f"{far} is above the bound of {self.bound:g}"
        return (
            f"{far} is above {self.bound:.4g}, the bound by {self.than.name}, which is smaller "
            f"({_shown(self.than_far)})"
        )


def _shown(measured: Measured) -> str:
    return f"{measured.value:.4g} ± {measured.se:.1g}" if measured.se is not None else f"{measured.value:.4g} ± ?"


def verdicts(manifest: Manifest) -> dict[str, Verdict]:
    """{file name: verdict} of the files that are held back, in the order of the manifest; the rest is fine.

    A file that was not measured is not judged: a set says elsewhere that it is not complete.
    """
    bounds, found = manifest.gates, closeness(manifest)
    failed = failures(manifest)
    judged: dict[str, Verdict] = {}
    for entry in manifest.files:
        if entry.name in failed:
            judged[entry.name] = Verdict(entry, why=failed[entry.name])
        elif entry.name in found and not manifest.model.base_is_dequantised:
            verdict = _too_far(entry, manifest, found, bounds)
            if verdict is not None:
                judged[entry.name] = verdict
    return judged


def _too_far(entry: FileEntry, manifest: Manifest, found: Mapping[str, Closeness], bounds: GateFacts) -> Verdict | None:
    mine = found[entry.name]
    far = distance(mine)
    verdict = Verdict(entry, far=far, embeddings=isinstance(mine, Similarity))
    base = manifest.evidence.get(mine.base_sha256)
    of_base = base and (base.quality or base.similarity)
    noise = distance(of_base).value if of_base else 0.0
    if isinstance(mine, Quality) and far.value > bounds.max_kld:
        return replace(verdict, bound=bounds.max_kld)
    measures = [
        other
        for other in manifest.files
        if other.n_bytes < entry.n_bytes
        and other.sha256 != mine.base_sha256  # a quant of small blocks can be larger than its base
        and (theirs := found.get(other.name)) is not None
        and comparable(mine, theirs)
        and not (manifest.model.qat and other.recipe in HOLD_Q4_0_GRID)
        and _exceeds(far, distance(theirs), bounds, noise)
    ]
    if not measures:
        return None
    than = min(measures, key=lambda other: distance(found[other.name]).value)
    than_far = distance(found[than.name])
    bound = bounds.max_kld_ratio * max(than_far.value, noise)
    return replace(verdict, bound=bound, than=than, than_far=than_far)


def _exceeds(mine: Measured, theirs: Measured, bounds: GateFacts, noise: float) -> bool:
    """mine > ratio * theirs, by more than the given number of standard errors of that difference.

    The error is that of independent measurements; both are made on the same tokens, so it is an upper bound. `noise`
    is what the base has against itself: below it no divergence means anything.
    """
    if mine.se is None or theirs.se is None:
        return False
    over = mine.value - bounds.max_kld_ratio * max(theirs.value, noise)
    return over > bounds.errors * math.hypot(mine.se, bounds.max_kld_ratio * theirs.se)


def refusals(manifest: Manifest) -> list[str]:
    """Why this set must not be published, one line per file; empty when nothing is held back."""
    return [f"{name}: {verdict}" for name, verdict in verdicts(manifest).items()]


def recorded(manifest: Manifest) -> Manifest:
    """The manifest with what the gate holds back now."""
    held = {name: str(verdict) for name, verdict in verdicts(manifest).items()}
    if held == manifest.gates.held:
        return manifest
    return manifest.model_copy(update={"gates": manifest.gates.model_copy(update={"held": held})})


@dataclass(frozen=True)
class Bounds:
    """The bounds that were asked for now; None keeps what the set records, at first the defaults."""

    max_kld: float | None = None
    max_kld_ratio: float | None = None
    errors: float | None = None

    def chosen(self, old: GateFacts) -> GateFacts:
        """The bounds of now over the recorded ones."""
        given: dict[str, Any] = {name: value for name, value in vars(self).items() if value is not None}
        return old.model_copy(update=given)


AS_RECORDED = Bounds()
