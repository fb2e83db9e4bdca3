from fedseg.federated.personal import choose


def test_the_federations_model_is_kept_unless_another_one_wins_beyond_doubt():
    shared = {"a": 0.80, "b": 0.82, "c": 0.78}
    better = {person: dice + 0.02 for person, dice in shared.items()}
    best = {person: dice + 0.03 for person, dice in shared.items()}
    worse = {person: dice - 0.01 for person, dice in shared.items()}
    doubtful = {"a": 0.84, "b": 0.83, "c": 0.785}  # gains of 0.04, 0.01, 0.005: mean 0.018, 1.7 standard errors
    assert choose([shared]) == 0
    assert choose([shared, worse]) == 0
    assert choose([shared, doubtful]) == 0
    assert choose([shared, better, best, worse]) == 2
    assert choose([shared, best, better]) == 1


def test_one_validation_person_decides_nothing():
    assert choose([{"a": 0.5}, {"a": 0.9}]) == 0
    assert choose([{}, {}]) == 0
