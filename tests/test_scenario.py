import json
import math

import pytest

from fedseg.data.cohort import Case, Cohort, PersonRule
from fedseg.errors import ConfigError
from fedseg.layout import deal_out, lay_out
from fedseg.scenario import Partition, Scenario, load_scenario

EXPERIMENT = """
[experiment]
name = "tiny"
task = { name = "phantom", modality = "mr", labels = { background = 0, liver = 1, spleen = 2, kidneys = 3 } }
model = { name = "unet", options = { widths = [4, 8] } }
training = { patch_size = [16, 16, 16], steps_per_epoch = 2 }
federation = { rounds = 2 }
"""
SITES = """
[[sites]]
name = "Aare"
phantom = { cases = 3, shape = [16, 16, 16] }
[[sites]]
name = "Elbe"
phantom = { cases = 3, shape = [16, 16, 16], first = 10 }
"""


def write(folder, text):
    path = folder / "scenario.toml"
    path.write_text(text)
    return path


def cohort(folder, persons, cases_each=2):
    names = [
        (f"case_{person:03d}_{side}", f"person{person:03d}") for person in range(persons) for side in range(cases_each)
    ]
    return Cohort(folder, tuple(Case(name, (folder / f"{name}.nii.gz",), None, person) for name, person in names))


def persons_of(cohort, shares):
    of_case = {case.name: case.person for case in cohort.cases}
    return {site: {of_case[name] for name in names} for site, names in shares.items()}


@pytest.mark.parametrize(
    "partition",
    [
        {"scheme": "lognormal", "sites": 6, "sigma": 0.6, "minimum": 8},
        {"scheme": "sizes", "sizes": [5.0, 3.0, 1.0], "minimum": 2},
        {"scheme": "dirichlet", "sites": 4, "alpha": 0.3, "minimum": 5},
    ],
    ids=lambda partition: partition["scheme"],
)
def test_every_person_goes_to_exactly_one_site_with_all_cases(tmp_path, partition):
    everybody = cohort(tmp_path, 104)
    shares = deal_out(everybody, Partition.model_validate_json(json.dumps(partition)), seed=3)
    persons = persons_of(everybody, shares)
    assert sorted(name for names in shares.values() for name in names) == sorted(case.name for case in everybody.cases)
    assert sum(len(group) for group in persons.values()) == 104
    assert set.union(*persons.values()) == set(everybody.persons())
    assert min(len(group) for group in persons.values()) >= partition["minimum"]


def test_the_seed_decides_who_goes_where(tmp_path):
    everybody = cohort(tmp_path, 40)
    partition = Partition(scheme="lognormal", sites=4)
    assert deal_out(everybody, partition, 1) == deal_out(everybody, partition, 1)
    assert deal_out(everybody, partition, 1) != deal_out(everybody, partition, 2)


def test_sizes_are_in_the_given_proportions(tmp_path):
    everybody = cohort(tmp_path, 90, cases_each=1)
    shares = deal_out(everybody, Partition(scheme="sizes", sizes=(5.0, 3.0, 1.0), minimum=1), 0)
    assert [len(names) for names in shares.values()] == [50, 30, 10]


def test_dirichlet_skews_hospitals_by_foreground(tmp_path, monkeypatch):
    everybody = cohort(tmp_path, 90, cases_each=1)
    monkeypatch.setattr("fedseg.layout._foreground", lambda cases: float(cases[0].person.removeprefix("person")))

    def spread(alpha):
        shares = deal_out(everybody, Partition(scheme="dirichlet", sites=3, alpha=alpha, minimum=3), 0)
        means = [sum(float(name.split("_")[1]) for name in names) / len(names) for names in shares.values()]
        return max(means) - min(means)

    assert spread(0.1) > spread(100.0) + 5


def test_a_listed_person_cannot_be_at_two_sites(tmp_path):
    everybody = cohort(tmp_path, 4)
    split = Partition(scheme="list", lists={"A": ("case_000_0",), "B": ("case_000_1", "case_001_0")})
    with pytest.raises(ConfigError, match="one person at two sites, A and B"):
        deal_out(everybody, split, 0)
    with pytest.raises(ConfigError, match="no case 'nobody'"):
        deal_out(everybody, Partition(scheme="list", lists={"A": ("nobody",)}), 0)


def test_too_few_persons_for_the_sites_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="5 persons are too few for 3 sites of at least 3"):
        deal_out(cohort(tmp_path, 5), Partition(scheme="lognormal", sites=3), 0)


