"""The server process: it listens, compiles, answers, and stops on SIGTERM."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from softprompt.errors import UserError
from softprompt.runtime.progress import Progress, silent
from softprompt.serving.app import create_app
from softprompt.serving.state import State
from softprompt.serving.watch import Folders

_log = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """Reserve an address. Connections are refused until the server listens.

    Raises:
      UserError: if the address is in use or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as failing:
            bound = failing.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            failing.pop_all()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--host {host} --port {port}: cannot be used ({reason})") from None
    return bound


class Server:
    """Serves until a signal arrives.

    Args:
      state: of the server.
      given: the prompts to load, by name.
    """

    def __init__(
        self, state: State, given: Sequence[tuple[str, Path]] = (), *, labels: bool = True
    ):
        self._state, self._given, self._labels = state, given, labels
        self._failure: Exception | None = None
        config = uvicorn.Config(
            create_app(state),
            http="h11",  # the other parser does not limit the size of headers
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=int(state.options.drain_seconds),
        )
        self._uvicorn = _Uvicorn(config, state)

    def run(self, bound: socket.socket, progress: Progress = silent) -> None:
        """Compile, load the prompts, and answer requests.

        Args:
          bound: where to listen.
          progress: shows how many programs are compiled.

        Raises:
          UserError: if a prompt cannot be loaded.
        """
        preparing = threading.Thread(
            target=self._prepare, args=[bound, progress], name="prepare", daemon=True
        )
        preparing.start()
        self._uvicorn.run(sockets=[bound])
        if self._failure is None and preparing.is_alive():
            # A program that is being compiled cannot be stopped.
            sys.stderr.flush()
            os._exit(0)
        if self._state.folders is not None:
            self._state.folders.stop()
        if self._failure is not None:
            raise self._failure
        self._state.service.stop(drain=False)

    def stop(self) -> None:
        """Stop after the running requests, as after SIGTERM."""
        self._uvicorn.handle_exit(signal.SIGTERM, None)

    def _prepare(self, bound: socket.socket, progress: Progress) -> None:
        state, service = self._state, self._state.service
        try:
            service.start(labels=self._labels, progress=progress)
            for name, folder in self._given:
                service.prompts.load(name, folder)
            if state.options.prompts_dir is not None:
                reserved = frozenset([service.name, *(name for name, _ in self._given)])
                folders = Folders(state.options.prompts_dir, service.prompts, reserved)
                folders.look(at_once=True)
                folders.start()
                state.folders = folders
        except Exception as error:
            self._failure = error
            self._uvicorn.should_exit = True
            return
        state.is_ready = True
        host, port, *_ = bound.getsockname()
        where = f"[{host}]" if ":" in host else host
        _log.info(f"serving {', '.join(service.prompts.names())} at http://{where}:{port}")


class _Uvicorn(uvicorn.Server):
    """Uvicorn, without raising the signal again after the server has stopped."""

    def __init__(self, config: uvicorn.Config, state: State):
        super().__init__(config)
        self._softprompt_state = state

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop after the running requests; at the second signal, at once."""
        self.force_exit, self.should_exit = bool(self.should_exit), True
        self._softprompt_state.is_draining = True
