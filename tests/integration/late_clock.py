"""A gate on a machine whose clock is two hours fast: `python late_clock.py KIT SOCKET HOME`."""

import sys
from datetime import datetime, timedelta
from pathlib import Path

from flwr.supernode import node_auth_http_interceptor

from fedseg.kit import load_kit
from fedseg.site.supernode import run_supernode

right = node_auth_http_interceptor.now


def fast() -> datetime:
    return right() + timedelta(hours=2)


node_auth_http_interceptor.now = fast
kit, socket, home = map(Path, sys.argv[1:])
run_supernode(load_kit(kit), socket, home=home)
