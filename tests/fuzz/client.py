"""Servers of cases, and asking them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

REPO = Path(__file__).parents[2]
# one thread each; nothing is asked of the network
ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
ENVIRONMENT |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "2",
    "WANDB_MODE": "offline",
}
ENVIRONMENT |= {"PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""}


class Servers:
    """`count` servers, which share the cases of an area. Its folder holds the valid inputs and failed cases."""

    def __init__(self, folder: Path, count: int):
        self.folder = folder
        self._servers = [self._start() for _ in range(count)]

    def _start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "tests.fuzz.server", str(self.folder)]
        environment = {**os.environ, **ENVIRONMENT}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        return subprocess.Popen(command, cwd=REPO, env=environment, **pipes)

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.kill()
            server.communicate()

    def run(self, area: str, seeds: Iterable[int]) -> Iterator[tuple[int, dict]]:
        """(seed, how the case ended) as they end; see `server`."""
        ready = self._ask(0, f"prepare {area}")
        if ready["ended"] != "ready":
            raise RuntimeError(f"no valid inputs for {area}: {ready}")
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        answers: queue.SimpleQueue[tuple[int, dict]] = queue.SimpleQueue()
        seeds = list(seeds)
        for seed in seeds:
            waiting.put(seed)

        def work(number: int) -> None:
            while True:
                try:
                    seed = waiting.get_nowait()
                except queue.Empty:
                    return
                answers.put((seed, self._ask(number, f"{area} {seed}")))

        for number in range(len(self._servers)):
            threading.Thread(target=work, args=(number,), daemon=True).start()
        for _ in seeds:
            yield answers.get()

    def _ask(self, number: int, what: str) -> dict:
        server, line = self._servers[number], ""
        with contextlib.suppress(OSError):
            server.stdin.write(what + "\n")
            line = server.stdout.readline()
        if line:
            return json.loads(line)
        server.kill()
        server.communicate()
        self._servers[number] = self._start()
        return {"ended": "crash", "why": "the server of cases ended", "changed": what, "seconds": 0}
