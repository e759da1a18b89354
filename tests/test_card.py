"""The card is a pure function of the manifest: front matter the Hub can read, a right table, no way to break out.

Bodies are judged by what a Markdown reader makes of them (markdown-it, which rich brings), not by their source.
"""

import copy
import functools
import json
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from gemma_gguf import card, manifest
from gemma_gguf.errors import BadInputError
from gemma_gguf.manifest import FileEntry, Manifest
from tests.examples import COMMIT, FRONT_MATTER, IMATRIX, STEM, example

# --- helpers -------------------------------------------------------------------------------------------------------


def _with_model(**changes: Any) -> Manifest:
    """The example with other facts of the model."""
    made = example()
    return made.model_copy(update={"model": made.model.model_copy(update=changes)})


def _with_front_matter(**changes: Any) -> Manifest:
    return _with_model(front_matter={**FRONT_MATTER, **changes})


def _with_files(*files: FileEntry) -> Manifest:
    return example().model_copy(update={"files": list(files)})


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
    return _data(card.render(example()))


def _body(made: Manifest, templates: Path | None = None) -> str:
    return str(ModelCard(card.render(made, templates)).text)


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
    assert _data(card.render(example())) == {
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
    assert _body(example()).startswith("# google gemma-3-4b-it: GGUF quants")


def test_licence_details_are_carried() -> None:
    given = {"license_name": "gemma-terms", "license_link": "https://ai.google.dev/gemma/terms", "datasets": ["a/b"]}
    data = _data(card.render(_with_front_matter(**given)))
    assert {key: data[key] for key in given} == given


def test_keys_of_the_original_that_mean_something_else_here_are_left_out() -> None:
    given = {"model-index": [{"name": "x"}], "widget": [{"text": "hi"}], "inference": False, "base_model": "a/b"}
    data = _data(card.render(_with_front_matter(**given)))
    assert data["base_model"] == "google/gemma-3-4b-it"
    assert {"model-index", "widget", "inference", "library_name"}.isdisjoint(data)


def test_a_local_checkpoint_names_no_base_model() -> None:
    made = _with_model(origin="local", repo=None, revision=None)
    assert {"base_model", "base_model_relation"}.isdisjoint(_data(card.render(made)))
    assert "Original model: a local checkpoint called gemma-3-4b-it" in _Page(_body(made)).text


def test_no_licence_is_not_made_up() -> None:
    made = _with_model(license=None, front_matter={})
    assert _data(card.render(made)) == {
        "base_model": "google/gemma-3-4b-it",
        "base_model_relation": "quantized",
        "tags": ["gguf", "imatrix"],
        "quantized_by": "gemma-gguf",
    }
    assert "Licence: not stated by the original card" in _Page(_body(made)).text


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
    assert _data(card.render(_with_front_matter(tags=given)))["tags"] == tags


def test_one_tag_without_a_list_is_not_taken_letter_by_letter() -> None:
    """`tags: gemma3` is easily written; it is one tag or none, never six."""
    tags = _data(card.render(_with_front_matter(tags="gemma3")))["tags"]
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
    assert _data(card.render(made)) == expected


@pytest.mark.parametrize("value", [True, 5, 2.5, ["a", {"b": "---"}], {"a": ["no", "---"]}], ids=repr)
def test_front_matter_keeps_values_that_are_no_text(value: object) -> None:
    assert _data(card.render(_with_front_matter(extra_gated_prompt=value)))["extra_gated_prompt"] == value


# --- table ---------------------------------------------------------------------------------------------------------


def test_rows_are_the_projector_then_the_models_by_size() -> None:
    rows = card.table_rows(example())
    assert [(row.quant, row.size, row.n_bytes, row.bpw, row.split) for row in rows] == [
        ("mmproj f16", "0.85GB", 851251104, "", False),
        ("bf16", "7.77GB", 7767474144, "16.01", False),
        ("Q8_0", "4.13GB", 4130226144, "8.51", False),
        ("Q4_K_L", "2.67GB", 2669357024, "5.49", False),
        ("Q4_K_M", "2.49GB", 2489894976, "5.12", False),
        ("Q4_0", "2.36GB", 2363344256, "4.86", False),
        ("IQ2_XS", "1.32GB", 1322841984, "2.72", False),
    ]
    assert [row.name for row in rows] == [
        f"mmproj-{STEM}-f16.gguf",
        *(f"{STEM}-{recipe}.gguf" for recipe in ("bf16", "Q8_0", "Q4_K_L", "Q4_K_M", "Q4_0", "IQ2_XS")),
    ]
    assert [row.about for row in rows[1:4]] == [
        "Full BF16 weights, as converted",
        "8 bits, one scale per 32 weights",
        "Q4_K_M with embedding and output at Q8_0",
    ]


def test_rows_stand_in_the_body_as_they_are() -> None:
    body = _body(example())
    assert (
        f"| [{STEM}-Q8_0.gguf](./{STEM}-Q8_0.gguf) | Q8_0 | 4.13GB | 4,130,226,144 | 8.51 | false "
        "| 8 bits, one scale per 32 weights |\n"
    ) in body
    rows = re.findall(r"^\| \[([^]]+)\]\(\./([^)]+)\) \|", body, re.MULTILINE)
    assert rows == [(row.name, row.name) for row in card.table_rows(example())]


def test_order_of_the_manifest_does_not_change_the_table() -> None:
    rows = card.table_rows(example())
    files = example().files
    for seed in range(5):
        random.Random(seed).shuffle(files)
        assert card.table_rows(_with_files(*files)) == rows


def test_several_projectors_are_sorted_by_size_before_every_model() -> None:
    projectors = [_entry(None, name=f"mmproj-m-{kind}.gguf", n_bytes=n) for kind, n in (("f16", 2), ("f32", 4))]
    rows = card.table_rows(_with_files(_entry("IQ2_XS"), *projectors))
    assert [(row.quant, row.n_bytes) for row in rows] == [("mmproj f32", 4), ("mmproj f16", 2), ("IQ2_XS", 1322841984)]


def test_files_of_one_size_stay_in_the_recipes_order() -> None:
    """Q6_K_L of a model whose embedding is Q8_0 already has the size of Q6_K."""
    files = [_entry(recipe, n_bytes=7) for recipe in ("IQ2_XS", "Q4_K_M", "Q4_K_L", "Q8_0")]
    rows = card.table_rows(_with_files(*files))
    assert [row.quant for row in rows] == ["Q8_0", "Q4_K_L", "Q4_K_M", "IQ2_XS"]


def test_a_recipe_without_a_row_of_its_own_comes_last_among_equals() -> None:
    files = [_entry("Q4_0", recipe="TQ1_0", n_bytes=7), _entry("IQ2_XS", n_bytes=7)]
    assert [row.quant for row in card.table_rows(_with_files(*files))] == ["IQ2_XS", "TQ1_0"]


@pytest.mark.parametrize(
    ("n_bytes", "shown"),
    [
        (0, "0.00MB"),
        (3_567_456, "3.57MB"),
        (10**7, "0.01GB"),
        (241_410_000, "0.24GB"),
        (2**30, "1.07GB"),
        (54_321 * 10**6, "54.32GB"),
    ],
)
def test_sizes_are_decimal(n_bytes: int, shown: str) -> None:
    assert card.gigabytes(n_bytes) == shown


def test_a_folder_of_shards_is_split() -> None:
    entry = _entry("bf16", name=f"{STEM}-bf16/{STEM}-bf16-00001-of-00002.gguf")
    (row,) = card.table_rows(_with_files(entry))
    assert row.split is True
    assert (
        f"](./{STEM}-bf16/{STEM}-bf16-00001-of-00002.gguf) | bf16 | 7.77GB | 7,767,474,144 | 16.01 | true |"
        in _body(_with_files(entry))
    )


def test_a_large_row_that_is_the_same_as_its_parent_says_so() -> None:
    made = _with_files(_entry("Q4_K_L", differs=[]), _entry("Q4_K_M"))
    assert card.table_rows(made)[0].about == (
        "Same tensors as Q4_K_M: in this model embedding and output have Q8_0 there already"
    )
    assert "In this model Q4_K_L holds the same tensors as Q4_K_M" in _Page(_body(made)).text


def test_a_large_row_that_differs_does_not() -> None:
    text = _Page(_body(example())).text
    assert "The rows Q4_K_L are standard quants whose embedding and output weights stay at Q8_0" in text
    assert "same tensors" not in text.lower()


def test_no_large_rows_no_section_on_them() -> None:
    assert "Embedding and output weights" not in _body(_with_files(_entry("Q4_K_M")))


def test_fallbacks_are_told_in_the_row() -> None:
    entry = _entry("Q4_K_M", fallbacks={"Q4_K -> Q5_0": 90, "Q6_K -> Q8_0": 18})
    (row,) = card.table_rows(_with_files(entry))
    assert row.about == (
        "K-quant mix, 4 bits with some tensors at 6; "
        "108 tensors in another type because their columns are not divisible by 256"
    )


def test_fallbacks_of_blocks_of_32_are_not_put_down_to_256() -> None:
    """Q4_0 has blocks of 32: when it cannot be had, 256 has nothing to do with it."""
    (row,) = card.table_rows(_with_files(_entry("Q4_0", fallbacks={"Q4_0 -> F16": 2})))
    assert "2 tensors" in row.about
    assert "256" not in row.about


def test_the_projector_of_a_model_that_does_not_hear_is_not_for_audio() -> None:
    assert example().model.audio is False
    row = card.table_rows(example())[0]
    assert row.quant == "mmproj f16"
    assert row.about.lower().startswith("vision")
    assert "audio" not in row.about


# --- body ----------------------------------------------------------------------------------------------------------


def test_body_names_model_and_build() -> None:
    page = _Page(_body(example()))
    for fact in (
        f"Original model: google/gemma-3-4b-it at revision {COMMIT}",
        "Architecture: Gemma 3 (Gemma3ForConditionalGeneration)",
        "Parameters: 4,300,079,472",
        "Licence: gemma",
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.",
        "Quantised with llama.cpp 0.5.0-dev, commit 0c1e57098, cpu backend.",
        "Compiler: c++ (Debian 12.2.0-14+deb12u1) 12.2.0. Source: pypi:0.3.36, sha256 832db0699007",
    ):
        assert fact in page.text
    assert page.links[:2] == ["https://huggingface.co/google/gemma-3-4b-it", "https://ai.google.dev/gemma/terms"]
    assert "https://github.com/ggml-org/llama.cpp/commit/0c1e57098" in page.links


def test_a_build_with_a_number_is_called_by_it() -> None:
    made = example()
    made = made.model_copy(update={"llama_cpp": made.llama_cpp.model_copy(update={"build_number": 9999})})
    assert "Quantised with llama.cpp b9999, commit 0c1e57098" in _Page(_body(made)).text


def test_every_file_is_there_with_its_hash() -> None:
    body = _body(example())
    expected = [(entry.name, entry.sha256) for entry in sorted(example().files, key=lambda e: e.name.lower())]
    assert re.findall(r"^\| (\S+\.gguf) \| `([0-9a-f]{64})` \|$", body, re.MULTILINE) == expected


def test_gemma_terms_are_for_the_gemma_licence_alone() -> None:
    assert "Gemma Terms" not in _body(_with_model(license="apache-2.0"))


def test_imatrix_and_its_text_are_described() -> None:
    page = _Page(_body(example()))
    assert (
        f"Every quant was made with an importance matrix ({IMATRIX}), computed on 146 chunks of 512 tokens of the "
        "calibration set default (texts of this repository, 262,144 bytes, sha256 "
    ) in page.text
    assert f"./{IMATRIX}" in page.links


def test_a_given_imatrix_has_no_text() -> None:
    text = _Page(_body(example().model_copy(update={"calibration": None}))).text
    made = f"Every quant was made with an importance matrix that was given ({IMATRIX}, 146 chunks of 512 tokens)."
    assert made in text
    assert "calibration" not in text


def test_without_an_imatrix_nothing_is_said_of_one() -> None:
    text = card.render(_without_imatrix())
    assert _data(text)["tags"] == ["gemma3", "conversational", "gguf"]
    told = [line for line in text.splitlines() if re.search("imatrix|importance|calibration", line, re.IGNORECASE)]
    assert told == []


def test_a_base_that_was_quantised_before_is_warned_of() -> None:
    page = _Page(_body(_with_model(base_is_dequantised=True)))
    assert (
        "These weights were quantised once before. The base of this set was rebuilt from a packaged Q4_K_M file, so "
        "its weights lie on a quantisation grid."
    ) in page.text
    assert "quantised once before" not in _body(example())


def test_repacking_names_the_rows_that_are_there() -> None:
    assert "Q4_0 and most K-quants profit" in _Page(_body(example())).text
    assert "repack" not in _body(_with_files(_entry("Q8_0"))).lower()


def test_page_has_one_title_and_whole_tables() -> None:
    """Every row of both tables is a row to a Markdown reader, and no line of a table was broken."""
    tags = _Page(_body(example())).tags
    assert tags.count("h1") == 1
    assert tags.count("table") == 2
    assert tags.count("tr") == 2 + 7 + 8
    assert tags.count("td") == 7 * 7 + 8 * 2


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


@pytest.mark.parametrize("value", HOSTILE_TEXTS, ids=ascii)
@pytest.mark.parametrize("field", ["org", "model", "license"])
def test_special_characters_are_shown_as_they_are(field: str, value: str) -> None:
    """The page keeps its structure and its links, and shows the text letter by letter (line breaks as spaces)."""
    marked = f"§{value}§"
    plain, hostile = _Page(_body(_with_model(**{field: "plain"}))), _Page(_body(_with_model(**{field: marked})))
    assert hostile.tags == plain.tags
    assert hostile.links == plain.links
    assert " ".join(marked.split()) in hostile.text


@pytest.mark.parametrize("field", ["org", "model", "license"])
def test_no_raw_html_in_the_body(field: str) -> None:
    assert "<script" not in _body(_with_model(**{field: "<script>alert(1)</script>"}))


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
    ("files", 4, "recipe"),
    ("files", 4, "about"),
    ("files", 4, "parent"),
]


