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


def test_those_that_come_at_once_all_hear_what_is_wrong(address: str) -> None:
    processes = [(0, 5), (1, 5), (2, 4), (3, 5), (4, 5)]
    with ThreadPoolExecutor(5) as pool:
        ends = [pool.submit(find_each_other, address, n, i, 20) for i, n in processes]
    said = {str(end.exception()) for end in ends}
    assert said == {f"{OF}process 2 was started as one of 4, process 0 as one of 5"}


def test_who_waits_longer_than_its_own_time_is_told_by_the_first(address: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        impatient = pool.submit(find_each_other, address, 3, 1, 1)
        first = pool.submit(find_each_other, address, 3, 0, 3)
    assert str(impatient.exception()) == str(first.exception())
    assert "process 2 of 3 did not come in 3 seconds" in str(first.exception())


def _said(place: tuple[str, int], words: bytes) -> bytes:
    with socket.create_connection(place) as connection:
        connection.sendall(words)
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(64)


def test_strangers_and_processes_that_are_killed_do_not_count(address: str) -> None:
    host, port = address.split(":")
    place = (host, int(port))
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(find_each_other, address, 3, 0, 20)
        time.sleep(0.3)
        assert _said(place, b"") == _said(place, b"GET / HTTP/1.1\r\n") == b""
        with socket.create_connection(place) as killed:
            killed.sendall(b"mtd-jax 1 3\n")
            assert killed.recv(5) == b"wait\n"
        second = pool.submit(find_each_other, address, 3, 2, 20)
        time.sleep(1.5)
        assert not first.done()  # the other one has not come, it has gone
        assert not second.done()
        again = pool.submit(find_each_other, address, 3, 1, 20)
        assert [end.exception() for end in (first, second, again)] == [None] * 3


def test_an_address_that_is_no_name() -> None:
    with pytest.raises(InputError, match=r"nobody answers at a\.\.b:1"):
        find_each_other("a..b:1", 2, 1, 0)
