"""The parity gate: a base reads and writes text as its checkpoint does.

Consumes the base, the checkpoint's tokenizer files and a build; produces `ParityFacts`. A GGUF with a wrong tokenizer
or chat template loads, answers and measures well enough that nobody notices, and is wrong in every file made from it.
So both sides are asked for the same things, and every id and every character is compared:

- texts: the calibration mix, document by document, and texts that are made to be difficult; each with special tokens
  parsed and as plain text; every added token in a text of its own;
- the vocabulary: the text of every token, which is what a model writes with;
- what stands before and behind a text;
- conversations, rendered by the build's own llama-server and by transformers, and their ids.

The checkpoint's side is `tokenizer.py`, llama.cpp's the bindings, or llama-server where a build has none: both in
processes of their own. What a template has no place for (a system prompt, tools) is not compared: llama.cpp then makes
up for it, on purpose.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from gemma_gguf import tokenizer
from gemma_gguf.errors import MissingToolError, ToolFailedError, VerificationError
from gemma_gguf.files import make_directory, sha256_json, write_atomic
from gemma_gguf.gguf_io import Header
from gemma_gguf.llama_cpp import Build, RunLog, Server, ask_bindings, ask_confined, check_ended, serving
from gemma_gguf.manifest import ParityDifference, ParityFacts
from gemma_gguf.prompts import TOOLS
from gemma_gguf.source import Source

FILES = (  # what of a checkpoint makes its tokenizer and chat template
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
WAIT_SECONDS = 1800.0  # for transformers; Gemma's vocabulary takes it 3 s on a quiet machine
SHOWN_TOKENS, SHOWN_CHARACTERS = 4, 24  # around a difference
MAX_DIFFERENCES = 20  # that are recorded; one error in a vocabulary shows in many texts
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # tokenizer.ggml.token_type
SPACE = "\u2581"  # how SentencePiece writes a space

Ids = list[int]

# --- what is asked -------------------------------------------------------------------------------------------------


def difficult_texts() -> dict[str, str]:
    """Texts on which tokenizers differ when they differ at all."""
    runs = [1, 2, 3, 4, 7, 8, 15, 16, 17, 30, 31, 32, 33, 64]
    return {
        "spaces": "".join(f"{' ' * n}a" for n in runs) + "  ",
        "line ends": "".join(f"{chr(10) * n}a" for n in runs) + "\n\n",
        "tabs": "".join(f"{chr(9) * n}a" for n in runs) + "\t\t",
        "mixed whitespace": " \n \t\n\r\n\r \t \n  \n\n a\u00a0b\u2003c\u3000d\u200be\u2028f\x0bg\x0ch",
        "space before and after": " leading, trailing ",
        "emoji": "😀😃 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇯🇵🇹🇼 1️⃣ ❤️ ☎ 🫠 🤷🏿‍♀️",
        "numbers": "0 1 12 123 1234 12345 1234567890 3.14159 -2.5e-10 1,000,000.00 0x1F 0b101 ½ ² ₃ Ⅷ ٣٤ ४५ 五六 １２",
        "marks": "e\u0301 é n\u0303 ñ \u1100\u1161\u11a8 각 ﬁ ﷺ \u202eabc\u202c \ufeff \u00ad \u2060",
        "rare": "\U00012000\U00012001 \U00010330 ᚠᚢᚦ \U0001f700 \ue000 \U0010ffff \u0378 ￿ \x01\x7f",
        "markup": '<b>bold</b> &lt; <!-- --> </s><s> [INST] <|im_start|> <unk> {{ x }} {% if %} \\n \\" `code` ~~~',
        "code": "def f(x):\n\tif x>=0 and x!=1:\n        return {'a': [x**2 for x in range(10)]}  # ok\n\n\n};\n})();",
        "long word": "Donaudampfschifffahrtsgesellschaft" * 8 + "a" * 300 + "=" * 200 + "ab" * 100,
        "spaces as SentencePiece writes them": f"{SPACE}a{SPACE}{SPACE}b {SPACE} c",
        "one letter": "a",
    }


@dataclass(frozen=True)
class Conversation:
    """A conversation to be rendered. `marks` are what a template that takes all of it writes; `never` it does not."""

    name: str
    messages: tuple[Mapping[str, Any], ...]
    marks: tuple[str, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: bool = False
    never: str | None = None

    def document(self) -> dict[str, Any]:
        return {"messages": list(self.messages), "tools": list(self.tools) or None, "thinking": self.thinking}


def _said(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


def conversations() -> list[Conversation]:
    """What is rendered by both sides. All end with the user, as llama-server would go on with a model's last words."""
    hard = 'Straße "naïve" <b>&amp;</b> \\n 日本語のテキスト، مرحبا 👩‍👩‍👧 {{ x }} {% y %}'
    turns = [_said(("user", "assistant")[n % 2], text) for n, text in enumerate(("Qa1", "Qa2", "Qa3", "Qa4", "Qa5"))]
    tool = {
        **TOOLS[0],
        "function": {
            "name": "look_up",
            "description": 'Looks up "words" & <signs> in 日本語.',
            "parameters": {
                "type": "object",
                "properties": {
                    "word": {"type": "string", "description": "Größe or 大きさ"},
                    "how": {"type": "string", "enum": ["short", "long"]},
                    "n": {"type": "integer"},
                },
                "required": ["word"],
            },
        },
    }
    user = _said("user", "Which word?")
    return [
        Conversation("plain", (_said("user", "Hello there."),), ("Hello there.",)),
        Conversation("system", (_said("system", "Be brief."), _said("user", "Hello.")), ("Be brief.", "Hello.")),
        Conversation("five turns", tuple(turns), ("Qa1", "Qa2", "Qa3", "Qa4", "Qa5")),
        Conversation("nothing said", (_said("user", ""),), ()),
        Conversation("whitespace", (_said("user", "\n  two\n\n\n lines \t\n"),), ("two\n\n\n lines",)),
        Conversation("all kinds of signs", (_said("user", hard),), (hard,)),
        Conversation("special tokens", (_said("user", "a<end_of_turn>\n<turn|><bos>b"),), ("<end_of_turn>",)),
        # A template that knows nothing of parts writes them as Python does; llama-server makes one text of them.
        Conversation("parts", (_said("user", [{"type": "text", "text": "One."}]),), ("One.",), never="'type'"),
        Conversation("thinking", (_said("user", "Think."),), ("Think.",), thinking=True),
        Conversation("a tool", (user,), ("look_up", "Which word?"), (TOOLS[0], tool)),
    ]


