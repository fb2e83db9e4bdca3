"""The experiment file: what is accepted, and how what is not is refused."""

import json

import pytest
from pydantic import ValidationError

from fedseg.config import Experiment, load_experiment, parse_experiment
from fedseg.data.cohort import PersonRule
from fedseg.errors import ConfigError
from fedseg.sections import load_section

TOML = """
name = "study"
seed = 7

[task]
name = "abdomen"
modality = "mr"
labels = { background = 0, liver = 1, spleen = 2 }

[training]
patch_size = [16, 24, 24]

[federation]
rounds = 3
"""


def experiment(**sections):
    values = {
        "name": "study",
        "task": {"name": "abdomen", "modality": "mr", "labels": {"background": 0, "liver": 1}},
        "training": {"patch_size": [16, 16, 16]},
        "federation": {"rounds": 1},
    }
    for key, given in sections.items():
        values[key] = {**values.get(key, {}), **given} if isinstance(given, dict) else given
    return json.dumps(values)


def refusal(document):
    with pytest.raises(ConfigError) as refused:
        parse_experiment(document)
    return str(refused.value)


def test_a_toml_file_becomes_an_experiment(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(TOML, encoding="utf-8")
    study = load_experiment(path)
    assert (study.name, study.seed, study.federation.rounds) == ("study", 7, 3)
    assert study.training.patch_size == (16, 24, 24)
    assert study.task.structures == {"liver": 1, "spleen": 2}
    assert study.task.num_labels == 3


def test_a_byte_order_mark_from_a_windows_editor_does_no_harm(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(TOML, encoding="utf-8-sig")
    assert load_experiment(path).name == "study"


def test_a_whole_number_is_fine_where_a_fraction_is_expected(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(TOML.replace("[training]", "[training]\nlearning_rate = 1"), encoding="utf-8")
    assert load_experiment(path).training.learning_rate == 1.0


def test_an_experiment_survives_its_json():
    study = parse_experiment(
        experiment(
            task={"modality": "ct", "channels": ["a", "b"]},
            data={"window": [-160, 240], "spacing": [3, 1.5, 1.5]},
            model={"name": "unet", "options": {"widths": [4, 8], "norm": "batch", "dropout": 0.5}},
        )
    )
    again = parse_experiment(study.to_json())
    assert again == study
    assert again.to_json() == study.to_json()


def test_the_digest_tells_experiments_apart_and_nothing_else():
    study = parse_experiment(experiment())
    turned = json.dumps(dict(reversed(json.loads(experiment()).items())))
    assert parse_experiment(turned).digest() == study.digest()
    assert parse_experiment(experiment(training={"learning_rate": 1e-3})).digest() == study.digest()
    assert parse_experiment(experiment(data={"spacing": [1, 1, 1]})).digest() == (
        parse_experiment(experiment(data={"spacing": [1.0, 1.0, 1.0]})).digest()
    )
    assert parse_experiment(experiment(seed=1)).digest() != study.digest()


def test_an_experiment_cannot_be_changed():
    study = parse_experiment(experiment())
    with pytest.raises(ValidationError, match="frozen"):
        study.seed = 1


def test_a_refusal_names_file_key_value_and_what_would_be_right(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(TOML.replace('"mr"', '"pet"'), encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        load_experiment(path)
    assert str(refused.value) == f"{path}: task.modality: Input should be 'mr' or 'ct', got 'pet'"


def test_every_fault_is_told_at_once():
    text = refusal(experiment(seed=-1, task={"modality": "pet"}, federation={"rounds": 0}))
    assert [line.split(": ")[1] for line in text.splitlines()] == ["seed", "task.modality", "federation.rounds"]


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"training": {"batchsize": 4}}, "training.batchsize: unknown key; did you mean 'batch_size', got 4"),
        ({"trainin": {}}, "trainin: unknown key; did you mean 'training', got {}"),
        (
            {"federation": {"screening": {"zzz": 1}}},
            "federation.screening.zzz: unknown key; known here are max_norm_ratio, max_norm, got 1",
        ),
        ({"training": {"batch_size": 2.5}}, "training.batch_size: Input should be a valid integer"),
        ({"training": {"batch_size": "2"}}, "training.batch_size: Input should be a valid integer, got '2'"),
        ({"training": {"batch_size": True}}, "training.batch_size: Input should be a valid integer, got True"),
        ({"training": {"learning_rate": True}}, "training.learning_rate: Input should be a valid number, got True"),
        ({"training": {"learning_rate": "1e-3"}}, "training.learning_rate: Input should be a valid number"),
        ({"training": {"patch_size": [16, 16]}}, "training.patch_size: has too few values, got [16, 16]"),
        ({"training": {"patch_size": [16, 16, 16, 16]}}, "training.patch_size: Tuple should have at most 3 items"),
        ({"training": {"patch_size": [16, 0, 16]}}, "training.patch_size.1: Input should be greater than 0, got 0"),
        ({"training": {"momentum": 1.0}}, "training.momentum: Input should be less than 1, got 1.0"),
        ({"federation": {"deadline": float("inf")}}, "federation.deadline: Input should be a finite number, got inf"),
        ({"federation": {"rounds": None}}, "federation.rounds: Input should be a valid integer, got None"),
        ({"federation": 3}, "federation: Input should be an object, got 3"),
        ({"seed": 2**32}, "seed: Input should be less than 4294967296"),
        ({"name": "../elsewhere"}, "name: a name may hold letters (a-z, A-Z, without accents), digits"),
        ({"name": "Leber Zürich"}, "and has 64 characters at most, got 'Leber Z"),
        ({"data": {"spacing": [1.0, float("nan"), 1.0]}}, "data.spacing.1: Input should be a finite number, got nan"),
        ({"data": {"orientation": "RAX"}}, "must name one of R/L, A/P and S/I each, such as RAS or LPS, got 'RAX'"),
        ({"data": {"orientation": "RLS"}}, "must name one of R/L, A/P and S/I each"),
        ({"data": {"percentiles": [0.9, 0.1]}}, "the lower bound must be below the upper one, got [0.9, 0.1]"),
        ({"data": {"window": [-160.0, 240.0]}}, "data.window: is for CT; an MR task uses data.percentiles"),
        ({"task": {"modality": "ct"}}, "data.window: a CT task needs one in Hounsfield units, such as window = [-160"),
        (
            {"task": {"modality": "ct"}, "data": {"window": [float("-inf"), 240.0]}},
            "data.window.0: Input should be a finite number, got -inf",
        ),
        ({"task": {"channels": []}}, "task.channels: needs at least one channel name, each once, got []"),
        ({"task": {"channels": ["t1", "t1"]}}, "needs at least one channel name, each once, got ['t1', 't1']"),
        ({"task": {"labels": {"background": 0, "": 1}}}, "a label has no name; every value needs one"),
        ({"task": {"labels": {"liver": 1}}}, "`background = 0` is missing, got {'liver': 1}"),
        ({"task": {"labels": {"background": 0}}}, "there is only background; name at least one structure"),
        ({"task": {"labels": {"background": 0, "a": 1, "b": 3}}}, "0, 1, 2, ... each once: 2 has no name"),
        ({"task": {"labels": {"background": 0, "a": 1, "b": 1}}}, "each once: two names share a value"),
        ({"task": {"labels": {"background": 0, "a": -1}}}, "each once: -1 is negative"),
        ({"task": {"labels": {"background": 0, "a": "1"}}}, "task.labels.a: Input should be a valid integer, got '1'"),
        (
            {"task": {"labels": {"background": 0} | {f"n{i}": i for i in range(1, 257)}}},
            "there can be 256 labels at most, there are 257",
        ),
        ({"model": {"name": "mlru"}}, "model: no network is called 'mlru'; did you mean 'mlru++'?"),
        ({"model": {"preset": "heavy"}}, "model: mlru++ has no preset 'heavy'"),
        ({"model": {"options": {"n_rse": 1}}}, "model: mlru++ has no option 'n_rse'; did you mean 'n_res'?"),
        ({"model": {"options": {"n_res": "many"}}}, "n_res must be a whole number from 0 to 8, got 'many'"),
        (
            {"model": {"options": {"n_res": {"deep": 1}}}},
            "model.options.n_res: must be true or false, a number, a text, or a list of numbers or of texts, got {'deep'",
        ),
        ({"training": {"patch_size": [2, 2, 2]}}, "training.patch_size: mlru++: a patch of 2x2x2 shrinks to a single"),
    ],
)
def test_what_cannot_work_is_refused(sections, told):
    text = refusal(experiment(**sections))
    assert told in text
    assert text.count("the received experiment: ") == 1


def test_a_missing_section_is_named():
    values = json.loads(experiment())
    del values["training"]
    assert refusal(json.dumps(values)) == "the received experiment: training: is missing"


@pytest.mark.parametrize("document", ["", "{", "[1]", "null", '"experiment"'])
def test_what_is_no_object_is_refused(document):
    assert refusal(document).startswith("the received experiment: ")


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 20_000 + "]" * 20_000,
        "a = " + "{a=" * 20_000 + "1" + "}" * 20_000,
        ".".join("a" * 20_000) + " = 1",
        "[" + ".".join("a" * 20_000) + "]",
        "seed = 0x" + "f" * 20_000,
        "seed = " + "9" * 20_000,
    ],
    ids=["lists", "tables", "keys", "header", "hexadecimal", "digits"],
)
def test_a_file_made_to_exhaust_the_reader_is_refused_like_any_other(tmp_path, text):
    (tmp_path / "deep.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"deep\.toml: "):
        load_experiment(tmp_path / "deep.toml")


@pytest.mark.parametrize(
    "document",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        experiment(seed=0)[:-1] + ', "seed": ' + "9" * 4000 + "}",
        experiment(seed=0)[:-1] + ', "seed": ' + "9" * 20_000 + "}",
        experiment(seed=0)[:-1] + ', "x": "\ud800"}',
        experiment(name="\x00"),
        "",
    ],
    ids=["lists", "tables", "digits", "more digits", "surrogate", "control", "nothing"],
)
def test_a_received_experiment_made_to_exhaust_the_reader_is_refused_like_any_other(document):
    assert "the received experiment" in refusal(document)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"training": {"steps_per_epoch": 10**12}}, "training.steps_per_epoch"),
        ({"training": {"batch_size": 10**12}}, "training.batch_size"),
        ({"training": {"patch_size": [10**6] * 3}}, "training.patch_size"),
        ({"data": {"spacing": [1e-9, 1.0, 1.0]}}, "data.spacing"),
        ({"evaluation": {"overlap": 0.9999}}, "evaluation.overlap"),
        ({"model": {"name": "unet", "options": {"widths": [10**9, 10**9]}}}, "model"),
    ],
)
def test_an_experiment_cannot_ask_for_all_memory_or_all_time(sections, key):
    assert key in refusal(experiment(**sections))


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such file"):
        load_experiment(tmp_path / "nowhere.toml")
    (tmp_path / "bad.toml").write_text("name = study", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.toml: not a readable TOML file: Invalid value \(at line 1"):
        load_experiment(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9tude"')
    with pytest.raises(ConfigError, match=r"latin\.toml: not a readable TOML file"):
        load_experiment(tmp_path / "latin.toml")
    with pytest.raises(ConfigError, match="not a readable TOML file"):
        load_experiment(tmp_path)


def test_a_rule_that_lacks_what_it_needs_is_refused(tmp_path):
    path = tmp_path / "rule.toml"
    path.write_text('kind = "pattern"', encoding="utf-8")
    with pytest.raises(ConfigError, match='`pattern` goes with kind = "pattern"'):
        load_section(PersonRule, path)


def test_the_schema_describes_every_key():
    schema = Experiment.model_json_schema()
    json.dumps(schema)
    sections = {"Experiment": schema} | schema["$defs"]
    assert set(schema["properties"]) == set(Experiment.model_fields)
    described = {
        f"{name}.{key}": "description" in value or "$ref" in value
        for name, section in sections.items()
        for key, value in section.get("properties", {}).items()
    }
    assert [key for key, is_described in described.items() if not is_described] == []
    assert schema["additionalProperties"] is False
    assert sections["FederationConfig"]["properties"]["aggregate"]["enum"] == ["mean", "median", "trimmed-mean"]
