"""Manifest -> model card. A pure function of `quantset.json`: no network, no look at the files.

Consumes a `Manifest`, produces the text of README.md and of its translations: front matter through huggingface_hub's
`ModelCardData`, body from the Jinja templates of a theme, one partial per section. What both themes share lies in
`sections/`; a theme's directory overrides it, and a maintainer's own directory overrides both, file by file.
Undefined names are errors, not blanks. Everything that comes from a model's own card is quoted by the YAML writer or
escaped for Markdown on its way, in every language. Messages are English in the templates; the catalogues that
translate them are gettext's (`make messages` keeps them up to date).
"""

import gettext
import json
import re
import shlex
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from gemma_gguf import embedding, gates, gemma, memory, names, pictures, prompts, qat, recipes, shards, table
from gemma_gguf.errors import BadInputError
from gemma_gguf.manifest import BuildFacts, Manifest, Similarity, argument
from gemma_gguf.resources import TEMPLATES
from gemma_gguf.table import gigabytes

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

THEMES = ("modern", "classic")
# Language tag -> its own name; README.md is English. A new language is a row here and a catalogue.
LANGUAGES: Mapping[str, str] = {"en": "English", "ja": "日本語", "zh-Hant": "繁體中文"}
_NO_SPACE = frozenset({"ja", "zh-Hant"})  # sentences follow each other without one
# Keys of the original card that mean the same on a card of quants; everything about gating comes along, too.
# `licence` and `model_name` are what TRL writes into the cards of models it trained.
CARRIED_KEYS = (
    "license_name",
    "license_link",
    "licence",
    "language",
    "datasets",
    "metrics",
    "model_name",
    "pipeline_tag",
)
GATING = "extra_gated_"


@dataclass(frozen=True)
class Language:
    """One rendering of a card. `current` is the one that is being read."""

    tag: str
    name: str
    file: str
    current: bool


def card_files(languages: tuple[str, ...]) -> dict[str, str]:
    """{language tag: file name}, English first: README.md is always there and always English.

    Raises `BadInputError` for a language without a catalogue.
    """
    for tag in languages:
        if tag not in LANGUAGES:
            raise BadInputError(f"there is no card in {tag!r}", next_step=f"Choose from: {', '.join(LANGUAGES)}.")
    ordered = ["en", *(tag for tag in LANGUAGES if tag != "en" and tag in languages)]
    return {tag: "README.md" if tag == "en" else f"README.{tag}.md" for tag in ordered}


# --- front matter ------------------------------------------------------------------------------------------------


def front_matter(manifest: Manifest) -> "ModelCardData":
    """Keys the Hub reads. The licence and the gating fields are the original card's, never a constant."""
    from huggingface_hub import ModelCardData  # noqa: PLC0415 - slow to import, and `card --help` needs none

    model = manifest.model
    original = model.front_matter
    carried = {key: original[key] for key in original if key in CARRIED_KEYS or str(key).startswith(GATING)}
    carried.setdefault("pipeline_tag", _pipeline_tag(manifest))
    listed = original.get("tags")
    listed = [listed] if isinstance(listed, str) else listed if isinstance(listed, list) else []
    # The Hub makes tags of base models itself, out of `base_model`: the original's would name another one.
    tags = [tag for tag in listed if isinstance(tag, str) and not tag.startswith("base_model:")]
    # Front matter must stay what it is after a round trip, so values the Hub does not know are left out, not blanked.
    return ModelCardData(
        base_model=model.repo,
        base_model_relation="quantized" if model.repo else None,
        license=model.license,
        tags=list(dict.fromkeys([*tags, "gguf", "imatrix"] if manifest.imatrix else [*tags, "gguf"])),
        quantized_by=manifest.card.quantized_by,
        **carried,
    )


def made_from(manifest: Manifest) -> list[str]:
    """Hub ids of what the original card says its model was made from: a fine-tune's base, a merge's parts.

    The front matter of a set names the model that was quantised, never these.
    """
    said = manifest.model.front_matter.get("base_model")
    listed = [said] if isinstance(said, str) else said if isinstance(said, list) else []
    ids = [name for name in listed if isinstance(name, str) and re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name)]
    return [name for name in dict.fromkeys(ids) if name != manifest.model.repo]


def _pipeline_tag(manifest: Manifest) -> str:
    """What the Hub calls the task, where the original card leaves it to the Hub to find out."""
    model = manifest.model
    if model.gguf_arch in gemma.WITHOUT_LOGITS:
        return "sentence-similarity"
    if model.audio:
        return "any-to-any"
    return "image-text-to-text" if model.vision else "text-generation"