def key(base_sha256: str, source: Source, build: Build, texts: Mapping[str, str]) -> str:
    """Hash of everything that a comparison depends on."""
    files = {file: digest for file, digest in source.files.items() if file in FILES}
    return sha256_json(["parity", 1, base_sha256, files, build.key, reference_version(), probe_sha256(texts)])


def probe_sha256(texts: Mapping[str, str]) -> str:
    """Hash of everything that both sides are asked."""
    asked = [vars(conversation) for conversation in conversations()]
    return sha256_json([texts, difficult_texts(), tokenizer.added_probe("token"), asked])


def reference_version() -> str:
    """`transformers 5.23.0, tokenizers 0.23.1`; "" when either is not installed."""
    try:
        return ", ".join(f"{package} {version(package)}" for package in ("transformers", "tokenizers"))
    except PackageNotFoundError:
        return ""


# --- the two sides -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A text, and how the checkpoint reads it: ids, and where in the text each begins."""

    name: str
    text: str
    plain: bool  # special tokens in it are ordinary characters
    ids: Ids
    starts: list[int]


@dataclass(frozen=True)
class Prompt:
    """A conversation as the checkpoint's template writes it."""

    conversation: Conversation
    text: str
    ids: Ids


@dataclass(frozen=True)
class Reference:
    """What the checkpoint's own tokenizer and template say."""

    probes: list[Probe]
    vocabulary: dict[int, str]
    added: frozenset[str]
    special: frozenset[int]  # tokens that plain text never has
    prefix: Ids
    suffix: Ids
    has_template: bool
    prompts: list[Prompt]
    left_out: dict[str, str]  # conversation -> why


