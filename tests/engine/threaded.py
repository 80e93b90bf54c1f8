"""An engine in a thread of this process, where a server has it in a process of its own."""

from __future__ import annotations

from collections.abc import Callable

from fd_dsa.engine.async_engine import AsyncEngine
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.host import Command, EngineFacts, EngineHost, EngineLink, Event


class EngineThread(EngineLink):
    """A link to an engine that no one else uses."""

    def __init__(self, engine: LLMEngine) -> None:
        self.facts, self.tokenizer = EngineFacts.of(engine), engine.tokenizer
        self._engine, self._host = engine, None

    def start(self, receive: Callable[[Event], None]) -> None:
        self._host = self._host or EngineHost(self._engine, receive)
        self.start_thread(self._host.run)

    def post(self, command: Command) -> None:
        """Nothing happens before `start`."""
        if self._host is not None:
            self._host.post(command)


def threaded(engine: LLMEngine) -> AsyncEngine:
    """What sends requests to an engine in a thread."""
    return AsyncEngine(EngineThread(engine))
