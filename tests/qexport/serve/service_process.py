"""`qexport serve` as a process of its own, for tests of how it starts, ends and stands what happens to it."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx2

WAIT_S = 60
READ_TIMEOUT_S = 1.0

# What `qexport serve` does, with a shorter limit for slow clients than an operator would choose.
COMMAND = f"""
import sys
import qexport.serve.settings as s
s.ServeSettings.__dataclass_fields__["read_timeout_s"].default = {READ_TIMEOUT_S}
s.ServeSettings.__init__.__defaults__ = tuple(
    {READ_TIMEOUT_S} if name == "read_timeout_s" else field.default
    for name, field in s.ServeSettings.__dataclass_fields__.items()
)
from qexport_cli.main import main
main()
"""


class Process:
    """`qexport serve` with its log, on a port that the system chose."""

    def __init__(self, *arguments, temporary: Path, group: bool = False, strict: bool = True):
        self.temporary = temporary
        self.strict = strict  # whether every line of the log must be ours
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "serve", *map(str, arguments), "--port", "0", "--threads", "1"],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=group,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        self.events: list[dict] = []
        self._lines: queue.Queue = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def until_ready(self):
        self.port = self.wait_for("listening")["port"]
        self.url = f"http://127.0.0.1:{self.port}"
        self.wait_for("ready")
        return self

    def _read(self):
        for line in self.process.stderr:
            if self.strict or line.startswith("{"):
                self._lines.put(json.loads(line))
        self._lines.put(None)

    def wait_for(self, event):
        while (found := self._lines.get(timeout=WAIT_S)) is not None:
            self.events.append(found)
            if found["event"] == event:
                return found
        raise AssertionError(f"ended before {event!r}: {self.events}")

    def workers(self, count):
        """Process numbers of the workers, once `count` of them have started since the last call."""
        return [self.wait_for("worker started")["pid"] for _ in range(count)]

    def draw(self, **fields):
        answer = httpx2.post(f"{self.url}/v1/images", json={"labels": [1], **fields}, timeout=WAIT_S)
        assert answer.status_code == 200, answer.text
        return answer.content

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)

    def clear_away(self):
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()
