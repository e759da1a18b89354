"""A corrected chat template or token: new headers for a whole set, against making it: `make bench SCALE=header`.

Makes the 27 files of a seeded checkpoint (`--scale` as in bench.py), corrects that (`--fix`), has `refresh --apply`
rewrite the headers, and makes the set of the corrected checkpoint from scratch, with the same imatrix; both are
timed from end to end (conversion, checks and loads of every file included), and must leave the same bytes. What the
fan-out enters into its journal, a line for each task that it did, is counted on both sides. One JSON line last.
"""

import argparse
import contextlib
import json
import tempfile
import unittest.mock
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gemma_gguf import factory, fanout, recipes, refresh
from gemma_gguf.files import sha256_file
from gemma_gguf.session import Options
from tests.bench import SHAPES, Spent, measured, write_checkpoint
from tests.test_refresh import fix_template, fix_token

FIXES = {"template": fix_template, "token": fix_token}


@contextlib.contextmanager
def journalled(tasks: Counter[str], side: str) -> Iterator[None]:
    """Count what the block's fan-outs enter into their journals."""
    add = fanout.Journal.add

    def counted(journal: fanout.Journal, index: int) -> None:
        tasks[side] += 1
        add(journal, index)

    with unittest.mock.patch.object(fanout.Journal, "add", counted):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=list(SHAPES), default="small")
    parser.add_argument("--fix", choices=list(FIXES), default="template")
    parser.add_argument("--kernels", choices=["auto", "ggml"], default="auto")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        checkpoint = write_checkpoint(Path(place, "model"), SHAPES[given.scale])
        options = Options(
            str(checkpoint),
            name="bench/model",
            out=Path(place, "out"),
            chunks=8,
            kernels=given.kernels,
            proof=False,
            evaluate=False,
        )
        set_dir = factory.run(options).set_dir
        FIXES[given.fix](checkpoint)
        headers, whole = Spent(), Spent()
        tasks: Counter[str] = Counter()
        with measured(headers), journalled(tasks, "refresh"):
            (result,) = refresh.refresh_sets([set_dir], refresh.Asked(apply=True, proof=False))
        if result.error is not None:
            raise result.error
        with measured(whole), journalled(tasks, "full run"):
            scratch = replace(options, out=Path(place, "scratch"), imatrix=set_dir / "bench_model-imatrix.gguf")
            made = factory.run(scratch).set_dir
        files = sorted(path.name for path in made.glob("*.gguf"))
        if any(sha256_file(made / name) != sha256_file(set_dir / name) for name in files):
            raise SystemExit("the refreshed set differs from the one made from scratch")
        rewritten = [found for found in result.decisions.values() if found.outcome == "keys"]
        figures = {
            "scale": given.scale,
            "fix": given.fix,
            "kernels": given.kernels,
            "files": len(rewritten),
            "bytes": sum((made / name).stat().st_size for name in files),
            "refresh_journal": tasks["refresh"],
            "full_run_journal": tasks["full run"],
            "refresh_seconds": round(headers.wall, 1),
            "full_run_seconds": round(whole.wall, 1),
            "wall_ratio": round(whole.wall / headers.wall, 2),
            "refresh_cpu_seconds": round(headers.cpu, 1),
            "full_run_cpu_seconds": round(whole.cpu, 1),
            "cpu_ratio": round(whole.cpu / headers.cpu, 2),
        }
        if len(rewritten) != len(recipes.DEFAULT_NAMES) or tasks["refresh"] or not tasks["full run"]:
            raise SystemExit(f"not a change of headers alone: {figures}")
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
