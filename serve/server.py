"""An application on a socket, until it is told to stop."""

from __future__ import annotations

import asyncio
import socket
import threading
from types import FrameType
from typing import Any

import uvicorn

from .logs import log
from .service import Service

#: Names by which a server that listens on this machine alone may be asked.
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Server(uvicorn.Server):
    """Ends gracefully: at the first signal it takes no new requests, finishes those that were begun and tells the others; at
    the second it finishes nothing."""

    def __init__(self, app: Any, service: Service) -> None:
        # (Long answers to nobody are ended by the scheduler; what hangs beyond its time-out is cut off.)
        patience = int(service.options.timeout) + 5
        super().__init__(
            uvicorn.Config(
                app,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=patience,
            )
        )
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.force_exit:
            threading.Thread(target=self.service.close, args=(0.0,), daemon=True).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log("shutting down")
        closing = asyncio.to_thread(self.service.close, self.service.options.timeout)
        await asyncio.gather(closing, super().shutdown(sockets))


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can reach; port 0 takes a free one. Raises OSError naming the address."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(f"cannot listen on {host}: {error.strerror or error}; choose another --host") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
    except OSError as error:
        found.close()
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}; choose another --port") from error
    return found


def address_of(listening: socket.socket) -> str:
    """http://host:port, for people of this machine to click on."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