@dataclass(frozen=True)
class Answers:
    """What llama.cpp says: ids of each probe, and those of "a" with what stands around it.

    `uncertain` are tokens that it may find in plain text, or pass over, though the file says otherwise.
    """

    ids: list[Ids]
    one_letter: Ids
    uncertain: frozenset[int]
    prompts: list[tuple[str, Ids] | str]  # text and ids, or why there is none


def stage_tokenizer(source: Source, work: Path) -> Path:
    """A directory with links to the checkpoint's tokenizer files, and nothing else."""
    staged = work / "tokenizer" / source.name.model
    shutil.rmtree(staged.parent, ignore_errors=True)
    make_directory(staged)
    for file in source.files:
        if file in FILES:
            (staged / file).symlink_to((source.path / file).resolve())
    return staged


def ask_reference(
    directory: Path, tokens: "Tokens", texts: Mapping[str, str], log: RunLog, seconds: float = tokenizer.SECONDS
) -> Reference:
    """Ask the checkpoint's own tokenizer; `seconds` bound the computing of its template.

    Raises `MissingToolError` without transformers, `ToolFailedError` with its reason when the tokenizer cannot be
    loaded, and `KilledError` when the process was killed or did not get to compute.
    """
    if not reference_version():
        raise MissingToolError(
            "comparing the tokenizer needs transformers",
            next_step="pip install 'gemma-gguf[convert]', or go on without the comparison: --allow-mismatch",
        )
    asked = conversations()
    request = {
        "directory": str(directory),
        "texts": list(texts.values()),
        "gguf_added": tokens.added,
        "conversations": [conversation.document() for conversation in asked],
        "seconds": seconds,
    }
    log.note("asking the checkpoint's tokenizer: python -m gemma_gguf.tokenizer")
    code, output = ask_confined("gemma_gguf.tokenizer", [], json.dumps(request), wait_seconds=WAIT_SECONDS)
    check_ended(code, "asks the checkpoint's tokenizer", WAIT_SECONDS)
    try:
        said = json.loads(output)
    except ValueError:
        said = {"error": f"the process that asks it ended with exit code {code}"}
    if "error" in said:
        raise ToolFailedError(
            f"transformers cannot use the checkpoint's tokenizer: {said['error']}",
            next_step="Mend the checkpoint's tokenizer files, or go on without the comparison: --allow-mismatch",
            log=log.path,
        )
    names = [*texts, *(f"the added token {text!r}" for text in said["added"])]
    written = [*texts.values(), *map(tokenizer.added_probe, said["added"])]
    probes = [
        Probe(name, text, mode == "plain", read["ids"], read["starts"])
        for mode in ("parsed", "plain")
        for name, text, read in zip(names, written, said[mode], strict=True)
    ]
    prompts, left_out = sorted_out(asked, said["rendered"])
    return Reference(
        probes,
        {number: text for text, number in said["vocabulary"]},
        frozenset(said["added"]),
        frozenset(said["special"]),
        said["prefix"],
        said["suffix"],
        said["has_template"],
        prompts,
        left_out,
    )


def sorted_out(
    asked: Sequence[Conversation], rendered: Sequence[Mapping[str, Any]]
) -> tuple[list[Prompt], dict[str, str]]:
    """(prompts to compare, why the other conversations are not)."""
    prompts, left_out = [], {}
    for conversation, said in zip(asked, rendered, strict=bool(rendered)):
        if "refused" in said:
            left_out[conversation.name] = f"the template refuses it: {said['refused']}"
        elif lost := [mark for mark in conversation.marks if mark not in said["text"]]:
            left_out[conversation.name] = f"the template has no place for {lost[0]!r}"
        elif conversation.never is not None and conversation.never in said["text"]:
            left_out[conversation.name] = "the template takes texts, not lists of parts"
        else:
            prompts.append(Prompt(conversation, said["text"], said["ids"]))
    return prompts, left_out


