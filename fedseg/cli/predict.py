"""`fedseg predict` and `fedseg evaluate`: a trained network on new images, and on cases with a reference."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedseg.evaluation import Evaluation

MODEL_HELP = "Model file, or a result directory: its federated model."
DEVICE_HELP = "cpu, cuda, cuda:1 or auto."


def predict(
    model: Annotated[Path, typer.Argument(help=MODEL_HELP)],
    images: Annotated[
        Path,
        typer.Argument(help="NIfTI file; or a folder of them, CASE_0000.nii.gz per channel; or a cohort's folder."),
    ],
    output: Annotated[Path, typer.Argument(help="Label file to write; a folder if IMAGES is one.")],
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    mirror: Annotated[
        bool, typer.Option(help="Average over eight flips: a little better, eight times slower.")
    ] = False,
    overlap: Annotated[
        float | None, typer.Option(min=0, max=0.95, help="Overlap of windows; absent: the experiment's.")
    ] = None,
) -> None:
    """Segment images; each label is written on its image's own grid.

    Warns of images that are unlike those that the network was trained on, where its federation had a fingerprint.
    """
    from rich.console import Console
    from rich.progress import track

    from fedseg.data.cohort import list_images
    from fedseg.data.features import align, describe
    from fedseg.data.preprocess import prepare_image, restore
    from fedseg.data.volume import write_label
    from fedseg.device import configure, default_threads, pick_device
    from fedseg.drift import drift_of
    from fedseg.errors import CaseError, DataError
    from fedseg.inference import predict_logits
    from fedseg.model_file import load_model

    experiment, network, fingerprint = load_model(model)
    cases = list_images(images)
    if not images.is_dir() and not output.name.endswith((".nii", ".nii.gz")):
        raise DataError(f"{output}: a label file must end in .nii or .nii.gz")
    place = pick_device(device)
    configure(threads=default_threads())
    network.to(place)
    console, failed = Console(stderr=True), 0
    shown: Iterable[tuple[str, tuple[Path, ...]]] = cases.items()
    if len(cases) > 1:
        shown = track(cases.items(), description="Segmenting", console=console)
    for name, files in shown:
        try:
            case = align(prepare_image(files, experiment.task, experiment.data), experiment.data, fingerprint)
        except CaseError as error:
            console.print(
                f"{name}: not segmented ({error.reason}): {error}", style="red", markup=False, highlight=False
            )
            failed += 1
            continue
        if fingerprint and (drift := drift_of(describe(case), fingerprint)).alarm:
            console.print(
                f"{name}: unlike the images that the network was trained on: {', '.join(drift.words)}; look at its label "
                "with care",
                style="yellow",
                markup=False,
                highlight=False,
            )
        logits_KDHW = predict_logits(
            network,
            case.image,
            experiment.training.patch_size,
            overlap=experiment.evaluation.overlap if overlap is None else overlap,
            device=place,
            precision=experiment.training.precision,
            mirror=mirror,
            slicing=experiment.slicing,
        )
        path = output / f"{name}.nii.gz" if images.is_dir() else output
        write_label(path, restore(logits_KDHW.numpy(), case.geometry), case.geometry.source)
    typer.echo(f"{len(cases) - failed} of {len(cases)} labels written to {output}; values: {experiment.task.labels}")
    if failed:
        raise typer.Exit(1)


def evaluate(
    model: Annotated[Path, typer.Argument(help=MODEL_HELP)],
    cases: Annotated[Path | None, typer.Argument(metavar="DATA", help="Folder with labelled cases.")] = None,
    data: Annotated[Path | None, typer.Option(help="Another way to name DATA.")] = None,
    person: Annotated[
        str, typer.Option(help="Who is one person: case, pairs, pattern:REGEX or column:FILE[:CASE:PERSON].")
    ] = "case",
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    csv: Annotated[Path | None, typer.Option(help="Also write the scores of each case to this file.")] = None,
    robustness: Annotated[
        bool,
        typer.Option(
            "--robustness",
            help="Of all networks of a result directory: other hospitals, simulated shifts, calibration; "
            "or of one network on DATA. Started again, it goes on.",
        ),
    ] = False,
    only: Annotated[str | None, typer.Option(help="Parts, with commas: cross-site, grid, calibration.")] = None,
    effects: Annotated[str | None, typer.Option(help="Effects of the grid, with commas; absent: all.")] = None,
    severities: Annotated[str | None, typer.Option(help="Of the grid, with commas: 1 (slight) to 5.")] = None,
    methods: Annotated[str | None, typer.Option(help="Federated methods, with commas; absent: all.")] = None,
    surface: Annotated[
        bool, typer.Option(help="With --robustness: HD95 and surface Dice too, which take longer.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --robustness: processes; absent: one per core.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="With --robustness and one network: folder for what is measured."),
    ] = None,
) -> None:
    """Score a network on labelled cases, per structure; or, with --robustness, see what it is worth elsewhere."""
    from fedseg.errors import ConfigError

    if cases is not None and data is not None:
        raise ConfigError("the folder with cases is named twice, as DATA and with --data; name it once")
    data = cases or data
    asked = {"--only": only, "--effects": effects, "--severities": severities, "--methods": methods,
             "--surface": surface or None, "--workers": workers, "--output": output}  # fmt: skip
    if robustness:
        if csv is not None:
            raise ConfigError("--csv is not for --robustness, whose scores are in robustness.sqlite")
        from fedseg.cli.robustness import evaluate_robustness, question
        from fedseg.device import usable_cores

        evaluate_robustness(
            model,
            data,
            question(only, effects, severities, methods, surface=surface),
            person=person,
            output=output,
            workers=workers or (usable_cores() if device in ("cpu", "auto") else 1),
            device=device,
        )
        return
    if foreign := [option for option, value in asked.items() if value is not None]:
        raise ConfigError(f"{foreign[0]} is for --robustness; add that, or leave {foreign[0]} out")
    if data is None:
        raise ConfigError(f"{model}: needs a folder with labelled cases: fedseg evaluate MODEL DATA")
    _score_once(model, data, person, device, csv)


def _score_once(model: Path, data: Path, person: str, device: str, csv: Path | None) -> None:
    import shlex

    from rich.console import Console
    from rich.progress import Progress

    from fedseg.data.cohort import PersonRule, read_cohort
    from fedseg.data.features import prepare_aligned
    from fedseg.device import configure, default_threads, pick_device
    from fedseg.errors import DataError
    from fedseg.evaluation import evaluate as score
    from fedseg.model_file import load_model
    from fedseg.site.config import default_cache

    experiment, network, fingerprint = load_model(model)
    cohort = read_cohort(data, PersonRule.parse(person))
    configure(threads=default_threads())
    console = Console()
    where = Path(default_cache())
    prepared = prepare_aligned(cohort, experiment.task, experiment.data, where, fingerprint, progress=True)
    if not prepared.cases:
        reasons = sorted(set(prepared.quarantined.values()))
        raise DataError(f"{data}: none of {len(cohort.cases)} cases can be used: {', '.join(reasons)}")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Scoring", total=len(prepared.cases))
        found = score(
            network,
            prepared.cases,
            experiment.task.structures,
            experiment.evaluation,
            experiment.training.patch_size,
            device=pick_device(device),
            precision=experiment.training.precision,
            surface=True,
            slicing=experiment.slicing,
            on_case=lambda done, _score: progress.update(task, completed=done),
        )
    console.print(_score_table(found))
    if prepared.quarantined:
        command = shlex.join(["fedseg", "data", "check", str(data)])
        console.print(f"not scored: {len(prepared.quarantined)} cases; `{command}` tells why", highlight=False)
    if csv is not None:
        _write_csv(csv, found)
        console.print(f"scores of each case: {csv}", highlight=False)


def _score_table(found: "Evaluation") -> Any:
    from rich.table import Table

    from fedseg.metrics import bootstrap_ci

    low, high = bootstrap_ci(found.by_person())
    worst = found.worst()
    table = Table(title=f"{len(found.cases)} cases of {len(found.by_person())} persons", title_justify="left")
    for heading in ("structure", "Dice", "HD95 mm", "surface Dice"):
        table.add_column(heading, justify="left" if heading == "structure" else "right")
    means = {metric: found.label_means(metric) for metric in ("dice", "hd95", "surface_dice")}
    for name in means["dice"]:
        table.add_row(
            name, f"{means['dice'][name]:.3f}", f"{means['hd95'][name]:.2f}", f"{means['surface_dice'][name]:.3f}"
        )
    table.add_section()
    table.add_row("mean", f"{found.dice_mean():.3f}", f"{found.hd95_mean():.2f}", f"{found.surface_dice_mean():.3f}")
    table.caption = (
        f"Dice 95 % interval over persons {low:.3f} to {high:.3f}; worst tenth of cases up to {found.p10():.3f}; "
        f"failed (a structure below 0.5) {100 * found.failure_rate():.0f} %"
        + (f"; worst case {worst.name}, {worst.dice:.3f}" if worst else "")
    )
    table.caption_justify = "left"
    return table


def _write_csv(path: Path, found: "Evaluation") -> None:
    import csv as table
    import io
    from dataclasses import asdict

    from fedseg.federated.checkpoint import write_durably

    rows = [
        {"case": case.name, "person": case.person, "label": label, **asdict(score)}
        for case in found.cases
        for label, score in case.labels.items()
    ]
    text = io.StringIO(newline="")
    writer = table.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_durably(path, text.getvalue().encode())
