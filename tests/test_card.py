"""The card is a pure function of the manifest: front matter the Hub can read, a right table, no way to break out.

Bodies are judged by what a Markdown reader makes of them (markdown-it, which rich brings), not by their source.
"""

import copy
import functools
import html
import itertools
import json
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from gemma_gguf import card, manifest, recipes
from gemma_gguf.errors import BadInputError
from gemma_gguf.manifest import CustomRecipe, EmbeddingFacts, FileEntry, Manifest, Sampling, Shard
from tests.examples import COMMIT, FRONT_MATTER, IMATRIX, STEM, evidence, example, model_entry, sha

# --- helpers -------------------------------------------------------------------------------------------------------


def _with_model(**changes: Any) -> Manifest:
    """The example with other facts of the model."""
    made = example()
    return made.model_copy(update={"model": made.model.model_copy(update=changes)})


def _with_front_matter(**changes: Any) -> Manifest:
    return _with_model(front_matter={**FRONT_MATTER, **changes})


def _with_files(*files: FileEntry) -> Manifest:
    """The example with these files alone, and nothing else asked for."""
    asked = [entry.recipe for entry in files if entry.recipe is not None]
    return example().model_copy(update={"files": list(files), "recipes": asked})


def _chosen(made: Manifest, **choices: Any) -> Manifest:
    """The same set with other choices for its card."""
    return made.model_copy(update={"card": made.card.model_copy(update=choices)})


def _entry(which: str | None, **changes: Any) -> FileEntry:
    """The example's file of that recipe (None: the projector), changed."""
    entry = next(e for e in example().files if e.recipe == which and e.kind != "imatrix")
    return entry.model_copy(update=changes)


def _without_imatrix() -> Manifest:
    made = example()
    files = [entry for entry in made.files if entry.kind != "imatrix"]
    stages = {"convert": made.stages["convert"]}
    return made.model_copy(update={"imatrix": None, "calibration": None, "files": files, "stages": stages})


def _data(text: str) -> dict[str, Any]:
    """The front matter as huggingface_hub reads it."""
    data = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    assert isinstance(data, dict)
    return data


@functools.cache
def _example_data() -> dict[str, Any]:
    return _data(RENDERER.render(example()))


RENDERER = card.Renderer()  # templates compiled once for all tests


def _body(made: Manifest, templates: Path | None = None, theme: str = "modern", language: str = "en") -> str:
    """A page without its front matter."""
    chosen = _chosen(made, theme=theme)
    text = card.render(chosen, templates, language) if templates else RENDERER.render(chosen, language)
    return text.partition("\n---\n")[2]


EVERY_PAGE = [pytest.param(theme, tag, id=f"{theme}-{tag}") for theme in card.THEMES for tag in card.LANGUAGES]
every_page = pytest.mark.parametrize(("theme", "language"), EVERY_PAGE)
every_theme = pytest.mark.parametrize("theme", card.THEMES)