def ask_llama_cpp(
    build: Build, base: Path, tokens: "Tokens", reference: Reference, *, work: Path, log: RunLog
) -> Answers:
    """Ask llama.cpp what it makes of the same; the server runs only where there is a prompt or no bindings."""
    prompts: list[str] = []
    if build.bindings is None or reference.prompts:
        with serving(build, server_arguments(base), log=log) as server:
            said = [_rendered(server, prompt.conversation) for prompt in reference.prompts]
            prompts = [text for text, _ in said if text is not None]
            if build.bindings is None:
                ids = [_tokenized(server, *row) for row in _rows(reference, prompts)]
                return _answers(reference, ids, tokens.control | _mended(server.output()), said)
    else:
        said = []
    place = work / "parity"
    make_directory(place)
    try:
        text, found = place / "texts.json", place / "ids"
        write_atomic(text, json.dumps(_rows(reference, prompts)))
        ask_bindings(build, "tokenize", base, text, log, settings={"ids": str(found.resolve())})
        *ids, control = _read_ids(np.fromfile(found, np.int32))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return _answers(reference, ids, tokens.control ^ frozenset(control), said)


def server_arguments(base: Path) -> list[str | Path]:
    """The smallest context that llama-server takes; nothing of it is used."""
    size = ["-c", "256", "-b", "32", "-ub", "32", "-np", "1", "-ngl", "0"]
    return ["-m", base.resolve(), *size, "--no-warmup", "--no-webui", "--jinja"]


def _rows(reference: Reference, prompts: Sequence[str]) -> list[tuple[str, bool, bool]]:
    """What llama.cpp is to read: (text, with BOS and EOS, special tokens parsed)."""
    rows = [(probe.text, False, not probe.plain) for probe in reference.probes]
    return [*rows, ("a", True, True), *((prompt, True, True) for prompt in prompts)]


def _read_ids(data: Any) -> list[Ids]:
    found, at = [], 0
    while at < len(data):
        n = int(data[at])
        found.append([int(token) for token in data[at + 1 : at + 1 + n]])
        at += 1 + n
    return found


def _answers(
    reference: Reference, ids: Sequence[Ids], uncertain: frozenset[int], said: Sequence[tuple[str | None, str]]
) -> Answers:
    n = len(reference.probes)
    of_prompts = iter(ids[n + 1 :])
    prompts: list[tuple[str, Ids] | str] = [why if text is None else (text, next(of_prompts)) for text, why in said]
    return Answers(list(ids[:n]), ids[n], uncertain, prompts)


def _mended(output: str) -> frozenset[int]:
    """Tokens of which llama.cpp says while it loads that it makes control tokens of them."""
    return frozenset(int(n) for n in re.findall(r"control-looking token: +([0-9]{1,9}) ", output))


def _rendered(server: Server, conversation: Conversation) -> tuple[str | None, str]:
    """(prompt, "") as llama-server renders it, or (None, why not)."""
    asked: dict[str, object] = {
        "messages": list(conversation.messages),
        "add_generation_prompt": True,
        "chat_template_kwargs": {"enable_thinking": conversation.thinking},
    }
    if conversation.tools:
        asked["tools"] = list(conversation.tools)
    status, said = server.post("/apply-template", asked)
    if status == 200 and isinstance(said, dict) and isinstance(said.get("prompt"), str):
        return said["prompt"], ""
    return None, f"llama-server answers {status}: {json.dumps(said, ensure_ascii=False)[:300]}"


def _tokenized(server: Server, text: str, add_special: bool, parse_special: bool) -> Ids:
    asked = {"content": text, "add_special": add_special, "parse_special": parse_special}
    status, said = server.post("/tokenize", asked)
    if status != 200:
        raise ToolFailedError(f"llama-server answers {status} to /tokenize: {said}")
    return [int(token) for token in said["tokens"]]


# --- comparing -----------------------------------------------------------------------------------------------------


