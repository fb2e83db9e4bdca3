"""Numbers in sentences."""


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number and what it counts.

    Args:
        number: how many.
        one: what stands behind a single one, such as `round` or `hospital trains`.
        many: what stands behind any other number; absent: `one` with an s.
    """
    return f"{number} {one if number == 1 else many or f'{one}s'}"
