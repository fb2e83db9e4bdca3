"""`fedseg evaluate --robustness`: how networks do at other hospitals and under simulated shifts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from fedseg.robustness.evaluation import Question
    from fedseg.robustness.work import Progress


def evaluate_robustness(
    model: Path,
    data: Path | None,
    question: "Question",
    *,
    person: str,
    output: Path | None,
    workers: int,
    device: str,
) -> None:
    """Measure, write `robustness.json` and pictures, and show tables.

    Raises:
        ConfigError: a model file without data, or a result directory with other data than its own.
    """
    from fedseg.cli.display import wide_console
    from fedseg.data.cohort import PersonRule, read_cohort
    from fedseg.device import pick_device
    from fedseg.errors import ConfigError
    from fedseg.report.robustness_figures import draw_robustness
    from fedseg.report.robustness_tables import robustness_tables
    from fedseg.robustness.evaluation import NAME, Machine, evaluate_model, evaluate_run

    console = wide_console()
    machine = Machine(workers, str(pick_device(device)))
    if model.is_dir():
        if data is not None or output is not None:
            raise ConfigError(
                f"{model}: a result directory has its own cases, and keeps what is measured; name it alone"
            )
        folder = model
        with _shown(console) as progress:
            document = evaluate_run(model, question, machine, progress=progress)
    else:
        if data is None:
            raise ConfigError(f"{model}: a single network needs a folder with labelled cases: add --data FOLDER")
        folder = output or model.with_name(f"{model.stem}-robustness")
        cohort = read_cohort(data, PersonRule.parse(person))
        with _shown(console) as progress:
            document = evaluate_model(model, cohort, folder, question, machine, progress=progress)
    console.print(*robustness_tables(document), sep="\n")
    pictures = draw_robustness(document, folder)
    console.print(f"All numbers, with intervals: {folder / NAME}", highlight=False, soft_wrap=True)
    console.print("Pictures: " + ", ".join(str(picture) for picture in pictures), highlight=False, soft_wrap=True)


def question(
    only: str | None, effects: str | None, severities: str | None, methods: str | None, *, surface: bool
) -> "Question":
    """What is asked, from the options' texts.

    Raises:
        ConfigError: there is no such part, effect or severity.
    """
    from fedseg.data.shift.catalogue import EFFECTS, SEVERITIES
    from fedseg.robustness.evaluation import PARTS, Question

    levels = _listed(severities, "--severities", [str(level) for level in SEVERITIES])
    parts = _listed(only, "--only", PARTS)
    return Question(
        parts=PARTS if parts is None else tuple(part for part in PARTS if part in parts),
        effects=_listed(effects, "--effects", list(EFFECTS)),
        severities=SEVERITIES if levels is None else tuple(sorted(int(level) for level in levels)),
        methods=_listed(methods, "--methods"),
        surface=surface,
    )


def _listed(text: str | None, option: str, known: Sequence[str] | None = None) -> tuple[str, ...] | None:
    """The parts of a list with commas."""
    from fedseg.errors import ConfigError

    if text is None:
        return None
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    strangers = [part for part in parts if known is not None and part not in known]
    if strangers or not parts:
        choices = f"; there are {', '.join(known)}" if known else ""
        raise ConfigError(f"{option} {text!r}: {f'no {strangers[0]!r}' if strangers else 'names nothing'}{choices}")
    return parts


@contextmanager
def _shown(console: "Console") -> "Iterator[Progress]":
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left"),
                          TimeRemainingColumn(), TextColumn("so far"), TimeElapsedColumn()]  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("Measuring cases", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