# --- escaping ----------------------------------------------------------------------------------------------------


def _escape(text: object) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    # A no-break space keeps a number and its error together, so only what breaks lines is made a space.
    flat = re.sub(r"[^\S\u00a0]+", " ", str(text)).strip(" ")
    for character in "\\`*{}[]#|~":
        flat = flat.replace(character, f"\\{character}")
    flat = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", flat)  # inside a word it emphasises nothing
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(text: object) -> str:
    """Text inside a Markdown code span, also in a table cell: no backtick, no bar, one line."""
    return _fenced(text).replace("|", "\\|")


def _fenced(text: object) -> str:
    """Text on one line of a fenced code block: no backtick ends the block."""
    return " ".join(str(text).split()).replace("`", "'")


def _kept(text: object) -> str:
    """Text inside a code span whose spaces count: a prompt ends in one."""
    return re.sub(r"[^\S ]", " ", str(text)).replace("`", "'")


def _quoted(text: object) -> str:
    """A string as JSON and Python write it, also inside single quotes of a shell and in a fenced block."""
    return json.dumps(str(text), ensure_ascii=False).replace("'", "\\u0027").replace("`", "\\u0060")


def _wide(heading: object) -> str:
    """A heading that keeps its column as wide as some words: invisible spaces around it, and no line break inside.

    A reader's program gives the last column what the others leave, which can be one word or one ideograph. A space is
    half as wide as a letter, an ideograph as wide as two; a page of 980 pixels has room for 18 letters.
    Word joiners keep the spaces from being trimmed off the cell, and ideographs, between which a line may break,
    together.
    """
    joiner, text = "\u2060", str(heading)
    letters = sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
    spaces = "\u00a0" * max(1, 18 - letters)
    return f"{joiner}{spaces}{text if text.isascii() else joiner.join(text)}{spaces}{joiner}"


# --- what the templates may name ---------------------------------------------------------------------------------


def sampling_settings(manifest: Manifest) -> tuple[dict[str, str], str]:
    """({setting: value}, the same as arguments of llama-server) that the checkpoint recommends; empty if none."""
    sampling = manifest.model.sampling
    if sampling is None:
        return {}, ""
    if sampling.do_sample is False:
        return {"do_sample": "false"}, " --temp 0"
    flags = {
        "temperature": "--temp",
        "top_k": "--top-k",
        "top_p": "--top-p",
        "min_p": "--min-p",
        "repetition_penalty": "--repeat-penalty",
    }
    stated = {name: f"{value:g}" for name in flags if (value := getattr(sampling, name)) is not None}
    return stated, "".join(f" {flags[name]} {value}" for name, value in stated.items())


def python_sampling(manifest: Manifest) -> str:
    """The same as keyword arguments of llama-cpp-python's calls: `, temperature=1, top_k=64`."""
    stated, _ = sampling_settings(manifest)
    if "do_sample" in stated:
        return ", temperature=0"
    names = {"repetition_penalty": "repeat_penalty"}
    return "".join(f", {names.get(name, name)}={value}" for name, value in stated.items())


def reproduce_command(manifest: Manifest) -> str:
    """The command that makes this set again, from what its files and stages record."""
    model, imatrix = manifest.model, manifest.stages.get("imatrix")
    argv = ["gemma-gguf", "run"]
    if model.origin == "demo":
        argv.append("demo")
    elif model.origin == "hub":
        argv.append(f"{model.repo}@{model.revision}" if model.revision else str(model.repo))
    else:
        argv += [f"./{model.model}", *(["--name", model.repo] if model.repo else [])]
    argv += [*_naming(manifest), "--llama-cpp", manifest.llama_cpp.source, *_form(manifest)]
    if manifest.llama_cpp.backend != "cpu":
        argv += ["--backend", manifest.llama_cpp.backend]
    made = {entry.recipe for entry in manifest.files if entry.kind == "model"} | set(manifest.recipes)
    if made and made != set(recipes.DEFAULT_NAMES):
        order = [*recipes.TABLE, *sorted(name for name in made if name and name not in recipes.TABLE)]
        argv += ["--recipes", ",".join(name for name in order if name in made)]
    convert = manifest.stages.get("convert")
    if convert is not None and not convert.argv:
        argv += ["--base", f"{manifest.stem}-bf16.gguf"]
    if manifest.parity is not None and (manifest.parity.differences or manifest.parity.problem):
        argv.append("--allow-mismatch")
    if imatrix is not None and not imatrix.argv:
        argv += ["--imatrix", f"{manifest.stem}-imatrix.gguf"]
    argv += _decisions(manifest)
    if imatrix is not None and imatrix.argv and manifest.calibration is not None:
        if manifest.calibration.name != "default":
            argv += ["--calibration", manifest.calibration.name]
        argv += _after(imatrix.argv[0], "--chunks", "--chunks") + _after(imatrix.argv[0], "-ngl", "--gpu-layers")
    return shlex.join(argv)