def compare(
    source: Source,
    base: Path,
    header: Header,
    build: Build,
    *,
    texts: Mapping[str, str],
    work: Path,
    log: RunLog,
) -> ParityFacts:
    """Ask both sides and compare. `texts` are read beside `difficult_texts`, by name."""
    tokens = Tokens.of(header)
    staged = stage_tokenizer(source, work)
    try:
        reference = ask_reference(staged, tokens, {**difficult_texts(), **texts}, log)
    finally:
        shutil.rmtree(staged.parent, ignore_errors=True)
    answers = ask_llama_cpp(build, base, tokens, reference, work=work, log=log)
    found = differences(reference, answers, tokens)
    left_out = {**reference.left_out, **_unasked(reference, answers, tokens, build)}
    return ParityFacts(
        probe_sha256=probe_sha256(texts),
        reference=reference_version(),
        asked="llama-server" if build.bindings is None else "bindings",
        build=build.key,
        n_texts=len(reference.probes),
        n_tokens=sum(len(probe.ids) for probe in reference.probes),
        n_vocab=len(reference.vocabulary) - len(_beyond(reference, tokens)),
        n_added=len(reference.added),
        n_conversations=len(reference.prompts),
        left_out=left_out,
        added_bos=_adds_bos_alone(reference, answers, tokens),
        problem=None,
        differences=found[:MAX_DIFFERENCES],
    )


def not_compared(build: Build, problem: str, texts: Mapping[str, str]) -> ParityFacts:
    """The record of a comparison that the user went on without."""
    return ParityFacts(
        probe_sha256=probe_sha256(texts),
        reference=reference_version(),
        asked="llama-server" if build.bindings is None else "bindings",
        build=build.key,
        n_texts=0,
        n_tokens=0,
        n_vocab=0,
        n_added=0,
        n_conversations=0,
        left_out={},
        added_bos=False,
        problem=problem,
        differences=[],
    )


def shown(facts: ParityFacts) -> str:
    """What was compared, in a line."""
    if facts.problem is not None:
        return f"NOT compared: {facts.problem}"
    texts = f"{facts.n_tokens:,} tokens of {facts.n_texts:,} texts, {facts.n_vocab:,} of the vocabulary"
    compared = f"{texts}, {facts.n_conversations} conversations, with {facts.reference}"
    return f"{len(facts.differences)} differences: {compared}" if facts.differences else compared


def refuse(facts: ParityFacts, log: RunLog) -> None:
    """Raise `VerificationError` with the first difference, if there is one."""
    if not facts.differences:
        return
    first, n = facts.differences[0], len(facts.differences)
    more = "" if n == 1 else f" (the first of {n}{' or more' if n == MAX_DIFFERENCES else ''} differences)"
    for difference in facts.differences:
        log.note(f"parity: {difference.what}")
    raise VerificationError(
        f"the GGUF does not read text as its checkpoint does{more}: {first.what}",
        next_step="Use another llama.cpp (--llama-cpp), mend the checkpoint's tokenizer or chat template, or keep the "
        "difference and have the card tell of it: --allow-mismatch",
        log=log.path,
    )


@dataclass(frozen=True)
class Tokens:
    """The vocabulary of a GGUF."""

    texts: list[str]
    types: list[int]
    bos: int | None
    template: bool  # whether there is one

    @classmethod
    def of(cls, header: Header) -> "Tokens":
        bos = header.get("tokenizer.ggml.bos_token_id")
        return cls(
            header.get("tokenizer.ggml.tokens", []),
            header.get("tokenizer.ggml.token_type", []),
            bos if isinstance(bos, int) else None,
            isinstance(header.get("tokenizer.chat_template"), str),
        )

    @property
    def added(self) -> list[str]:
        """The tokens that are kept apart from the rest: control and user-defined ones."""
        return [text for text, kind in zip(self.texts, self.types, strict=False) if kind in (CONTROL, USER_DEFINED)]

    @property
    def control(self) -> frozenset[int]:
        return frozenset(number for number, kind in enumerate(self.types) if kind == CONTROL)

    def text(self, number: int | None) -> str | None:
        return self.texts[number] if number is not None and 0 <= number < len(self.texts) else None

    def show(self, ids: Sequence[int]) -> str:
        return _shown(ids, {number: self.text(number) for number in ids})


def differences(reference: Reference, answers: Answers, tokens: Tokens) -> list[ParityDifference]:
    """Everything that is not the same, texts first: there a difference shows what it does."""
    found = _text_differences(reference, answers, tokens)
    found += _vocabulary_differences(reference, tokens)
    found += _bos_differences(reference, answers, tokens)
    return found + _prompt_differences(reference, answers, tokens)


