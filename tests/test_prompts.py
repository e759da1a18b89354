"""Prompt examples from chat templates like those of Gemma 2, 3 and 4, and from hostile ones."""

from collections.abc import Sequence
from typing import Any

import pytest

from gemma_gguf import card, chat, prompts
from gemma_gguf.files import sha256_bytes
from gemma_gguf.manifest import PromptFacts
from tests.examples import example
from tests.test_chat import GEMMA3

# As Google's, shortened: Gemma 2 refuses a system prompt, Gemma 3 puts it before the user's first words, Gemma 4 has a
# turn for it, where tools are declared, too.
GEMMA_2 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}
{%- endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""
GEMMA_4 = """{{ bos_token }}{%- set ns = namespace(first=0) -%}
{%- if messages[0]['role'] == 'system' or tools -%}
{{ '<|turn>system\\n' }}{%- if messages[0]['role'] == 'system' -%}{{ messages[0]['content'] | trim }}
{%- set ns.first = 1 -%}{%- endif -%}
{%- for tool in tools or [] -%}
{{ '<|tool>declaration:' + tool['function']['name'] + tool['function']['parameters'] | tojson + '<tool|>' }}
{%- endfor -%}
{{ '<turn|>\\n' }}{%- endif -%}
{%- for message in messages[ns.first:] -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<|turn>' + role + '\\n' + message['content'] + '<turn|>\\n' }}
{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|turn>model\\n' }}{%- endif -%}"""


def _render(template: str, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> str:
    return chat.render(
        template, messages, tools=tools, bos_token="<bos>", eos_token="<eos>", now=prompts.NOW, seconds=1.0
    )


def _facts(template: str) -> PromptFacts:
    return prompts.prompt_facts(template, _render)


def _texts(template: str) -> dict[str, str]:
    facts = _facts(template)
    assert facts.problem is None
    return {example.kind: example.text for example in facts.examples}


def test_gemma_2_has_no_system_prompt() -> None:
    assert _texts(GEMMA_2) == {
        "plain": "<bos><start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n",
    }


def test_gemma_3_puts_the_system_prompt_before_the_users_words() -> None:
    assert _texts(GEMMA3) == {
        "plain": "<bos><start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n",
        "system": "<bos><start_of_turn>user\n{system_prompt}\n\n{prompt}<end_of_turn>\n<start_of_turn>model\n",
    }


def test_gemma_4_has_a_turn_for_system_prompt_and_tools() -> None:
    texts = _texts(GEMMA_4)
    assert texts["plain"] == "<bos><|turn>user\n{prompt}<turn|>\n<|turn>model\n"
    assert texts["system"] == (
        "<bos><|turn>system\n{system_prompt}<turn|>\n<|turn>user\n{prompt}<turn|>\n<|turn>model\n"
    )
    assert texts["tools"].startswith("<bos><|turn>system\n<|tool>declaration:get_current_temperature{")
    assert texts["tools"].endswith("<tool|><turn|>\n<|turn>user\n{prompt}<turn|>\n<|turn>model\n")


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(
            "{% for m in messages if m['role'] == 'user' %}[{{ m['content'] }}]{% endfor %}",
            id="leaves it out silently",
        ),
        pytest.param(
            "{# {{ messages[0]['role'] == 'system' }} tools #}{% for m in messages if m['role'] != 'system' %}"
            "[{{ m['content'] }}]{% endfor %}{{ '' if tools }}",
            id="speaks of it, but does not write it",
        ),
        pytest.param("{{ messages[0]['content'] if messages[0]['role'] == 'user' }}", id="loses the user instead"),
    ],
)
def test_what_a_template_does_not_write_it_does_not_have(template: str) -> None:
    assert set(_texts(template)) == {"plain"}


def test_a_template_that_always_names_the_tool_has_no_tools() -> None:
    text = "get_current_temperature {{ messages[-1]['content'] }}"
    assert set(_texts(text)) == {"plain"}


def test_digest_is_the_templates() -> None:
    assert _facts(GEMMA3).template_sha256 == sha256_bytes(GEMMA3.encode())


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        pytest.param("{{ raise_exception('not for you') }}", "not for you", id="refuses"),
        pytest.param("{% for %}", "Expected an expression", id="no template"),
        pytest.param("{{ ''.__class__.__mro__ }}", "__class__", id="reaches for Python"),
        pytest.param(
            "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
            "more than 1 s",
            id="endless",
        ),
        pytest.param("{{ 'a' * 100000000 }}", "", id="too large for the sandbox"),
        pytest.param("hello", "leaves out what the user writes", id="no place for the user"),
        pytest.param("{{ messages[0]['content'] + 'x' * 7000 }}", "more than 6000 characters", id="too long to show"),
    ],
)
def test_a_template_that_cannot_be_shown_says_why(template: str, problem: str) -> None:
    facts = _facts(template)
    assert facts.examples == []
    assert facts.problem
    assert problem in facts.problem
    assert len(facts.problem) <= 500


def test_what_a_terminal_or_browser_acts_on_is_shown_instead() -> None:
    template = "\x1b[31m\u202e{{ messages[0]['content'] }}\x00\u2028\ttab\n."
    assert _texts(template)["plain"] == "\\u001b[31m\\u202e{prompt}\\u0000\\u2028\ttab\n."


@pytest.mark.parametrize(
    ("text", "fence"),
    [
        pytest.param("a\n", "```", id="plain"),
        pytest.param("a", "```", id="without a last newline"),
        pytest.param("```\n# not a heading\n", "````", id="ends a block"),
        pytest.param("`````x", "``````", id="ends a longer one"),
        pytest.param("``", "```", id="two backticks"),
        pytest.param("", "```", id="empty"),
    ],
)
def test_a_block_cannot_be_ended_from_inside(text: str, fence: str) -> None:
    lines = prompts.block(text).splitlines()
    assert (lines[0], lines[-1]) == (fence, fence)
    assert "\n".join(lines[1:-1]).rstrip("\n") == text.rstrip("\n")
    assert all(not line.startswith(fence) for line in lines[1:-1])


def test_examples_do_not_change_with_the_day() -> None:
    text = _texts("{{ strftime_now('%d %B %Y') }} {{ messages[-1]['content'] }}")["plain"]
    assert text == "01 January 2026 {prompt}"


# --- on the card ---------------------------------------------------------------------------------------------------


def _section(facts: PromptFacts | None, template: str | None = "{{ a }}") -> str:
    made = example()
    model = made.model.model_copy(update={"chat_template": template})
    text = card.render(made.model_copy(update={"prompts": facts, "model": model}))
    return text.partition("## Prompt format\n")[2].partition("\n## ")[0]


def test_card_shows_every_example_as_it_is() -> None:
    facts = _facts(GEMMA_4)
    section = _section(facts)
    for example_ in facts.examples:
        assert prompts.block(example_.text) in section
    assert "no place" not in section


def test_card_says_what_a_template_has_no_place_for() -> None:
    section = _section(_facts(GEMMA_2))
    assert "It has no place for a system prompt." in section
    assert "It has no place for tools." in section


def test_card_of_a_model_without_a_template_says_so() -> None:
    assert "The original model has no chat template: it continues text." in _section(None, template=None)


def test_card_of_an_older_set_says_that_examples_were_not_recorded() -> None:
    assert "were not recorded" in _section(None)


def test_card_says_why_a_template_is_not_shown() -> None:
    facts = _facts("{{ raise_exception('<b>no</b> [x](y) ```') }}")
    section = _section(facts)
    assert "could not be shown here" in section
    assert "<b>" not in section
    assert "```" not in section
