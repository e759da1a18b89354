"""How long `gemma-gguf card` takes for many sets: `python -m tests.bench_cards [--sets 100] [--lang en,ja,zh-Hant]`.

Writes copies of one manifest, renders their cards twice with the command line in a process of its own, and checks
that the second time changes no byte. One JSON line last: seconds of both, and of an empty command to compare with.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gemma_gguf import manifest
from gemma_gguf.files import sha256_file
from tests.examples import example


def timed(*argv: str) -> float:
    """Wall seconds of one run of the command line."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "gemma_gguf", *argv], check=True, capture_output=True)
    return time.monotonic() - started


def state(sets: list[Path]) -> dict[str, tuple[str, int]]:
    """{file: (hash, time of change)} of everything in the sets."""
    files = [path for directory in sets for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path): (sha256_file(path), path.stat().st_mtime_ns) for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=100)
    parser.add_argument("--lang", default="en")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        sets = [Path(place) / f"set-{number}" for number in range(given.sets)]
        for directory in sets:
            manifest.save(example(), directory)
        command = ["card", *map(str, sets), "--lang", given.lang]
        first = timed(*command)
        before = state(sets)
        second = timed(*command)
        if state(sets) != before:
            raise SystemExit("the second run changed a file")
        figures = {
            "sets": given.sets,
            "cards": sum(path.endswith(".md") for path in before),
            "first_seconds": round(first, 2),
            "second_seconds": round(second, 2),
            "empty_command_seconds": round(timed("--version"), 2),
        }
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
