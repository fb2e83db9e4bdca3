"""A bar for work that takes more than a moment."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def shown(items: Iterable[T], description: str, *, total: int | None = None, progress: bool = True) -> Iterator[T]:
    """Pass items on under a progress bar on stderr, where it does not mix with results.

    Args:
        items: what is worked through.
        description: stands before the bar.
        total: number of items; absent: their length.
        progress: False passes them on silently.
    """
    if not progress:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description=description, total=total, console=Console(stderr=True), transient=True)
