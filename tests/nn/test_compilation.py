"""What keeps a machine from compiling networks."""

from __future__ import annotations

import pytest
import torch

from latent_verse.nn import compilation
from latent_verse.nn.compilation import why_not_compiled
from tests.messages import naming


class Machine:
    """A machine with all that is needed, less what a test takes away."""

    def __init__(self, monkeypatch, include):
        (include / "Python.h").touch()
        self.include, self.programs, self.capability, self.packages = include, {"gcc", "g++"}, (9, 0), {"triton"}
        for name in ("CC", "CXX"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(compilation.sys, "platform", "linux")
        monkeypatch.setattr(compilation.shutil, "which", lambda name: name if name in self.programs else None)
        monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: name in self.packages or None)
        monkeypatch.setattr(compilation.sysconfig, "get_path", lambda *args: str(self.include))
        monkeypatch.setattr(compilation.sysconfig, "get_config_var", lambda *args: str(self.include))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: self.capability)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path)


DEVICES = [torch.device("cuda", 0), torch.device("cpu")]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_nothing_is_missing(machine, device):
    assert why_not_compiled(device) == ""


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_the_headers_of_python_are_missing(machine, device):
    (machine.include / "Python.h").unlink()
    assert naming(machine.include / "Python.h", "python3-dev").search(why_not_compiled(device))


@pytest.mark.parametrize(("device", "compiler", "variable"), [(DEVICES[0], "gcc", "CC"), (DEVICES[1], "g++", "CXX")])
def test_the_compiler_is_missing(machine, device, compiler, variable, monkeypatch):
    machine.programs.remove(compiler)
    assert variable in why_not_compiled(device) and compiler in why_not_compiled(device)
    monkeypatch.setenv(variable, "mine")
    assert naming("mine", variable).search(why_not_compiled(device))
    machine.programs.add("mine")
    assert why_not_compiled(device) == ""


def test_triton_is_missing_or_too_new_for_the_gpu(machine):
    machine.capability = (6, 1)
    assert naming("Triton", "7.0").search(why_not_compiled(DEVICES[0]))
    machine.packages.clear()
    assert naming("Triton", "pip").search(why_not_compiled(DEVICES[0]))
    assert why_not_compiled(DEVICES[1]) == ""  # a CPU needs neither
