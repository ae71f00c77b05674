"""Training that comes to numbers which are not finite stops at that step, in both stages, and saves none of them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from latent_verse.augvae.model import AugVAE
from latent_verse.biart import sampling
from latent_verse.biart.model import BiART
from latent_verse.checkpoints.checks import CheckpointError, check_tensor, is_finite
from latent_verse.checkpoints.ckpt_files import read_ckpt
from latent_verse.commands import train_biart, train_vae
from latent_verse.config.train import TrainBiARTConfig, TrainerConfig, TrainVAEConfig
from latent_verse.data.images import MapImages
from latent_verse.training.augvae import LitAugVAE
from latent_verse.training.backups import RunFolder, WholeFiles
from latent_verse.training.biart import LitBiART
from latent_verse.training.divergence import Diverged, Divergence, tensors_in
from latent_verse.training.runs import Run
from latent_verse.training.trainer import make_trainer
from tests.biart.tiny_biart import CONFIG
from tests.image_runs import SMALL, write_pictures
from tests.messages import naming
from tests.two_processes import WORLD, in_two_processes

pytestmark = pytest.mark.usefixtures("one_thread")

BIART = shlex.split(
    "--fake_data --epochs 1 --limit_train_batches 4 --limit_val_batches 1 --n_layer 1 --n_head 2 --n_embd 16 "
    "--tokenizer bpe --bpe_vocab_size 300 --text_len 8 --batch_size 4 --num_workers 0 --gpus 0 --logger csv "
    "--log_every_n_steps 1 --refresh_rate 0 --num_samples 2"
)


class Stage:
    """One of the two training programs on data that takes a second, in a run folder called `run`."""

    def __init__(self, name: str, place: Path):
        self.place, self.folder = place, place / "runs" / "run"
        self.module = {"augvae": LitAugVAE, "biart": LitBiART}[name]
        self.program = {"augvae": train_vae, "biart": train_biart}[name]
        if name == "augvae":
            data = {split: write_pictures(place / split, count) for split, count in (("train", 12), ("val", 5))}
            self.flags = [*SMALL, "--train_dir", str(data["train"]), "--val_dir", str(data["val"])]
        else:
            self.flags = BIART

    def run(self, *more: str, name: str = "run") -> int:
        return self.program.main([*self.flags, "--log_dir", str(self.place / "runs"), "--name", name, *more])

    def saved(self) -> list[Path]:
        """All checkpoints of the run, each of which must be finite."""
        files = sorted(self.folder.rglob("*.ckpt"))
        for file in files:
            content = read_ckpt(file)
            assert all(map(is_finite, tensors_in([content["state_dict"], content["optimizer_states"]]))), file
        return files


@pytest.fixture(params=["augvae", "biart"])
def stage(request, tmp_path) -> Stage:
    return Stage(request.param, tmp_path)


@pytest.fixture
def augvae(tmp_path) -> Stage:
    return Stage("augvae", tmp_path)


@pytest.mark.parametrize(
    "flags",
    ["", "--backup --backup_steps 1", "--optimizer muon", "--gradient_clip_val 1 --accumulate_grad_batches 2"],
)
def test_a_rate_far_too_high_stops_with_one_line(stage, flags, capsys):
    flags = ["--learning_rate", "1e30", "--epochs", "3", *flags.split()]
    for _ in range(1 + ("--backup" in flags)):
        assert stage.run(*flags) == Diverged.exit_code == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "Traceback" not in said
        saved = stage.saved()
        newest = max(saved, key=lambda file: int(file.stem.split("step=")[1]))
        assert naming("step", "not finite", "--learning_rate", newest).search(said), said
        assert ("--gradient_clip_val" in said) != ("--gradient_clip_val" in flags)


def breaks(monkeypatch, stage: Stage, step: int, how, micro: int = 0) -> None:
    """Apply `how(batch)` to a batch of the training step that would be number `step` + 1."""
    original = stage.module.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == step and batch_idx % self.trainer.accumulate_grad_batches == micro:
            return how(self, batch, lambda: original(self, batch, batch_idx))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(stage.module, "training_step", training_step)


def scaled(out, factor: float):
    return {**out, "loss": out["loss"] * factor} if isinstance(out, dict) else out * factor


def with_a_bad_image(module, batch, step):
    batch[0].fill_(torch.nan)  # so that the codebook has learnt it before the loss is known
    return step()


def with_a_bad_loss(module, batch, step):
    return scaled(step(), torch.inf)


def with_bad_gradients(module, batch, step):
    out = step()
    bad = (next(module.model.parameters()) * 0).sum().abs().sqrt()  # 0, with a gradient of infinity times 0
    return {**out, "loss": out["loss"] + bad} if isinstance(out, dict) else out + bad


def losses(folder: Path) -> dict[int, float]:
    import csv

    rows = csv.DictReader((folder / "logs" / "metrics.csv").open())
    return {int(row["step"]): float(row["train/total_loss"]) for row in rows if row["train/total_loss"]}


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_state_before_the_step_is_kept_and_a_rerun_resumes_from_it(augvae, accumulate, monkeypatch, capsys):
    """Although the codebook, the counts of codes, random numbers and the data had moved on: the rest is the same."""
    flags = ["--backup", "--dropout", "0.2", "--restart_threshold", "0.5", "--batch_size", "2"]
    flags += ["--epochs", "1", "--accumulate_grad_batches", str(accumulate), "--learning_rate", "1e-3"]
    flags += ["--num_workers", str(accumulate - 1)]
    assert augvae.run(*flags, name="straight") == 0
    with monkeypatch.context() as patch:
        breaks(patch, augvae, 2, with_a_bad_image, micro=accumulate - 1)
        assert augvae.run(*flags) == 1
    assert naming("step 3", "loss", augvae.folder / "backups/step=2.ckpt").search(capsys.readouterr().err)
    assert [file.name for file in augvae.saved()] == ["step=2.ckpt"]
    assert augvae.run(*flags) == 0
    assert losses(augvae.folder) == losses(augvae.folder.with_name("straight"))
    weights = [read_ckpt(next((f / "checkpoints").glob("last*")))["state_dict"] for f in (
        augvae.folder, augvae.folder.with_name("straight"))]  # fmt: skip
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_save_that_failed_does_not_count_as_saved(augvae, monkeypatch, capsys):
    original, failures = WholeFiles.save_checkpoint, ["full", "full"]

    def save(self, *args, **more):
        if failures:
            self.error = failures.pop()
        else:
            original(self, *args, **more)

    monkeypatch.setattr(WholeFiles, "save_checkpoint", save)
    breaks(monkeypatch, augvae, 2, with_a_bad_image)
    with pytest.warns(UserWarning, match="full"):
        assert augvae.run("--backup", "--backup_steps", "1") == 1
    assert naming("step 3", augvae.folder / "backups/step=2.ckpt").search(capsys.readouterr().err)
    assert [file.name for file in augvae.saved()] == ["step=2.ckpt"] and not failures


@pytest.mark.parametrize(("how", "what"), [(with_a_bad_loss, "loss"), (with_bad_gradients, "gradients")])
def test_the_step_and_what_it_was_are_named(stage, how, what, monkeypatch, capsys):
    breaks(monkeypatch, stage, 1, how)
    assert stage.run() == 1
    assert naming("step 2", what).search(capsys.readouterr().err)
    assert [file.name for file in stage.saved()] == ["step=1.ckpt"]


def test_an_image_that_is_not_finite_from_a_worker_stops_the_run_at_its_step(augvae, monkeypatch, capfd):
    """Batches wait in the workers: the step is that of the image's batch, not that of when it was read."""
    original = MapImages.__getitem__

    def getitem(self, key):
        image, label = original(self, key)
        return (image * torch.nan if key == (0, 7) else image), label  # epoch and image

    monkeypatch.setattr(MapImages, "__getitem__", getitem)
    seen, original_step = [], LitAugVAE.training_step

    def training_step(self, batch, batch_idx):
        seen.append(bool(batch[0].isnan().any()))
        return original_step(self, batch, batch_idx)

    monkeypatch.setattr(LitAugVAE, "training_step", training_step)
    assert augvae.run("--batch_size", "1", "--num_workers", "2") == 1
    assert len(seen) > 1 and seen == [False] * (len(seen) - 1) + [True]
    (kept,) = augvae.saved()
    said = capfd.readouterr().err
    assert kept == augvae.folder / f"backups/step={len(seen) - 1}.ckpt"
    assert naming(f"step {len(seen)}", "loss", kept).search(said) and "Traceback" not in said