class _Page(HTMLParser):
    """What a reader sees: the tags in order, where links lead, and the text."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"href", "src"}]

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.tags.append(f"comment {data}")


# --- front matter --------------------------------------------------------------------------------------------------


def test_front_matter_is_what_the_hub_reads() -> None:
    assert _data(RENDERER.render(example())) == {
        "base_model": "google/gemma-3-4b-it",
        "base_model_relation": "quantized",
        "license": "gemma",
        "language": ["en"],
        "pipeline_tag": "image-text-to-text",
        "tags": ["gemma3", "conversational", "gguf", "imatrix"],
        "quantized_by": "gemma-gguf",
        "extra_gated_heading": FRONT_MATTER["extra_gated_heading"],
        "extra_gated_prompt": FRONT_MATTER["extra_gated_prompt"],
        "extra_gated_button_content": "Acknowledge license",
    }


def test_front_matter_stands_at_the_very_top() -> None:
    text = card.render(example())
    assert text.startswith("---\nbase_model: google/gemma-3-4b-it\n")
    assert text.count("\n---\n") == 1
    assert _body(example()).startswith("# google gemma-3-4b-it: GGUF quants with imatrix\n\n")
    assert _body(example(), theme="classic").startswith(
        "# llama.cpp imatrix quantizations of gemma-3-4b-it by google\n"
    )


def test_licence_details_are_carried() -> None:
    given = {"license_name": "gemma-terms", "license_link": "https://ai.google.dev/gemma/terms", "datasets": ["a/b"]}
    data = _data(RENDERER.render(_with_front_matter(**given)))
    assert {key: data[key] for key in given} == given


def test_keys_of_the_original_that_mean_something_else_here_are_left_out() -> None:
    given = {"model-index": [{"name": "x"}], "widget": [{"text": "hi"}], "inference": False, "base_model": "a/b"}
    data = _data(RENDERER.render(_with_front_matter(**given)))
    assert data["base_model"] == "google/gemma-3-4b-it"
    assert {"model-index", "widget", "inference", "library_name"}.isdisjoint(data)


def test_a_local_checkpoint_names_no_base_model() -> None:
    made = _with_model(origin="local", repo=None, revision=None)
    assert {"base_model", "base_model_relation"}.isdisjoint(_data(RENDERER.render(made)))
    for theme in card.THEMES:
        assert "Original model: a local checkpoint called gemma-3-4b-it" in _Page(_body(made, theme=theme)).text


def test_no_licence_is_not_made_up() -> None:
    made = _with_model(license=None, front_matter={})
    assert _data(RENDERER.render(made)) == {
        "base_model": "google/gemma-3-4b-it",
        "base_model_relation": "quantized",
        "pipeline_tag": "image-text-to-text",
        "tags": ["gguf", "imatrix"],
        "quantized_by": "gemma-gguf",
    }
    assert "Licence: not stated by the original card" in _Page(_body(made)).text


# What the original cards of two published sets say, and the front matter that bartowski's cards of them have.
CODER = {
    "base_model": "google/gemma-3-12b-it",
    "datasets": "open-r1/codeforces-cots",
    "library_name": "transformers",
    "model_name": "gemma-3-12b-it-codeforces-SFT",
    "tags": ["generated_from_trainer", "trl", "sft"],
    "licence": "license",
}
QAT = {
    "license": "gemma",
    "tags": ["gemma3", "gemma", "google"],
    "pipeline_tag": "image-text-to-text",
    "extra_gated_heading": "Access Gemma on Hugging Face",
    "extra_gated_prompt": "To access Gemma on Hugging Face, you’re required to review and agree to its license.",
    "extra_gated_button_content": "Acknowledge license",
    "base_model": "google/gemma-3-4b-it",
}


def test_front_matter_has_every_key_of_a_published_fine_tune() -> None:
    made = _with_model(
        org="burtenshaw",
        model="GemmaCoder3-12B",
        repo="burtenshaw/GemmaCoder3-12B",
        license=None,
        vision=False,
        front_matter=CODER,
    )
    data = _data(RENDERER.render(_chosen(made, quantized_by="bartowski")))
    assert data == {
        "quantized_by": "bartowski",
        "pipeline_tag": "text-generation",
        "base_model_relation": "quantized",
        "datasets": "open-r1/codeforces-cots",
        "licence": "license",
        "base_model": "burtenshaw/GemmaCoder3-12B",
        "tags": ["generated_from_trainer", "trl", "sft", "gguf", "imatrix"],
        "model_name": "gemma-3-12b-it-codeforces-SFT",
    }


def test_front_matter_has_every_key_of_a_published_qat_set() -> None:
    repo = "google/gemma-3-4b-it-qat-q4_0-unquantized"
    made = _with_model(model="gemma-3-4b-it-qat-q4_0-unquantized", repo=repo, qat=True, front_matter=QAT)
    data = _data(RENDERER.render(_chosen(made, quantized_by="bartowski")))
    assert data == {
        "quantized_by": "bartowski",
        "pipeline_tag": "image-text-to-text",
        "tags": ["gemma3", "gemma", "google", "gguf", "imatrix"],
        "license": "gemma",
        "extra_gated_button_content": "Acknowledge license",
        "extra_gated_heading": "Access Gemma on Hugging Face",
        "extra_gated_prompt": QAT["extra_gated_prompt"],
        "base_model": repo,
        "base_model_relation": "quantized",
    }


def test_everything_about_gating_is_carried() -> None:
    given = {"extra_gated_fields": {"Country": "country", "I agree": "checkbox"}, "extra_gated_eu_disallowed": True}
    data = _data(RENDERER.render(_with_front_matter(**given)))
    assert {key: data[key] for key in given} == given


@pytest.mark.parametrize(
    ("facts", "task"),
    [
        pytest.param({"vision": True}, "image-text-to-text", id="sees"),
        pytest.param({"vision": False}, "text-generation", id="text alone"),
        pytest.param({"vision": True, "audio": True}, "any-to-any", id="hears"),
        pytest.param({"vision": False, "gguf_arch": "gemma-embedding"}, "sentence-similarity", id="embeds"),
    ],
)
def test_a_task_that_the_original_card_leaves_to_the_hub_is_stated(facts: dict[str, Any], task: str) -> None:
    assert _data(RENDERER.render(_with_model(**facts, front_matter={})))["pipeline_tag"] == task
    stated = card.render(_with_model(**facts, front_matter={"pipeline_tag": "feature-extraction"}))
    assert _data(stated)["pipeline_tag"] == "feature-extraction"


@pytest.mark.parametrize("quantized_by", ["bartowski", "no", "a: b", "---", "Ü & <b>"])
def test_who_quantised_is_a_choice(quantized_by: str) -> None:
    assert _data(RENDERER.render(_chosen(example(), quantized_by=quantized_by)))["quantized_by"] == quantized_by


@every_page
def test_every_page_has_the_same_front_matter(theme: str, language: str) -> None:
    assert _data(RENDERER.render(_chosen(example(), theme=theme), language)) == _example_data()


@pytest.mark.parametrize(
    ("given", "tags"),
    [
        pytest.param(["gemma", "gguf", "a", "gemma"], ["gemma", "gguf", "a", "imatrix"], id="each once"),
        pytest.param(["a", 5, None, {"b": 1}, "c"], ["a", "c", "gguf", "imatrix"], id="only texts"),
        pytest.param([], ["gguf", "imatrix"], id="empty"),
        pytest.param(None, ["gguf", "imatrix"], id="null"),
        pytest.param(5, ["gguf", "imatrix"], id="a number"),
        pytest.param(True, ["gguf", "imatrix"], id="a truth value"),
    ],
)
def test_tags(given: object, tags: list[str]) -> None:
    assert _data(RENDERER.render(_with_front_matter(tags=given)))["tags"] == tags


def test_one_tag_without_a_list_is_not_taken_letter_by_letter() -> None:
    """`tags: gemma3` is easily written; it is one tag or none, never six."""
    tags = _data(RENDERER.render(_with_front_matter(tags="gemma3")))["tags"]
    assert tags in (["gemma3", "gguf", "imatrix"], ["gguf", "imatrix"])


HOSTILE_VALUES = [
    "no",
    "null",
    "~",
    "1.0",
    "0x10",
    "2025-03-12",
    "=",
    "a: b",
    "a #b",
    "- a",
    "---",
    "...",
    "a\n---\nb",
    "\n---\n",
    "a\r\n---\r\nb",
    "a\n\n# Heading\n\n\nb\n",
    "'",
    '"',
    'it\'s "so"',
    "{a: b}",
    "[a]",
    "*a",
    "&a",
    "!!python/object:os.system",
    "%YAML 1.1",
    "@a",
    "`a`",
    "|",
    ">",
    "? a",
    "\t",
    " a ",
    "a\\nb",
    "ü ▁ 😀",
    "\x85\u2028\u2029\ufeff",
    "\0\x07\x1b",
    "<script>alert(1)</script>",
    "{{ manifest }}{% raw %}",
    "x" * 500 + " " + "y" * 500,
]


@pytest.mark.parametrize("value", HOSTILE_VALUES, ids=ascii)
@pytest.mark.parametrize("key", ["license", "license_name", "extra_gated_prompt", "language", "tags", "base_model"])
def test_front_matter_parses_back_to_the_same_value(key: str, value: str) -> None:
    """Whatever the original card says, YAML quotes it: no value ends the block or becomes another type."""
    if key == "license":
        made = _with_model(license=value)
    elif key == "base_model":
        made = _with_model(repo=value)
    else:
        made = _with_front_matter(**{key: [value] if key in {"language", "tags"} else value})
    expected = {**_example_data(), key: value}
    if key == "language":
        expected[key] = [value]
    if key == "tags":
        expected[key] = [value, "gguf", "imatrix"]
    assert _data(RENDERER.render(made)) == expected


@pytest.mark.parametrize("value", [True, 5, 2.5, ["a", {"b": "---"}], {"a": ["no", "---"]}], ids=repr)
def test_front_matter_keeps_values_that_are_no_text(value: object) -> None:
    assert _data(RENDERER.render(_with_front_matter(extra_gated_prompt=value)))["extra_gated_prompt"] == value


# --- the download table --------------------------------------------------------------------------------------------


ABOUT = "Description"


def _cells(body: str, heading: str) -> list[list[str]]:
    """The cells of the first table whose header has this cell, header first, as a Markdown reader shows them."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)
    tables: list[list[list[str]]] = []
    for token, following in itertools.pairwise(tokens):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type in {"th_open", "td_open"}:
            shown = "".join(child.content for child in following.children or [])
            tables[-1][-1].append(html.unescape(shown).replace("\u00a0", " ").replace("\u2060", "").strip())
    return next(table for table in tables if heading in table[0])


def _column(body: str, heading: str) -> list[str]:
    header, *rows = _cells(body, heading)
    return [row[header.index(heading)] for row in rows]


