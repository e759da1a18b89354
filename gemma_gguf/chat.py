"""A model's own chat template, rendered without trusting it.

Consumes the text of a template and conversations (lists of messages as `transformers` takes them), produces what the
model would read. A template is a program from somebody else's repository. Jinja's sandbox keeps it from Python's
internals, and `sandbox.py` runs it in a process of its own with limits of computing time, memory and output, so the
worst it can do is to end in one clear error.
"""

import json
import signal
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from gemma_gguf import llama_cpp
from gemma_gguf.errors import BadInputError

Message = Mapping[str, Any]

SECONDS = 5.0  # of computing, for all conversations of one call
MEMORY = 512_000_000  # bytes of address space: Python and Jinja take about 50 MB of it
MAX_TEMPLATE_BYTES = 1_000_000  # the longest of Google's has 20 kB
MAX_BYTES = 256_000  # of one rendered conversation
WAIT_SECONDS = 60.0  # beyond the computing: a busy machine is no fault of the template
NEXT_STEP = "Mend the chat template of the checkpoint (chat_template.jinja or tokenizer_config.json)."


class RefusedError(BadInputError):
    """The template itself says that it cannot render this conversation."""


def render(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    bos_token: str,
    eos_token: str,
    now: datetime | None = None,
    seconds: float = SECONDS,
    max_bytes: int = MAX_BYTES,
) -> str:
    """The prompt that `template` makes of one conversation; `render_many` says what it raises."""
    (text,) = render_many(
        template,
        [messages],
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        bos_token=bos_token,
        eos_token=eos_token,
        now=now,
        seconds=seconds,
        max_bytes=max_bytes,
    )
    return text


def render_many(
    template: str,
    conversations: Sequence[Sequence[Message]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    bos_token: str,
    eos_token: str,
    now: datetime | None = None,
    seconds: float = SECONDS,
    max_bytes: int = MAX_BYTES,
) -> list[str]:
    """The prompts that `template` makes of several conversations, in one process.

    `messages` and `tools` are JSON values: `{"role": "user", "content": "Hi"}`, functions as their JSON schema. `now`
    is what `strftime_now` tells, by default the present: give it where a result must not change with the day.
    `seconds` bounds the computing for all conversations together, `max_bytes` the UTF-8 length of each result.

    Raises `RefusedError` with the template's line when it is no valid template, refuses the conversation
    (`raise_exception`) or reaches for what the sandbox keeps from it, `BadInputError` when it exceeds a limit, and
    `KilledError` when the process was killed from outside, or did not get to compute: that tells nothing of a template.
    """
    n_bytes = len(template.encode("utf-8", errors="surrogatepass"))
    if n_bytes > MAX_TEMPLATE_BYTES:
        raise BadInputError(
            f"the chat template has {n_bytes:,} bytes, more than the {MAX_TEMPLATE_BYTES:,} that are read",
            next_step=NEXT_STEP,
        )
    request = {
        "template": template,
        "conversations": conversations,
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token,
        "eos_token": eos_token,
        "now": now.isoformat() if now else None,
        "max_bytes": max_bytes,
    }
    code, output = llama_cpp.ask_confined(
        "gemma_gguf.sandbox", [str(seconds), str(MEMORY)], json.dumps(request), wait_seconds=seconds + WAIT_SECONDS
    )
    llama_cpp.check_ended(code, "renders the chat template", seconds + WAIT_SECONDS)
    try:
        said = json.loads(output)
    except ValueError:
        said = {"problem": "time" if code == -signal.SIGXCPU else "crash", "line": None, "message": ""}
    if "texts" in said:
        return [str(text) for text in said["texts"]]
    error = RefusedError if said["problem"] == "error" else BadInputError
    raise error(_what(said, seconds, max_bytes), next_step=NEXT_STEP)


def _what(said: Mapping[str, Any], seconds: float, max_bytes: int) -> str:
    happened = {
        "time": f"computes for more than {seconds:g} s",
        "size": f"writes more than {max_bytes:,} bytes",
        "memory": f"takes more than {MEMORY // 1_000_000} MB of memory",
        "crash": "ended the process that renders it",
        "error": f"failed: {shown(str(said['message']))}",
    }[str(said["problem"])]
    where = f" (line {said['line']})" if said["line"] else ""
    return f"the chat template {happened}{where}"


def shown(text: str) -> str:
    """Foreign text on one line, without characters that a terminal obeys."""
    return "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
