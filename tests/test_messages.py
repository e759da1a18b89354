"""Every message of both themes is translated into every language; no catalogue is stale."""

import io
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from babel.messages.catalog import Catalog, Message
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po

from gemma_gguf import card

ROOT = Path(__file__).parents[1]
LANGUAGES = [tag for tag in card.LANGUAGES if tag != "en"]
every_language = pytest.mark.parametrize("tag", LANGUAGES)


def po_path(tag: str) -> Path:
    return ROOT / "templates" / "locale" / tag.replace("-", "_") / "LC_MESSAGES" / "card.po"


def catalogue(tag: str) -> Catalog:
    with po_path(tag).open("rb") as file:
        return read_po(file, locale=tag.replace("-", "_"))


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """The messages of templates, rows and recipes now, by the command of `make messages`."""
    pot = tmp_path_factory.mktemp("messages") / "card.pot"
    makefile = (ROOT / "Makefile").read_text()
    line = re.search(r"^\t\$\(BIN\)/pybabel (--quiet extract .*)$", makefile, re.MULTILINE)
    assert line is not None
    arguments = line[1].replace("$(VENV)/card.pot", str(pot)).split()
    subprocess.run([sys.executable, "-m", "babel.messages.frontend", *arguments], cwd=ROOT, check=True)
    with pot.open("rb") as file:
        return read_po(file)


def ids(catalog: Catalog) -> set[str]:
    return {english_of(message) for message in catalog if message.id}


def english_of(message: Message) -> str:
    """The English text, of a plural the singular."""
    return message.id if isinstance(message.id, str) else message.id[0]


def texts(message: Message) -> list[str]:
    given = [message.string] if isinstance(message.string, str | None) else message.string
    return [text or "" for text in given]


def test_messages_are_found_in_templates_rows_and_recipes(extracted: Catalog) -> None:
    for known in ("Provenance", "not measured", "I-quant, 2.31 bits", "What's new"):
        assert known in ids(extracted)
    assert len(ids(extracted)) > 100


@every_language
def test_every_message_is_translated_and_none_is_stale(extracted: Catalog, tag: str) -> None:
    """When this fails: `make messages`, fill in what is empty, `make messages` again."""
    made = catalogue(tag)
    assert ids(made) - ids(extracted) == set(), "stale"
    assert ids(extracted) - ids(made) == set(), "missing"
    assert [message.id for message in made if message.id and not all(texts(message))] == [], "empty"
    assert [message.id for message in made if message.id and message.fuzzy] == [], "not reviewed"


@every_language
def test_translations_keep_what_is_filled_in(tag: str) -> None:
    """The same placeholders, code spans and marks of Markdown."""
    placeholder = re.compile(r"%\((\w+)\)[sd]|(%)(?!\()")
    for message in catalogue(tag):
        if not message.id:
            continue
        english = english_of(message)
        for text in texts(message):
            assert Counter(placeholder.findall(text)).keys() == Counter(placeholder.findall(english)).keys(), english
            for mark in ("`", "**", "[", "]("):
                assert text.count(mark) == english.count(mark), english
            assert re.findall(r"`[^`%]*`", text) == re.findall(r"`[^`%]*`", english)


@every_language
def test_translations_are_in_their_own_writing(tag: str) -> None:
    """No message was left in English, but for those that have no words of it."""
    own = {"ja": r"[\u3040-\u30ff\u4e00-\u9fff]", "zh-Hant": r"[\u4e00-\u9fff]"}[tag]
    foreign = {"ja": r"[\uac00-\ud7af]", "zh-Hant": r"[\u3040-\u30ff\uac00-\ud7af]"}[tag]
    simplified = "张权类载说显测资讯库该个"  # characters that Traditional Chinese writes otherwise
    for message in catalogue(tag):
        for text in texts(message) if message.id else []:
            assert re.search(own, text) or re.fullmatch(r"%\(about\)s.", text), text
            assert not re.search(foreign, text), text
            if tag == "zh-Hant":
                assert not set(text) & set(simplified), text


@every_language
def test_compiled_catalogues_are_those_of_the_sources(tag: str) -> None:
    """gettext reads the compiled form; `make messages` writes it."""
    compiled = io.BytesIO()
    write_mo(compiled, catalogue(tag))
    assert po_path(tag).with_suffix(".mo").read_bytes() == compiled.getvalue()


@every_language
def test_the_catalogue_is_what_a_card_uses(tag: str) -> None:
    words = card.translations(tag)
    for message in catalogue(tag):
        if message.id and isinstance(message.id, str):
            assert words.gettext(message.id) == message.string
