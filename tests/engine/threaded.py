"""An engine in a thread of this process, where a server has it in a process of its own."""

from __future__ import annotations

from collections.abc import Callable

from fd_dsa.engine.async_engine import AsyncEngine
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.loop import Command, EngineClient, EngineLoop, EngineProperties, Event


class EngineThread(EngineClient):
    """Client of an engine that no one else uses."""

    def __init__(self, engine: LLMEngine) -> None:
        self.properties, self.tokenizer = EngineProperties.of(engine), engine.tokenizer
        self._engine, self._loop = engine, None

    def start(self, receive: Callable[[Event], None]) -> None:
        self._loop = self._loop or EngineLoop(self._engine, receive)
        self.start_thread(self._loop.run)

    def post(self, command: Command) -> None:
        """Nothing happens before `start`."""
        if self._loop is not None:
            self._loop.post(command)


def threaded(engine: LLMEngine) -> AsyncEngine:
    """Return an engine in a thread, which takes requests."""
    return AsyncEngine(EngineThread(engine))
