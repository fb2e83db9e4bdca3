"""A process without a network: its own, empty network namespace, as far as the system grants one.

UNIX sockets that lie in the file system go on working, which is all that a site service needs.
"""

import ctypes
import os
import sys
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000


def leave_network() -> bool:
    """Move this process, and what it will start, into a network namespace without any device that is up.

    Must be called before threads are started: a process with several may not have a user namespace of its own.

    Returns:
        Whether it worked. It needs Linux, and root or a system that allows user namespaces to everybody.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNET) == 0:
        return not has_network()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return False
    try:  # without these the process would own nothing any more
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    except OSError:
        return False
    return not has_network()


def has_network() -> bool:
    """Whether this process has a network device other than the loopback, or a route; True if that cannot be seen."""
    try:
        devices = [line.split(":")[0].strip() for line in Path("/proc/self/net/dev").read_text().splitlines()[2:]]
        routes = Path("/proc/self/net/route").read_text().splitlines()[1:]
    except OSError:
        return True
    return bool(routes) or set(devices) - {"lo"} != set()
