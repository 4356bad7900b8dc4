"""Processes whose addresses are given find each other before JAX connects them.

When somebody is missing, comes twice or counts otherwise, JAX ends every process with a stack trace
(0.10 to 0.12). So they meet at the same address first, over a connection of one line each way:
`mtd-jax INDEX COUNT` is answered by `go`, or by what is wrong.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import time

from mtd_jax.errors import InputError

_LINE_BYTES = 512
_HELLO = re.compile(r"mtd-jax (\d{1,6}) (\d{1,6})")
_PATIENCE = 10.0
"""Seconds for one line, and beyond the timeout for the answer to it."""
_OURS = ("process ", "two processes ")
"""What is wrong begins with, so that another program's answer is not taken for it."""
_LOST = "the processes of this run did not find each other"


def find_each_other(address: str, count: int, index: int, timeout: int) -> None:
    """Returns when all processes have come; whoever else listens at the address has gone then.

    Args:
      address: HOST:PORT of process 0.
      timeout: seconds for all to come.

    Raises:
      InputError: on all that have come: who has not, or came twice, or counts otherwise.
    """
    host, _, port = address.rpartition(":")
    if index == 0:
        _receive(int(port), count, timeout)
    else:
        _call((host.strip("[]"), int(port)), address, count, index, timeout)


def _receive(port: int, count: int, timeout: int) -> None:
    until = time.monotonic() + timeout
    came: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:

        def close() -> None:
            for connection in came.values():
                connection.close()

        stack.callback(close)
        try:
            listener = stack.enter_context(_listen(port))
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{_LOST}: cannot listen at port {port} ({reason})") from None
        wrong = ""
        while not wrong and len(came) < count - 1:
            left = until - time.monotonic()
            if left <= 0 or not select.select([listener], [], [], left)[0]:
                missing = sorted(set(range(1, count)) - came.keys())
                text = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
                wrong = f"process {text} of {count} did not come in {timeout} seconds"
                break
            wrong = _welcome(listener.accept()[0], came, count)
        listener.close()  # before anybody goes on: JAX listens here next
        for connection in came.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{wrong or 'go'}\n".encode())
        if wrong:
            raise InputError(f"{_LOST}: {wrong}")


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)


def _welcome(connection: socket.socket, came: dict[int, socket.socket], count: int) -> str:
    """Adds a process to those that came; returns what is wrong with it."""
    said = _HELLO.fullmatch(_read_line(connection, _PATIENCE))
    if said is None:  # somebody else: a health check, a scanner
        connection.close()
        return ""
    index, counted = int(said[1]), int(said[2])
    wrong = ""
    if counted != count:
        wrong = f"process {index} was started as one of {counted}, process 0 as one of {count}"
    elif not 0 < index < count or (index in came and _is_there(came[index])):
        wrong = f"two processes have --process-index {index}"
    if index in came and not wrong:
        came.pop(index).close()  # it was started again
    came[-1 if wrong else index] = connection
    return wrong


def _is_there(connection: socket.socket) -> bool:
    """A process that waits says nothing; of one that has gone, the end can be read."""
    return not select.select([connection], [], [], 0)[0]


def _call(place: tuple[str, int], address: str, count: int, index: int, timeout: int) -> None:
    until = time.monotonic() + timeout
    while True:
        said = ""
        try:
            with socket.create_connection(place, timeout=5) as connection:
                connection.sendall(f"mtd-jax {index} {count}\n".encode())
                said = _read_line(connection, max(0.0, until - time.monotonic()) + _PATIENCE)
            wrong = f"what answers at {address} is no process 0 of `mtd train`"
        except OSError as error:
            wrong = f"nobody answers at {address} ({error.strerror or error})"
        if said == "go":
            return
        if said.startswith(_OURS):
            raise InputError(f"{_LOST}: {said}")
        # Not there yet, started again meanwhile, or still that of the run before.
        if time.monotonic() > until:
            raise InputError(f"{_LOST}: {wrong}")
        time.sleep(0.2)


def _read_line(connection: socket.socket, seconds: float) -> str:
    """What comes before a line's end; all there was, if none comes in that time."""
    until, text = time.monotonic() + seconds, b""
    with contextlib.suppress(OSError):
        while b"\n" not in text and len(text) < _LINE_BYTES:
            connection.settimeout(max(0.01, until - time.monotonic()))
            piece = connection.recv(_LINE_BYTES)
            if not piece:
                break
            text += piece
    return text.decode(errors="replace").partition("\n")[0]
