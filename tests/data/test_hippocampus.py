"""The real volumes: all of them, through everything up to the patch."""

from fedseg.config import TaskConfig, TrainingConfig
from fedseg.data.audit import audit_cohort
from fedseg.data.cohort import PersonRule, read_cohort, split_by_person
from fedseg.data.patches import PatchSampler
from fedseg.data.preprocess import prepare_cohort
from tests.data.niftis import config

TASK = TaskConfig(name="hippocampus", modality="mr", labels={"background": 0, "anterior": 1, "posterior": 2})


def test_all_199_cases_of_130_persons_are_usable(hippocampus, tmp_path):
    cohort = read_cohort(hippocampus, PersonRule(kind="pairs"))
    audit = audit_cohort(cohort, TASK, progress=False, workers=2)
    assert audit.findings == ()
    assert (audit.total_cases, audit.fingerprint.cases, audit.fingerprint.persons) == (199, 199, 130)
    bright = audit.fingerprint.intensity["99.5"]
    assert bright.maximum / bright.minimum > 1000

    prepared = prepare_cohort(cohort, TASK, config(), tmp_path)
    assert prepared.quarantined == {}
    assert len(prepared.cases) == 199
    for case in prepared.cases:
        assert abs(float(case.image.mean())) < 0.05
        assert 0.9 < float(case.image.std()) < 1.1
        assert sorted(case.foreground) == [1, 2]

    batch = next(PatchSampler(prepared.cases, TrainingConfig(patch_size=(40, 56, 40)), seed=0).epoch(0))
    assert tuple(batch.image.shape) == (2, 1, 40, 56, 40)
    assert batch.label.any()


def test_a_split_of_the_persons_keeps_left_and_right_together(hippocampus):
    cohort = read_cohort(hippocampus, PersonRule(kind="pairs"))
    training, validation = split_by_person(cohort, 0.2, seed=0)
    assert (len(training.persons()), len(validation.persons())) == (104, 26)
    numbers = {(int(case.name[-3:]) + 1) // 2 for case in training.cases}
    assert numbers.isdisjoint((int(case.name[-3:]) + 1) // 2 for case in validation.cases)
