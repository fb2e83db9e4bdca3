"""Tables of `robustness.json` for the screen."""

from typing import Any

from rich.table import Table

from fedseg.words import counted

Document = dict[str, Any]
"""What `robustness.json` holds."""


def robustness_tables(document: Document) -> list[Table]:
    """One table for each thing that was measured."""
    tables = []
    if "cross_site" in document:
        tables += [_matrix(document), _in_short(document), _volumes(document)]
        if document["cross_site"]["leave_one_out"]:
            tables.append(_left_out(document))
        if document["cross_site"]["comparisons"]:
            tables.append(_comparisons(document))
    if document.get("calibration"):
        tables.append(_calibration(document))
    if "grid" in document:
        tables += [_degradation(document), _effects(document)]
    return tables


def _matrix(document: Document) -> Table:
    table = _table(
        "Dice of networks (rows) at hospitals (columns): "
        f"{counted(document['cases'], 'case')} of {counted(document['persons'], 'person')}"
    )
    hospitals = document["hospitals"]
    table.add_column("network")
    for name, about in hospitals.items():
        table.add_column(name if about["takes_part"] else f"{name} (unseen)", justify="right")
    for row, cells in document["cross_site"]["dice"].items():
        table.add_row(row, *(_number(cells.get(name), 3) for name in hospitals))
    return table


def _in_short(document: Document) -> Table:
    table = _table("What the mean hides")
    headings = ("network", "Dice [95 % CI]", "worst site", "p10", "failed %", "site SD", "Jain", "worst/best", "gap pt")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for name, row in document["cross_site"]["rows"].items():
        if row["kind"] == "single" and len(document["networks"]) > 1:
            continue
        table.add_row(
            name,
            _interval(row["dice"], 3),
            f"{_number(row['worst_site_dice'], 3)} {row['worst_site'] or ''}",
            _number(row["p10"], 3),
            _number(row["failure_rate"], 1, 100),
            _number(row["site_sd"], 3),
            _number(row["jain"], 4),
            _number(row["worst_to_best"], 3),
            _interval(row.get("gap"), 1),
        )
    return _noted(
        table,
        "Failed: Dice below 0.5 in any structure. Gap: what hospitals that took no part have less than the sites.",
    )


def _volumes(document: Document) -> Table:
    table = _table("Volumes")
    for heading in ("network", "structure", "error mm³", "error %", "bias mm³", "bias % [95 % CI]"):
        table.add_column(heading, justify="left" if heading in ("network", "structure") else "right")
    for name, row in document["cross_site"]["rows"].items():
        if row["kind"] == "single" and len(document["networks"]) > 1:
            continue
        for structure, of in row["volume"].items():
            cells = (_number(of["error_mm3"], 0), _number(of["error_percent"], 1), _number(of["bias_mm3"], 0))
            table.add_row(name, structure, *cells, _interval(of["bias_percent"], 1))
    return table


def _left_out(document: Document) -> Table:
    found = document["cross_site"]["leave_one_out"]
    table = _table("Sites that were left out of the federation")
    table.add_column("site")
    table.add_column("Dice without it", justify="right")
    for name in found["drop"]:
        table.add_column(f"less than {name}, pt", justify="right")
    for site, dice in found["dice"].items():
        table.add_row(site, _interval(dice, 3), *(_interval(drop[site], 1) for drop in found["drop"].values()))
    table.add_section()
    table.add_row("mean", "", *(_interval(drop["mean"], 1) for drop in found["drop"].values()))
    return table


def _comparisons(document: Document) -> Table:
    table = _table("Pairs, over persons")
    for heading in ("first", "second", "first minus second, pt [95 % CI]", "p", "p, Holm"):
        table.add_column(heading, justify="left" if heading in ("first", "second") else "right")
    for pair in document["cross_site"]["comparisons"]:
        table.add_row(*pair["rows"], _interval(pair["difference"], 2), f"{pair['p']:.2g}", f"{pair['p_holm']:.2g}")
    return _noted(table, "Wilcoxon's signed-rank test of the persons' mean Dice over the sites.")


def _calibration(document: Document) -> Table:
    table = _table("Calibration near the border, and whether uncertainty finds failures")
    headings = ["network", "ECE [95 % CI]", "Brier", "worst ECE", "failed", "augmented AUROC", "rho"]
    heads = any("heads" in row["uncertainty"] for row in document["calibration"].values())
    for heading in headings + (["heads AUROC", "rho"] if heads else []):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for name, row in document["calibration"].items():
        worst = max(row["hospitals"], key=lambda hospital: row["hospitals"][hospital]["ece"]["value"] or 0)
        kinds = [row["uncertainty"].get(kind, {}) for kind in ("augmented", "heads")[: 1 + heads]]
        table.add_row(
            name,
            _interval(row["ece"], 3),
            _number(row["brier"], 3),
            f"{_number(row['hospitals'][worst]['ece'], 3)} {worst}",
            f"{kinds[0].get('failures', '')} of {kinds[0].get('cases', '')}",
            *(cell for kind in kinds for cell in (_number(kind.get("auroc"), 2), _plain(kind.get("spearman"), 2))),
        )
    return _noted(
        table, "AUROC: chance that a failed case is the more uncertain one. rho: rank correlation with 1 - Dice."
    )


def _degradation(document: Document) -> Table:
    grid = document["grid"]
    table = _table(
        f"Under {counted(len(grid['effects']), 'effect')}, severities {', '.join(map(str, grid['severities']))}"
    )
    headings = ["network", "clean Dice", "lost pt [95 % CI]", "weighted pt"]
    headings += ["mCE", "relative mCE"] if grid["reference"] else []
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for name, row in grid["rows"].items():
        cells = [_number(row["clean"], 3), _interval(row["degradation"], 1), _number(row["weighted_degradation"], 1)]
        cells += [_interval(row[key], 3) for key in ("mean_ce", "mean_relative_ce") if key in row]
        table.add_row(name, *cells)
    ranks = grid["ranks"]
    stable = ""
    if ranks:
        taus = ", ".join(
            f"{level}: {_plain(tau, 2)}" for level, tau in zip(grid["severities"], ranks["tau"], strict=True)
        )
        stays = f"{100 * ranks['best_stays']:.0f} %"
        stable = f" Ranks against clean, Kendall's tau by severity: {taus}; the best stays so in {stays}."
    reference = f" CE: error relative to {grid['reference']}, below 1 is better." if grid["reference"] else ""
    return _noted(table, f"Weighted: severity s counts (2/3)^s.{reference}{stable}")


def _effects(document: Document) -> Table:
    grid = document["grid"]
    table = _table("Dice by effect, severities in turn")
    table.add_column("effect")
    for name in grid["rows"]:
        table.add_column(name, justify="right")
    for effect in grid["effects"]:
        table.add_row(
            effect, *(" ".join(_number(one, 2) for one in row["dice"][effect]) for row in grid["rows"].values())
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", min_width=len(title))  # or a long title is wrapped


def _noted(table: Table, text: str) -> Table:
    table.caption, table.caption_justify = text, "left"
    return table


def _plain(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _number(estimate: dict[str, Any] | None, digits: int, factor: float = 1) -> str:
    return "" if estimate is None or estimate["value"] is None else f"{factor * estimate['value']:.{digits}f}"


def _interval(estimate: dict[str, Any] | None, digits: int) -> str:
    if estimate is None or estimate["value"] is None:
        return ""
    if estimate["ci95"] is None:
        return _number(estimate, digits)
    low, high = estimate["ci95"]
    return f"{estimate['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
