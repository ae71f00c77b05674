"""Processes that hold something and wait to be killed."""

from __future__ import annotations

import subprocess
import sys

CHILD = """
import os, sys, time
from pathlib import Path
from latent_verse import files
folder = Path(sys.argv[1])
def wait():
    print("ready", flush=True)
    time.sleep(60)
"""


def start(folder, lines: str) -> subprocess.Popen:
    """A process that runs these lines and has come to `wait()`."""
    process = subprocess.Popen([sys.executable, "-c", CHILD + lines, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait(30)
    process.stdout.close()
