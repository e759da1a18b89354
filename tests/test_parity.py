"""The parity gate: real tokenizers and templates in transformers and llama.cpp, and what is said of a difference."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma_gguf import calibration, factory, gguf_io, llama_cpp, manifest, parity
from gemma_gguf.errors import MissingToolError, ToolFailedError, VerificationError
from gemma_gguf.gguf_io import strings_value, write_with_values
from gemma_gguf.llama_cpp import Build, RunLog
from gemma_gguf.manifest import ParityFacts
from gemma_gguf.parity import Answers, Conversation, Probe, Prompt, Reference, Tokens
from gemma_gguf.session import Options
from tests import checkpoints, examples

# --- what is said of a difference: no model needed -------------------------------------------------------------------

TEXTS = ["<pad>", "<bos>", "a", "b", "▁", "<turn>", "  ", "</s>"]
TYPES = [3, 3, 1, 1, 1, 3, 4, 4]
TOKENS = Tokens(TEXTS, TYPES, bos=1, template=True)
PLAIN = Conversation("plain", ({"role": "user", "content": "ab"},), ("ab",))


def reference(**changed: Any) -> Reference:
    """A checkpoint that has the vocabulary of `TOKENS`, and has read two texts and one conversation."""
    made = Reference(
        probes=[Probe("one letter", "a", False, [2], [0]), Probe("words", "ab a", False, [2, 3, 4, 2], [0, 1, 2, 3])],
        vocabulary=dict(enumerate(TEXTS)),
        added=frozenset({"<turn>", "  "}),
        special=frozenset({1, 5}),
        prefix=[1],
        suffix=[],
        has_template=True,
        prompts=[Prompt(PLAIN, "<bos><turn>ab", [1, 5, 2, 3])],
        left_out={},
    )
    return replace(made, **changed)


def answers(**changed: Any) -> Answers:
    """A llama.cpp that agrees with `reference()`; it takes the BOS that a template writes away."""
    made = Answers([[2], [2, 3, 4, 2]], [1, 2], frozenset(), [("<turn>ab", [1, 5, 2, 3])])
    return replace(made, **changed)


def said(theirs: Reference, ours: Answers, tokens: Tokens = TOKENS) -> list[str]:
    return [difference.what for difference in parity.differences(theirs, ours, tokens)]


def test_the_same_is_the_same() -> None:
    assert said(reference(), answers()) == []


def replaced(at: int, text: str) -> Tokens:
    return replace(TOKENS, texts=[*TEXTS[:at], text, *TEXTS[at + 1 :]])


@pytest.mark.parametrize(
    ("theirs", "ours", "tokens", "what"),
    [
        pytest.param(
            reference(),
            answers(ids=[[2], [2, 3, 2, 4]]),
            TOKENS,
            "words (special tokens parsed), token 2, character 2, at 'ab' >> ' a': "
            "the checkpoint has 4 '▁', 2 'a'; the GGUF has 2 'a', 4 '▁'",
            id="another order",
        ),
        pytest.param(
            reference(),
            answers(ids=[[2], [2, 3]]),
            TOKENS,
            "words (special tokens parsed), token 2, character 2, at 'ab' >> ' a': "
            "the checkpoint has 4 '▁', 2 'a'; the GGUF has nothing",
            id="ends early",
        ),
        pytest.param(
            reference(),
            answers(ids=[[2], [2, 3, 4, 2, 99]]),
            TOKENS,
            "words (special tokens parsed), token 4, character 4, at 'ab a' >> '': "
            "the checkpoint has nothing; the GGUF has 99, no such token",
            id="goes on",
        ),
        pytest.param(
            reference(), answers(), replaced(3, "c"), "token 3 is 'b' in the checkpoint and 'c' in the GGUF", id="token"
        ),
        pytest.param(
            reference(vocabulary=dict(enumerate(TEXTS[:7]))),
            answers(),
            TOKENS,
            "token 7 is '</s>' in the GGUF, and the checkpoint has no such token",
            id="more tokens",
        ),
        pytest.param(
            reference(prefix=[1]),
            answers(one_letter=[2]),
            TOKENS,
            "before a text the checkpoint has 1 '<bos>'; the GGUF has nothing",
            id="no BOS",
        ),
        pytest.param(
            reference(prefix=[]),
            answers(one_letter=[0, 2]),
            TOKENS,
            "before a text the checkpoint has nothing; the GGUF has 0 '<pad>'",
            id="what is no BOS",
        ),
        pytest.param(
            reference(),
            answers(one_letter=[1, 2, 5]),
            TOKENS,
            "behind a text the checkpoint has nothing; the GGUF has 5 '<turn>'",
            id="something behind",
        ),
        pytest.param(
            reference(),
            answers(prompts=[("<turn>\nab", [1, 5, 2, 3])]),
            TOKENS,
            "the conversation 'plain', character 6: the checkpoint's template writes '<turn>' >> 'ab', "
            "llama-server '<turn>' >> '\\nab'",
            id="another prompt",
        ),
        pytest.param(
            reference(),
            answers(prompts=[("<turn>ab", [1, 1, 5, 2])]),
            TOKENS,
            "the conversation 'plain', token 1 of the prompt: the checkpoint has 5 '<turn>', 2 'a', 3 'b'; "
            "the GGUF has 1 '<bos>', 5 '<turn>', 2 'a'",
            id="two BOS",
        ),
        pytest.param(
            reference(),
            answers(prompts=["llama-server answers 500: boom"]),
            TOKENS,
            "the conversation 'plain': llama-server answers 500: boom",
            id="the server refuses",
        ),
        pytest.param(
            reference(),
            answers(prompts=[]),
            replace(TOKENS, template=False),
            "the checkpoint has a chat template and the GGUF has none",
            id="lost template",
        ),
        pytest.param(
            reference(has_template=False, prompts=[]),
            answers(prompts=[]),
            TOKENS,
            "the GGUF has a chat template and the checkpoint has none",
            id="foreign template",
        ),
    ],
)
def test_a_difference(theirs: Reference, ours: Answers, tokens: Tokens, what: str) -> None:
    assert said(theirs, ours, tokens) == [what]


@pytest.mark.parametrize(
    ("theirs", "ours", "tokens"),
    [
        pytest.param(reference(prefix=[]), answers(), TOKENS, id="BOS that the tokenizer leaves to the template"),
        pytest.param(
            reference(), answers(), replace(TOKENS, texts=[*TEXTS, "<pad9>"], types=[*TYPES, 5]), id="padding"
        ),
        pytest.param(reference(), answers(), replaced(6, "▁▁"), id="spaces in an added token"),
        pytest.param(
            reference(
                probes=[*reference().probes, Probe("mask", "a<mask>", False, [2, 8], [0, 1])],
                vocabulary=dict(enumerate([*TEXTS, "<mask>"])),
            ),
            answers(ids=[*answers().ids, [2, 5]]),
            TOKENS,
            id="a token that the model has no row for",
        ),
        pytest.param(
            reference(probes=[*reference().probes, Probe("html", "a</s>", True, [2, 7], [0, 1])]),
            answers(ids=[*answers().ids, [2, 4, 4]], uncertain=frozenset({7})),
            TOKENS,
            id="a token that llama.cpp types otherwise, in plain text",
        ),
        pytest.param(
            reference(probes=[*reference().probes, Probe("mark", "a<turn>", True, [2, 7, 7], [0, 1, 2])]),
            answers(ids=[*answers().ids, [2, 5]]),
            replace(TOKENS, types=[*TYPES[:5], 4, *TYPES[6:]]),
            id="a special token that the converter makes visible, in plain text",
        ),
        pytest.param(
            reference(prompts=[Prompt(PLAIN, "<bos><turn>ab", [1, 5, 2, 3])]),
            answers(prompts=[("<bos><turn>ab", [1, 5, 2, 3])]),
            TOKENS,
            id="a server that leaves BOS where it is",
        ),
    ],
)
def test_what_is_no_difference(theirs: Reference, ours: Answers, tokens: Tokens) -> None:
    assert said(theirs, ours, tokens) == []


def test_a_token_that_llama_cpp_types_otherwise_counts_where_it_is_parsed() -> None:
    probe = Probe("html", "a</s>", False, [2, 7], [0, 1])
    ours = answers(ids=[*answers().ids, [2, 4, 4]], uncertain=frozenset({7}))
    assert len(said(reference(probes=[*reference().probes, probe]), ours)) == 1


@pytest.mark.parametrize(
    ("plain", "special", "kind"),
    [
        pytest.param(False, {1, 5}, 4, id="where special tokens are parsed"),
        pytest.param(True, {1}, 4, id="that the checkpoint does not call special"),
        pytest.param(True, {1, 5}, 3, id="that is a control token in the file"),
    ],
)
def test_a_token_that_is_no_visible_special_one_counts(plain: bool, special: set[int], kind: int) -> None:
    probe = Probe("mark", "a<turn>", plain, [2, 7, 7], [0, 1, 2])
    theirs = reference(probes=[*reference().probes, probe], special=frozenset(special))
    tokens = replace(TOKENS, types=[*TYPES[:5], kind, *TYPES[6:]])
    assert len(said(theirs, answers(ids=[*answers().ids, [2, 5]]), tokens)) == 1


@pytest.mark.parametrize(
    ("name", "rendered", "why"),
    [
        ("plain", {"text": "<u>Hello there.", "ids": [1]}, None),
        ("system", {"text": "<u>Hello.", "ids": [1]}, "the template has no place for 'Be brief.'"),
        ("system", {"refused": "TemplateError: no"}, "the template refuses it: TemplateError: no"),
        ("parts", {"text": "<u>One.", "ids": [1]}, None),
        (
            "parts",
            {"text": "[{'type': 'text', 'text': 'One.'}]", "ids": [1]},
            "the template takes texts, not lists of parts",
        ),
        ("nothing said", {"text": "", "ids": []}, None),
    ],
)
def test_what_a_template_has_no_place_for_is_not_compared(name: str, rendered: dict[str, Any], why: str | None) -> None:
    (asked,) = [conversation for conversation in parity.conversations() if conversation.name == name]
    prompts, left_out = parity.sorted_out([asked], [rendered])
    assert ([prompt.conversation.name for prompt in prompts], left_out) == (
        ([name], {}) if why is None else ([], {name: why})
    )


def facts_with(n: int) -> ParityFacts:
    found = [
        manifest.ParityDifference(kind="vocabulary", where=f"token {i}", position=i, what=f"token {i} is not the same")
        for i in range(n)
    ]
    return examples.parity().model_copy(update={"differences": found})


@pytest.mark.parametrize(
    ("n", "how_many"), [(1, ""), (3, " (the first of 3 differences)"), (20, " (the first of 20 or more differences)")]
)
def test_a_refusal_names_the_first_difference(n: int, how_many: str, log: RunLog) -> None:
    with pytest.raises(VerificationError) as caught:
        parity.refuse(facts_with(n), log)
    assert caught.value.what == f"the GGUF does not read text as its checkpoint does{how_many}: token 0 is not the same"
    assert "--allow-mismatch" in str(caught.value.next_step)
    assert caught.value.log == log.path


def test_no_difference_is_not_refused(log: RunLog) -> None:
    parity.refuse(facts_with(0), log)


def test_probe_is_what_is_asked() -> None:
    """Every script of the mix, and the texts that are made for this."""
    texts = calibration.part_documents("mix")
    assert {name.partition("/")[0] for name in texts} == {part.name for part in calibration.parts("mix")}
    assert sum(part.n_documents for part in calibration.parts("mix")) == len(texts)
    assert set(parity.difficult_texts()).isdisjoint(texts)
    assert parity.probe_sha256(texts) != parity.probe_sha256({**texts, "one more": "x"})


# --- real ones -------------------------------------------------------------------------------------------------------

# As Gemma 3's: a system prompt goes before the user's first words.
TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] | trim }}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def options(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A checkpoint with a chat template, converted and compared."""
    checkpoint = checkpoints.write_gemma3_text(tmp_path_factory.mktemp("parity") / "tiny-parity", layers=1)
    config = checkpoint / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    made = Options(str(checkpoint), name="test/tiny-parity", out=checkpoint.parent / "out", until="convert")
    factory.run(made)
    return made