BREAKOUT = "`<script>alert(1)</script>` ) | ![x](https://evil.example) |\n\n# b"


@pytest.mark.parametrize("place", [pytest.param(place, id=".".join(map(str, place))) for place in PLACES])
def test_no_text_of_a_manifest_changes_the_page(tmp_path: Path, place: tuple[str | int, ...]) -> None:
    """`gemma-gguf card` takes any quantset.json: a text is refused when it is read, or shown without breaking out."""
    raw = json.loads(example().model_dump_json())
    assert raw["files"][4]["recipe"] == "Q4_K_L"
    if place[-1] == "parent":
        raw["files"][4]["differs"] = []  # a parent is named only by a row that is the same
    changed = copy.deepcopy(raw)
    at = changed
    for step in place[:-1]:
        at = at[step]
    assert isinstance(at[place[-1]], str)
    at[place[-1]] = BREAKOUT
    (tmp_path / manifest.FILE_NAME).write_text(json.dumps(changed), encoding="utf-8")
    try:
        made = manifest.load(tmp_path)
    except BadInputError:
        return
    plain, hostile = _Page(_body(Manifest.model_validate(raw))), _Page(_body(made))
    assert hostile.tags.count("script") == hostile.tags.count("img") == 0
    assert hostile.tags.count("h1") == 1
    assert hostile.tags.count("tr") == plain.tags.count("tr")
    assert hostile.tags.count("td") == plain.tags.count("td")
    assert "https://evil.example" not in hostile.links