def test_the_first_step_leaves_nothing_to_keep(augvae, monkeypatch, capsys):
    breaks(monkeypatch, augvae, 0, with_a_bad_image)
    assert augvae.run("--backup") == 1
    assert naming("step 1", "nothing was saved").search(capsys.readouterr().err.lower())
    assert not augvae.saved()


@pytest.mark.parametrize("where", ["weights", "optimizer"])
def test_a_state_that_is_not_finite_is_not_saved(stage, where, monkeypatch, capsys):
    """A loss is finite in the step that breaks the state: best and last are refused."""
    original = stage.module.on_train_batch_end

    def on_train_batch_end(self, *args):
        original(self, *args)
        if self.trainer.is_last_batch and self.current_epoch == 1:
            parameter = next(self.model.parameters())
            (self.optimizers().state[parameter]["exp_avg"] if where == "optimizer" else parameter.data).fill_(torch.inf)

    monkeypatch.setattr(stage.module, "on_train_batch_end", on_train_batch_end)
    assert stage.run("--epochs", "3", "--num_sanity_val_steps", "1") == 1
    said = capsys.readouterr().err
    steps = 3 if stage.module is LitAugVAE else 4
    (last,) = [file for file in stage.saved() if file.name.startswith("last")]
    assert naming(f"after step {2 * steps}", where, last).search(said) and f"step={steps}.ckpt" in last.name


