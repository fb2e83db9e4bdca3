"""Scores of final models on test cases, and the figures that compare methods: R, W and G."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedseg.case_rows import CaseRow, mean, read_scores, write_scores
from fedseg.comparison import figures_of
from fedseg.config import Experiment
from fedseg.data.features import prepare_aligned
from fedseg.data.preprocess import PreparedCase
from fedseg.device import pick_device
from fedseg.evaluation import evaluate
from fedseg.federated.fingerprint import Fingerprint
from fedseg.federated.site import Site
from fedseg.layout import Layout
from fedseg.metrics import FAILURE_DICE, LabelScore, bootstrap_ci
from fedseg.model_file import load_model
from fedseg.models.registry import ARCHITECTURES
from fedseg.scenario import Scenario
from fedseg.site.config import SiteConfig
from fedseg.traffic import traffic


def score_model(
    model_file: Path, run: str, experiment: Experiment, layout: Layout, hospitals: Sequence[str]
) -> list[CaseRow]:
    """Score one model for several hospitals.

    Args:
        model_file: the model.
        run: its name in the rows.
        experiment: says how cases are prepared.
        layout: has the cases: the shared test persons as each hospital sees them, else the sites' own validation cases.
        hospitals: for whom, sites or unseen ones.
    """
    sites = {site.name: site for site in layout.sites}
    torch.set_num_threads(layout.sites[0].threads)
    own, model, fingerprint = load_model(model_file)
    known: dict[str, dict[tuple[str, str, str], LabelScore]] = {}
    rows = []
    for name in hospitals:
        view = layout.scored_on(name)
        same = f"{name}" if view is None else view.model_copy(update={"name": "-"}).model_dump_json()
        if same not in known:  # hospitals without a scanner of their own see the same
            cases = _all_cases(view, own, fingerprint) if view else _own_cases(sites[name], own, fingerprint)
            known[same] = _score(model, experiment, cases, (view or sites[name]).device)
        rows += [CaseRow(run, name, *key, *astuple(score)) for key, score in known[same].items()]
    return rows


def score_once(
    kept: Path, model_file: Path, run: str, experiment: Experiment, layout: Layout, hospitals: Sequence[str]
) -> list[CaseRow]:
    """The same, or what an earlier start has left of it: it may have been killed, or a method may have been added since.

    Args:
        kept: folder of the rows of each model, by a digest of it, of the cases' files and of all settings.
        model_file: the model.
        run: its name in the rows.
        experiment: says how cases are prepared.
        layout: has the cases.
        hospitals: for whom.
    """
    path = kept / f"{run}-{_digest(model_file, experiment, layout, hospitals)}.csv"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_scores(path, score_model(model_file, run, experiment, layout, hospitals))
    return read_scores(path)


def _digest(model_file: Path, experiment: Experiment, layout: Layout, hospitals: Sequence[str]) -> str:
    digest, sites = hashlib.sha256(model_file.read_bytes()), {site.name: site for site in layout.sites}
    for name in hospitals:
        site = layout.scored_on(name) or sites[name]
        digest.update(site.model_dump_json(exclude={"device", "threads", "data", "cache", "state"}).encode())
        for case in Site(site).cohort().cases:
            for file in (*case.images, *([case.label] if case.label else [])):
                about = file.stat() if file.exists() else None
                digest.update(f"{file.name} {about and (about.st_size, about.st_mtime_ns)}\n".encode())
    digest.update(experiment.to_json().encode())
    return digest.hexdigest()[:20]


def summarise(scenario: Scenario, layout: Layout, rows: Sequence[CaseRow], output: Path) -> dict[str, Any]:
    """What `result.json` holds: final scores by method, site and label, and R, W, G of each federated method.

    `R` is the mean over sites of the federated Dice over that of the pooled model; `W` the largest deficit of a site
    against pooled, in Dice points (0.01); `G` the smallest gain of a site over its own local model, in points; `U` what
    hospitals that took no part have less than the sites in the mean, in points, and `U_pooled` their deficit against pooled.
    """
    experiment = scenario.experiment
    groups: dict[str, list[CaseRow]] = {
        method: [row for row in rows if row.run == method] for method in scenario.compared
    }
    if "pooled" in scenario.baselines:
        groups["pooled"] = [row for row in rows if row.run == "pooled"]
    if "local" in scenario.baselines:
        groups["local"] = [row for row in rows if row.run == f"local-{row.site}"]
    sites = {site.name for site in layout.sites}
    final = {name: summary([row for row in group if row.site in sites]) for name, group in groups.items()}
    for name, group in groups.items():
        if unseen := [row for row in group if row.site not in sites]:
            final[name]["unseen"] = site_means(unseen)
    final.setdefault("federated", final[next(iter(scenario.methods))])
    return {
        "name": experiment.name,
        "seed": experiment.seed,
        "experiment_digest": experiment.digest(),
        "rounds": experiment.federation.rounds,
        "model": {
            "name": experiment.model.name,
            "preset": experiment.model.preset or ARCHITECTURES[experiment.model.name].default_preset,
        },
        "test": "shared persons that no site has" if layout.test else "each site's validation cases",
        "sites": {site.name: _site_counts(site, experiment) for site in layout.sites},
        "final": final,
        "headline": {method: headline(final, method) for method in scenario.compared},
        "traffic": {method: traffic(output, method) for method in scenario.methods},
        "hospitals": {
            name: {
                "scanner": hospital.scanner and hospital.scanner.name,
                "annotator": hospital.annotator and hospital.annotator.name,
            }
            for name, hospital in (scenario.hospitals | scenario.unseen).items()
        },
        "leave_one_out": site_means([row for row in rows if row.run == f"without-{row.site}"]),
        "expected": {
            method: {figure: expected.model_dump() for figure, expected in figures.items()}
            for method, figures in scenario.expected.items()
        },
    }


def summary(rows: Sequence[CaseRow]) -> dict[str, Any]:
    """Means over a group of rows; the Dice of a site is unweighted over its cases and labels, the mean over sites too."""
    sites, cases = site_means(rows), _by_case(rows)
    persons: dict[str, list[float]] = {}
    for row in rows:
        persons.setdefault(row.person, []).append(row.dice)
    worst = min(sites, key=lambda site: sites[site])
    labels = dict.fromkeys(row.label for row in rows)
    return {
        "dice_mean": mean(sites.values()),
        "dice_ci95": list(bootstrap_ci(persons)),
        "dice_worst_site": sites[worst],
        "worst_site": worst,
        "sites": sites,
        "labels": {label: mean(row.dice for row in rows if row.label == label) for label in labels},
        "hd95_mm": mean(row.hd95 for row in rows),
        "surface_dice": mean(row.surface_dice for row in rows),
        "dice_site_sd": float(np.std([*sites.values()], ddof=1)) if len(sites) > 1 else 0.0,
        "dice_p10": float(np.quantile([mean(dice) for dice in cases.values()], 0.1)) if cases else math.nan,
        "failure_rate": mean(float(min(dice) < FAILURE_DICE) for dice in cases.values()),
        "cases": len(cases),
    }


def site_means(rows: Sequence[CaseRow]) -> dict[str, float]:
    """Mean Dice by site, unweighted over its cases and labels."""
    return {
        site: mean(row.dice for row in rows if row.site == site) for site in dict.fromkeys(row.site for row in rows)
    }


def _by_case(rows: Sequence[CaseRow]) -> dict[tuple[str, str], list[float]]:
    """Dice of all structures, by site and case."""
    cases: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        cases.setdefault((row.site, row.case), []).append(row.dice)
    return cases


def headline(final: dict[str, Any], method: str) -> dict[str, float | None]:
    """R as a share, W, G and U in Dice points; None without the baseline, or the unseen hospitals, that they need."""
    figures = figures_of({"final": final}, method)
    share, gain = figures.get("R"), figures.get("unseen_gain")
    return {
        "R": None if share is None else share / 100,
        "W": figures.get("W"),
        "G": figures.get("G"),
        "U": 100 * (figures["dice"] - figures["unseen"]) if "unseen" in figures else None,
        "U_pooled": None if gain is None else 0.0 - gain,
    }


def _score(
    model: Any, experiment: Experiment, cases: Sequence[PreparedCase], device: str
) -> dict[tuple[str, str, str], Any]:
    evaluation = evaluate(
        model,
        cases,
        experiment.task.structures,
        experiment.evaluation,
        experiment.training.patch_size,
        device=pick_device(device),
        precision=experiment.training.precision,
        surface=True,
        slicing=experiment.slicing,
    )
    return {(case.name, case.person, label): score for case in evaluation.cases for label, score in case.labels.items()}


def _own_cases(site: SiteConfig, experiment: Experiment, fingerprint: Fingerprint) -> Sequence[PreparedCase]:
    return Site(site).prepare(experiment, fingerprint).validation.cases


def _all_cases(site: SiteConfig, experiment: Experiment, fingerprint: Fingerprint) -> Sequence[PreparedCase]:
    shift = site.shift and site.shift.for_scoring
    cohort, task, data = Site(site).cohort(), experiment.task, experiment.data
    return prepare_aligned(cohort, task, data, Path(site.cache), fingerprint, shift=shift).cases


def _site_counts(site: SiteConfig, experiment: Experiment) -> dict[str, Any]:
    data = Site(site).prepare(experiment)
    quarantined = sorted((data.training.quarantined | data.validation.quarantined).values())
    return {
        "training_cases": len(data.training.cases),
        "validation_cases": len(data.validation.cases),
        "quarantined": {reason: quarantined.count(reason) for reason in dict.fromkeys(quarantined)},
    }