def _naming(manifest: Manifest) -> list[str]:
    """What else it takes to have the files of this set begin with its stem."""
    model, stem = manifest.model, manifest.stem
    if stem == names.strip(model.model):
        return ["--naming", "model"]
    if model.origin != "hub" or stem == names.stem(model.org, model.model):
        return []
    called = stem.replace("_", "/", 1)
    return ["--name", called] if "/" in called else ["--name", f"{model.org}/{called}", "--naming", "model"]


def _form(manifest: Manifest) -> list[str]:
    """What the set leaves out, and how large a file of it can be."""
    argv = ["--no-mmproj"] if manifest.model.left_out else []
    if manifest.split_max_size != shards.DEFAULT_LIMIT:
        argv += ["--split-max-size", f"{manifest.split_max_size // shards.MEGABYTE}MB"]
    return argv


def _decisions(manifest: Manifest) -> list[str]:
    """What was decided about a QAT checkpoint, and about tensors without imatrix data."""
    argv: list[str] = []
    if manifest.qat is not None:
        argv += ["--qat"] if manifest.qat.said_by == "--qat" else []
        argv += ["--qat-embedding", manifest.qat.embedding] if manifest.qat.embedding != qat.EMBEDDINGS[0] else []
    elif qat.is_said(manifest.model.model, manifest.model.front_matter):
        argv.append("--no-qat")
    kinds = sorted({kind for tensors in manifest.pins.values() for kind in tensors.values()})
    return [*argv, "--pin-uncovered", kinds[-1]] if kinds else argv


def custom_recipes(manifest: Manifest) -> str:
    """The set's recipes that are no rows of ours, as the lines of `gemma-gguf.toml` that define them."""
    own = {recipe.name: (recipe.ftype, recipe.flags, recipe.about) for recipe in manifest.custom_recipes}
    for entry in manifest.files:
        adapted = entry.static or entry.recipe in manifest.pins  # its flags are not the user's own alone
        if entry.flags and entry.recipe and entry.recipe not in recipes.TABLE and not adapted:
            own[entry.recipe] = (str(entry.ftype), entry.flags, entry.about or "")
    lines: list[str] = []
    for name, (ftype, flags, about) in own.items():
        pairs = list(zip(flags[::2], flags[1::2], strict=True))
        tensors = [value for option, value in pairs if option == "--tensor-type"]
        others = {option.removeprefix("--").replace("-", "_"): value for option, value in pairs}
        others.pop("tensor_type", None)
        told = {"name": name, "ftype": ftype, **({"tensor_types": tensors} if tensors else {}), **others}
        # TOML's basic strings and arrays of them are written like JSON's.
        lines += ["", "[[custom_recipes]]"]
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in {**told, "about": about}.items()]
    return "\n".join(lines[1:])


def _after(argv: list[str], option: str, ours: str) -> list[str]:
    """[ours, value] when a tool was called with `option value`, but for the value 0."""
    value = argument(argv, option)
    return [ours, value] if value not in (None, "0") else []


@dataclass(frozen=True)
class Refreshed:
    """What the last comparison with a llama.cpp build says to a reader; lists are names of files."""

    build_name: str
    commit: str
    is_applied: bool
    unchanged: list[str]
    keys: list[str]
    remake: list[str]
    unknown: list[str]
    key_names: str

    @property
    def stale(self) -> list[str]:
        """Files that another build would write otherwise, and that are still as they were."""
        return [] if self.is_applied else [*self.keys, *self.remake]


