"""A model's chat template: rendered as transformers renders it, and whatever it tries, one clear error in little time.

The oracle for what a template means is transformers itself, on the templates of Google's models that llama.cpp's
source archive carries.
"""

import json
import tarfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from gemma_gguf import chat, llama_cpp
from gemma_gguf.errors import BadInputError, KilledError
from gemma_gguf.llama_cpp import Build
from gemma_gguf.prompts import prompt_facts
from tests import checkpoints, gemma4

USER = {"role": "user", "content": " What is 2+2? "}
MODEL = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city, <now> & here",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Name"}},
                "required": ["city"],
            },
        },
    }
]
# As Gemma 3's: the system prompt goes before the first user turn, roles must alternate, content may be parts.
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Roles must alternate user/assistant") }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
    {{- first_user_prefix if loop.first else "" }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {{ '<start_of_image>' if item['type'] == 'image' else item['text'] | trim }}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
# What transformers gives a template beyond plain Jinja, and the whitespace rules.
FEATURES = """{%- set ns = namespace(n=0) -%}
{% for message in messages %}
    {% if loop.index0 == 3 %}{% break %}{% endif %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% generation %}{{ message.content }}{% endgeneration %}
    {% set ns.n = ns.n + 1 %}
  {# a comment #}
{% endfor %}
{{ ns.n }} {{ tools is none }} {{ documents is none }} {{ (tools or []) | tojson(indent=2) }}
{{ dict(a='<&>') | tojson }} {{ dict.fromkeys(['k'], 'é') | tojson(sort_keys=true) }} {{ eos_token }}{{ missing }}
"""
TAKEN_FROM_LLAMA_CPP = (
    "google-gemma-2-2b-it.jinja",
    "google-gemma-4-31B-it.jinja",
    "google-gemma-4-31B-it-interleaved.jinja",
)


def rendered(template: str, *messages: Any, **given: Any) -> str:
    return chat.render(template, messages, **{"bos_token": "<bos>", "eos_token": "<eos>", **given})


def by_transformers(template: str, messages: list[Any], **given: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template  # noqa: PLC0415 - the oracle

    given = {"add_generation_prompt": True, "bos_token": "<bos>", "eos_token": "<eos>", **given}
    (text,), _ = render_jinja_template([messages], chat_template=template, **given)
    return str(text)


@pytest.fixture(scope="module")
def google_templates(build: Build) -> dict[str, str]:
    """Templates of Google's models, from the archive of the pinned llama.cpp."""
    archive = llama_cpp.cache_dir() / "sources" / f"llama_cpp_python-{build.source.partition(':')[2]}.tar.gz"
    found: dict[str, str] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = Path(member.name).name
            if "/models/templates/" in member.name and name in TAKEN_FROM_LLAMA_CPP:
                file = tar.extractfile(member)
                assert file is not None
                found[name] = file.read().decode("utf-8")
    return found


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "three turns": [USER, MODEL, {"role": "user", "content": "And <b>3</b>?\n\n"}],
    "system": [SYSTEM, USER],
    "parts": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
    "a call": [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Łódź"}}}],
        },
        {"role": "tool", "name": "weather", "content": "rain"},
    ],
}
# Which conversations each of Google's templates takes; the others it refuses, or they are not for it.
TAKES = {
    "google-gemma-2-2b-it.jinja": ("one turn", "three turns"),
    "google-gemma-4-31B-it.jinja": tuple(CONVERSATIONS),
    "google-gemma-4-31B-it-interleaved.jinja": tuple(CONVERSATIONS),
}