def test_methods_replace_settings_and_are_checked_at_once(tmp_path):
    methods = '[methods.plain]\n[methods.prox]\nproximal_mu = 0.1\n"training.learning_rate" = 0.5\n'
    scenario = load_scenario(write(tmp_path, methods + EXPERIMENT + SITES))
    assert scenario.experiment_of("plain") == scenario.experiment
    changed = scenario.experiment_of("prox")
    assert (changed.federation.proximal_mu, changed.training.learning_rate) == (0.1, 0.5)
    assert changed.federation.rounds == scenario.experiment.federation.rounds
    with pytest.raises(ConfigError, match=r"scenario\.toml.*methods\.prox.*proximal_nu"):
        load_scenario(write(tmp_path, "[methods.prox]\nproximal_nu = 0.1\n" + EXPERIMENT + SITES))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (EXPERIMENT, r"either \[\[sites\]\] or \[source\]"),
        (EXPERIMENT + SITES.replace("Elbe", "Aare"), "name of its own"),
        (EXPERIMENT + '[[sites]]\nname = "Aare"\n', "either data or phantom"),
        (EXPERIMENT + '[source]\ndata = "x"\npartition = { scheme = "lognormal" }', "'lognormal' needs sites"),
        ("[methods.pooled]\n" + EXPERIMENT + SITES, "pooled, local, local-"),
        (EXPERIMENT + SITES + "\n[extra]\n", "extra: unknown key"),
        ('[methods.x]\n"trainings.learning_rate" = 1.0\n' + EXPERIMENT + SITES, "no section 'trainings'"),
    ],
)
def test_impossible_scenarios_are_refused_with_the_reason(tmp_path, text, told):
    with pytest.raises(ConfigError, match=told):
        load_scenario(write(tmp_path, text))


def test_a_data_folder_may_come_from_the_environment(tmp_path, monkeypatch):
    text = EXPERIMENT + '[source]\ndata = "${WHERE_IT_IS}/x"\npartition = { scheme = "lognormal", sites = 2 }'
    monkeypatch.delenv("WHERE_IT_IS", raising=False)
    with pytest.raises(ConfigError, match=r"WHERE_IT_IS.*not set"):
        load_scenario(write(tmp_path, text))
    monkeypatch.setenv("WHERE_IT_IS", "/somewhere")
    assert load_scenario(write(tmp_path, text)).source.data == "/somewhere/x"


def test_seed_and_rounds_can_be_replaced_and_an_experiment_can_be_a_file(tmp_path):
    (tmp_path / "experiment.toml").write_text(EXPERIMENT.replace("[experiment]\n", ""))
    path = write(tmp_path, 'experiment = "experiment.toml"\n' + SITES)
    scenario = load_scenario(path, seed=5, rounds=7)
    assert (scenario.experiment.seed, scenario.experiment.federation.rounds) == (5, 7)


def test_sites_with_phantoms_get_folders_of_their_own(tmp_path):
    layout = lay_out(load_scenario(write(tmp_path, EXPERIMENT + SITES)), tmp_path / "run")
    assert [site.name for site in layout.sites] == ["Aare", "Elbe"]
    assert layout.test is None
    assert all((tmp_path / "run" / "data" / name / "dataset.json").exists() for name in ("Aare", "Elbe"))


def test_hippocampus_persons_are_dealt_out_whole(hippocampus, tmp_path):
    source = (
        f'[source]\ndata = "{hippocampus}"\nperson = {{ kind = "pairs" }}\ntest_fraction = 0.2\n'
        'partition = { scheme = "lognormal", sites = 6, minimum = 8 }'
    )
    layout = lay_out(load_scenario(write(tmp_path, EXPERIMENT + source)), tmp_path / "run")
    groups = [{person(name) for name in site.cases} for site in (*layout.sites, layout.test)]
    assert sum(len(group) for group in groups) == len(set.union(*groups)) == 130
    assert len(groups[-1]) == math.floor(0.2 * 130 + 0.5)


def person(name):
    return PersonRule(kind="pairs").persons([name], None)[name]


def test_the_shipped_scenarios_are_valid(monkeypatch):
    from pathlib import Path

    monkeypatch.setenv("FEDSEG_HIPPOCAMPUS", "/somewhere")
    shipped = sorted((Path(__file__).parents[1] / "simulations").glob("*.toml"))
    assert shipped
    assert all(isinstance(load_scenario(path), Scenario) for path in shipped)


def test_only_some_methods_are_personalised(tmp_path):
    methods = "[methods.plain]\n[methods.prox]\nproximal_mu = 0.1\n"
    top = 'personal_epochs = 2\npersonalised = ["prox"]\n'
    found = load_scenario(write(tmp_path, top + EXPERIMENT + SITES + methods))
    assert found.goes_on == ("prox",)
    assert found.compared == ("plain", "prox", "prox-personal")
    assert load_scenario(write(tmp_path, "personal_epochs = 2\n" + EXPERIMENT + SITES + methods)).goes_on == (
        "plain",
        "prox",
    )
    with pytest.raises(ConfigError, match="personalised: there is no method 'other', there are plain, prox"):
        load_scenario(write(tmp_path, top.replace("prox", "other") + EXPERIMENT + SITES + methods))
    with pytest.raises(ConfigError, match="personalised: personal_epochs says for how long, and it is 0"):
        load_scenario(write(tmp_path, top.replace("2", "0") + EXPERIMENT + SITES + methods))
