"""What the machine does wrong, as a line that says what would help: memory, processes, files, packages, the network."""

from __future__ import annotations

import errno
import importlib.util
import re
import sys

from latent_verse.config.messages import reason

LOST_CONTACT = (
    "another process of this run has ended or does not answer. If it has not said why above, it was killed, often "
    "because memory ran out, or the network failed."
)
WORKERS = "Give fewer --num_workers or a smaller --batch_size; with --num_workers 0 no such process is needed."
SHARED = (
    "/dev/shm, the memory that processes share, is full or too small. Free some, or give a container more "
    "(--shm-size). Loader processes need less with a smaller --batch_size, and none with --num_workers 0."
)
FAULTS = {  # what PyTorch raises as RuntimeError: what to say
    rf"Too many open files|items of ancdata|worker .*exit code {errno.EMFILE}\.": (
        "too many open files. Raise the limit (ulimit -n 4096), or give fewer --num_workers."
    ),
    r"DataLoader worker .*Bus error|(unable to|could not) .*(shared memory|shm|/torch_)": SHARED,
    r"DataLoader worker .*signal: (?!Killed)([\w ]+)": "a loader process has failed ({0}). " + WORKERS,
    r"DataLoader worker": "a loader process was killed, often because memory or /dev/shm ran out. " + WORKERS,
    r"DataLoader timed out after (\d+)": (
        "the loader processes have given nothing for {0} seconds. Does the disk or network that holds the data answer?"
    ),
    r"can't start new thread": "no more processes or threads may be started: raise the limit (ulimit -u).",
    r"operator torchvision::\w+ does not exist": (
        "torchvision does not fit PyTorch: one is made for CPUs, the other for GPUs, or their versions differ. "
        "Install both with one command, as README.md shows."
    ),
    r"can't allocate memory|out of memory": "not enough memory. Give a smaller --batch_size or fewer --num_workers.",
}
REMEDIES = {  # by errno
    errno.ENOSPC: " Free some space, or write elsewhere.",
    errno.EDQUOT: " Free some space, or write elsewhere.",
    errno.EMFILE: " Raise the limit (ulimit -n 4096), or give fewer --num_workers.",
    errno.EAGAIN: " Processes may be limited (ulimit -u): raise the limit, or give fewer --num_workers.",
    errno.ENOMEM: " Give a smaller --batch_size or fewer --num_workers.",
}


def fault(error: BaseException) -> str | None:
    """What to say of an error of the machine's, or None."""
    text = str(error)
    unmapped = isinstance(error, ImportError) and re.search(r"failed to map segment|annot allocate memory", text)
    if isinstance(error, MemoryError) or unmapped:  # of a library
        return FAULTS[r"can't allocate memory|out of memory"]
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if not package:  # Lightning says itself what to install
            return text
        if package in sys.stdlib_module_names or importlib.util.find_spec(package) is not None:
            return None  # a part of it is missing, which no installation brings
        return f"{text.rstrip('.')}. Install it: pip install {package}, or all of requirements.txt."
    if isinstance(error, OSError):
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        if isinstance(error, FileNotFoundError) and "temporary directory" in text:  # tempfile's
            return "no folder for temporary files can be written, which PyTorch needs to start. Name one as TMPDIR."
        what = error.strerror or f"{type(error).__name__}: {text}"
        return f"{names + ': ' if names else ''}{what}.{REMEDIES.get(error.errno or 0, '')}"
    wandb = sys.modules.get("wandb")
    if wandb is not None and isinstance(error, wandb.errors.Error):
        return f"Weights & Biases: {reason(error)}. With WANDB_MODE=offline a run logs on this machine only."
    if isinstance(error, UnicodeError):
        return f"a text cannot be read or written in its encoding: {text}. Use UTF-8, for the terminal too (LANG)."
    if isinstance(error, RecursionError):
        return "something given is nested too deeply (RecursionError)."
    if isinstance(error, RuntimeError):
        for pattern, said in FAULTS.items():
            found = re.search(pattern, text)
            if found:
                return said.format(*found.groups())
    return None


def lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone or silent. gloo raises bare RuntimeErrors."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError) or not torch.distributed.is_available():
        return False
    return isinstance(error, torch.distributed.DistError) or bool(
        re.search(r"gloo|Connection (closed|reset|refused)|Timed out waiting|NCCL", str(error))
    )