@pytest.mark.parametrize("name", TAKEN_FROM_LLAMA_CPP)
def test_googles_templates_render_as_transformers_renders_them(name: str, google_templates: dict[str, str]) -> None:
    template = google_templates[name]
    for tools in (None, TOOLS):
        for prompt in (True, False):
            conversations = [CONVERSATIONS[kind] for kind in TAKES[name]]
            expected = [
                by_transformers(template, messages, tools=tools, add_generation_prompt=prompt)
                for messages in conversations
            ]
            made = chat.render_many(
                template,
                conversations,
                tools=tools,
                add_generation_prompt=prompt,
                bos_token="<bos>",
                eos_token="<eos>",
            )
            assert made == expected
            assert all(text.startswith("<bos>") and "2+2" in text for text in made[:2])
    if "gemma-4" in name:
        assert "weather" in made[0]  # the tool is declared


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        pytest.param(
            GEMMA3,
            [USER],
            "<bos><start_of_turn>user\nWhat is 2+2?<end_of_turn>\n<start_of_turn>model\n",
            id="gemma3",
        ),
        pytest.param(
            GEMMA3,
            [SYSTEM, USER],
            "<bos><start_of_turn>user\nBe brief.\n\nWhat is 2+2?<end_of_turn>\n<start_of_turn>model\n",
            id="gemma3 system",
        ),
        pytest.param(
            GEMMA3,
            CONVERSATIONS["parts"],
            "<bos><start_of_turn>user\n<start_of_image>What is it?<end_of_turn>\n<start_of_turn>model\n",
            id="gemma3 image",
        ),
        pytest.param(
            checkpoints.CHAT_TEMPLATE,
            [USER, MODEL],
            "<bos><start_of_turn>user\nWhat is 2+2?<end_of_turn>\n<start_of_turn>model\n4<end_of_turn>\n"
            "<start_of_turn>model\n",
            id="test model",
        ),
        pytest.param(
            gemma4.CHAT_TEMPLATE,
            [USER],
            "<bos><|turn>user\nWhat is 2+2?<turn|>\n<|turn>model\n",
            id="test model 4",
        ),
        pytest.param(
            FEATURES,
            [SYSTEM, USER, MODEL, USER],
            ' What is 2+2? 42 True True []\n{"a": "<&>"} {"k": "é"} <eos>',
            id="features",
        ),
        pytest.param("plain text", [USER], "plain text", id="no variable"),
        pytest.param("", [], "", id="empty"),
    ],
)
def test_a_template(template: str, messages: list[Any], expected: str) -> None:
    assert rendered(template, *messages) == expected
    assert by_transformers(template, messages) == expected


def test_tools_and_the_end_of_a_prompt() -> None:
    assert '"description": "The weather of a city, <now> & here"' in rendered(FEATURES, USER, tools=TOOLS)
    assert rendered(FEATURES, USER, tools=TOOLS) == by_transformers(FEATURES, [USER], tools=TOOLS)
    assert rendered(GEMMA3, USER, add_generation_prompt=False) == (
        "<bos><start_of_turn>user\nWhat is 2+2?<end_of_turn>\n"
    )


def test_the_time_can_be_given() -> None:
    template = "{{ strftime_now('%d %B %Y') }}"
    assert rendered(template, now=datetime(2024, 2, 29)) == "29 February 2024"
    before = datetime.now()
    assert before.isoformat() <= rendered("{{ strftime_now('%Y-%m-%dT%H:%M:%S.%f') }}") <= datetime.now().isoformat()


