"""`python -m fastdeploy.entrypoints.openai.multi_api_server`: several servers, one a data rank.

Takes `--ports "p1,p2" --num-servers n --args <flags of api_server>` and says what it was started
with, like `api_server`; the servers are children that end when it does.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from typing import Any

from fastdeploy.entrypoints.openai.api_server import dump


def main() -> int:
    """Serve until a signal; the largest status of the servers."""
    dump("fastdeploy.entrypoints.openai.multi_api_server")
    parser = argparse.ArgumentParser()
    parser.add_argument("--ports", required=True)
    parser.add_argument("--num-servers", type=int, required=True)
    parser.add_argument("--args", nargs=argparse.REMAINDER, default=[])
    arguments = parser.parse_known_args()[0]
    ports = arguments.ports.split(",")
    if len(ports) != arguments.num_servers:
        print(f"multi_api_server: {len(ports)} ports for {arguments.num_servers} servers")
        return 1
    env = {name: value for name, value in os.environ.items() if name != "FAKE_FASTDEPLOY_DUMP"}
    command = [sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server", *arguments.args]
    servers = [subprocess.Popen([*command, "--port", port], env=env) for port in ports]

    def stop(number: int, frame: Any) -> None:
        for server in servers:
            server.send_signal(number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    return max(server.wait() for server in servers)


if __name__ == "__main__":
    sys.exit(main())