@pytest.fixture
def base(options: Options) -> Path:
    return options.out / ".work" / "test_tiny-parity" / "test_tiny-parity-bf16.gguf"


def recorded(options: Options) -> ParityFacts:
    facts = manifest.load(options.out / "test_tiny-parity-GGUF").parity
    assert facts is not None
    return facts


def test_a_converted_base_is_the_same(options: Options) -> None:
    facts = recorded(options)
    assert (facts.asked, facts.problem, facts.differences, facts.added_bos) == ("bindings", None, [], False)
    assert facts.n_conversations == 9
    assert facts.n_tokens > 300_000
    assert facts.n_vocab == len(checkpoints.sentencepiece_model()[1])
    assert facts.left_out["a tool"] == "the template has no place for 'look_up'"
    assert facts.reference.startswith("transformers 5.")


def test_what_was_compared_is_not_compared_again(options: Options) -> None:
    (again,) = [done for done in factory.run(options).done if done.stage == "parity"]
    assert not again.made
    assert again.why.startswith("compared before: ")


def edited(base: Path, target: Path, change: Callable[[list[str]], list[str]]) -> Path:
    """The base with another vocabulary."""
    header = gguf_io.read_header(base)
    write_with_values(
        header, target, {"tokenizer.ggml.tokens": strings_value(change(header.get("tokenizer.ggml.tokens")))}
    )
    return target


