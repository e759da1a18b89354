"""A worker process that asks a checkpoint's own tokenizer and ends: the only user of transformers.

Run as `python -m gemma_gguf.tokenizer` by `parity.py`; reads one JSON request from stdin, prints one JSON answer. It is
a process of its own, started without the user's environment, for three reasons: transformers takes a second to import,
nothing else here may depend on it, and the chat template of a model is a program of somebody else's. transformers
renders it in Jinja's sandbox; the limits of `sandbox.py` hold from then on, as reading a vocabulary takes more than a
template may.

Nothing is fetched, no code of the checkpoint is imported (`trust_remote_code` is off), and torch is kept out: it takes
longer to import than everything that is done here, and a tokenizer has no use for it.
"""

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gemma_gguf import sandbox

SECONDS = 10.0  # of computing, for all conversations together
MEMORY = 1_000_000_000  # bytes of address space beyond what the tokenizer takes
MAX_BYTES = 1_000_000  # of one rendered conversation


def added_probe(token: str) -> str:
    """A text in which an added token stands between letters, after a space, after a line end, twice, and alone."""
    return f"x{token}x {token}\n{token}{token} {token}.{token}"


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """What the tokenizer in `request["directory"]` makes of texts and conversations.

    `texts` are read with special tokens parsed and as plain text; so is an `added_probe` of every token that the
    checkpoint or `request["gguf_added"]` names as added. Ids are without BOS and EOS, which `prefix` and `suffix` hold.
    `starts` are where each token begins in its text, in characters; `special` are the tokens that plain text never has.
    """
    tokenizer = _load(request["directory"])
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added = sorted({*tokenizer.get_added_vocab(), *request["gguf_added"]})
    texts = [*request["texts"], *map(added_probe, added)]
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    at = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), len(whole))
    template = _template(tokenizer, Path(request["directory"]))
    said = {
        "n_vocab": len(tokenizer),
        "vocabulary": sorted(vocabulary.items(), key=lambda item: item[1]),
        "added": added,
        "special": sorted(n for n, token in tokenizer.added_tokens_decoder.items() if token.special),
        "parsed": _read(tokenizer, texts, plain=False),
        "plain": _read(tokenizer, texts, plain=True),
        "prefix": whole[:at],
        "suffix": whole[at + len(bare) :],
        "has_template": tokenizer.chat_template is not None or template is not None,
    }
    return {**said, "rendered": _render(tokenizer, template, request) if said["has_template"] else []}


def _load(directory: str) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415 - only in this process

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _read(tokenizer: Any, texts: Sequence[str], *, plain: bool) -> list[dict[str, list[int]]]:
    """{ids, starts} of every text; with `plain`, special tokens in it are ordinary characters."""
    read = tokenizer(texts, add_special_tokens=False, split_special_tokens=plain, return_offsets_mapping=True)
    pairs = zip(read["input_ids"], read["offset_mapping"], strict=True)
    return [{"ids": ids, "starts": [start for start, _ in offsets]} for ids, offsets in pairs]


def _template(tokenizer: Any, directory: Path) -> str | None:
    """The template of `chat_template.json`, where older processors kept it and a tokenizer does not look."""
    file = directory / "chat_template.json"
    if tokenizer.chat_template is not None or not file.is_file():
        return None
    template = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    return template if isinstance(template, str) else None


def _render(tokenizer: Any, template: str | None, request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`{"text", "ids"}` or `{"refused": reason}` of each conversation; after a limit was hit all are refused."""
    seconds = float(request["seconds"])
    sandbox.set_limits(seconds, _address_space() + MEMORY, used=time.process_time())
    said: list[dict[str, Any]] = []
    spent = ""
    for conversation in request["conversations"]:
        if spent:
            said.append({"refused": spent})
            continue
        try:
            text = tokenizer.apply_chat_template(
                conversation["messages"],
                tools=conversation["tools"],
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=conversation["thinking"],
            )
            if len(text.encode("utf-8")) > MAX_BYTES:
                said.append({"refused": f"it writes more than {MAX_BYTES:,} bytes"})
                continue
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            said.append({"text": text, "ids": ids})
        except sandbox.TooLongError:
            spent = f"it computes for more than {seconds:g} s"
            said.append({"refused": spent})
        except MemoryError:
            said.append({"refused": "it takes too much memory"})
        except Exception as error:  # noqa: BLE001 - whatever a template can raise is the template's fault
            said.append({"refused": f"{type(error).__name__}: {error}".splitlines()[0][: sandbox.MESSAGE_CHARACTERS]})
    sandbox.end_timer()
    return said


def _address_space() -> int:
    """Bytes of address space that this process has; where the system does not say, so many that no limit is felt."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return 1 << 45


def main() -> None:
    """Answer the one request on stdin; `{"error": text}` when the tokenizer cannot be loaded or used."""
    request = json.load(sys.stdin)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "TRANSFORMERS_VERBOSITY": "critical"}
    sys.modules["torch"] = None  # type: ignore[assignment] # as if it were not installed
    logging.disable(logging.CRITICAL)
    try:
        said = answer(request)
    except Exception as error:  # noqa: BLE001 - told to the one who asked
        said = {"error": f"{type(error).__name__}: {error}"}
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
