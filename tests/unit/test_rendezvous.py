"""Processes of a run find each other, or say why not: threads play them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from mtd_jax.errors import InputError
from mtd_jax.training.rendezvous import find_each_other

OF = "the processes of this run did not find each other: "


@pytest.fixture
def address() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def _all(address: str, processes: list[tuple[int, int]], timeout: int = 20) -> list[str]:
    """What each (index, count) ends with, empty where all is well."""
    with ThreadPoolExecutor(len(processes)) as pool:
        ends: list[Future[None]] = []
        for index, count in processes:
            ends.append(pool.submit(find_each_other, address, count, index, timeout))
            time.sleep(0.2)  # in this order
        errors = [end.exception() for end in ends]
    assert all(error is None or isinstance(error, InputError) for error in errors)
    return ["" if error is None else str(error) for error in errors]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_come(address: str, order: tuple[int, ...]) -> None:
    assert _all(address, [(index, 3) for index in order]) == [""] * 3
    host, port = address.split(":")
    socket.create_server((host, int(port))).close()  # free for JAX


def test_who_did_not_come_is_named_to_all(address: str) -> None:
    said = _all(address, [(0, 4), (2, 4)], timeout=2)
    assert said == [f"{OF}process 1, 3 of 4 did not come in 2 seconds"] * 2


def test_other_counts_are_named(address: str) -> None:
    said = _all(address, [(0, 3), (1, 3), (2, 4)])
    assert said == [f"{OF}process 2 was started as one of 4, process 0 as one of 3"] * 3


def test_an_index_given_twice(address: str) -> None:
    said = _all(address, [(0, 3), (1, 3), (1, 3)])
    assert said == [f"{OF}two processes have --process-index 1"] * 3


def test_nobody_answers(address: str) -> None:
    (said,) = _all(address, [(1, 2)], timeout=1)
    assert said.startswith(f"{OF}nobody answers at {address} (")


@contextlib.contextmanager
def _listener(address: str, answer: bytes) -> Iterator[None]:
    host, port = address.split(":")
    stopped = threading.Event()

    def answers(server: socket.socket) -> None:
        server.settimeout(0.1)
        while not stopped.is_set():
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.sendall(answer)

    with socket.create_server((host, int(port))) as server:
        thread = threading.Thread(target=answers, args=(server,))
        thread.start()
        yield
        stopped.set()
        thread.join()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff\x00", b""])
def test_another_program_answers(address: str, answer: bytes) -> None:
    with _listener(address, answer):
        said = _all(address, [(1, 2), (0, 2)], timeout=1)
    assert said[0] == f"{OF}what answers at {address} is no process 0 of `mtd train`"
    assert said[1].startswith(f"{OF}cannot listen at port {address.split(':')[1]} (")


def test_strangers_and_processes_started_again_do_not_disturb(address: str) -> None:
    host, port = address.split(":")
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(find_each_other, address, 3, 0, 20)
        time.sleep(0.3)
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n"):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(words)
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(1) == b""
        with socket.create_connection((host, int(port))) as killed:
            killed.sendall(b"mtd-jax 1 3\n")
        time.sleep(0.3)
        others = [pool.submit(find_each_other, address, 3, index, 20) for index in (1, 2)]
        assert [end.exception() for end in (first, *others)] == [None] * 3
