"""What a model's prompts look like, written by its own chat template.

Consumes the template and a renderer of conversations (`chat.render`, which runs it in a sandbox of its own process),
produces `PromptFacts` for the manifest: made once, so that rendering a card runs no foreign program. Whether a template
has a system role and tools is not read from its text but tried: it is given marked ones, and what it writes is searched
for the marks. Templates that refuse, ignore or merge a system prompt all tell the truth this way.
"""

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from gemma_gguf.chat import RefusedError
from gemma_gguf.errors import BadInputError
from gemma_gguf.files import sha256_bytes
from gemma_gguf.manifest import PromptExample, PromptFacts

# (template, messages, tools) -> the prompt; raises `RefusedError` where the template refuses.
Render = Callable[[str, Sequence[dict[str, Any]], Sequence[dict[str, Any]] | None], str]

MAX_CHARACTERS = 6000  # of one example; Google's longest, with a tool, has 1200
NOW = datetime(2026, 1, 1)  # what a template that writes the date is told, so that runs agree
SYSTEM, USER, TOOL = "GgufSystemMark", "GgufUserMark", "get_current_temperature"
SHOWN = {SYSTEM: "{system_prompt}", USER: "{prompt}"}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": "The temperature at a place, now.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string", "description": "City and country"}},
                "required": ["place"],
            },
        },
    }
]
# Characters that a terminal or browser acts on instead of showing: controls, and those that turn the writing direction.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def prompt_facts(template: str, render: Render) -> PromptFacts:
    """Examples of a template: a plain conversation, one with a system prompt and one with a tool, where it has them.

    A template that cannot render the plain one has a `problem` and no examples.
    """
    digest = sha256_bytes(template.encode("utf-8", errors="surrogatepass"))
    user = {"role": "user", "content": USER}
    try:
        plain = render(template, [user], None)
    except BadInputError as error:
        return PromptFacts(template_sha256=digest, examples=[], problem=_visible(error.what)[:500])
    if USER not in plain:
        problem = "the template leaves out what the user writes"
        return PromptFacts(template_sha256=digest, examples=[], problem=problem)
    examples = [_example("plain", plain)]
    trials: list[tuple[str, str, list[dict[str, Any]], list[dict[str, Any]] | None]] = [
        ("system", SYSTEM, [{"role": "system", "content": SYSTEM}, user], None),
        ("tools", TOOL, [user], TOOLS),
    ]
    for kind, mark, messages, tools in trials:
        try:
            text = render(template, messages, tools)
        except RefusedError:
            continue  # as Gemma 2's: "System role not supported"
        if mark in text and mark not in plain and USER in text:
            examples.append(_example(kind, text))
    if any(len(example.text) > MAX_CHARACTERS for example in examples):
        problem = f"the template writes more than {MAX_CHARACTERS} characters around a short message"
        return PromptFacts(template_sha256=digest, examples=[], problem=problem)
    return PromptFacts(template_sha256=digest, examples=examples, problem=None)


def _example(kind: Any, text: str) -> PromptExample:
    for mark, shown in SHOWN.items():
        text = text.replace(mark, shown)
    return PromptExample(kind=kind, text=_visible(text))


def _visible(text: str) -> str:
    return _INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def block(text: str) -> str:
    """Text as a block of code in Markdown, which it cannot end: the fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}{'' if text.endswith(chr(10)) else chr(10)}{fence}"