def test_an_edited_token_is_caught(options: Options, base: Path, tmp_path: Path) -> None:
    """And with `--allow-mismatch` kept and told of; without it the next run refuses again."""

    def swap(tokens: list[str]) -> list[str]:
        """`the` and `ing` in each other's place: both are tokens still, and the model would write the wrong one."""
        one, other = tokens.index("the"), tokens.index("ing")
        swapped = list(tokens)
        swapped[one], swapped[other] = "ing", "the"
        return swapped

    wrong = replace(options, base=edited(base, tmp_path / "wrong.gguf", swap), out=tmp_path / "out")
    with pytest.raises(VerificationError) as caught:
        factory.run(wrong)
    tokens = checkpoints.sentencepiece_model()[1]
    the, ing = tokens.index("the"), tokens.index("ing")
    assert caught.value.what.startswith(
        "the GGUF does not read text as its checkpoint does (the first of 20 or more differences): "
    )
    assert f"; the GGUF has {the} 'ing'" in caught.value.what or f"; the GGUF has {ing} 'the'" in caught.value.what
    assert " (special tokens parsed), token " in caught.value.what
    factory.run(replace(wrong, allow_mismatch=True))
    assert len(recorded(wrong).differences) == parity.MAX_DIFFERENCES
    with pytest.raises(VerificationError):
        factory.run(wrong)