def _refreshed(manifest: Manifest) -> Refreshed | None:
    """None when there was no comparison, or none of these very files."""
    done = manifest.refresh
    if done is None:
        return None
    current = {
        entry.name: done.files[entry.name]
        for entry in manifest.files
        if entry.name in done.files and done.files[entry.name].sha256 == entry.sha256
    }
    if not current:
        return None
    names = {
        outcome: [name for name, found in current.items() if found.outcome == outcome]
        for outcome in ("unchanged", "keys", "remake", "unknown")
    }
    changed = dict.fromkeys(key for found in current.values() for key in found.keys)
    return Refreshed(
        build_name=_build_name(done.build),
        commit=done.build.commit,
        is_applied=done.state == "applied",
        key_names=", ".join(f"`{_code(key)}`" for key in changed),
        **names,
    )


def _build_name(build: BuildFacts) -> str:
    return f"b{build.build_number}" if build.build_number else build.version


def context(manifest: Manifest, language: str = "en", words: gettext.NullTranslations | None = None) -> dict[str, Any]:
    """Everything the templates may name; `words` translates what is said in rows."""
    words = words or gettext.NullTranslations()
    build, picked = manifest.llama_cpp, table.pick(manifest)
    close = gates.closeness(manifest)
    quality, likes = gates.qualities(manifest), [q for q in close.values() if isinstance(q, Similarity)]
    setups = {(q.text, q.text_sha256, q.mode, q.chunk_size, q.n_chunks, q.n_tokens): q for q in quality.values()}
    lines = {(q.text, q.text_sha256, q.n_lines): q for q in likes}
    large = [entry for entry in table.in_order(manifest) if entry.parent is not None]
    sampling, sampling_flags = sampling_settings(manifest)
    models = [entry for entry in manifest.files if entry.kind == "model"]
    return {
        "manifest": manifest,
        "model": manifest.model,
        "made_from": made_from(manifest),
        "build": build,
        "build_name": _build_name(build),
        "languages": [
            Language(tag, LANGUAGES[tag], file, tag == language)
            for tag, file in card_files(tuple(manifest.card.languages)).items()
        ],
        "repo": manifest.card.repo or f"YOUR_NAMESPACE/{manifest.stem}-GGUF",
        "is_published": manifest.card.repo is not None,
        "is_embedding": manifest.model.embedding is not None,
        "said": _embedding_prompts(manifest),
        # A text that is read in both directions must be in one batch, whole.
        "n_batch": manifest.context.n_ctx_train if manifest.context else 2048,
        "sampling": sampling,
        "sampling_flags": sampling_flags,
        "python_sampling": python_sampling(manifest),
        "imatrix_file": next((e for e in manifest.files if e.kind == "imatrix"), None),
        "rows": table.download_rows(manifest, words, "" if language in _NO_SPACE else " "),
        "is_partial": table.is_partial(manifest),
        "n_made": len(models),
        "n_measured": len(close),
        "n_asked": len(set(manifest.recipes) | {entry.recipe for entry in models}),
        "refreshed": _refreshed(manifest),
        "older": [entry for entry in manifest.files if not manifest.is_of_build(entry, build.key)],
        "setups": list(setups.values()),
        "line_setups": list(lines.values()),
        "pick": picked,
        "static": manifest.qat is not None and any(entry.recipe == "Q4_0" for entry in models),
        "grid": _grid(manifest),
        "pins": [
            (recipe, ", ".join(sorted(set(tensors.values()))), sorted(tensors))
            for recipe, tensors in manifest.pins.items()
            if any(entry.recipe == recipe for entry in models)
        ],
        "unseen_experts": _unseen_experts(manifest),
        "held": sorted(gates.verdicts(manifest)),
        "is_beaten_pick": picked is not None and table.beaten_by(picked, manifest) is not None,
        "links": {entry.name: table.name_and_link(entry, manifest)[1] for entry in manifest.files},
        "splits": [entry for entry in models if entry.shards],
        "mmproj": table.projector(manifest),
        "large": large,
        "large_equal": [entry for entry in large if not entry.differs],
        "large_rows": table.large_rows(manifest),
        "repacked": [e for e in manifest.files if e.recipe in {"Q4_0", "IQ4_NL"}],
        "speeds": table.speed_tables(manifest),
        "reproduce": reproduce_command(manifest),
        "custom_recipes": custom_recipes(manifest),
        "choices": memory.choices(manifest),
        "prompt_kinds": [example.kind for example in manifest.prompts.examples] if manifest.prompts else [],
        "pictures": {name: pictures.alt_text(name, data, words) for name, data in pictures.shown(manifest).items()},
        "undrawn": sorted(set(pictures.all_data(manifest)) - set(pictures.shown(manifest))),
    }


