"""A catalogue of Prometheus series, and samples that are checked against it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

Kind = Literal["gauge", "counter"]


@dataclass(frozen=True)
class Series:
    """One metric of a catalogue."""

    name: str
    """Without the `_total` of counters."""
    kind: Kind
    labels: tuple[str, ...]
    help: str

    @property
    def exposed_name(self) -> str:
        """As it stands in queries."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


class Samples:
    """Samples by series, checked against a catalogue.

    Args:
        catalogue: the series that may be exposed, by name.
    """

    def __init__(self, catalogue: Mapping[str, Series]) -> None:
        self._catalogue = catalogue
        self._families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}

    def add(self, name: str, value: float | None, *labels: str) -> None:
        """Take in a sample; None is none."""
        if value is None:
            return
        series = self._catalogue[name]
        if name not in self._families:
            family = GaugeMetricFamily if series.kind == "gauge" else CounterMetricFamily
            self._families[name] = family(name, series.help, labels=series.labels)
        self._families[name].add_metric(labels, value)

    def families(self) -> Iterator[Metric]:
        """What was taken in, series by series."""
        yield from self._families.values()


def markdown_table(catalogue: Iterable[Series]) -> str:
    """A catalogue as a Markdown table."""
    rows = [f"| `{s.exposed_name}` | {s.kind} | {', '.join(s.labels)} | {s.help} |" for s in catalogue]
    return "\n".join(["| series | type | labels | meaning |", "| --- | --- | --- | --- |", *rows])
