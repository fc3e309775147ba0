"""Runs an HTTP server of this process, on a free port, while a test talks to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def local_server(handler: type[BaseHTTPRequestHandler], *, daemon: bool = True) -> Iterator[str]:
    """Yields the URL.

    Args:
        daemon: whether the process may end while a request is being answered.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = daemon
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=daemon)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
