"""Write the report on a run: the HTML file, the PDF, and a card beside every model."""

from pathlib import Path

from fedseg.errors import StoreError
from fedseg.federated.checkpoint import write_durably
from fedseg.report.card import NAME, model_card
from fedseg.report.content import report_on
from fedseg.report.html import to_html


def write_report(
    directory: Path, output: Path | None = None, *, method: str | None = None, pdf: bool = True
) -> list[Path]:
    """Write a report.

    Args:
        directory: of the run.
        output: the HTML file; absent: `report.html` in the directory.
        method: which one of a simulation speaks for the federation; absent: the first.
        pdf: write the same with the suffix `.pdf`, too.

    Returns:
        What was written.

    Raises:
        StoreError: the directory holds no run, or the files cannot be written.
        ConfigError: it has no such method.
    """
    report = report_on(directory, method)
    target = output or directory / "report.html"
    paths = [target]
    try:
        write_durably(target, to_html(report).encode())
        if pdf:
            from fedseg.report.pdf import to_pdf  # half a second of imports

            paths.append(target.with_suffix(".pdf"))
            write_durably(paths[-1], to_pdf(report))
        if (directory / "result.json").exists() and (directory / "models").is_dir():
            paths.append(directory / "models" / NAME)
            write_durably(paths[-1], model_card(directory).encode())
    except OSError as error:
        raise StoreError(f"{target}: cannot be written: {error}") from error
    return paths
