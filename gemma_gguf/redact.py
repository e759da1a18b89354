"""No secret reaches a log or an error: tokens are taken out of everything that children print.

Consumes bytes as they come, in any pieces; produces the same bytes with `[secret]` in the place of every token. What
counts: the values of variables of this process's environment that are named like secrets, the token that `hf auth
login` stored, whatever looks like a token of the Hub, and passwords in addresses.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

HIDDEN = b"[secret]"
SHORTEST = 8  # characters; shorter values are words such as `none`
NAMED_LIKE_SECRETS = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL)S?$", re.IGNORECASE)
# Variables that only the Hub's client needs; no child of ours is one.
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
_SHAPES = (rb"\bhf_[A-Za-z0-9]{20,}", rb"(?<=://)[^\s/:@]{1,200}:[^\s/@]{1,200}(?=@)")
# A secret lies between two of these, unless it is a known one that holds them; so does every number of a progress line.
_BETWEEN = re.compile(rb"[\s,]")
MOST_KEPT = 4096  # bytes without any of them


def known_secrets(environment: Mapping[str, str] = os.environ) -> frozenset[str]:
    """The secrets of this user that this process can see."""
    found = {value.strip() for name, value in environment.items() if NAMED_LIKE_SECRETS.search(name)}
    home = environment.get("HF_HOME") or str(Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    stored = Path(environment.get("HF_TOKEN_PATH") or Path(home) / "token").expanduser()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found.add(stored.read_text(encoding="utf-8").strip())
    return frozenset(value for value in found if len(value) >= SHORTEST and "\n" not in value)


class Redactor:
    """Takes secrets out of a stream. The last word is kept back until more comes, or until `rest` is asked for."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = sorted((secret.encode() for secret in secrets), key=len, reverse=True)
        shapes = [*map(re.escape, self._secrets), *_SHAPES]
        self._pattern = re.compile(b"|".join(shapes))
        self._kept = b""

    def feed(self, data: bytes) -> bytes:
        """What can be shown by now."""
        data = self._kept + data
        cut = self._begun(data)
        self._kept = data[cut:]
        return self._pattern.sub(HIDDEN, data[:cut])

    def rest(self) -> bytes:
        """What was kept back."""
        data, self._kept = self._kept, b""
        return self._pattern.sub(HIDDEN, data)

    def text(self, text: str) -> str:
        """A whole text without secrets."""
        return self._pattern.sub(HIDDEN, text.encode("utf-8", errors="replace")).decode("utf-8", errors="replace")

    def _begun(self, data: bytes) -> int:
        """Where at the end of `data` something begins that more bytes could make a secret."""
        last = max((match.end() for match in _BETWEEN.finditer(data, max(0, len(data) - MOST_KEPT))), default=0)
        places = [last if len(data) - last < MOST_KEPT else len(data)]
        for secret in self._secrets:
            # The longest end of the data that is a beginning of the secret; whole ones are replaced, not kept.
            ends = range(min(len(secret) - 1, len(data)), 0, -1)
            places += [len(data) - length for length in ends if data.endswith(secret[:length])][:1]
        return min(places)
