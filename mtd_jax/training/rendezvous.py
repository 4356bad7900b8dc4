"""Processes whose addresses are given find each other before JAX connects them.

When somebody is missing, comes twice or counts otherwise, JAX ends every process with a stack trace
(0.10 to 0.12). So they meet at the same address first, by lines of text: `mtd-jax INDEX COUNT` is
answered by `wait` at once, and when all have come by `go`, or by what is wrong.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time

from mtd_jax.errors import InputError

_LINE_BYTES = 512
_HELLO = re.compile(r"mtd-jax (\d{1,6}) (\d{1,6})")
_PROMPTLY = 3.0
"""Seconds for a line that nothing has to be waited for."""
_OURS = ("process ", "two processes ")
"""What is wrong begins with, so that another program's answer is not taken for it."""
_LOST = "the processes of this run did not find each other"


def find_each_other(address: str, count: int, index: int, timeout: int) -> None:
    """Returns when all processes have come; nobody listens at the address any more then.

    Args:
      address: HOST:PORT of process 0.
      timeout: seconds for all to come, counted by process 0.

    Raises:
      InputError: on all that have come: who has not, or came twice, or counts otherwise.
    """
    host, _, port = address.rpartition(":")
    if index == 0:
        _receive(int(port), count, timeout)
    else:
        _call((host.strip("[]"), int(port)), address, count, index, timeout)


def _receive(port: int, count: int, timeout: int) -> None:
    came: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        try:
            listener = stack.enter_context(_listen(port))
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{_LOST}: cannot listen at port {port} ({reason})") from None
        wrong = _gather(listener, came, count, time.monotonic() + timeout)
        if not wrong and len(came) < count - 1:
            missing = sorted(set(range(1, count)) - came.keys())
            text = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            wrong = f"process {text} of {count} did not come in {timeout} seconds"
        if wrong:  # those that come a moment later shall know too
            for connection in came.values():
                _say(connection, wrong)
            _turn_away(listener, wrong, time.monotonic() + _PROMPTLY)
        listener.close()  # before anybody goes on: JAX listens here next
        for connection in came.values():
            if not wrong:
                _say(connection, "go")
            connection.close()
    if wrong:
        raise InputError(f"{_LOST}: {wrong}")


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)


def _gather(
    listener: socket.socket, came: dict[int, socket.socket], count: int, until: float
) -> str:
    """Fills `came` until all are there or time is up; returns what is wrong with one, if anything.

    Who goes while it waits for the others (killed, started again) has not come.
    """
    while True:
        for index in [i for i, connection in came.items() if not _is_there(connection)]:
            came.pop(index).close()
        left = until - time.monotonic()
        if len(came) == count - 1 or left <= 0:
            return ""
        connection = _accepted(listener, min(left, 1.0))
        if connection is None:
            continue
        said = _HELLO.fullmatch(_read_line(connection, _PROMPTLY))
        if said is None:  # somebody else: a health check, a scanner
            connection.close()
            continue
        wrong = _objection(int(said[1]), int(said[2]), came, count)
        if wrong:
            _say(connection, wrong)
            connection.close()
            return wrong
        _say(connection, "wait")
        came[int(said[1])] = connection


def _objection(index: int, counted: int, came: dict[int, socket.socket], count: int) -> str:
    if counted != count:
        return f"process {index} was started as one of {counted}, process 0 as one of {count}"
    if not 0 < index < count or (index in came and _is_there(came[index])):
        return f"two processes have --process-index {index}"
    if index in came:
        came.pop(index).close()  # it was started again
    return ""


def _turn_away(listener: socket.socket, wrong: str, until: float) -> None:
    while time.monotonic() < until:
        connection = _accepted(listener, 0.2)
        if connection is not None:
            with connection:
                _read_line(connection, 0.2)
                _say(connection, wrong)


def _accepted(listener: socket.socket, seconds: float) -> socket.socket | None:
    listener.settimeout(max(0.01, seconds))
    try:
        connection, _ = listener.accept()
    except OSError:  # nobody came; or too many files are open, and somebody may go
        return None
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return connection


def _is_there(connection: socket.socket) -> bool:
    """A process that waits says nothing; of one that has gone, the end can be read."""
    connection.setblocking(False)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _call(place: tuple[str, int], address: str, count: int, index: int, timeout: int) -> None:
    until = time.monotonic() + timeout
    while True:
        said = ""
        wrong = f"what answers at {address} is no process 0 of `mtd train`"
        try:
            with socket.create_connection(place, timeout=5) as connection:
                connection.sendall(f"mtd-jax {index} {count}\n".encode())
                said = _read_line(connection, _PROMPTLY + 2)
                if said == "wait":  # process 0 is there, and says when time is up
                    wrong = f"process 0 at {address} went away"
                    said = _read_line(connection, timeout + 60)
        except (OSError, UnicodeError) as error:
            wrong = f"nobody answers at {address} ({getattr(error, 'strerror', '') or error})"
        if said == "go":
            return
        if said.startswith(_OURS):
            raise InputError(f"{_LOST}: {said}")
        # Not there yet, started again meanwhile, or still that of the run before.
        if time.monotonic() > until:
            raise InputError(f"{_LOST}: {wrong}")
        time.sleep(0.2)


def _say(connection: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(f"{line}\n".encode())


def _read_line(connection: socket.socket, seconds: float) -> str:
    """What comes before a line's end; all there was, if none comes in that time."""
    until, text = time.monotonic() + seconds, b""
    with contextlib.suppress(OSError):
        while not text.endswith(b"\n") and len(text) < _LINE_BYTES:
            connection.settimeout(max(0.01, until - time.monotonic()))
            piece = connection.recv(1)  # no more: another line may follow
            if not piece:
                break
            text += piece
    return text.decode(errors="replace").removesuffix("\n")