def test_a_gpu_is_asked_where_the_program_waits_anyway(stage, monkeypatch, capsys):
    """This CPU stands in for one: it computes on, is asked at the fourth step, names the third, and saves nothing."""
    original = Divergence.setup

    def setup(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self._at_once = False

    monkeypatch.setattr(Divergence, "setup", setup)
    monkeypatch.setattr(LitAugVAE, "on_train_epoch_end", lambda self: None)
    flags = ["--log_every_n_steps", "4", "--batch_size", "2"]
    breaks(monkeypatch, stage, 2, lambda module, batch, step: scaled(step(), torch.nan))
    seen = []
    original_step = stage.module.training_step
    monkeypatch.setattr(
        stage.module, "training_step", lambda self, *a: seen.append(self.global_step) or original_step(self, *a)
    )
    assert stage.run(*flags) == 1
    assert seen == [0, 1, 2, 3]
    assert naming("step 3", "loss", "nothing was saved").search(capsys.readouterr().err.lower())
    assert not stage.saved()
    seen.clear()  # a backup in between finds it first, and is not written
    assert stage.run(*flags, "--log_every_n_steps", "50", "--backup", "--backup_steps", "1") == 1
    assert seen == [0, 1, 2]
    assert naming("step 3", stage.folder / "backups/step=2.ckpt").search(capsys.readouterr().err)
    assert [file.name for file in stage.saved()] == ["step=1.ckpt", "step=2.ckpt"]


def test_a_validation_that_is_not_finite_is_said_and_not_the_best(augvae, monkeypatch):
    original = LitAugVAE.validation_step

    def validation_step(self, batch, batch_idx):
        if self.current_epoch != 1:
            batch[0].fill_(torch.nan)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LitAugVAE, "validation_step", validation_step)
    with pytest.warns(UserWarning, match=naming("val/total_loss", "nan", "step 3")):
        assert augvae.run("--epochs", "3") == 0
    names = [file.name for file in augvae.saved()]
    assert names == ["best-epoch=1-step=6.ckpt", "last-epoch=2-step=9.ckpt"]


@pytest.mark.parametrize("scaler", [None, object()])
def test_gradients_that_the_scaler_of_fp16_leaves_out_are_no_divergence(scaler, tmp_path):
    divergence = Divergence(RunFolder(Run(tmp_path, "0"), TrainVAEConfig()))
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.tensor([1.0, torch.inf, 2.0])
    strategy = SimpleNamespace(root_device=torch.device("cpu"), broadcast=lambda value: value)
    trainer = SimpleNamespace(
        strategy=strategy, world_size=1, global_step=4, ckpt_path=None, precision_plugin=SimpleNamespace(scaler=scaler)
    )
    divergence.setup(trainer, None, "fit")
    step = lambda: divergence.on_before_optimizer_step(trainer, None, torch.optim.SGD([parameter]))  # noqa: E731
    if scaler is None:
        with pytest.raises(Diverged, match=naming("step 5", "gradients")):
            step()
    else:
        step()
        with pytest.raises(Diverged, match=naming("step 5", "loss")):
            divergence.on_before_backward(trainer, None, torch.tensor(torch.nan))


def test_samples_that_fail_do_not_end_the_run(tmp_path, monkeypatch):
    def generate(*args, **kwargs):
        raise sampling.NotFinite("the model's logits are not finite")

    monkeypatch.setattr(sampling, "generate", generate)
    stage = Stage("biart", tmp_path)
    with pytest.warns(UserWarning, match=naming("samples", "step 4", "logits")):
        assert stage.run("--log_images", "--image_log_steps", "2") == 0
    assert len(stage.saved()) == 2


