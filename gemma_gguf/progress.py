"""How a stage tells its caller how far it is: a function, so that stages know neither rich nor the terminal."""

from typing import Protocol


class Progress(Protocol):
    """Called with what is being done and how much of it: `progress("imatrix", 12, 120, "chunks")`."""

    def __call__(self, label: str, done: float, total: float, unit: str = "") -> None: ...


def silent(label: str, done: float, total: float, unit: str = "") -> None:
    """A `Progress` that shows nothing, for callers in Python and for tests."""
