"""Where the files that are not code lie: in the wheel below this package, in a checkout beside it."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def resource_dir(installed: str, checkout: str) -> Path:
    """Directory `installed` of the package when it exists (a wheel), else `checkout` in the repository."""
    inside = _PACKAGE / installed
    return inside if inside.is_dir() else _PACKAGE.parent / checkout


TEMPLATES = resource_dir("templates", "templates")
CALIBRATION = resource_dir("calibration_text", "calibration")