def _text_differences(reference: Reference, answers: Answers, tokens: Tokens) -> list[ParityDifference]:
    not_plain = answers.uncertain | _always_read(reference, tokens)
    uncertain = [text for number in not_plain if (text := tokens.text(number))]
    beyond = list(_beyond(reference, tokens).values())
    found = []
    for probe, ids in zip(reference.probes, answers.ids, strict=True):
        passed_over = [SPACE, *beyond, *(uncertain if probe.plain else [])]
        if probe.ids == ids or any(text in probe.text for text in passed_over):
            continue
        at = _first(probe.ids, ids)
        character = probe.starts[at] if at < len(probe.starts) else len(probe.text)
        how = "as plain text" if probe.plain else "special tokens parsed"
        theirs = _shown(probe.ids[at : at + SHOWN_TOKENS], reference.vocabulary)
        what = (
            f"{probe.name} ({how}), token {at}, character {character}, at {_excerpt(probe.text, character)}: "
            f"the checkpoint has {theirs}; the GGUF has {tokens.show(ids[at : at + SHOWN_TOKENS])}"
        )
        found.append(ParityDifference(kind="tokens", where=probe.name, position=at, what=what))
    return found


def _beyond(reference: Reference, tokens: Tokens) -> dict[int, str]:
    """Tokens of the checkpoint's tokenizer that its model has no row for: a GGUF has one token per row.

    transformers' classes add some of their own (a `<mask>`) where a tokenizer lacks them; no model could read them.
    """
    return {number: text for number, text in reference.vocabulary.items() if number >= len(tokens.texts)}


def _always_read(reference: Reference, tokens: Tokens) -> frozenset[int]:
    """Special tokens of the checkpoint that the file types as user-defined: llama.cpp finds them in plain text, too.

    The converter does so to Gemma 4's marks of thoughts and tool calls, because llama.cpp writes no control tokens and
    its chat parser must see these (`conversion/gemma.py`).
    """
    typed = frozenset(number for number, kind in enumerate(tokens.types) if kind == USER_DEFINED)
    return typed & reference.special


def _vocabulary_differences(reference: Reference, tokens: Tokens) -> list[ParityDifference]:
    """Tokens with another text. Beyond the checkpoint's vocabulary a GGUF has only padding."""
    found = []
    for number, theirs in sorted(reference.vocabulary.items()):
        ours = tokens.text(number)
        # In a GGUF, added tokens have spaces where the rest of a vocabulary has SentencePiece's sign.
        if ours is None or ours == theirs or ours.replace(SPACE, " ") == theirs.replace(SPACE, " "):
            continue
        what = f"token {number} is {theirs!r} in the checkpoint and {ours!r} in the GGUF"
        found.append(ParityDifference(kind="vocabulary", where=f"token {number}", position=number, what=what))
    for number in range(len(tokens.texts)):
        if number not in reference.vocabulary and number < len(tokens.types) and tokens.types[number] != UNUSED:
            what = f"token {number} is {tokens.texts[number]!r} in the GGUF, and the checkpoint has no such token"
            found.append(ParityDifference(kind="vocabulary", where=f"token {number}", position=number, what=what))
    return found


def _around(reference: Reference, answers: Answers) -> tuple[Ids, Ids]:
    """What llama.cpp puts before and behind the text "a"."""
    bare = next(ids for probe, ids in zip(reference.probes, answers.ids, strict=True) if probe.text == "a")
    whole, n = answers.one_letter, len(bare)
    at = next((at for at in range(len(whole)) if whole[at : at + n] == bare), len(whole))
    return whole[:at], whole[at + n :]


def _adds_bos_alone(reference: Reference, answers: Answers, tokens: Tokens) -> bool:
    """Whether llama.cpp puts BOS before a text, and the checkpoint's tokenizer leaves that to the chat template.

    Every Gemma was trained on texts that begin with BOS; llama.cpp's converter sees to it.
    """
    before, _ = _around(reference, answers)
    return before == [tokens.bos] and not reference.prefix


