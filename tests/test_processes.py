import subprocess
import sys

from fedseg.processes import Backoff, keep_short


def test_a_log_that_grows_too_long_starts_anew_while_a_process_writes_it(tmp_path):
    log = tmp_path / "gate.log"
    program = (
        "import sys\nfor line in sys.stdin: print(line, end='', flush=True); print('.', file=sys.stderr, flush=True)"
    )
    with log.open("ab") as output:
        writer = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=output, stderr=subprocess.PIPE, text=True
        )
    assert writer.stdin is not None
    assert writer.stderr is not None
    for line, keep in (("first\n", 100), ("second\n", 10), ("third\n", 100)):
        writer.stdin.write(line)
        writer.stdin.flush()
        assert writer.stderr.readline() == ".\n"
        keep_short(log, keep)
    writer.communicate()
    assert (tmp_path / "gate.log.1").read_text() == "first\nsecond\n"
    assert log.read_bytes() == b"third\n"


def test_pauses_double_up_to_a_minute_and_begin_anew_after_progress():
    again = Backoff()
    assert again.over
    assert [again.failed(3) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert not again.over
    assert [again.failed(4), again.failed(4)] == [1, 2]


def test_a_log_that_is_not_there_yet_is_no_trouble(tmp_path):
    keep_short(tmp_path / "gate.log", 1)
    assert not list(tmp_path.iterdir())
