"""Whether torch.compile's default compiler, Inductor, can work on this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch


def why_not_compiled(device: torch.device) -> str:
    """What a compiled function for `device` lacks, with the remedy, as part of a sentence; "" if it lacks nothing.

    Without this check a function would fail at its first call: for a GPU, Triton builds its launchers with a C compiler
    and Python's headers (pytorch issue 129351); elsewhere, Inductor builds kernels with a C++ compiler and the headers.
    """
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install triton)"
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "Triton needs a GPU of compute capability 7.0 or newer"
        variable, names = "CC", ["gcc", "clang"]
    else:
        variable, names = "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    compilers = [os.environ[variable]] if os.environ.get(variable) else names
    if not any(map(shutil.which, compilers)):
        return (
            f"there is no compiler {compilers[0]} (install it, or name another in the environment variable {variable})"
        )
    # both, as Debian's default path is not where its headers are, and a framework's on macOS are elsewhere again
    places = (sysconfig.get_path("include", "posix_prefix"), sysconfig.get_config_var("INCLUDEPY"))
    if not any((Path(place) / "Python.h").is_file() for place in places):
        return f"{places[0]}/Python.h does not exist (install Python's headers: python3-dev or python3-devel)"
    return ""
