"""What a result was computed with: the machine, the commit of the code, and versions of packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def machine() -> dict[str, str]:
    """Processor and cores, the GPU if there is one, and the versions of torch and Python."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    about = {"machine": f"{name}, {os.cpu_count()} cores"}
    if torch.cuda.is_available():
        about["GPU"] = torch.cuda.get_device_name()
    return about | {"torch": torch.__version__, "Python": platform.python_version()}


def commit() -> str:
    """The commit of the code, marked if files differ from it; "unknown" outside a repository."""
    try:
        options = {"cwd": ROOT, "capture_output": True, "text": True, "check": True, "timeout": 20}
        name = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{name}, with uncommitted changes" if changed else name


def versions(*packages: str) -> str:
    """ "torchmetrics 1.9.0, torch-fidelity 0.4.0": those of the packages that are installed, with their versions."""
    found = {name: next(iter(importlib.metadata.distributions(name=name)), None) for name in packages}
    return ", ".join(f"{name} {it.version}" for name, it in found.items() if it)