def _embedding_prompts(manifest: Manifest) -> dict[str, str]:
    """{name: prompt} of a model that gives embeddings, those for queries and documents first."""
    facts = manifest.model.embedding
    prompts = facts.prompts if facts is not None else {}
    first = [name for name in (embedding.QUERY, embedding.DOCUMENT) if name in prompts]
    return {name: prompts[name] for name in (*first, *sorted(set(prompts) - set(first))) if prompts[name]}


def _grid(manifest: Manifest) -> dict[str, str] | None:
    """How the weights of a QAT checkpoint lie on the grid of Q4_0, over all kinds; None where it was not measured."""
    facts = manifest.qat
    if facts is None or facts.verdict is None:
        return None
    figures = {"best": "residual", "ggml": "residual_ggml", "none": "residual_none"}
    shares = {name: f"{qat.overall(facts.grid, name):.1%}" for name in ("fits", "fits_ggml")}
    changes = {name: f"{qat.overall(facts.grid, figure):.2%}" for name, figure in figures.items()}
    return {"verdict": facts.verdict, **shares, **changes}


def _unseen_experts(manifest: Manifest) -> tuple[int, int] | None:
    """(experts that no calibration token reached, all experts), counted by layer and kind; None when all were."""
    rows = [row for row in manifest.imatrix.coverage if row.n_experts > 1] if manifest.imatrix else []
    unseen = sum(sum(row.unseen) for row in rows)
    return (unseen, sum(row.n_experts * len(row.layers) for row in rows)) if unseen else None


# --- rendering ---------------------------------------------------------------------------------------------------


def translations(language: str) -> gettext.NullTranslations:
    """The catalogue of a language; English needs none."""
    if language == "en":
        return gettext.NullTranslations()
    return gettext.translation("card", TEMPLATES / "locale", [language.replace("-", "_")])


class Renderer:
    """A theme's templates, compiled once: cards of many sets are rendered with one of these.

    `templates` is a directory whose files override the theme's, partial by partial.
    """

    def __init__(self, templates: Path | None = None) -> None:
        self._templates = templates
        self._environments: dict[tuple[str, str], jinja2.Environment] = {}
        self._words: dict[str, gettext.NullTranslations] = {}

    def render(self, manifest: Manifest, language: str = "en") -> str:
        """The whole README.md in one language.

        Raises `BadInputError` when a template names what does not exist, or a fact that a card needs is not recorded.
        """
        words = self._words.setdefault(language, translations(language))
        place = (manifest.card.theme, language)
        if place not in self._environments:
            self._environments[place] = self._environment(manifest.card.theme, words)
        try:
            body = self._environments[place].get_template("README.md.j2").render(context(manifest, language, words))
        except jinja2.TemplateError as error:
            raise BadInputError(
                f"the card of {manifest.stem} cannot be rendered: {_place(error)}{error}",
                next_step="Correct the template; the names it may use are those of card.context.",
            ) from error
        return f"---\n{front_matter(manifest).to_yaml()}\n---\n{body}"

    def _environment(self, theme: str, words: gettext.NullTranslations) -> jinja2.Environment:
        own = [self._templates] if self._templates else []
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader([*own, TEMPLATES / theme, TEMPLATES / "sections"]),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            autoescape=False,  # Markdown, not HTML; foreign text goes through the `md` filter
            extensions=["jinja2.ext.i18n"],
        )
        environment.policies["ext.i18n.trimmed"] = True
        environment.install_gettext_translations(words, newstyle=True)  # type: ignore[attr-defined]
        environment.filters["md"] = _escape
        environment.filters["code"] = _code
        environment.filters["fenced"] = _fenced
        environment.filters["gb"] = gigabytes
        environment.filters["wide"] = _wide
        environment.filters["kept"] = _kept
        environment.filters["quoted"] = _quoted
        environment.filters["block"] = prompts.block
        environment.filters["tokens"] = memory.short_tokens
        return environment


def _place(error: jinja2.TemplateError) -> str:
    """Where in which template, as far as Jinja's traceback knows: `title.md.j2, line 3: `."""
    place, trace = "", error.__traceback__
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.suffix == ".j2":
            place = f"{file.name}, line {trace.tb_lineno}: "
        trace = trace.tb_next
    return place


def render(manifest: Manifest, templates: Path | None = None, language: str = "en") -> str:
    """The whole README.md of one set, or its translation; see `Renderer`."""
    return Renderer(templates).render(manifest, language)
