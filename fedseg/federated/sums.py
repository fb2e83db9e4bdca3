"""Metrics leave a site as additive sums and counts; this turns them into means.

A key `dice/liver/sum` has its count under `dice/liver/count`; the mean is called `dice/liver`. Keys without such a pair
(plain counts, such as `cases`) are passed on as they are.
"""

from collections.abc import Iterable, Mapping


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Means of the pairs in `sums`; a pair with count 0 is left out."""
    found: dict[str, float] = {}
    for key, value in sums.items():
        name, _, kind = key.rpartition("/")
        if kind == "count":
            continue
        if kind == "sum":
            count = sums.get(f"{name}/count", 0.0)
            if count:
                found[name] = value / count
        else:
            found[key] = value
    return found


def add(many: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sums of several sites, joined."""
    total: dict[str, float] = {}
    for sums in many:
        for key, value in sums.items():
            total[key] = total.get(key, 0.0) + value
    return total
