"""The loop of an engine: commands and steps take turns."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from fd_dsa.engine.loop import AddRequest, EngineLoop, Shutdown
from fd_dsa.engine.sampling_params import SamplingParams
from tests.engine.fakes import make_engine


def test_requests_that_arrive_together_do_not_hold_up_the_running_ones() -> None:
    engine = make_engine()
    add, step, log = engine.add_request, engine.step, list[str]()

    def slow_add(key: str, prompt: Sequence[int], params: SamplingParams) -> None:
        log.append("add")
        time.sleep(0.005)
        add(key, prompt, params)

    def logged_step() -> object:
        log.append("step")
        if log.count("add") == 41:
            loop.post(Shutdown())
        return step()

    engine.add_request, engine.step = slow_add, logged_step  # type: ignore[method-assign]
    loop = EngineLoop(engine, lambda event: None)
    endless = SamplingParams(max_tokens=60, ignore_eos=True)
    loop.post(AddRequest("first", [5], endless))
    thread = threading.Thread(target=loop.run)
    for index in range(40):
        loop.post(AddRequest(str(index), [5], endless))
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    # 20 ms of commands are at most 4 of 5 ms, and the one that ends them
    runs = "".join(name[0] for name in log).split("s")
    assert max(map(len, runs)) <= 6
    assert log.count("add") == 41
