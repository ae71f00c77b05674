"""What differs between the processes of a run, and has to be restored in each: random number generators, and more."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.utilities.rank_zero import rank_zero_warn


class ProcessState(pl.Callback):
    """Save and restore what differs between processes: random number generators, and the module's `process_state`.

    Lightning saves rank 0's only: a resumed run would have other dropout masks and restart other codes.
    """

    def __init__(self) -> None:
        self.loaded: list[dict[str, Any]] | None = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        state = {"rng": random_state(), "module": getattr(pl_module, "process_state", dict)()}
        states: list[dict[str, Any] | None] = [state]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            dist.all_gather_object(states, state)
        checkpoint["process_states"] = states

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self.loaded = checkpoint.get("process_states")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.loaded is None:
            return
        if len(self.loaded) != trainer.world_size:
            rank_zero_warn(
                f"{len(self.loaded)} processes saved the checkpoint, {trainer.world_size} resume from it: weights and "
                "step are the same, data order and random numbers are not."
            )
        else:
            state = self.loaded[trainer.global_rank]
            set_random_state(state["rng"])
            if state["module"]:
                pl_module.load_process_state(state["module"])
        self.loaded = None


def random_state() -> dict[str, Any]:
    """States of the generators of Python, NumPy, torch and this process's GPU, as plain types and tensors."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(
    state: dict[str, Any],
    of_python: Any = random,
    of_numpy: Any = np.random,
    of_torch: torch.Generator = torch.default_generator,
) -> None:
    """Restore what `random_state` returned, in these generators; the GPU's as well if they are the program's own."""
    version, internal, gauss = state["python"]
    of_python.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    of_numpy.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    of_torch.set_state(state["torch"].cpu())
    if "cuda" in state and of_torch is torch.default_generator and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