@every_theme
def test_the_table_links_every_file_with_its_figures(theme: str) -> None:
    body = _body(example(), theme=theme)
    header, *rows = _cells(body, "Filename")
    assert header == [
        "Filename", "Quant", "Size", "Split", "bpw", "KLD ± se", "Same top", "PPL change", ABOUT,
    ]  # fmt: skip
    assert [row[:-1] for row in rows] == [
        [f"mmproj-{STEM}-f16.gguf", "f16", "0.85GB", "false", "–", "–", "–", "–"],
        [f"{STEM}-bf16.gguf", "bf16", "7.77GB", "false", "16.01", "0", "100.00 ± 0.30 %", "0 %"],
        [f"{STEM}-Q8_0.gguf", "Q8_0", "4.13GB", "false", "8.51", "0.002752 ± 0.000055", "99.72 ± 0.30 %",
         "+0.275 ± 0.028 %"],
        [f"{STEM}-Q4_K_L.gguf", "Q4_K_L", "2.67GB", "false", "5.49", "0.02218 ± 0.00044", "97.78 ± 0.30 %",
         "+2.22 ± 0.22 %"],
        [f"{STEM}-Q4_K_M.gguf", "Q4_K_M", "2.49GB", "false", "5.12", "0.02867 ± 0.00057", "97.13 ± 0.30 %",
         "+2.87 ± 0.29 %"],
        [f"{STEM}-Q4_0.gguf", "Q4_0", "2.36GB", "false", "4.86", "0.03435 ± 0.00069", "96.57 ± 0.30 %",
         "+3.43 ± 0.34 %"],
        [f"{STEM}-IQ2_XS.gguf", "IQ2_XS", "1.32GB", "false", "2.72", "0.1519 ± 0.0030", "84.81 ± 0.30 %",
         "+15.2 ± 1.5 %"],
    ]  # fmt: skip
    links = re.findall(r"^\| \[([^]]+)\]\(\./([^)]+)\) \|", body, re.MULTILINE)
    assert links == [(row[0], row[0]) for row in rows]


PUBLISHED = (  # of bartowski's google_gemma-3-4b-it-GGUF: file, quant type, size in decimal GB
    ("mmproj-google_gemma-3-4b-it-f32.gguf", "f32", "1.68GB"),
    ("mmproj-google_gemma-3-4b-it-f16.gguf", "f16", "0.85GB"),
    ("google_gemma-3-4b-it-bf16.gguf", "bf16", "7.77GB"),
    ("google_gemma-3-4b-it-Q8_0.gguf", "Q8_0", "4.13GB"),
    ("google_gemma-3-4b-it-Q6_K_L.gguf", "Q6_K_L", "3.35GB"),
    ("google_gemma-3-4b-it-Q6_K.gguf", "Q6_K", "3.19GB"),
    ("google_gemma-3-4b-it-Q5_K_L.gguf", "Q5_K_L", "2.99GB"),
    ("google_gemma-3-4b-it-Q5_K_M.gguf", "Q5_K_M", "2.83GB"),
    ("google_gemma-3-4b-it-Q5_K_S.gguf", "Q5_K_S", "2.76GB"),
    ("google_gemma-3-4b-it-Q4_K_L.gguf", "Q4_K_L", "2.65GB"),
    ("google_gemma-3-4b-it-Q4_1.gguf", "Q4_1", "2.56GB"),
    ("google_gemma-3-4b-it-Q4_K_M.gguf", "Q4_K_M", "2.49GB"),
)


def published() -> Manifest:
    """The published set as a manifest, in an order that is not the table's."""
    files = []
    for name, quant, size in PUBLISHED:
        n_bytes = round(float(size.removesuffix("GB")) * 1e9)
        if name.startswith("mmproj"):
            files.append(_entry(None, name=name, n_bytes=n_bytes, sha256=sha(name)))
        else:
            known = recipes.TABLE[quant]
            made = model_entry(quant, known.ftype, known.about, n_bytes=n_bytes, bpw=n_bytes * 8 / 3880099328, types={})
            parent = {"parent": known.parent, "differs": ["token_embd.weight"] if known.parent else []}
            files.append(made.model_copy(update=parent))
    random.Random(0).shuffle(files)
    whole = _with_files(*files)
    measured = {entry.sha256: evidence(entry.bpw, sha(f"{STEM}-bf16.gguf")) for entry in files if entry.bpw}
    return whole.model_copy(update={"evidence": measured})


@every_page
def test_the_published_rows_appear_as_they_were_published(theme: str, language: str) -> None:
    _, *rows = _cells(_body(published(), theme=theme, language=language), "bpw")
    assert tuple((row[0], row[1], row[2]) for row in rows) == PUBLISHED


@every_page
def test_page_has_one_title_and_whole_tables(theme: str, language: str) -> None:
    """Every row of all tables is a row to a Markdown reader, and no line of a table was broken."""
    tags = _Page(_body(example(), theme=theme, language=language)).tags
    assert tags.count("h1") == 1
    choices = card.context(example())["choices"]
    n_rows, n_columns = len(choices.rows), 1 + len(choices.contexts)
    # downloads, large rows, speeds, hashes, which file to choose
    assert tags.count("table") == 5
    assert tags.count("tr") == 5 + 7 + 1 + 6 + 8 + n_rows
    assert tags.count("td") == 7 * 9 + 1 * 5 + 6 * 7 + 8 * 3 + n_rows * n_columns
    assert tags.count("th") == 9 + 5 + 7 + 3 + n_columns
    assert tags.count("details") == tags.count("summary")


# --- recipes of the maintainer's own -------------------------------------------------------------------------------


@every_theme
def test_a_recipe_of_ones_own_has_a_row_and_a_definition(theme: str) -> None:
    """One that is made, and one that was asked for and is not: both can be made again with what the card says."""
    made = example()
    files = [
        entry.model_copy(
            update={
                "recipe": "Q4_0_OWN",
                "name": f"{STEM}-Q4_0_OWN.gguf",
                "about": 'Mine, "so" | to say',
                "flags": ["--tensor-type", r"blk\.0\.ffn=q8_0", "--tensor-type", "attn_v=f16"],
            }
        )
        if entry.recipe == "Q4_0"
        else entry
        for entry in made.files
    ]
    asked = CustomRecipe(name="LATER", ftype="Q6_K", about="Not yet", flags=["--token-embedding-type", "q8_0"])
    names = ["Q4_0_OWN" if name == "Q4_0" else name for name in made.recipes]
    made = made.model_copy(update={"files": files, "recipes": [*names, "LATER"], "custom_recipes": [asked]})
    body = _body(made, theme=theme)
    rows = {row[0]: row[-1] for row in _cells(body, "Status")[1:]}
    assert rows[f"{STEM}-LATER.gguf"] == "Not yet."
    assert r'Mine, "so" \| to say.' in body
    assert _blocks(body, "toml") == [
        '[[custom_recipes]]\nname = "LATER"\nftype = "Q6_K"\ntoken_embedding_type = "q8_0"\nabout = "Not yet"\n\n'
        '[[custom_recipes]]\nname = "Q4_0_OWN"\nftype = "Q4_0"\n'
        'tensor_types = ["blk\\\\.0\\\\.ffn=q8_0", "attn_v=f16"]\nabout = "Mine, \\"so\\" | to say"\n'
    ]
    assert "Recipes of our own, in `gemma-gguf.toml`:" in body
    assert "LATER,Q4_0_OWN" in card.reproduce_command(made)


@every_theme
def test_without_recipes_of_ones_own_there_is_no_word_of_them(theme: str) -> None:
    assert "gemma-gguf.toml" not in _body(example(), theme=theme)