def test_many_conversations_take_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    real = llama_cpp.ask_confined

    def counted(module: str, *args: Any, **kwargs: Any) -> Any:
        started.append(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(llama_cpp, "ask_confined", counted)
    conversations = [[{"role": "user", "content": str(number)}] for number in range(500)]
    made = chat.render_many(checkpoints.CHAT_TEMPLATE, conversations, bos_token="", eos_token="")
    assert made[499] == "<start_of_turn>user\n499<end_of_turn>\n<start_of_turn>model\n"
    assert len(made) == 500
    assert started == ["gemma_gguf.sandbox"]


GROW = "{% set ns = namespace(all=[]) %}\n{% for a in range(99999) %}{% set ns.all = ns.all + [range(99999)|list] %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        pytest.param(
            "a\n{% for a in range(99999) %}\n{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "computes for more than 1 s (line 3)",
            id="nested loops",
        ),
        pytest.param(
            "{% macro again() %}{% for a in range(9) %}{{ again() }}{% endfor %}{% endmacro %}\n{{ again() }}",
            "failed: RecursionError: maximum recursion depth exceeded (line 1)",
            id="endless recursion",
        ),
        pytest.param("{{ 10 ** (10 ** 10) }}", "computes for more than 1 s", id="a number without end"),
        pytest.param('x\n{{ "a" * 10 ** 10 }}', "takes more than 512 MB of memory (line 2)", id="a long text"),
        pytest.param(f"{GROW}{{% endfor %}}", "takes more than 512 MB of memory (line 2)", id="growing list"),
        pytest.param("{{ '%1000000000d' % 1 }}", "takes more than 512 MB of memory (line 1)", id="wide format"),
        pytest.param(
            "\n{% for i in range(99999) %}xxxxxxxxxx{% endfor %}",
            "writes more than 256,000 bytes",
            id="many pieces",
        ),
        pytest.param("{{ 'é' * 200000 }}", "writes more than 256,000 bytes", id="bytes, not characters"),
        pytest.param(
            "{{ range(10 ** 9) | list }}",
            "failed: OverflowError: Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000). (line 1)",
            id="a long range",
        ),
        pytest.param(
            "{{ ''.__class__.__mro__ }}",
            "failed: access to attribute '__class__' of 'str' object is unsafe. (line 1)",
            id="class",
        ),
        pytest.param(
            "{{ ''['__class__'].mro() }}",
            "failed: access to attribute '__class__' of 'str' object is unsafe. (line 1)",
            id="class as item",
        ),
        pytest.param(
            "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
            "failed: access to attribute '__class__' of 'dict' object is unsafe. (line 1)",
            id="class by a filter",
        ),
        pytest.param(
            "\n\n{{ raise_exception.__globals__.json }}",
            "failed: access to attribute '__globals__' of 'function' object is unsafe. (line 3)",
            id="globals",
        ),
        pytest.param(
            "{{ cycler.__init__.__globals__.os }}",
            "failed: access to attribute '__init__' of 'type' object is unsafe. (line 1)",
            id="init",
        ),
        pytest.param(
            "{{ namespace(__class__=1) }}", "failed: a namespace cannot hold '__class__' (line 1)", id="namespace"
        ),
        pytest.param(
            "{% set ns = namespace() %}{% set ns._x = 1 %}",
            "failed: a namespace cannot hold '_x' (line 1)",
            id="namespace, later",
        ),
        pytest.param(
            "{{ dict.__init__.__globals__ }}",
            "failed: access to attribute '__init__' of '_Dict' object is unsafe. (line 1)",
            id="dict",
        ),
        pytest.param(
            "{{ messages.append(1) }}",
            "failed: access to attribute 'append' of 'list' object is unsafe. (line 1)",
            id="changing a message",
        ),
        pytest.param(
            "{% include '/etc/passwd' %}",
            "failed: TypeError: no loader for this environment specified (line 1)",
            id="include",
        ),
        pytest.param(
            "a\n{% if %}", "failed: Expected an expression, got 'end of statement block' (line 2)", id="syntax"
        ),
        pytest.param(
            "a\nb\n{% for x in y %}",
            "failed: Unexpected end of template. Jinja was looking for the following tags: 'endfor' or 'else'. "
            "The innermost block that needs to be closed is 'for'. (line 3)",
            id="not closed",
        ),
        pytest.param("{{ 1 / 0 }}", "failed: ZeroDivisionError: division by zero (line 1)", id="division"),
        pytest.param(
            "{{ messages[7].content }}",
            "failed: list object has no element 7 (line 1)",
            id="no such message",
        ),
        pytest.param(
            "x\n{{ raise_exception('no \x1b[31m system\nrole [bold]') }}",
            "failed: no [31m system role [bold] (line 2)",
            id="refused by the template",
        ),
        pytest.param(
            "{{ raise_exception('m' * 100000) }}", f"failed: {'m' * 500} (line 1)", id="refused at great length"
        ),
        pytest.param(
            "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
            "failed: RecursionError: maximum recursion depth exceeded",
            id="too deep",
        ),
    ],
)
def test_a_hostile_template(template: str, message: str) -> None:
    with pytest.raises(BadInputError) as caught:
        rendered(template, USER, seconds=1)
    if "recursion" in message:  # where the depth ends depends on the version of Python
        assert caught.value.what.startswith(f"the chat template {message.partition(' (')[0]}")
    else:
        assert caught.value.what == f"the chat template {message}"
    assert caught.value.next_step == (
        "Mend the chat template of the checkpoint (chat_template.jinja or tokenizer_config.json)."
    )


