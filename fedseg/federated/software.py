"""What a program runs on: versions of the libraries that decide its numbers."""

import platform
from importlib.metadata import PackageNotFoundError, version

from fedseg import __version__

LIBRARIES = ("torch", "monai", "flwr", "numpy")


def software() -> dict[str, str]:
    """Versions by name, of what is installed."""
    found = {"fedseg": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)  # without importing it
        except PackageNotFoundError:
            continue
    return found
