"""Manifest -> model card. A pure function of `quantset.json`: no network, no look at the files.

Consumes a `Manifest`, produces the text of README.md: front matter through huggingface_hub's `ModelCardData`, body
from the Jinja templates of a theme, one partial per section. Undefined names are errors, not blanks. Everything that
comes from a model's own card is quoted by the YAML writer or escaped for Markdown on its way.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from gemma_gguf import recipes
from gemma_gguf.manifest import FileEntry, Manifest
from gemma_gguf.resources import TEMPLATES

THEME = "modern"
# Keys of the original card that mean the same on a card of quants.
CARRIED_KEYS = (
    "license_name",
    "license_link",
    "language",
    "datasets",
    "pipeline_tag",
    "extra_gated_heading",
    "extra_gated_prompt",
    "extra_gated_button_content",
)


@dataclass(frozen=True)
class Row:
    """One row of the download table."""

    name: str
    quant: str
    size: str  # decimal GB
    n_bytes: int
    bpw: str
    about: str
    split: bool


def gigabytes(n_bytes: int) -> str:
    """Decimal GB with two digits, as the Hub and the reference cards show sizes: `0.24GB`; MB below 10 MB."""
    return f"{n_bytes / 1e9:.2f}GB" if n_bytes >= 10_000_000 else f"{n_bytes / 1e6:.2f}MB"


def table_rows(manifest: Manifest) -> list[Row]:
    """mmproj first, then the models, each largest first; files of one size stay in the recipes' order."""
    order = {name: index for index, name in enumerate(recipes.TABLE)}

    def place(entry: FileEntry) -> tuple[int, int, int]:
        return (entry.kind != "mmproj", -entry.n_bytes, order.get(entry.recipe or "", len(order)))

    shown = [entry for entry in manifest.files if entry.kind != "imatrix"]
    return [_row(entry, manifest) for entry in sorted(shown, key=place)]


def _row(entry: FileEntry, manifest: Manifest) -> Row:
    outtype = entry.name.removesuffix(".gguf").rpartition("-")[2]
    senses = [word for word, has in (("vision", manifest.model.vision), ("audio", manifest.model.audio)) if has]
    kind = " and ".join(senses).capitalize()
    about = entry.about or f"{kind} projector in {outtype}; needed beside any file below"
    if entry.parent is not None and not entry.differs:
        about = f"Same tensors as {entry.parent}: in this model embedding and output have Q8_0 there already"
    elif entry.fallbacks:
        n = sum(entry.fallbacks.values())
        of_256 = all("_K" in pair.partition(" ")[0] or pair.startswith("IQ") for pair in entry.fallbacks)
        why = "are not divisible by 256" if of_256 else "do not allow the usual one"
        tensors = "1 tensor" if n == 1 else f"{n} tensors"
        about += f"; {tensors} in another type because {'its' if n == 1 else 'their'} columns {why}"
    return Row(
        name=entry.name,
        quant=entry.recipe or f"mmproj {outtype}",
        size=gigabytes(entry.n_bytes),
        n_bytes=entry.n_bytes,
        bpw=f"{entry.bpw:.2f}" if entry.bpw is not None else "",
        about=about,
        split="/" in entry.name,
    )


def front_matter(manifest: Manifest) -> ModelCardData:
    """Keys the Hub reads. The licence and the gating fields are the original card's, never a constant."""
    model = manifest.model
    original = model.front_matter
    carried = {key: original[key] for key in CARRIED_KEYS if key in original}
    listed = original.get("tags")
    listed = [listed] if isinstance(listed, str) else listed if isinstance(listed, list) else []
    tags = [tag for tag in listed if isinstance(tag, str)]
    # Front matter must stay what it is after a round trip, so values the Hub does not know are left out, not blanked.
    return ModelCardData(
        base_model=model.repo,
        base_model_relation="quantized" if model.repo else None,
        license=model.license,
        tags=list(dict.fromkeys([*tags, "gguf", "imatrix"] if manifest.imatrix else [*tags, "gguf"])),
        quantized_by="gemma-gguf",
        **carried,
    )


def _escape(text: object) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    flat = " ".join(str(text).split())
    for character in "\\`*{}[]#|~":
        flat = flat.replace(character, f"\\{character}")
    flat = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", flat)  # inside a word it emphasises nothing
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(text: object) -> str:
    """Text inside a Markdown code span, also in a table cell: no backtick, no bar, one line."""
    return " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")


def context(manifest: Manifest) -> dict[str, Any]:
    """Everything the templates may name."""
    build = manifest.llama_cpp
    large = [entry for entry in manifest.files if entry.parent is not None]
    return {
        "manifest": manifest,
        "model": manifest.model,
        "build": build,
        "build_name": f"b{build.build_number}" if build.build_number else build.version,
        "imatrix_file": next((e.name for e in manifest.files if e.kind == "imatrix"), None),
        "rows": table_rows(manifest),
        "has_mmproj": any(entry.kind == "mmproj" for entry in manifest.files),
        "large": large,
        "large_equal": [entry for entry in large if not entry.differs],
        "repacked": [e for e in manifest.files if e.recipe in {"Q4_0", "IQ4_NL"}],
    }


def render(manifest: Manifest, templates: Path | None = None) -> str:
    """The whole README.md. `templates` is a directory whose files override the theme's, partial by partial."""
    theme = TEMPLATES / THEME
    loader = jinja2.FileSystemLoader([*([templates] if templates else []), theme])
    environment = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML; foreign text goes through the `md` filter
    )
    environment.filters["md"] = _escape
    environment.filters["code"] = _code
    environment.filters["gb"] = gigabytes
    body = environment.get_template("README.md.j2").render(context(manifest))
    return f"---\n{front_matter(manifest).to_yaml()}\n---\n{body}"
