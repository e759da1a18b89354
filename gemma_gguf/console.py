"""The only user of rich: progress, tables, hints, and the `--json` document.

Consumes values of the stages, produces text for people on stderr and, with `--json`, one JSON document on stdout.
"""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from gemma_gguf.batch import Item, Outcome
from gemma_gguf.doctor import Check
from gemma_gguf.errors import GemmaGGUFError
from gemma_gguf.planning import SetPlan
from gemma_gguf.proof import Verified
from gemma_gguf.publishing import Look
from gemma_gguf.refresh import Refreshed
from gemma_gguf.session import Done, Report
from gemma_gguf.stale import OUTCOMES, counts
from gemma_gguf.table import gigabytes

PLAIN_WIDTH = 160  # columns of tables in a log
PLAIN_SECONDS = 20.0  # between progress lines when nobody watches a terminal


class Console:
    """Talks to a person on stderr; `as_json` adds one document on stdout."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._err = RichConsole(stderr=True, soft_wrap=True, highlight=False)
        if not self._err.is_terminal:
            self._err.width = PLAIN_WIDTH
        self._bar: RichProgress | None = None
        self._task: Any = None
        self._label = ""
        self._said_at = 0.0
        self._began: tuple[str, float, float] = ("", 0.0, 0.0)  # label, when, how much was done by then
        self._lock = threading.RLock()  # files are finished in a thread of their own

    def progress(self, label: str, done: float, total: float, unit: str = "") -> None:
        """One bar at a time on a terminal; elsewhere a plain line now and then. Both say how much time is left."""
        with self._lock:
            self._progress(label, done, total, unit)

    def _progress(self, label: str, done: float, total: float, unit: str) -> None:
        now = time.monotonic()
        if label != self._began[0]:
            self._began = (label, now, done)
        left = time_left(now - self._began[1], done - self._began[2], total - done)
        if not self._err.is_terminal:
            if label != self._label or now - self._said_at > PLAIN_SECONDS:
                self._label, self._said_at = label, now
                self._err.print(shown(f"  {label}: {done:.0f}/{total:.0f} {unit}{f', {left}' if left else ''}"))
            return
        if self._bar is None or label != self._label:
            self._end_bar()
            columns = (
                TextColumn("  {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(shown(unit)),
                TextColumn("{task.fields[left]}"),
            )
            self._bar = RichProgress(*columns, console=self._err, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(shown(label), total=total, left="")
            self._label = label
        self._bar.update(self._task, completed=done, total=total, left=left)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._label = ""

    def did(self, done: Done) -> None:
        """A line for something made or skipped."""
        with self._lock:
            self._did(done)

    def _did(self, done: Done) -> None:
        self._end_bar()
        size = f"  {gigabytes(done.n_bytes)}" if done.n_bytes is not None else ""
        if done.stage == "proof" or (done.stage == "parity" and done.made):
            self._err.print(f"[green]same[/]  {done.stage:<9} {shown(done.name)}  [dim]({shown(done.why)})[/]")
        elif done.stage == "gate":
            self._err.print(f"[bold red]held[/]  {done.stage:<9} {shown(done.name)}  {shown(done.why)}")
        elif done.stage == "evaluate" and done.made:
            self._err.print(f"[green]read[/]  {done.stage:<9} {shown(done.name)}  {shown(done.why)}")
        elif done.stage == "publish" and done.made:
            self._err.print(f"[green]sent[/]  {done.stage:<9} {shown(done.name)}{size}  [dim]({shown(done.why)})[/]")
        elif done.made:
            self._err.print(f"[green]made[/]  {done.stage:<9} {shown(done.name)}{size}  {done.seconds:.1f} s")
        else:
            self._err.print(f"[dim]kept[/]  {done.stage:<9} {shown(done.name)}{size}  [dim]({shown(done.why)})[/]")

    def say(self, text: str) -> None:
        """A plain line for a person."""
        self._end_bar()
        self._err.print(shown(text))

    def report(self, report: Report) -> None:
        """The closing table of a run: what, how big, how long, and where."""
        self._end_bar()
        made = [done for done in report.done if done.n_bytes is not None]
        rows = [
            (done.name, gigabytes(done.n_bytes or 0), f"{done.seconds:.1f} s" if done.made else "kept", done.stage)
            for done in made
        ]
        self.table(("File", "Size", "Time", "Stage"), rows, right=(1, 2))
        n_made = sum(done.made for done in made)
        files = "file" if n_made == 1 else "files"
        self._err.print(f"{n_made} {files} made, {len(made) - n_made} kept, in {report.seconds:.0f} s")
        if report.engine == "fanout" and any(done.made and done.stage == "quantize" for done in made):
            self._err.print("Quants are made together: the time of each is counted from the start of the fan-out.")
        self._err.print(f"The set: {shown(shown_path(report.set_dir))}")
        if report.log.is_file():
            self._err.print(f"The log: {shown(shown_path(report.log))}")

    def plan(self, planned: SetPlan) -> None:
        """What a set takes: sizes and time per file, then the whole."""
        self._end_bar()
        about = "" if planned.exact else "~"
        rows = [
            (
                row.recipe,
                f"{about}{gigabytes(row.n_bytes)}",
                f"{row.n_bytes:,}" if planned.exact else "",
                f"{row.bpw:.2f}",
                "" if row.cpu_seconds is None else f"{row.cpu_seconds:.0f} s",
                str(row.shards or 1),
                ", ".join(f"{n} {kind}" for kind, n in row.types.items()),
            )
            for row in planned.files
        ]
        self.table(("Recipe", "Size", "Bytes", "bpw", "CPU", "Files", "Tensors"), rows, right=(1, 2, 3, 4, 5))
        self._err.print(f"Sizes and times from: {planned.basis}")
        if planned.asked_seconds is not None and planned.distinct_seconds is not None:
            self._err.print(
                f"CPU time: {planned.distinct_seconds:.0f} s; one llama-quantize after the other: "
                f"{planned.asked_seconds:.0f} s. With {planned.jobs} workers about {planned.wall_seconds:.0f} s"
            )
        needed, there = gigabytes(planned.peak_bytes), gigabytes(planned.budget_bytes)
        verdict = "fits" if planned.fits else "does NOT fit"
        self._err.print(f"Disk: {about}{needed} at the peak, {there} there: {verdict}")
        if len(planned.waves) > 1:
            for number, group in enumerate(planned.waves, start=1):
                self._err.print(f"  wave {number}: {', '.join(group)}")

    def verified(self, results: Sequence[Verified]) -> None:
        """One line per file of a set that was checked."""
        self._end_bar()
        rows = [
            (result.name, result.problem or ("whole" if result.place is None else f"not here: {result.place}"))
            for result in results
        ]
        self.table(("File", "Verdict"), rows)

    def upload(self, seen: Look) -> None:
        """What publishing a set does, file by file, and what forbids it."""
        self._end_bar()
        plan = seen.plan
        rows = [(o.action, o.name, gigabytes(o.n_bytes), o.reason) for o in plan.operations]
        self.table(("Do", "File", "Size", "Why"), rows, right=(2,))
        if plan.creates:
            self._err.print(f"New repository: {shown(plan.repo)}, private")
        sizes = f"{gigabytes(plan.n_bytes)} to {shown(plan.repo)}"
        commits = f"{len(plan.groups)} commit{'' if len(plan.groups) == 1 else 's'}"
        self._err.print(f"To send: {sizes} in {commits}" if plan.groups else f"{shown(plan.repo)} holds this set")
        if plan.makes_public:
            self._err.print("In the end: made public")
        for finding in seen.warnings:
            self._err.print(f"[yellow]note:[/]  {shown(finding.what)}")
        for finding in seen.refusals:
            self._err.print(f"[bold red]refused:[/] {shown(finding.what)}")
            if finding.next_step:
                self._err.print(f"[bold]next:[/]  {shown(finding.next_step)}")

    def checks(self, checks: Sequence[Check]) -> None:
        """What the doctor found, then what to do about it."""
        self._end_bar()
        self.table(("Check", "Verdict", "What"), [(check.name, check.status, check.what) for check in checks])
        for check in checks:
            if check.status != "ok" and check.next_step:
                self._err.print(f"[bold]next:[/]  {shown(check.name)}: {shown(check.next_step)}")

    def batch_problems(self, items: Sequence[Item], problems: Sequence[Sequence[Check]]) -> None:
        """What stands in the way of which model, before the first of them is made."""
        self._end_bar()
        for item, checks in zip(items, problems, strict=True):
            for check in checks:
                self._err.print(f"[bold red]{shown(item.label)}:[/] {shown(check.name)}: {shown(check.what)}")
                if check.next_step:
                    self._err.print(f"[bold]next:[/]  {shown(check.next_step)}")
        n_bad = sum(bool(checks) for checks in problems)
        if n_bad:
            self._err.print(f"{n_bad} of {len(items)} models cannot be made as things are.")

    def outcome(self, outcome: Outcome) -> None:
        """How one model of a batch ended."""
        self._end_bar()
        if outcome.trace is not None:
            self._err.print(shown(outcome.trace))
        if outcome.error is None:
            self._err.print(f"[green]complete[/] {shown(outcome.model)}")
            return
        self._err.print(f"[bold red]failed[/] {shown(outcome.model)}: {shown(outcome.error)}")
        if outcome.next_step:
            self._err.print(f"[bold]next:[/]  {shown(outcome.next_step)}")
        if outcome.log is not None:
            self._err.print(f"[bold]log:[/]   {shown(shown_path(outcome.log))}")

    def outcomes(self, outcomes: Sequence[Outcome], seconds: float) -> None:
        """The closing table of a batch."""
        self._end_bar()
        rows = [
            (
                outcome.model,
                "complete" if outcome.complete else "FAILED",
                str(outcome.made),
                str(outcome.kept),
                gigabytes(outcome.n_bytes),
                f"{outcome.seconds:.0f} s",
                (shown_path(outcome.set_dir) if outcome.set_dir else "") if outcome.complete else outcome.error or "",
            )
            for outcome in outcomes
        ]
        self.table(("Model", "Result", "Made", "Kept", "Size", "Time", "Set, or why not"), rows, right=(2, 3, 4, 5))
        n_failed = sum(not outcome.complete for outcome in outcomes)
        self._err.print(f"{len(outcomes) - n_failed} of {len(outcomes)} sets complete, in {seconds:.0f} s")
        if n_failed:
            self._err.print("The same command goes on: what is complete is kept.")

    def refreshed_one(self, result: Refreshed) -> None:
        """What was decided about the files of one set, those with the same reason together."""
        self._end_bar()
        self._err.print(f"[bold]{shown(result.set_dir.name)}[/]")
        groups: dict[tuple[str, str], list[str]] = {}
        for name, decision in result.decisions.items():
            groups.setdefault((OUTCOMES[decision.outcome], decision.why), []).append(name)
        rows = [(outcome, ", ".join(names), why) for (outcome, why), names in groups.items()]
        if rows:
            self.table(("", "Files", "Why"), rows, folded=(1, 2))
        if result.error is not None:
            self._err.print(f"[bold red]error:[/] {shown(result.error.what)}")
            if result.error.next_step:
                self._err.print(f"[bold]next:[/]  {shown(result.error.next_step)}")

    def refreshed(self, results: Sequence[Refreshed]) -> None:
        """One row per set: how many of its files are what, and what was done."""
        self._end_bar()
        rows = [
            (
                result.set_dir.name,
                *(str(n) for n in counts(result.decisions.values()).values()),
                f"{result.seconds:.1f} s",
                "failed" if result.error is not None else "applied" if result.applied else "card only",
            )
            for result in results
        ]
        self.table(("Set", *OUTCOMES.values(), "Time", "Done"), rows, right=(1, 2, 3, 4, 5))
        stale = sum(result.error is None and not result.applied and _is_stale(result) for result in results)
        if stale:
            self._err.print(f"{stale} of {len(results)} sets would change: the same command with --apply changes them")

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        right: Sequence[int] = (),
        folded: Sequence[int] = (),
    ) -> None:
        """A table whose cells are never cut."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, column in enumerate(columns):
            # The last column, and others that may be long, fold; the rest stay whole.
            last = index == len(columns) - 1 or index in folded
            table.add_column(column, justify="right" if index in right else "left", no_wrap=not last, overflow="fold")
        for row in rows:
            table.add_row(*(shown(cell) for cell in row))
        self._err.print(table)

    def error(self, error: GemmaGGUFError) -> None:
        """What happened, what to do next, where the whole story is."""
        self._end_bar()
        self._err.print(f"[bold red]error:[/] {shown(error.what)}")
        if error.next_step:
            self._err.print(f"[bold]next:[/]  {shown(error.next_step)}")
        if error.log is not None:
            self._err.print(f"[bold]log:[/]   {shown(shown_path(error.log))}")
        self.document({"error": error.what, "next_step": error.next_step, "log": str(error.log) if error.log else None})

    def interrupted(self) -> None:
        """After Ctrl-C: what stays, and how to go on."""
        self._end_bar()
        self._err.print("\nstopped; finished files stay. Run the same command again to go on.")

    def document(self, value: Mapping[str, Any]) -> None:
        """The one JSON document on stdout, when it was asked for."""
        if self.as_json:
            print(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def time_left(elapsed: float, done: float, left: float) -> str:
    """What is left at the pace so far, `about 3 min left`; nothing in the first five seconds, nor at the end."""
    if elapsed < 5 or done <= 0 or left <= 0:
        return ""
    seconds = elapsed * left / done
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"


def _is_stale(result: Refreshed) -> bool:
    return any(decision.outcome in ("keys", "remake") for decision in result.decisions.values())


def shown(text: str) -> str:
    """Text as rich and a terminal show it unchanged: names and messages may come from somebody else's files."""
    return escape("".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text))


def shown_path(path: Path) -> str:
    """A path relative to the working directory when it lies below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