@pytest.mark.parametrize(("stem", "told"), [(STEM, ""), ("gemma-3-4b-it", " --naming model")])
def test_the_command_that_makes_a_set_again_names_its_files_alike(stem: str, told: str) -> None:
    command = card.reproduce_command(example().model_copy(update={"stem": stem}))
    assert command.startswith(f"gemma-gguf run google/gemma-3-4b-it@{COMMIT}{told} --llama-cpp ")


# --- a set that is not whole ---------------------------------------------------------------------------------------


@every_theme
def test_what_is_not_made_or_not_measured_has_a_status(theme: str) -> None:
    made = example()
    lost = made.file(f"{STEM}-Q4_0.gguf")
    assert lost is not None
    left = {key: value for key, value in made.evidence.items() if key != lost.sha256}
    made = made.model_copy(update={"evidence": left, "recipes": [*made.recipes, "IQ4_XS", "Q6_K_L"]})
    body = _body(made, theme=theme)
    assert _column(body, "Status") == [
        "complete", "complete", "complete", "complete", "complete", "not measured", "complete", "not made", "not made",
    ]  # fmt: skip
    header, *rows = _cells(body, "Status")
    assert [row[:-1] for row in rows[-2:]] == [
        [f"{STEM}-Q6_K_L.gguf", "Q6_K_L", "–", "false", "–", "–", "–", "–", "not made"],
        [f"{STEM}-IQ4_XS.gguf", "IQ4_XS", "–", "false", "–", "–", "–", "–", "not made"],
    ]
    assert rows[5][header.index("KLD ± se")] == "–"
    assert f"](./{STEM}-IQ4_XS.gguf)" not in body
    assert "6 of 8 model files are made, 5 of them are measured" in _Page(body).text


@every_theme
def test_a_whole_set_has_no_status(theme: str) -> None:
    body = _body(example(), theme=theme)
    assert "Status" not in body
    assert "not complete" not in body


@every_theme
def test_a_set_without_any_measurement_has_no_empty_columns(theme: str) -> None:
    body = _body(example().model_copy(update={"evidence": {}}), theme=theme)
    header, *rows = _cells(body, "Filename")
    assert header == ["Filename", "Quant", "Size", "Split", "bpw", "Status", ABOUT]
    assert [row[5] for row in rows] == ["complete", *["not measured"] * 6]
    page = _Page(body)
    assert "KLD" not in page.text.partition("Filename")[2].partition("ARM and AVX")[0].replace("KLD by", "")
    assert "llama-bench" not in page.text


def test_measurements_against_another_base_do_not_count() -> None:
    made = example()
    stage = made.stages["convert"]
    other = stage.model_copy(update={"outputs": {f".work/{STEM}-bf16.gguf": sha("another base")}})
    body = _body(made.model_copy(update={"stages": {**made.stages, "convert": other}}))
    assert _column(body, "Status") == ["complete", *["not measured"] * 6]


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        pytest.param({"bpw": None}, "the bits per weight of", id="bpw"),
        pytest.param({"recipe": None}, "the recipe of", id="recipe"),
        pytest.param({"about": None}, "what", id="about"),
    ],
)
def test_a_missing_fact_is_an_error_that_names_it(changes: dict[str, Any], fact: str) -> None:
    entry = _entry("Q8_0", **changes)
    with pytest.raises(BadInputError, match="which a card must show") as caught:
        card.render(_with_files(entry))
    assert fact in caught.value.what
    assert entry.name in caught.value.what


# --- sections ------------------------------------------------------------------------------------------------------


@every_theme
def test_body_names_model_and_build(theme: str) -> None:
    page = _Page(_body(example(), theme=theme))
    for fact in (
        f"Original model: google/gemma-3-4b-it, revision {COMMIT}",
        "Architecture: Gemma 3 (Gemma3ForConditionalGeneration)",
        "Parameters: 4,300,079,472",
        "Input: text, images",
        "Licence: gemma",
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.",
        "Oldest llama.cpp that loads it: b4875 (ggml-org/llama.cpp#12343, merged on 2025-03-12)",
        "Recommended sampling (the original's generation_config.json): top_k 64, top_p 0.95",
        "Made with llama.cpp 0.5.0-dev (commit 0c1e57098, cpu backend) and gemma-gguf 0.1.0.",
        "Compiler: c++ (Debian 12.2.0-14+deb12u1) 12.2.0",
        "Source: pypi:0.3.36, sha256 832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
        f"Calibration text: default, sha256 {sha('calibration')}",
        f"imatrix: sha256 {sha('imatrix')}",
    ):
        assert fact in page.text
    for link in (
        "https://huggingface.co/google/gemma-3-4b-it",
        "https://ai.google.dev/gemma/terms",
        "https://github.com/ggml-org/llama.cpp/commit/0c1e57098",
        "https://github.com/ggml-org/llama.cpp/pull/12343",
        f"./{IMATRIX}",
        "./quantset.json",
    ):
        assert link in page.links


HEADINGS = {
    "modern": [
        "Model details",
        "What's new",
        "How to run",
        "Vision",
        "Prompt format",
        "Download a file (not the whole repository) from below",
        "Pictures",
        "Embedding and output weights",
        "Which file should I choose?",
        "imatrix",
        "ARM and AVX",
        "Provenance",
        "Credits",
    ],
    "classic": [
        "How to run",
        "Vision",
        "Prompt format",
        "Download a file (not the whole repository) from below",
        "Pictures",
        "Embedding and output weights",
        "ARM and AVX",
        "Which file should I choose?",
        "Provenance",
        "Credits",
    ],
}


@every_theme
def test_sections_stand_in_the_order_of_their_layout(theme: str) -> None:
    assert re.findall(r"^## (.*)$", _body(example(), theme=theme), re.MULTILINE) == HEADINGS[theme]


@every_theme
def test_a_build_with_a_number_is_called_by_it(theme: str) -> None:
    made = example()
    made = made.model_copy(update={"llama_cpp": made.llama_cpp.model_copy(update={"build_number": 9999})})
    assert "Made with llama.cpp b9999 (commit 0c1e57098" in _Page(_body(made, theme=theme)).text


@every_theme
def test_every_file_is_there_with_its_size_and_hash(theme: str) -> None:
    body = _body(example(), theme=theme)
    listed = re.findall(r"^\| (\S+\.gguf) \| ([\d,]+) \| `([0-9a-f]{64})` \|$", body, re.MULTILINE)
    expected = sorted(example().files, key=lambda entry: entry.name.lower())
    assert listed == [(entry.name, f"{entry.n_bytes:,}", entry.sha256) for entry in expected]


@every_theme
def test_gemma_terms_are_for_the_gemma_licence_alone(theme: str) -> None:
    assert "Gemma Terms" not in _body(_with_model(license="apache-2.0"), theme=theme)


@every_theme
def test_imatrix_and_its_text_are_described(theme: str) -> None:
    page = _Page(_body(example(), theme=theme))
    assert (
        f"Every quant was made with an importance matrix ({IMATRIX}), computed on 146 chunks of 512 tokens of the "
        f"calibration text default (texts of this repository, 262,144 bytes, sha256 {sha('calibration')})."
    ) in page.text


@every_theme
def test_a_given_imatrix_has_no_text(theme: str) -> None:
    text = _Page(_body(example().model_copy(update={"calibration": None}), theme=theme)).text
    made = f"Every quant was made with an importance matrix that was given ({IMATRIX}, 146 chunks of 512 tokens)."
    assert made in text
    assert "calibration text" not in text.lower()


