"""The child has no network, whichever way it can lose it."""

import json
import socket
import subprocess
import sys
from typing import Any

import pytest

from components.smoke_test import child

SCRIPT = """
import ctypes, importlib, json, os, runpy, socket, sys

runpy.run_path(sys.argv[1])["add_judge"]()
limits = importlib.import_module("smoke_judge.limits")
port, mode = int(sys.argv[2]), sys.argv[3]

def natively():
    # As a library of a model would: past Python's own sockets.
    libc = ctypes.CDLL(None, use_errno=True)
    address = (socket.AF_INET).to_bytes(2, sys.byteorder) + port.to_bytes(2) + bytes([127, 0, 0, 1])
    handle = libc.socket(socket.AF_INET, socket.SOCK_STREAM, 0)
    done = libc.connect(handle, address + bytes(8), 16)
    os.close(handle)
    return done == 0

def refused(step):
    try:
        step()
    except PermissionError as error:
        return str(error)
    except OSError as error:
        return f"the kernel says {error.errno}"
    return "done"

said = {"before": natively()}
if mode == "audit":
    limits.leave_network = lambda: False
early = socket.socket()
said["network"] = limits.cut_network()
said["natively"] = natively()
said["connect"] = refused(lambda: early.connect(("127.0.0.1", port)))
said["bind"] = refused(lambda: early.bind(("127.0.0.1", 0)))
said["sendto"] = refused(lambda: early.sendto(b"x", ("127.0.0.1", port)))
said["look-up"] = refused(lambda: socket.getaddrinfo("localhost", port))
said["new"] = refused(socket.socket)
print(json.dumps(said))
"""


def attempt_to_connect(mode: str) -> dict[str, Any]:
    """What a process that cut its network says about a server that was in its reach."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        command = [sys.executable, "-I", "-c", SCRIPT, child.__file__, port, mode]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert isinstance(said, dict)
    return said


@pytest.mark.parametrize("mode", ["best", "audit"])
def test_no_server_can_be_reached(mode: str) -> None:
    said = attempt_to_connect(mode)
    assert said["before"], "the server is there"
    for what in ("connect", "bind", "sendto", "look-up", "new"):
        assert "the smoke test has no network; socket." in said[what]
    assert said["network"] in {"best": ("namespace", "audit"), "audit": ("audit",)}[mode]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has network namespaces")
def test_native_code_cannot_reach_one_either() -> None:
    said = attempt_to_connect("best")
    if said["network"] == "audit":
        pytest.skip("this kernel lets nobody leave its network")
    assert said["before"] and not said["natively"]