def test_a_template_that_is_too_long() -> None:
    with pytest.raises(BadInputError) as caught:
        rendered("x" * 1_000_001)
    assert caught.value.what == "the chat template has 1,000,001 bytes, more than the 1,000,000 that are read"


def test_the_limit_of_the_output_can_be_set() -> None:
    assert rendered("{{ 'x' * 400000 }}", max_bytes=400_000) == "x" * 400_000
    with pytest.raises(BadInputError, match="writes more than 10 bytes"):
        rendered("{{ 'x' * 11 }}", max_bytes=10)


def test_no_process_is_left_when_the_clock_ends_it() -> None:
    """The wall clock is the last resort: here it runs out before the limit of computing does."""
    before = time.monotonic()
    request: dict[str, Any] = {
        "template": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "conversations": [[]],
        **dict.fromkeys(("tools", "add_generation_prompt", "bos_token", "eos_token", "now")),
        "max_bytes": 1,
    }
    code, output = llama_cpp.ask_confined("gemma_gguf.sandbox", ["600", "5e8"], json.dumps(request), wait_seconds=1)
    assert (code, output) == (None, b"")
    assert time.monotonic() - before < 30
    assert not [p for p in psutil.Process().children() if "gemma_gguf.sandbox" in p.cmdline()]


def test_the_process_knows_no_secret_and_writes_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Should the sandbox leak: neither the environment with its tokens is there, nor may a file be written."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s" * 34)
    (tmp_path / "probe.py").write_text(
        "import json, os, sys\n"
        "from gemma_gguf import sandbox\n"
        "sandbox.set_limits(5, 500_000_000)\n"
        "found = {'environment': sorted(os.environ), 'file': ''}\n"
        "try:\n"
        "    with open(sys.argv[1], 'w') as file:\n"
        "        file.write('x' * 10)\n"
        "except OSError as error:\n"
        "    found['file'] = error.strerror\n"
        "print(json.dumps(found))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, output = llama_cpp.ask_confined("probe", [str(tmp_path / "written")], "", wait_seconds=60)
    found = json.loads(output)
    assert code == 0
    assert set(found["environment"]) <= {
        *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ", "PYTHONPATH", "PYTHONUTF8", "PYTHONDONTWRITEBYTECODE"),
        *("LC_CTYPE", "__CF_USER_TEXT_ENCODING"),  # the interpreter's and macOS's own
    }
    assert found["file"] == "File too large"
    assert (tmp_path / "written").read_bytes() == b""


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        pytest.param((-9, b""), "was killed", id="killed"),
        pytest.param((None, b""), "did not end within 65 s", id="no time to compute"),
    ],
)
def test_a_process_that_is_killed_says_nothing_of_the_template(
    ending: tuple[int | None, bytes], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not be taken for a template without a place for a system prompt."""
    monkeypatch.setattr(llama_cpp, "ask_confined", lambda *_, **__: ending)
    with pytest.raises(KilledError) as caught:
        rendered("{{ messages }}")
    assert caught.value.what == f"the process that renders the chat template {message}"
    with pytest.raises(KilledError):
        prompt_facts("x", lambda template, messages, tools: rendered(template))