def with_template(base: Path, target: Path, template: str) -> Path:
    value = template.encode()
    key = {"tokenizer.chat_template": len(value).to_bytes(8, "little") + value}
    write_with_values(gguf_io.read_header(base), target, key)
    return target


def test_a_swapped_template_is_caught(options: Options, base: Path, tmp_path: Path) -> None:
    other = TEMPLATE.replace("'<end_of_turn>\n'", "'<end_of_turn>'")
    wrong = replace(options, base=with_template(base, tmp_path / "wrong.gguf", other), out=tmp_path / "out")
    with pytest.raises(VerificationError) as caught:
        factory.run(wrong)
    assert caught.value.what == (
        "the GGUF does not read text as its checkpoint does (the first of 9 differences): the conversation 'plain', "
        "character 45: the checkpoint's template writes 'ello there.<end_of_turn>' >> '\\n<start_of_turn>model\\n', "
        "llama-server 'ello there.<end_of_turn>' >> '<start_of_turn>model\\n'"
    )


# --- what a machine or a checkpoint lacks ----------------------------------------------------------------------------


def test_without_transformers_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: RunLog
) -> None:
    monkeypatch.setattr(parity, "reference_version", lambda: "")
    with pytest.raises(MissingToolError) as caught:
        parity.ask_reference(tmp_path, TOKENS, {}, log)
    assert "--allow-mismatch" in str(caught.value.next_step)


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path: Path, log: RunLog) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ToolFailedError) as caught:
        parity.ask_reference(tmp_path, TOKENS, {}, log)
    assert caught.value.what.startswith("transformers cannot use the checkpoint's tokenizer: ")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    directory = tmp_path / "hostile"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "gemma3_text"}))
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    checkpoints.write_tokenizer_files(directory, checkpoints.sentencepiece_model()[0], endless)
    return directory


def test_a_template_that_does_not_end_is_left_out(hostile: Path, log: RunLog) -> None:
    asked = parity.ask_reference(hostile, TOKENS, {"one letter": "a"}, log, seconds=0.3)
    assert asked.prompts == []
    assert set(asked.left_out.values()) == {"the template refuses it: it computes for more than 0.3 s"}


def test_a_server_that_cannot_start_says_why(build: Build, tmp_path: Path, log: RunLog) -> None:
    (tmp_path / "no.gguf").write_bytes(b"no model")
    with (
        pytest.raises(ToolFailedError, match=r"llama-server ended. Its last lines:\n"),
        llama_cpp.serving(build, parity.server_arguments(tmp_path / "no.gguf"), log=log),
    ):
        pass