def test_images_that_cannot_be_written_do_not_end_the_run(stage, monkeypatch):
    original = RunFolder.setup

    def setup(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.run.images.touch()  # a file where the folder would be

    monkeypatch.setattr(RunFolder, "setup", setup)
    with pytest.warns(UserWarning, match=r"images/\w+_step=2\.png"):
        assert stage.run("--log_images", "--image_log_steps", "2") == 0


def test_what_is_finite_looks_at_every_number_and_is_what_readers_read(tmp_path):
    """In float64 what is more than float32 can hold is not: a network would load infinity."""
    (tmp_path / "a.ckpt").touch()
    large = [torch.full((4,), 3e38), torch.full((4,), 60000.0).half(), torch.full((4,), 3e38, dtype=torch.float64)]
    for good in (torch.ones(2, 3), torch.tensor([1, 2]), torch.zeros(0), *large):  # the large ones' sums are not finite
        assert is_finite(good)
        check_tensor(good, tmp_path / "a.ckpt", "a")
    ends = [torch.tensor([1.0, bad]) for bad in (torch.nan, torch.inf, -torch.inf)]
    both = torch.tensor([torch.inf, -torch.inf])
    for bad in (*ends, both, both.half(), both.bfloat16(), torch.tensor([1e39, 0.0], dtype=torch.float64)):
        assert not is_finite(bad)
        with pytest.raises(CheckpointError, match=naming("finite")):
            check_tensor(bad, tmp_path / "a.ckpt", "a")


def one_bad_rank(rank: int, folder: str, vae: AugVAE, stage: str, strategy: str, what: str) -> dict:
    """A run as the programs make it, as one of two processes of torchrun.

    The second's loss, or an image of its batch, is not finite at step 3.
    """
    os.environ |= {"TORCHELASTIC_RUN_ID": "0", "LOCAL_WORLD_SIZE": str(WORLD), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    t = TrainerConfig(
        gpus=WORLD, accelerator="cpu", epochs=2, logger="csv", refresh_rate=0, num_sanity_val_steps=0, strategy=strategy
    )
    torch.manual_seed(rank)
    batch = [torch.rand(2, 3, 16, 16) * 2 - 1]
    if stage == "augvae":
        config = TrainVAEConfig(model=vae.config, trainer=t)
        module = LitAugVAE(vae, config)
    else:
        config = TrainBiARTConfig(trainer=t)
        batch = [torch.randint(0, CONFIG.image_vocab, (2, CONFIG.image_len)),
                 torch.randint(0, CONFIG.text_vocab, (2, CONFIG.text_len))]  # fmt: skip
        module = LitBiART(BiART(CONFIG), vae, config, {})
    original = module.training_step

    def training_step(batch, batch_idx):
        bad = rank == 1 and batch_idx == 2
        if bad and what == "image":  # of which the codebooks of both processes learn
            batch = [batch[0].clone().index_fill_(0, torch.tensor([1]), torch.nan)]
        out = original(batch, batch_idx)
        return scaled(out, torch.inf) if bad and what == "loss" else out

    module.training_step = training_step
    trainer = make_trainer(t, RunFolder(Run(Path(folder), "0"), config))
    loader = torch.utils.data.DataLoader([batch] * 5, batch_size=None)
    try:
        trainer.fit(module, loader, loader)
    except Diverged as error:
        return {"said": [str(error)], "step": trainer.global_step}
    return {"said": [], "step": trainer.global_step}


@pytest.mark.parametrize(
    ("stage", "strategy", "what"),
    [
        ("augvae", "ddp", "image"),
        ("biart", "ddp", "loss"),
        pytest.param("augvae", "ddp", "loss", marks=pytest.mark.slow),
        pytest.param("biart", "fsdp", "loss", marks=pytest.mark.slow),
    ],
)
def test_all_processes_stop_after_the_step_that_one_could_not_take(tiny_augvae, tmp_path, stage, strategy, what):
    run = tmp_path / "run"
    for found in in_two_processes(tmp_path, one_bad_rank, run, tiny_augvae(), stage, strategy, what):
        assert found["step"] == 2
        assert naming("step 3", "loss", run / "backups" / "step=2.ckpt").search(found["said"][0])
    (file,) = run.rglob("*.ckpt")
    assert all(map(is_finite, tensors_in(read_ckpt(file)["state_dict"])))
