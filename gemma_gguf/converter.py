"""llama.cpp's converter in a process of its own, and which of its files it used.

Run as `python -P converter.py CONVERTER ARGS...` with the paths of a build in the environment (`convert.py` does it).
Runs CONVERTER as Python would, with ARGS, and prints as its last line one JSON object: the SHA-256 of every file under
CONVERTER's directory that was imported. The converter imports the module of one architecture and leaves out a hundred
others, so two releases whose listed files are the same convert a model to the same bytes. Nothing of this package is
imported here: its modules must not stand in front of the converter's own.
"""

import hashlib
import json
import runpy
import sys
from pathlib import Path


def traced(script: Path) -> dict[str, str]:
    """{path relative to the script's directory: SHA-256} of the script and what was imported from there."""
    root = script.parent
    found = {script.name: hashlib.sha256(script.read_bytes()).hexdigest()}
    for module in list(sys.modules.values()):
        place = getattr(module, "__file__", None)
        path = Path(place).resolve() if isinstance(place, str) else None
        if path is not None and path.is_relative_to(root) and path.is_file():
            found[path.relative_to(root).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return dict(sorted(found.items()))


def main() -> None:
    script = Path(sys.argv[1]).resolve()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    print(f"\n{json.dumps({'converter_files': traced(script)})}")


if __name__ == "__main__":
    main()
