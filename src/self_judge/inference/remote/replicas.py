"""Replicas: one or more servers that share the work of a client.

Requests go to any replica with free capacity. If a replica stops answering, a warning is logged, it
receives no more requests, and the other replicas take over its work.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from self_judge.inference.remote.server import Server, ServerDownError

ServerT = TypeVar("ServerT", bound=Server)
WorkT = TypeVar("WorkT")


class Replicas(Generic[ServerT]):
    """Servers that do the same work.

    Args:
        servers: the servers.
        concurrency: the number of concurrent requests per server.
    """

    def __init__(self, servers: Sequence[ServerT], concurrency: int) -> None:
        self.servers = list(servers)
        self.concurrency = concurrency

    def _alive(self) -> list[ServerT]:
        alive = [server for server in self.servers if server.down is None]
        if not alive:
            raise ServerDownError(
                "all servers have stopped answering: "
                + "; ".join(f"{s.shown}: {s.down}" for s in self.servers)
                + ". Start them again and resume from the last checkpoint"
            )
        return alive

    def everywhere(self, call: Callable[[ServerT], object]) -> None:
        """Calls every server that is up. A server that does not answer gets no more requests."""
        for server in self._alive():
            try:
                call(server)
            except ServerDownError as error:
                server.leave_out(error)
        self._alive()

    def shared_out(
        self,
        call: Callable[[ServerT, WorkT], Any],
        work: Sequence[WorkT],
        done: Callable[[WorkT], object],
    ) -> list[Any]:
        """Runs `call` for each item of work on any free server; returns the answers in order."""
        answers: list[Any] = [None] * len(work)
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for place in range(len(work)):
            todo.put(place)
        left = len(work)
        failures: list[BaseException] = []
        lock = threading.Lock()

        def serve(server: ServerT) -> None:
            nonlocal left
            while server.down is None and not failures:
                try:
                    place = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    answers[place] = call(server, work[place])
                except ServerDownError as error:
                    todo.put(place)
                    server.leave_out(error)
                    return
                except BaseException as error:
                    failures.append(error)
                    return
                with lock:
                    left -= 1
                    done(work[place])

        # If a server stops answering, its work returns to the queue, possibly after all other
        # workers have finished. Therefore, start new workers until no work is left.
        while left and not failures:
            alive = self._alive()
            # Each server gets the same number of workers. Otherwise, the first server would get all
            # the work of a small job.
            each = min(self.concurrency, -(-left // len(alive)))
            workers = [
                threading.Thread(target=serve, args=(server,), daemon=True)
                for _ in range(each)
                for server in alive
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        if failures:
            raise failures[0]
        return answers
