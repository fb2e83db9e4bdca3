import numpy as np

from fedseg.federated.personal import HALFWAY, Candidate, choose, mixed

SHARED = {"a": 0.80, "b": 0.82, "c": 0.78}


def better(by):
    return {person: dice + by for person, dice in SHARED.items()}


def all_the_way(dice):
    return Candidate(1, 1.0, dice)


def halfway(dice):
    return Candidate(1, HALFWAY, dice)


def the_federations(dice):
    return Candidate(0, 0.0, dice)


def test_the_federations_model_is_kept_unless_training_on_wins_beyond_doubt():
    doubtful = {"a": 0.84, "b": 0.83, "c": 0.785}  # gains of 0.04, 0.01, 0.005: mean 0.018, 1.7 standard errors
    shared = the_federations(SHARED)
    assert choose([shared]) == 0
    assert choose([shared, all_the_way(better(-0.01))]) == 0
    assert choose([shared, all_the_way(doubtful)]) == 0
    assert choose([shared, all_the_way(better(0.02)), all_the_way(better(0.03)), all_the_way(better(-0.01))]) == 2
    assert choose([shared, all_the_way(better(0.03)), all_the_way(better(0.02))]) == 1


def test_halfway_wins_with_a_higher_mean():
    doubtful = {"a": 0.84, "b": 0.83, "c": 0.785}
    shared = the_federations(SHARED)
    assert choose([shared, halfway(doubtful)]) == 1
    assert choose([shared, halfway(better(-0.01))]) == 0
    assert choose([shared, halfway(SHARED)]) == 0
    assert (
        choose([shared, halfway(better(0.01)), all_the_way(doubtful)]) == 1
    )  # better in the mean, and not beyond chance
    assert choose([shared, halfway(better(0.01)), all_the_way(better(0.02))]) == 2


def test_one_validation_person_may_choose_halfway_and_no_more():
    shared = the_federations({"a": 0.5})
    assert choose([shared, all_the_way({"a": 0.9})]) == 0
    assert choose([shared, halfway({"a": 0.6}), all_the_way({"a": 0.9})]) == 1
    assert choose([the_federations({}), halfway({}), all_the_way({})]) == 0


def test_halfway_is_the_mean_of_the_weights():
    first = {"w": np.array([0.0, 4.0], np.float32), "count": np.array(3)}
    second = {"w": np.array([2.0, 2.0], np.float32), "count": np.array(8)}
    found = mixed(first, second, HALFWAY)
    assert found["w"].tolist() == [1.0, 3.0]
    assert found["w"].dtype == np.float32
    assert found["count"] == 8
    assert mixed(first, second, 1.0)["w"].tolist() == [2.0, 2.0]


def test_a_candidate_tells_what_it_is():
    assert str(the_federations(SHARED)) == "the model of the federation"
    assert str(halfway(SHARED)) == "halfway to 1 epoch of its own"
    assert str(Candidate(3, 1.0, SHARED)) == "3 epochs of its own"
