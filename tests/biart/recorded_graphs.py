"""Recordings of decoding steps in place of CUDA graphs, and a tiny model to decode with, on the CPU."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latent_verse.biart.model import BiART
from latent_verse.biart.sequence import TEXT_TO_IMAGE
from latent_verse.config import BiARTConfig

CONFIG = BiARTConfig(
    text_vocab=11, image_vocab=9, text_len=7, image_len=12, n_layer=2, n_head=2, n_embd=16
)  # 20 positions: slots of 4, 8, ... 20
CPU = torch.device("cpu")


def lively(seed=0, config=CONFIG) -> BiART:
    torch.manual_seed(seed)
    model = BiART(config).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)  # no near ties
    return model


def references(direction, batch=3, seed=1) -> torch.Tensor:
    length, classes = (CONFIG.text_len, 11) if direction == TEXT_TO_IMAGE else (CONFIG.image_len, 9)
    return torch.randint(classes, (batch, length), generator=torch.Generator().manual_seed(seed))


class Recorder(TorchDispatchMode):
    """Keeps every operator with its arguments and results, and refuses those that a CUDA graph cannot hold."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a step waits for the device"
        assert "nonzero" not in str(func) and "masked_select" not in str(func), f"{func}: its size depends on data"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Run the same operators on the same memory."""
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            pairs = zip(out, again, strict=True) if isinstance(out, (tuple, list)) else [(out, again)]
            for old, new in pairs:
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class RecordedGraphs:
    """`CUDAGraphs` with a Recorder in place of each graph; counts captures and replays."""

    captures = replays = 0

    def __init__(self, device, capture):
        self.warm, self.recorders = set(), {}

    def __call__(self, slots, step) -> None:
        if slots in self.recorders:
            self.recorders[slots].replay()
            RecordedGraphs.replays += 1
        elif slots in self.warm:
            with Recorder() as self.recorders[slots]:
                step()
            RecordedGraphs.captures += 1
        else:
            self.warm.add(slots)
            step()


def same_as_the_first(sample) -> torch.Tensor:
    """What sample() gives, three times the same: warming up and capturing, replaying, and once more."""
    first = sample()
    assert torch.equal(sample(), first) and torch.equal(sample(), first)
    return first
