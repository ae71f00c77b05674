"""Fixtures that several test files share: small AugVAEs and images for them."""

from __future__ import annotations

import signal
from contextlib import contextmanager

import pytest
import torch

from latent_verse import AugVAE
from latent_verse.config import AugVAEConfig

# 16 px, levels 8, 4 and 2: milliseconds a pass
TINY = {
    "hidden_dim": 32,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "resolution": 16,
    "attn_resolutions": (8, 4, 2),
    "z_channels": 16,
    "codebook_dim": 8,
    "num_tokens": 24,
}


# Background jobs of a shell and nohup ignore these, and so would programs that the tests start.
for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with dry runs of CUDA last: see `fake_cuda.fake_cuda`."""
    dry = {"tests.fake_cuda", "tests.sm90"}
    items.sort(key=lambda item: any(getattr(v, "__module__", "") in dry for v in vars(item.module).values()))


@pytest.fixture
def tiny_config():
    """Makes a tiny AugVAEConfig: tiny_config(single_level=4, ...)."""
    return lambda **changes: AugVAEConfig(**{**TINY, **changes})


@pytest.fixture
def tiny_augvae(tiny_config):
    """Makes a tiny AugVAE in evaluation mode whose codebook has seen use; no two weights are equal."""

    def make(seed: int = 0, **changes) -> AugVAE:
        torch.manual_seed(seed)
        model = AugVAE(tiny_config(**changes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            book = model.quantizer.embedding
            book.weight.mul_(0.3)
            book.cluster_size.uniform_(0.5, 2.0)
            book.embed_avg.copy_(book.weight * book.cluster_size[:, None])
        return model.eval()

    return make


@pytest.fixture
def tiny_images():
    """Makes images (B, 3, 16, 16) in [-1, 1]."""
    return lambda batch=2, seed=1: torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def one_thread():
    """One thread in this process, as in those that a test starts: other numbers of threads round sums otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture
def killed(monkeypatch):
    """Ends a run within a step, as by kill -9: `with killed(LitBiART, step=5): train_biart.main(...)`."""

    @contextmanager
    def kill(module: type, step: int, hook: str = "training_step"):
        original = getattr(module, hook)

        def dies(self, batch, batch_idx):
            if self.global_step == step:
                raise Killed
            return original(self, batch, batch_idx)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, hook, dies)
            yield

    return kill
