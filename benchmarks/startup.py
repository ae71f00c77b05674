"""How long a person waits: `--help`, the first training step of the tiny recipes, generate.py's first image.

    python benchmarks/run.py startup

Each is a process of its own, timed alternately with what it needs in any case: Python, importing PyTorch, importing
PyTorch and Lightning. A process is timed from its start to its end, a training run to the first step on its progress
bar. With one thread this is the CPU time of the process, else the wall clock. Training runs stop after that step,
without validation; on a GPU they do not compile, which the area augvae times.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import ROOT, Case, Row, peer, row

FIRST_STEP = rb"\| 1/\d"  # on the progress bar
SCRIPTS = ("train_vae.py", "eval_vae.py", "train_biart.py", "generate.py")
RECIPES = {
    "train_vae.py": ("configs/tiny_augvae_ml.yaml", "configs/tiny_augvae_sl.yaml"),
    "train_biart.py": ("configs/tiny_biart.yaml",),
}
BASES = {
    "python": "pass",
    "torch": "import torch",
    "torch and Lightning": "import torch, pytorch_lightning",
}
SIZES = {
    "toy": {"help": SCRIPTS[:1], "steps": {}, "generate": False, "repeats": 1},
    "cpu": {"help": SCRIPTS, "steps": RECIPES, "generate": True, "repeats": 3},
    "cuda": {
        "help": SCRIPTS[:1],
        "steps": {"train_vae.py": RECIPES["train_vae.py"][:1]},
        "generate": True,
        "repeats": 1,
    },
}


def python(*arguments: str) -> None:
    """Run Python on `arguments` in the repository's root. RuntimeError with its last line of errors if it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError(said[-1] if said else f"exit code {done.returncode}")


def process_seconds(arguments: tuple[str, ...] | list[str], until: bytes | None = None) -> float:
    """What `python` takes: CPU time with one thread (OMP_NUM_THREADS=1), else wall clock.

    Args:
        until: pattern in what the process says; its time up to there, not to its end. The process ends all the same.
    """
    before, start = os.times(), time.perf_counter()
    if until is None:
        python(*arguments)
        after, taken = os.times(), time.perf_counter() - start
        spent = after.children_user + after.children_system - before.children_user - before.children_system
    else:
        taken, spent = _seconds_until(until, arguments)
    return spent if torch.get_num_threads() == 1 else taken


def _seconds_until(pattern: bytes, arguments: tuple[str, ...] | list[str]) -> tuple[float, float]:
    """(wall clock, CPU time) of Python on `arguments` until it says `pattern`. RuntimeError if it never does."""
    start, said = time.perf_counter(), b""
    here, there = pty.openpty()  # the progress bar needs a terminal, of some width
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    command = [sys.executable, *arguments]
    with open(here, "rb", 0) as terminal, subprocess.Popen(command, cwd=ROOT, stdout=there, stderr=there) as process:
        os.close(there)
        while not re.search(pattern, said):
            more = _read(terminal)
            if not more:
                last = (said.decode(errors="replace").strip() or "it said nothing").splitlines()[-1]
                raise RuntimeError(f"no first step: {last}")
            said += more
        taken = time.perf_counter() - start
        ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:15]  # own and children's
        while _read(terminal):
            pass
    return taken, sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def _read(terminal: io.RawIOBase) -> bytes:
    """What is said next, nothing at the end, which Linux calls an error of a terminal."""
    try:
        return terminal.read(2**16)
    except OSError:
        return b""


def bundle(folder: Path) -> Path:
    """A bundle of a small random AugVAE-SL (64 px, 256 codes) and a tiny BiART."""
    from latent_verse.augvae.model import AugVAE
    from latent_verse.biart.model import BiART
    from latent_verse.config import PRESETS, AugVAEConfig, BiARTConfig
    from latent_verse.data.text import BPETokenizer
    from latent_verse.inference.pipeline import LVerse

    torch.manual_seed(0)
    shape = {"hidden_dim": 32, "ch_mult": (2, 1, 2), "num_res_blocks": 1, "resolution": 64}
    shape |= {"z_channels": 32, "codebook_dim": 32, "num_tokens": 512}
    vae = AugVAE(AugVAEConfig(**shape, attn_resolutions=(16, 8), single_level=16)).eval()
    tokenizer = BPETokenizer.train(["a red circle", "a blue square"], 300)
    sizes = {"text_vocab": tokenizer.vocab_size, "image_vocab": 512, "text_len": 24, "image_len": vae.num_codes}
    model = BiART(BiARTConfig(**sizes, **PRESETS["tiny"])).eval()
    LVerse(vae, model, tokenizer, {"reference_dropout": 0.1, "text_too_long": "truncate"}).save_pretrained(folder)
    return folder


def cases(device: str, size: str) -> list[Case]:
    """One for each command."""
    s = SIZES[size]
    found = [_case(f"{script} --help", [script, "--help"], 1.0, "python", s) for script in s["help"]]
    common = ["--gpus", "1" if device == "cuda" else "0"]
    for script, recipes in s["steps"].items():
        flags = ["--max_steps", "1", "--limit_val_batches", "0", "--no-compile", *common]
        flags += ["--num_samples", "0", "--num_judged", "0"] if script == "train_biart.py" else []
        for recipe in recipes:
            arguments = [script, "--config", recipe, "--fake_data", *flags]
            name = f"{script}, {Path(recipe).stem}: first step"
            found.append(_case(name, arguments, 5.0, "torch and Lightning", s, FIRST_STEP))
    if s["generate"]:
        arguments = ["generate.py", "--text", "a red circle", "--num", "1", "--seed", "1", *common]
        found.append(_case("generate.py: first image of a tiny bundle", arguments, 5.0, "torch", s))
    return found


def _case(name: str, arguments: list[str], most: float, base: str, s: dict, until: bytes | None = None) -> Case:
    return Case(name, partial(_process, name, arguments, most, base, until, s["repeats"]))


def _process(
    name: str, arguments: list[str], most: float, base: str, until: bytes | None, repeats: int
) -> Iterator[Row]:
    taken: dict[str, list[float]] = {"ours": [], base: []}
    with tempfile.TemporaryDirectory() as folder:
        if until is not None:
            arguments = [*arguments, "--log_dir", f"{folder}/runs"]
        if "configs/tiny_augvae_sl.yaml" in arguments:  # it begins with a model of all levels
            python(*(a.replace("_sl.yaml", "_ml.yaml") for a in arguments))
            arguments += ["--pretrained_path", f"{folder}/runs/fake-tiny_augvae_ml"]
        if arguments[0] == "generate.py":
            arguments = [
                *arguments,
                "--model",
                str(bundle(Path(folder) / "bundle")),
                "--overwrite",
                "--out",
                f"{folder}/out",
            ]
        for _ in range(repeats):
            taken["ours"].append(process_seconds(arguments, until))
            taken[base].append(process_seconds(["-c", BASES[base]]))
    times = {way: sorted(values)[len(values) // 2] for way, values in taken.items()}
    yield row(
        "startup",
        name,
        {"seconds": times["ours"], "bytes": None},
        [peer(f"{base} alone", times["ours"], times[base])],
        unit="process",
        goal=f"under {most:g} s on the CPU",
        met=times["ours"] < most,
        figures={"more_than_that_s": times["ours"] - times[base]},
    )
