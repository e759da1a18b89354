"""The one error tree. A `GemmaGGUFError` is something the user can act on; anything else is a bug.

Consumes nothing, produces exceptions. Library code raises them and never prints; `cli.py` alone turns them
into text and an exit code, so a caller in Python gets the same facts as a person at a terminal.
"""

from pathlib import Path


class GemmaGGUFError(Exception):
    """Something went wrong that the user can mend.

    `what` says what happened and where, `next_step` what to type or change, `log` where the whole story is.
    """

    def __init__(self, what: str, *, next_step: str | None = None, log: Path | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.next_step = next_step
        self.log = log


class BadInputError(GemmaGGUFError):
    """A model, file or option that cannot be used as it is."""


class MissingToolError(GemmaGGUFError):
    """A program or package that this step needs is not installed."""


class ToolFailedError(GemmaGGUFError):
    """A child process ended badly, or ended well without doing what it was asked."""


class KilledError(ToolFailedError):
    """A child process was killed from outside (SIGKILL: a person, or a machine short of memory); it says nothing of
    what the child was asked, so nothing may be concluded from it."""


class VerificationError(GemmaGGUFError):
    """A file is not what was planned; it never gets its final name."""


class NoFiguresError(VerificationError):
    """A file that was measured gives NaN or Inf; `why` says where."""

    def __init__(self, what: str, *, why: str, next_step: str | None = None, log: Path | None = None) -> None:
        super().__init__(what, next_step=next_step, log=log)
        self.why = why


class DiskError(GemmaGGUFError):
    """The disk is full or does not do what it is asked."""


class BusyError(GemmaGGUFError):
    """Another run holds the lock on a directory."""
