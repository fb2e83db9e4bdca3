import subprocess
import sys

import pytest

PROGRAM = """
import socket, sys
from fedseg.site.isolation import has_network, leave_network
assert has_network()
if not leave_network():
    sys.exit(77)
assert not has_network()
for address in (("127.0.0.1", 9), ("192.0.2.1", 9)):
    try:
        socket.create_connection(address, 1)
    except OSError:
        continue
    sys.exit(1)
ours, theirs = socket.socketpair()
ours.send(b"x")
assert theirs.recv(1) == b"x"
"""


def test_a_process_that_has_left_the_network_reaches_nothing_and_may_still_use_unix_sockets():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 77:
        pytest.skip("this system grants no network namespace of one's own")
    assert done.returncode == 0, done.stderr