def _bos_differences(reference: Reference, answers: Answers, tokens: Tokens) -> list[ParityDifference]:
    before, behind = _around(reference, answers)
    found = []
    for where, ours, theirs in (("before", before, reference.prefix), ("behind", behind, reference.suffix)):
        if ours != theirs and not (where == "before" and _adds_bos_alone(reference, answers, tokens)):
            what = (
                f"{where} a text the checkpoint has {_shown(theirs, reference.vocabulary)}; "
                f"the GGUF has {tokens.show(ours)}"
            )
            found.append(ParityDifference(kind="bos", where=where, position=None, what=what))
    return found


def _prompt_differences(reference: Reference, answers: Answers, tokens: Tokens) -> list[ParityDifference]:
    if reference.has_template != tokens.template:
        has = "the checkpoint has a chat template and the GGUF has none"
        what = has if reference.has_template else "the GGUF has a chat template and the checkpoint has none"
        return [ParityDifference(kind="template", where="chat template", position=None, what=what)]
    bos = tokens.text(tokens.bos)
    found = []
    for prompt, said in zip(reference.prompts, answers.prompts, strict=True):
        name = f"the conversation {prompt.conversation.name!r}"
        if isinstance(said, str):
            found.append(ParityDifference(kind="template", where=name, position=None, what=f"{name}: {said}"))
            continue
        text, ids = said
        # llama-server takes the BOS that a template writes away where the tokenizer adds one; the ids tell.
        theirs = prompt.text.removeprefix(bos) if bos and not text.startswith(bos) else prompt.text
        if text != theirs:
            at = _first(theirs, text)
            what = (
                f"{name}, character {at}: the checkpoint's template writes {_excerpt(theirs, at)}, "
                f"llama-server {_excerpt(text, at)}"
            )
            found.append(ParityDifference(kind="template", where=name, position=at, what=what))
        elif ids != prompt.ids:
            at = _first(prompt.ids, ids)
            what = (
                f"{name}, token {at} of the prompt: the checkpoint has "
                f"{_shown(prompt.ids[at : at + SHOWN_TOKENS], reference.vocabulary)}; "
                f"the GGUF has {tokens.show(ids[at : at + SHOWN_TOKENS])}"
            )
            found.append(ParityDifference(kind="tokens", where=name, position=at, what=what))
    return found


def _unasked(reference: Reference, answers: Answers, tokens: Tokens, build: Build) -> dict[str, str]:
    """Tokens that were not compared, or not in plain text, and why."""
    beyond = _beyond(reference, tokens)
    left_out = {f"token {number} {beyond[number]!r}": "the model has no row for it" for number in sorted(beyond)}
    if len(left_out) > MAX_DIFFERENCES:
        left_out = {f"{len(left_out)} tokens from number {min(beyond)} on": "the model has no rows for them"}
    pairs = zip(reference.probes, answers.ids, strict=True)
    if any(SPACE in probe.text and probe.ids != ids for probe, ids in pairs):
        left_out[f"the sign {SPACE} (U+2581) in a text"] = (
            "SentencePiece's own; the two sides take it for a space or not"
        )
    if build.bindings is None:
        return {**left_out, "special tokens in plain text": "llama-server does not say how llama.cpp types them"}
    why = "llama.cpp gives it another type than the file; where special tokens are parsed it was compared"
    mended = {f"token {number} {tokens.text(number)!r} in plain text": why for number in sorted(answers.uncertain)}
    why = "llama.cpp reads it in any text, as the file types it; where special tokens are parsed it was compared"
    always = {f"token {n} {tokens.text(n)!r} in plain text": why for n in sorted(_always_read(reference, tokens))}
    return {**left_out, **mended, **always}


def _first(one: Sequence[object], other: Sequence[object]) -> int:
    """Where two sequences begin to differ."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _excerpt(text: str, at: int) -> str:
    """Some characters around a place, the place marked."""
    before, behind = text[max(0, at - SHOWN_CHARACTERS) : at], text[at : at + SHOWN_CHARACTERS]
    return f"{before!r} >> {behind!r}"


def _shown(ids: Sequence[int], vocabulary: Mapping[int, str | None]) -> str:
    texts = ((n, vocabulary.get(n)) for n in ids)
    return ", ".join(f"{n} {text!r}" if text is not None else f"{n}, no such token" for n, text in texts) or "nothing"
