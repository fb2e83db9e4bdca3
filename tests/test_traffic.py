import sqlite3
from contextlib import closing

from fedseg.federated.store import RunStore
from fedseg.traffic import traffic


def filled(folder, dice, pooled):
    """A store of two sites: three rounds, 3 MB down and 1 MB up for each site in each; A has three times as many cases."""
    RunStore(folder, "fed").close()
    with closing(sqlite3.connect(folder / "store.sqlite")) as db:
        for number in (1, 2, 3):
            for site, cases in (("A", 3), ("B", 1)):
                db.execute("INSERT INTO requests VALUES ('fed', ?, ?, 3000000)", (number, site))
                db.execute(
                    "INSERT INTO updates (run, server_round, site, status, bytes) VALUES ('fed', ?, ?, 'accepted', 1000000)",
                    (number, site),
                )
                db.execute(
                    "INSERT INTO metrics VALUES ('fed', ?, ?, 'dice', ?)", (number, site, dice[site][number - 1])
                )
                db.execute("INSERT INTO metrics VALUES ('fed', ?, ?, 'cases', ?)", (number, site, cases))
        for number, value in pooled.items():
            db.execute("INSERT INTO metrics VALUES ('pooled', ?, 'pooled', 'dice', ?)", (number, value))
            db.execute("INSERT INTO metrics VALUES ('pooled', ?, 'pooled', 'cases', 4)", (number,))
        db.commit()


def test_what_a_sites_line_carried_until_the_federation_was_nearly_pooled(tmp_path):
    # All cases together: 0.6, 0.76, 0.8. Pooled ends at 0.8, of which 95 % are 0.76.
    filled(tmp_path, {"A": [0.6, 0.78, 0.8], "B": [0.6, 0.7, 0.8]}, {1: 0.9, 3: 0.8})
    found = traffic(tmp_path, "fed")
    assert (found["megabytes_up"], found["megabytes_down"], found["updates"]) == (6, 18, 6)
    assert found["to_95"] == {"round": 2, "megabytes_per_site": 8}


def test_a_federation_that_stays_behind_never_was(tmp_path):
    filled(tmp_path, {"A": [0.6, 0.7, 0.7], "B": [0.6, 0.7, 0.8]}, {3: 0.8})
    assert traffic(tmp_path, "fed")["to_95"] is None


def test_without_pooled_there_is_nothing_to_be_near_to(tmp_path):
    filled(tmp_path, {"A": [0.6, 0.7, 0.7], "B": [0.6, 0.7, 0.8]}, {})
    assert "to_95" not in traffic(tmp_path, "fed")