@every_page
def test_without_an_imatrix_nothing_is_said_of_one(theme: str, language: str) -> None:
    text = card.render(_chosen(_without_imatrix(), theme=theme), None, language)
    assert _data(text)["tags"] == ["gemma3", "conversational", "gguf"]
    told = [line for line in text.splitlines() if re.search("imatrix|importance matrix", line, re.IGNORECASE)]
    assert [line for line in told if "bartowski" not in line] == []  # the credits name what was learnt from


@every_theme
def test_a_base_that_was_quantised_before_is_warned_of_and_not_ranked(theme: str) -> None:
    page = _Page(_body(_with_model(base_is_dequantised=True), theme=theme))
    assert (
        "These weights were quantised once before. The base of this set was rebuilt from a packaged Q4_K_M file, so "
        "its weights lie on a quantisation grid."
    ) in page.text
    assert "Beaten" not in page.text
    assert "Nothing smaller" not in page.text
    assert "quantised once before" not in _body(example(), theme=theme)


@every_theme
def test_a_qat_set_says_who_profits(theme: str) -> None:
    body = _body(_with_model(qat=True), theme=theme)
    assert "only the Q4_0 file is expected to profit from it" in _Page(body).text
    trained = [text for text in _column(body, ABOUT) if "trained for" in text]
    assert trained == [text for text in _column(body, ABOUT) if text.startswith("4 bits, one scale")]
    assert len(trained) == 1
    assert "Quantisation-aware" not in _body(example(), theme=theme)


def test_a_qat_set_recommends_what_it_was_trained_for() -> None:
    assert f"Grab Q4_0: {STEM}-Q4_0.gguf, 2.36GB." in _Page(_body(_with_model(qat=True))).text
    assert f"Grab Q4_K_M: {STEM}-Q4_K_M.gguf, 2.49GB." in _Page(_body(example())).text


@every_theme
def test_repacking_is_told_where_it_matters(theme: str) -> None:
    assert "IQ4_NL" in _Page(_body(example(), theme=theme)).text.partition("ARM and AVX")[2]
    alone = _with_files(_entry("Q8_0")).model_copy(update={"evidence": {}})
    assert "repack" not in _body(alone, theme=theme).lower()


@every_theme
def test_speeds_stand_with_their_spread_and_their_share_of_q4_0(theme: str) -> None:
    body = _body(example(), theme=theme)
    header, *rows = _cells(body, "tg64 t/s")
    assert header == ["Quant", "Size", "pp512 t/s", "vs Q4_0", "tg64 t/s", "vs Q4_0", "Memory"]
    assert rows == [
        ["bf16", "7.77GB", "30.50 ± 0.40", "100%", "3.75 ± 0.10", "30%", "3.10GB"],
        ["Q8_0", "4.13GB", "30.50 ± 0.40", "100%", "7.05 ± 0.10", "57%", "3.10GB"],
        ["Q4_K_L", "2.67GB", "30.50 ± 0.40", "100%", "10.92 ± 0.10", "89%", "3.10GB"],
        ["Q4_K_M", "2.49GB", "30.50 ± 0.40", "100%", "11.71 ± 0.10", "95%", "3.10GB"],
        ["Q4_0", "2.36GB", "30.50 ± 0.40", "100%", "12.34 ± 0.10", "100%", "3.10GB"],
        ["IQ2_XS", "1.32GB", "30.50 ± 0.40", "100%", "22.07 ± 0.10", "179%", "3.10GB"],
    ]
    assert "Measured with llama-bench on AMD EPYC (cpu backend, 2 threads)" in _Page(body).text


@every_theme
def test_large_rows_state_cost_and_gain(theme: str) -> None:
    body = _body(example(), theme=theme)
    _, *rows = _cells(body, "Lowers KLD by")
    assert rows == [["Q4_K_L", "Q4_K_M", "179.46MB", "0.00649 ± 0.00072", "token_embd.weight"]]
    text = "Pays 179.46MB for token_embd.weight and lowers KLD by 0.00649 ± 0.00072."
    assert [text in about for about in _column(body, ABOUT)].count(True) == 1


@every_theme
def test_a_large_row_that_is_the_same_as_its_parent_says_so(theme: str) -> None:
    made = _with_files(_entry("Q4_K_L", differs=[]), _entry("Q4_K_M"))
    body = _body(made, theme=theme)
    assert "In this model Q4_K_L holds the same tensors as Q4_K_M" in _Page(body).text
    assert _column(body, ABOUT)[0].startswith("Same tensors as Q4_K_M:")
    assert "Lowers KLD by" not in body
    assert "same tensors" not in _Page(_body(example(), theme=theme)).text.lower()


def test_no_large_rows_no_section_on_them() -> None:
    assert "Embedding and output weights" not in _body(_with_files(_entry("Q4_K_M")))


def test_files_of_an_earlier_build_are_named() -> None:
    made = example()
    files = [entry.model_copy(update={"build": "0" * 20}) if entry.recipe == "Q8_0" else entry for entry in made.files]
    page = _Page(_body(made.model_copy(update={"files": files})))
    assert f"neither the model nor the imatrix changed: {STEM}-Q8_0.gguf How to run" in page.text
    assert "earlier llama.cpp build" not in _body(example())


SAMPLING = Sampling(do_sample=True, temperature=None, top_k=None, top_p=None, min_p=None, repetition_penalty=None)


@pytest.mark.parametrize(
    ("stated", "shown", "server", "python"),
    [
        pytest.param(
            {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.1},
            "temperature 1, top_k 64, top_p 0.95, min_p 0, repetition_penalty 1.1",
            "--temp 1 --top-k 64 --top-p 0.95 --min-p 0 --repeat-penalty 1.1",
            "temperature=1, top_k=64, top_p=0.95, min_p=0, repeat_penalty=1.1",
            id="everything",
        ),
        pytest.param({"temperature": 0.7}, "temperature 0.7", "--temp 0.7", "temperature=0.7", id="one"),
        pytest.param(
            {"do_sample": False, "temperature": 1.0}, "do_sample false", "--temp 0", "temperature=0", id="greedy"
        ),
    ],
)
@every_theme
def test_the_recommended_sampling_is_in_the_commands(
    stated: dict[str, Any], shown: str, server: str, python: str, theme: str
) -> None:
    body = _body(_with_model(sampling=SAMPLING.model_copy(update=stated)), theme=theme)
    assert f"(the original's generation_config.json): {shown} " in _Page(body).text
    assert f"google_gemma-3-4b-it-GGUF:Q4_K_M {server}\n" in body
    assert f"max_tokens=64, {python})\n" in body


@every_theme
def test_sampling_that_nobody_recommends_is_not_made_up(theme: str) -> None:
    body = _body(_with_model(sampling=SAMPLING), theme=theme)
    assert "Recommended sampling: the original's files state none" in _Page(body).text
    assert "--temp" not in body
    unknown = _body(_with_model(sampling=None), theme=theme)  # of a manifest that did not record it
    assert "sampling" not in unknown


