import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from fedseg.config import EvaluationConfig
from fedseg.evaluation import CaseScore, Evaluation, evaluate, join_sums, means_from_sums
from fedseg.metrics import LabelScore

LABELS = {"background": 0, "liver": 1, "spleen": 2}
CONFIG = EvaluationConfig()


@dataclass(frozen=True)
class Prepared:
    name: str
    person: str
    image: np.ndarray
    label: np.ndarray | None
    spacing: tuple[float, float, float]


class ReadsTheLabel(nn.Module):
    """Segments images that show their label, by the nearest integer."""

    def forward(self, image_BCDHW):
        values = torch.arange(3.0).reshape(1, 3, 1, 1, 1)
        return -(image_BCDHW - values).square()


def case(name="case-1", person="p1", shift=0, size=(8, 6, 6)):
    label = np.zeros(size, dtype=np.uint8)
    label[1:5, 1:5, 1:3] = 1
    label[1:5, 1:5, 3:5] = 2
    image = np.roll(label, shift, axis=0).astype(np.float32)[None]
    return Prepared(name, person, image, label, (2.0, 1.0, 1.0))


def scored(name, liver, spleen, person=None, hd95=math.nan):
    labels = {"liver": LabelScore(liver, hd95, hd95, 1.0, 1.0), "spleen": LabelScore(spleen, hd95, hd95, 1.0, 1.0)}
    return CaseScore(name, person or name, labels)


def test_a_perfect_model_has_perfect_scores():
    found = evaluate(ReadsTheLabel(), [case(), case("case-2")], LABELS, CONFIG, (8, 6, 6), surface=True)
    assert (found.dice_mean(), found.hd95_mean(), found.surface_dice_mean()) == (1.0, 0.0, 1.0)
    assert [score.name for score in found.cases] == ["case-1", "case-2"]


def test_a_shift_by_one_slice_costs_what_it_should():
    # cubes of 4 slices of 2 mm, shifted by one slice: Dice 3/4, HD95 2 mm
    found = evaluate(ReadsTheLabel(), [case(shift=1)], LABELS, CONFIG, (8, 6, 6), surface=True)
    assert found.dice_mean() == 0.75
    assert found.hd95_mean() == pytest.approx(2.0)


def test_windows_give_the_same_scores_as_one_pass():
    cases = [case(shift=1), case("case-2", size=(9, 7, 11))]
    windows, whole = (
        evaluate(ReadsTheLabel(), cases, LABELS, CONFIG, size, surface=True) for size in [(4, 6, 5), (9, 7, 11)]
    )
    assert windows == whole


def test_surfaces_are_computed_when_the_configuration_or_the_caller_says_so():
    def hd95(config, **options):
        return evaluate(ReadsTheLabel(), [case()], LABELS, config, (8, 6, 6), **options).hd95_mean()

    always = EvaluationConfig(surface_metrics=True)
    assert math.isnan(hd95(CONFIG))
    assert hd95(always) == 0.0
    assert math.isnan(hd95(always, surface=False))


def test_the_model_is_in_training_mode_again_afterwards():
    model = ReadsTheLabel().train()
    evaluate(model, [case()], LABELS, CONFIG, (8, 6, 6))
    assert model.training


def test_every_case_is_reported_as_it_is_done():
    seen = []
    cases = (case(f"case-{number}") for number in (1, 2))
    evaluate(
        ReadsTheLabel(), cases, LABELS, CONFIG, (8, 6, 6), on_case=lambda count, one: seen.append((count, one.name))
    )
    assert seen == [(1, "case-1"), (2, "case-2")]


def test_a_case_without_label_cannot_be_scored():
    with pytest.raises(ValueError, match="case-1 has no label"):
        evaluate(ReadsTheLabel(), [replace(case(), label=None)], LABELS, CONFIG, (8, 6, 6))


def test_summaries_by_hand():
    found = Evaluation((scored("a", 0.9, 0.7), scored("b", 0.6, 0.4), scored("c", 1.0, 1.0)))
    assert found.dice_mean() == pytest.approx(4.6 / 6)
    assert found.label_means() == pytest.approx({"liver": 2.5 / 3, "spleen": 0.7})
    assert found.p10() == pytest.approx(0.5 + 0.2 * (0.8 - 0.5))  # case means 0.5, 0.8, 1.0; a fifth of the way
    assert found.worst().name == "b"
    assert found.failure_rate() == pytest.approx(1 / 3)


def test_cases_are_gathered_by_person_for_the_bootstrap():
    found = Evaluation((scored("a", 1.0, 0.5, "p"), scored("b", 0.0, 0.0, "q"), scored("c", 1.0, 1.0, "p")))
    assert found.by_person() == {"p": [0.75, 1.0], "q": [0.0]}


def test_nothing_has_no_mean():
    nothing = Evaluation(())
    assert all(math.isnan(value) for value in (nothing.dice_mean(), nothing.p10(), nothing.failure_rate()))
    assert nothing.worst() is None
    assert nothing.sums() == {"cases": 0.0, "failures": 0.0}


def test_sums_name_no_case_and_no_person():
    found = Evaluation((scored("secret-1", 0.9, 0.7, "person-1"), scored("secret-2", 0.6, 0.4, "person-2")))
    assert found.sums() == pytest.approx(
        {
            "cases": 2,
            "failures": 1,
            "dice/liver/sum": 1.5,
            "dice/liver/count": 2,
            "dice/spleen/sum": 1.1,
            "dice/spleen/count": 2,
        }
    )


def test_sums_are_finite_so_that_they_can_be_sent():
    found = Evaluation((scored("a", 0.9, 0.7), scored("b", 0.6, 0.4, hd95=3.0)))
    assert all(math.isfinite(value) for value in found.sums().values())
    assert found.sums()["hd95/liver/count"] == 1


def test_means_from_the_sums_of_sites_are_those_of_all_cases_together():
    cases = [scored(str(number), number / 7, 1 - number / 9, hd95=number) for number in range(7)]
    together = Evaluation(tuple(cases))
    joined = means_from_sums(join_sums([Evaluation(tuple(cases[:2])).sums(), Evaluation(tuple(cases[2:])).sums()]))
    assert joined["cases"] == 7
    assert joined["dice"] == pytest.approx(together.dice_mean())
    assert joined["hd95"] == pytest.approx(together.hd95_mean())
    assert joined["dice/spleen"] == pytest.approx(together.label_means()["spleen"])
    assert joined["failure_rate"] == pytest.approx(together.failure_rate())