# --- the same page every time --------------------------------------------------------------------------------------


def test_rendering_changes_nothing_and_is_always_the_same(tmp_path: Path) -> None:
    made = example()
    text = card.render(made)
    assert card.render(made) == text
    assert made == example()
    manifest.save(made, tmp_path)
    assert card.render(manifest.load(tmp_path)) == text
    assert text.endswith("|\n")


def test_other_processes_render_the_same_bytes(tmp_path: Path) -> None:
    """Neither hash seeds nor time zone, locale or directory are in the page."""
    root = Path(__file__).parents[1]
    code = "import sys; from tests.examples import example; from gemma_gguf import card; "
    code += "sys.stdout.buffer.write(card.render(example()).encode())"
    for seed, zone in (("1", "Asia/Tokyo"), ("2", "America/Lima")):
        env = {**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": "C", "PYTHONPATH": str(root)}
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, check=True)
        assert done.stdout.decode() == card.render(example())


# --- templates -----------------------------------------------------------------------------------------------------


def test_a_directory_overrides_one_partial(tmp_path: Path) -> None:
    (tmp_path / "title.md.j2").write_text("# My {{ model.model | md }} in {{ rows[0].n_bytes | gb }}\n")
    own, theme = _body(example(), tmp_path), _body(example())
    assert own.startswith("# My gemma-3-4b-it in 0.85GB\n\n## How they were made\n")
    assert own.partition("## How they were made")[2] == theme.partition("## How they were made")[2]


def test_a_directory_overrides_the_whole_page(tmp_path: Path) -> None:
    (tmp_path / "README.md.j2").write_text('mine\n{% include "downloads.md.j2" %}')
    own = card.render(example(), tmp_path)
    assert _data(own) == _data(card.render(example()))
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
    ],
)
def test_undefined_names_are_errors(tmp_path: Path, template: str) -> None:
    (tmp_path / "title.md.j2").write_text(template)
    with pytest.raises(jinja2.UndefinedError, match="no_such_name"):
        card.render(example(), tmp_path)