@every_theme
def test_an_architecture_without_a_known_release_names_the_change(theme: str) -> None:
    support = example().model.support
    assert support is not None
    later = support.model_copy(update={"pull_request": 21309, "merged": "2026-04-02", "release": None})
    text = _Page(_body(_with_model(support=later), theme=theme)).text
    assert "the first release after ggml-org/llama.cpp#21309 was merged on 2026-04-02" in text
    assert "Oldest" not in _body(_with_model(support=None), theme=theme)


# --- how to run ----------------------------------------------------------------------------------------------------


def _blocks(body: str, language: str) -> list[str]:
    """The fenced code blocks of a page in one programming language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)


@every_page
def test_commands_of_every_program(theme: str, language: str) -> None:
    """In every language the same commands, letter by letter."""
    body = _body(example(), theme=theme, language=language)
    repo = "someone/google_gemma-3-4b-it-GGUF"
    assert _blocks(body, "sh") == [
        f"llama-server -hf {repo}:Q4_K_M --top-k 64 --top-p 0.95\n"
        f"llama-server -m {STEM}-Q4_K_M.gguf --mmproj mmproj-{STEM}-f16.gguf --top-k 64 --top-p 0.95\n",
        'curl http://127.0.0.1:8080/v1/chat/completions -H "Content-Type: application/json" '
        """-d '{"messages": [{"role": "user", "content": "Which planet is the largest?"}]}'\n""",
        f"lms get https://huggingface.co/{repo}@Q4_K_M\n",
        f"ollama run hf.co/{repo}:Q4_K_M\n",
        f"llama-mtmd-cli -m {STEM}-Q4_K_M.gguf --mmproj mmproj-{STEM}-f16.gguf --jinja --image picture.png "
        '-p "What is in this picture?"\n',
        f'pip install -U huggingface_hub\nhf download {repo} --include "{STEM}-Q4_K_M.gguf" --local-dir ./\n',
        f"gemma-gguf run google/gemma-3-4b-it@{COMMIT} --llama-cpp pypi:0.3.36 "
        "--recipes bf16,Q8_0,Q4_K_L,Q4_K_M,Q4_0,IQ2_XS\n",
    ]
    assert _blocks(body, "python") == [
        "from huggingface_hub import hf_hub_download\n"
        "from llama_cpp import Llama\n\n"
        f'llm = Llama(hf_hub_download("{repo}", "{STEM}-Q4_K_M.gguf"), n_ctx=4096)\n'
        'messages = [{"role": "user", "content": "Which planet is the largest?"}]\n'
        "answer = llm.create_chat_completion(messages, max_tokens=64, top_k=64, top_p=0.95)\n"
        'print(answer["choices"][0]["message"]["content"])\n'
    ]


@every_theme
def test_a_set_that_is_not_published_says_so(theme: str) -> None:
    body = _body(_chosen(example(), repo=None), theme=theme)
    assert "This set was not uploaded when its card was written" in _Page(body).text
    assert "llama-server -hf YOUR_NAMESPACE/google_gemma-3-4b-it-GGUF:Q4_K_M" in body
    assert "YOUR_NAMESPACE" not in _body(example(), theme=theme)


@every_theme
def test_a_base_model_is_not_asked_to_chat(theme: str) -> None:
    body = _body(_with_model(chat_template=None), theme=theme)
    assert "/completion -H" in body
    assert "chat" not in "".join([*_blocks(body, "sh"), *_blocks(body, "python")])


@every_theme
def test_an_embedding_model_embeds(theme: str) -> None:
    said = EmbeddingFacts(prompts={"query": "query: it's `so` "}, similarity="cosine", dense=[])
    made = _with_model(gguf_arch="gemma-embedding", embedding=said, vision=False, chat_template=None)
    made = made.model_copy(update={"files": [entry for entry in made.files if entry.kind != "mmproj"]})
    body = _body(made, theme=theme)
    assert "--embeddings -b 131072 -ub 131072\n" in body  # as far as this model was trained
    assert "/v1/embeddings" in body
    assert "embedding=True, n_ctx=131072, n_batch=131072, n_ubatch=131072)" in body
    quoted = '"query: it\\u0027s \\u0060so\\u0060 Which planet is the largest?"'  # the same to JSON, Python and a shell
    assert f"llm.embed({quoted}, normalize=True)" in body
    assert f"-d '{{\"input\": {quoted}}}'\n" in body
    assert "| query | `query: it's 'so' ` |\n" in body
    assert "mtmd" not in body
    bare = said.model_copy(update={"prompts": {}})
    assert "names no prompts" in _body(_with_model(gguf_arch="gemma-embedding", embedding=bare), theme=theme)


@every_theme
def test_a_model_that_hears_is_given_sound(theme: str) -> None:
    body = _body(_with_model(audio=True), theme=theme)
    assert "## Vision and audio\n" in body
    assert '--audio speech.wav -p "What is said here?"\n' in body
    assert "Vision and audio projector in f16" in body
    deaf = _body(_with_model(vision=False, audio=True), theme=theme)
    assert "## Audio\n" in deaf
    assert "--image" not in deaf


@every_theme
def test_shards_are_downloaded_as_a_folder_and_not_offered_to_ollama(theme: str) -> None:
    folder = f"{STEM}-Q4_K_M"
    names = [f"{folder}/{folder}-0000{number}-of-00002.gguf" for number in (1, 2)]
    name, cut = names[0], [Shard(name=name, n_bytes=1244947488, sha256=sha(name)) for name in names]
    made = _with_files(_entry("Q4_K_M", name=name, shards=cut))
    body = _body(made, theme=theme)
    link = f"https://huggingface.co/{made.card.repo}/tree/main/{folder}"
    assert f"| [{folder}]({link}) | Q4_K_M | 2.49GB | true |" in body
    assert f"| [{folder}](./{folder}) |" in _body(_chosen(made, repo=None), theme=theme)
    for shard in cut:
        assert f"| {shard.name} | 1,244,947,488 | `{shard.sha256}` |" in body
    assert "ollama run" not in body
    assert "cannot pull files that are split" in body
    assert f'--include "{STEM}-Q4_K_M/*"' in body
    assert f'llm = Llama("{name}", n_ctx=4096)' in body


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        pytest.param({"origin": "demo"}, "gemma-gguf run demo --llama-cpp pypi:0.3.36", id="demo"),
        pytest.param(
            {"origin": "local", "repo": None, "model": "my gemma"},
            "gemma-gguf run './my gemma' --llama-cpp pypi:0.3.36",
            id="directory",
        ),
        pytest.param(
            {"origin": "local", "repo": "me/my-gemma", "model": "my-gemma"},
            "gemma-gguf run ./my-gemma --name me/my-gemma --llama-cpp pypi:0.3.36",
            id="directory with a name",
        ),
        pytest.param(
            {"origin": "demo", "vision": False, "left_out": ["vision"]},
            "gemma-gguf run demo --llama-cpp pypi:0.3.36 --no-mmproj",
            id="without projectors",
        ),
    ],
)
def test_the_command_to_reproduce_names_the_model(changes: dict[str, Any], command: str) -> None:
    made = _with_model(**changes).model_copy(update={"recipes": list(recipes.DEFAULT_NAMES)})
    assert card.reproduce_command(made) == command


@pytest.mark.parametrize(
    ("stem", "options"),
    [
        ("google_gemma-3-4b-it", ""),
        ("gemma-3-4b-it", "--naming model "),
        ("me_my-gemma", "--name me/my-gemma "),
        ("my-gemma", "--name google/my-gemma --naming model "),
    ],
)
def test_the_command_to_reproduce_names_the_files(stem: str, options: str) -> None:
    made = example().model_copy(update={"stem": stem, "recipes": list(recipes.DEFAULT_NAMES)})
    made = made.model_copy(update={"split_max_size": 20_000_000_000})
    expected = f"gemma-gguf run google/gemma-3-4b-it@{COMMIT} {options}--llama-cpp pypi:0.3.36 --split-max-size 20000MB"
    assert card.reproduce_command(made).startswith(expected)


def test_the_command_to_reproduce_names_every_choice() -> None:
    made = example()
    stages = dict(made.stages)
    argv = [["llama-imatrix", "-m", "b.gguf", "--chunks", "40", "-ngl", "99", "-o", "x"]]
    stages["imatrix"] = stages["imatrix"].model_copy(update={"argv": argv})
    calibration = made.calibration
    assert calibration is not None
    made = made.model_copy(
        update={
            "stages": stages,
            "calibration": calibration.model_copy(update={"name": "technical"}),
            "llama_cpp": made.llama_cpp.model_copy(update={"backend": "cuda", "source": "git:b9999"}),
        }
    )
    assert card.reproduce_command(made) == (
        f"gemma-gguf run google/gemma-3-4b-it@{COMMIT} --llama-cpp git:b9999 --backend cuda "
        "--recipes bf16,Q8_0,Q4_K_L,Q4_K_M,Q4_0,IQ2_XS --calibration technical --chunks 40 --gpu-layers 99"
    )
    for stage in ("convert", "imatrix"):
        stages[stage] = stages[stage].model_copy(update={"argv": []})
    given = card.reproduce_command(made.model_copy(update={"stages": stages}))
    assert given.endswith(f"--base {STEM}-bf16.gguf --imatrix {STEM}-imatrix.gguf")


# --- languages -----------------------------------------------------------------------------------------------------


@every_theme
def test_cards_of_a_set_link_each_other(theme: str) -> None:
    made = _chosen(example(), languages=["zh-Hant", "en", "ja"], theme=theme)
    shown = {tag: card.render(made, None, tag) for tag in card.LANGUAGES}
    names = {"en": "English", "ja": "日本語", "zh-Hant": "繁體中文"}
    files = {"en": "README.md", "ja": "README.ja.md", "zh-Hant": "README.zh-Hant.md"}
    assert card.card_files(("zh-Hant", "en", "ja")) == files
    for tag, text in shown.items():
        line = " · ".join(names[t] if t == tag else f"[{names[t]}](./{files[t]})" for t in names)
        assert f"\n\n{line}\n\n" in text, tag
    assert "README.ja.md" not in card.render(example())


def test_a_column_of_ideographs_is_as_wide_as_one_of_words() -> None:
    """Of 18 letters: a letter is as wide as two of the spaces, an ideograph as two letters."""

    def width(heading: str) -> int:
        return sum({"\u00a0": 1, "\u2060": 0}.get(c, 2 if c.isascii() else 4) for c in card._wide(heading))

    assert {width(heading) for heading in ("Description", "説明", "説明と注意", "Notes")} == {36}


def test_large_rows_are_named_in_the_order_of_the_table() -> None:
    made = _with_files(
        _entry("Q4_0", recipe="Q2_K_L", parent="Q2_K", n_bytes=10),
        _entry("Q4_K_L", n_bytes=30),
        _entry("Q4_0", recipe="Q3_K_XL", parent="Q3_K_L", n_bytes=20),
        _entry("Q4_K_M"),
    )
    assert [entry.recipe for entry in card.context(made)["large"]] == ["Q4_K_L", "Q3_K_XL", "Q2_K_L"]


def test_english_is_always_there() -> None:
    assert card.card_files(("ja",)) == {"en": "README.md", "ja": "README.ja.md"}
    assert card.card_files(()) == {"en": "README.md"}


def test_a_language_without_a_catalogue_is_refused() -> None:
    with pytest.raises(BadInputError) as caught:
        card.card_files(("en", "tlh"))
    assert caught.value.what == "there is no card in 'tlh'"
    assert caught.value.next_step == "Choose from: en, ja, zh-Hant."


@every_theme
def test_translations_differ_and_keep_every_figure(theme: str) -> None:
    """The same tables of numbers, the same links; another language around them."""
    pages = {tag: _body(example(), theme=theme, language=tag) for tag in card.LANGUAGES}
    headings = {tag: re.findall(r"^## (.*)$", page, re.MULTILINE) for tag, page in pages.items()}
    assert len({len(found) for found in headings.values()}) == 1
    for tag in ("ja", "zh-Hant"):
        assert _Page(pages[tag]).links == _Page(pages["en"]).links
        assert _Page(pages[tag]).tags == _Page(pages["en"]).tags
        assert sum(one == other for one, other in zip(headings[tag], headings["en"], strict=True)) <= 1  # imatrix
        figures = re.compile(r"[+-]?\d[\d,.]* ±\u00a0\d+\.\d+")
        assert sorted(figures.findall(pages[tag])) == sorted(figures.findall(pages["en"]))


# --- breaking out --------------------------------------------------------------------------------------------------

HOSTILE_TEXTS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!-- comment",
    "</a></h1><h1>",
    "<https://evil.example>",
    "[x](https://evil.example)",
    "![x](https://evil.example)",
    "](https://evil.example)",
    "*a* _b_ **c** __d__",
    "`code` ``more``",
    "a | b |",
    "# a",
    "a\n# b",
    "a\n\n| b |\n| - |\n",
    "a\r\nb",
    "back\\slash \\[",
    "{{ 7 * 7 }}{% include 'x' %}",
    "---\n===",
    "~~gone~~",
    "&lt;b&gt; &amp; &copy;",
    "a & b",
]


@pytest.mark.parametrize("value", [*HOSTILE_TEXTS, "".join(HOSTILE_TEXTS)], ids=lambda value: ascii(value[:40]))
@pytest.mark.parametrize("field", ["org", "model", "license"])
@every_page
def test_special_characters_are_shown_as_they_are(field: str, value: str, theme: str, language: str) -> None:
    """The page keeps its structure and its links, and shows the text letter by letter (line breaks as spaces)."""
    marked = f"§{value}§"
    plain = _Page(_body(_with_model(**{field: "plain"}), theme=theme, language=language))
    hostile = _Page(_body(_with_model(**{field: marked}), theme=theme, language=language))
    assert hostile.tags == plain.tags
    assert hostile.links == plain.links
    assert " ".join(marked.split()) in hostile.text


@pytest.mark.parametrize("field", ["org", "model", "license"])
@every_page
def test_no_raw_html_in_the_body(field: str, theme: str, language: str) -> None:
    hostile = _with_model(**{field: "<script>alert(1)</script>"})
    assert "<script" not in _body(hostile, theme=theme, language=language)


PLACES: list[tuple[str | int, ...]] = [
    ("model", "org"),
    ("model", "model"),
    ("model", "repo"),
    ("model", "revision"),
    ("model", "architecture"),
    ("model", "family"),
    ("model", "license"),
    ("llama_cpp", "source"),
    ("llama_cpp", "source_sha256"),
    ("llama_cpp", "version"),
    ("llama_cpp", "commit"),
    ("llama_cpp", "backend"),
    ("llama_cpp", "compiler"),
    ("calibration", "name"),
    ("calibration", "source"),
    ("tool_version",),
    ("evidence", "", "quality", "text"),
    ("evidence", "", "speed", "cpu"),
    ("evidence", "", "speed", "backend"),
    ("files", 4, "differs", 0),
    ("files", 4, "recipe"),
    ("files", 4, "about"),
    ("files", 4, "parent"),
]


BREAKOUT = "`<script>alert(1)</script>` ) | ![x](https://evil.example) |\n\n# b"


@pytest.mark.parametrize("place", [pytest.param(place, id=".".join(map(str, place))) for place in PLACES])
@every_page
def test_no_text_of_a_manifest_changes_the_page(
    tmp_path: Path, place: tuple[str | int, ...], theme: str, language: str
) -> None:
    """`gemma-gguf card` takes any quantset.json: a text is refused when it is read, or shown without breaking out."""
    raw = json.loads(example().model_dump_json())
    assert raw["files"][4]["recipe"] == "Q4_K_L"
    if place[-1] == "parent":
        raw["files"][4]["differs"] = []  # a parent is named only by a row that is the same
    changed = copy.deepcopy(raw)
    at = changed
    for step in place[:-1]:
        at = at[step or raw["files"][4]["sha256"]]
    assert isinstance(at[place[-1]], str)
    at[place[-1]] = BREAKOUT
    (tmp_path / manifest.FILE_NAME).write_text(json.dumps(changed), encoding="utf-8")
    try:
        made = manifest.load(tmp_path)
    except BadInputError:
        return
    if place[-1] in {"cpu", "backend"} and "evidence" in place:
        raw["evidence"][raw["files"][4]["sha256"]]["speed"][place[-1]] = "other"  # that row has a table of its own
    if place[-1] == "text":
        raw["evidence"][raw["files"][4]["sha256"]]["quality"]["text"] = "other"
    plain = _Page(_body(Manifest.model_validate(raw), theme=theme, language=language))
    hostile = _Page(_body(made, theme=theme, language=language))
    assert hostile.tags.count("script") == 0
    # Fewer where the text is in a picture, which is then not the one that was drawn.
    assert hostile.tags.count("img") <= plain.tags.count("img")
    assert hostile.tags.count("h1") == 1
    assert hostile.tags.count("tr") == plain.tags.count("tr")
    assert hostile.tags.count("td") == plain.tags.count("td")
    assert "https://evil.example" not in hostile.links


# --- the same page every time --------------------------------------------------------------------------------------


@every_page
def test_rendering_changes_nothing_and_is_always_the_same(tmp_path: Path, theme: str, language: str) -> None:
    made = _chosen(example(), theme=theme)
    before = made.model_dump_json()
    text = card.render(made, None, language)
    assert card.render(made, None, language) == text
    assert made.model_dump_json() == before
    manifest.save(made, tmp_path)
    assert card.render(manifest.load(tmp_path), None, language) == text
    assert text.endswith("\n")
    assert not text.endswith("\n\n\n")


def test_one_renderer_serves_many_sets_in_any_order() -> None:
    """What one set chose is not seen on the card of the next."""
    renderer = card.Renderer()
    sets = [(_chosen(example(), theme=theme), tag) for tag in card.LANGUAGES for theme in card.THEMES for _ in range(2)]
    random.Random(0).shuffle(sets)
    for made, tag in sets:
        assert renderer.render(made, tag) == card.render(made, None, tag)


def test_other_processes_render_the_same_bytes(tmp_path: Path) -> None:
    """Neither hash seeds nor time zone, locale or directory are in the page."""
    root = Path(__file__).parents[1]
    code = "import sys; from tests.examples import example; from gemma_gguf import card; "
    code += "sys.stdout.buffer.write((card.render(example()) + card.render(example(), None, 'ja')).encode())"
    for seed, zone in (("1", "Asia/Tokyo"), ("2", "America/Lima")):
        env = {**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": "C", "PYTHONPATH": str(root)}
        env |= {"LANGUAGE": "ja", "LANG": "ja_JP.UTF-8"}
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, check=True)
        assert done.stdout.decode() == card.render(example()) + card.render(example(), None, "ja")


def test_a_card_needs_no_heavy_package() -> None:
    """Half a second for a card: none of these is imported for one."""
    code = (
        "import sys; from gemma_gguf import cli; from tests.examples import example; from gemma_gguf import card; "
        "card.render(example(), None, 'ja'); "
        "print(sorted({'numpy', 'gguf', 'babel', 'torch', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True, text=True)
    assert set(json.loads(done.stdout.replace("'", '"'))) <= {"numpy", "gguf"}  # these the command line itself needs


# --- templates -----------------------------------------------------------------------------------------------------


def test_a_directory_overrides_one_partial(tmp_path: Path) -> None:
    (tmp_path / "title.md.j2").write_text("# My {{ model.model | md }} in {{ rows[0].n_bytes | gb }}\n")
    own, theme = _body(example(), tmp_path), _body(example())
    assert own.startswith("# My gemma-3-4b-it in 0.85GB\n")
    assert own.partition("## Model details")[2] == theme.partition("## Model details")[2]


@every_theme
def test_a_directory_overrides_what_both_themes_share(tmp_path: Path, theme: str) -> None:
    (tmp_path / "credits.md.j2").write_text("\nThanks to {{ manifest.card.quantized_by | md }}.\n")
    own = _body(example(), tmp_path, theme=theme)
    assert own.endswith("\nThanks to gemma-gguf.\n")
    assert own.partition("## Provenance")[0] == _body(example(), theme=theme).partition("## Provenance")[0]


def test_a_directory_overrides_the_whole_page(tmp_path: Path) -> None:
    (tmp_path / "README.md.j2").write_text('mine\n{% include "downloads.md.j2" %}')
    own = card.render(example(), tmp_path)
    assert _data(own) == _data(RENDERER.render(example()))
    assert str(ModelCard(own).text).startswith("mine\n\n## Download a file")
    assert "Provenance" not in own


def test_an_empty_directory_changes_nothing(tmp_path: Path) -> None:
    assert card.render(example(), tmp_path) == card.render(example())


@pytest.mark.parametrize(
    "template",
    [
        "{{ no_such_name }}",
        "{{ model.no_such_name }}",
        "{% if no_such_name %}a{% endif %}",
        "{{ rows[0].no_such_name }}",
        "{% trans %}{{ no_such_name }}{% endtrans %}",
    ],
)
def test_undefined_names_are_errors(tmp_path: Path, template: str) -> None:
    (tmp_path / "title.md.j2").write_text(f"\n{template}")
    with pytest.raises(BadInputError, match="no_such_name") as caught:
        card.render(example(), tmp_path)
    assert "title.md.j2, line 2: " in caught.value.what


def test_a_template_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "title.md.j2").write_text("\n{% if %}")
    with pytest.raises(BadInputError, match=r"title\.md\.j2, line 2") as caught:
        card.render(example(), tmp_path)
    assert caught.value.next_step is not None
