"""train_vae.py as a user runs it: smoke test, own images, single-level, interruption, mistakes."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from latent_verse.checkpoints.augvae import load_augvae
from latent_verse.commands import train_vae
from latent_verse.files import only_writer
from latent_verse.training import image_logging
from latent_verse.training.augvae import LitAugVAE
from latent_verse.training.backups import Backup
from tests.image_runs import SMALL, write_pictures
from tests.messages import naming

REPO = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def images(tmp_path):
    """Class folders of 12 training and 5 validation images."""
    return write_pictures(tmp_path / "train", 12), write_pictures(tmp_path / "val", 5)


def small(tmp_path: Path, *more: str, name: str = "run") -> list[str]:
    """Flags of a run that takes a second."""
    return [*SMALL, "--log_dir", str(tmp_path / "runs"), "--name", name, *more]


def on(images) -> list[str]:
    return ["--train_dir", str(images[0]), "--val_dir", str(images[1])]


def values(run: Path, key: str = "train/total_loss") -> dict[int, float]:
    """{step: value} of a run's CSV log, which has each step once, in order."""
    with open(run / "logs" / "metrics.csv") as file:
        found = [(int(row["step"]), float(row[key])) for row in csv.DictReader(file) if row.get(key)]
    assert found == sorted(dict(found).items())
    return dict(found)


def test_trains_on_own_images_and_writes_a_run_folder(tmp_path, images, capsys):
    assert train_vae.main(small(tmp_path, *on(images), "--epochs", "2", "--log_images", "--image_log_steps", "2")) == 0
    run = tmp_path / "runs" / "run"
    said = capsys.readouterr().out
    assert naming(4.5e-06, 1, 4, 1.8e-05, run).search(said)
    names = {p.name for p in run.iterdir()}
    assert names >= {"config.yaml", "run.json", "checkpoints", "images", "logs"}
    kept = sorted(p.name.split("-")[0] for p in (run / "checkpoints").iterdir())
    assert kept == ["best", "last"]
    grids = {p.name for p in (run / "images").iterdir()}
    assert {"train_step=2.png", "train_step=4.png", "val_step=3.png", "val_step=6.png"} <= grids
    with Image.open(run / "images" / "val_step=3.png") as grid:
        assert grid.height == 2 * 16 + 3 * 2  # input over reconstruction, 2 px apart
    logged = values(run, "val/codes_used_8")
    assert set(logged) == {2, 5} and all(1 <= v <= 32 for v in logged.values())
    assert values(run, "val/perplexity_4") and values(run, "train/codes_used_4") and values(run, "lr-AdamW")
    model = load_augvae(run)
    assert model.levels == (8, 4) and not model.training
    checkpoint = torch.load(next((run / "checkpoints").glob("last*")), weights_only=True)
    assert checkpoint["latent_verse"]["run"]["data"]["batch_size"] == 4
    assert not [k for k in checkpoint["state_dict"] if "lpips" in k or "usage" in k or "val_means" in k]


def test_saved_config_runs_again(tmp_path, images):
    assert train_vae.main(small(tmp_path, *on(images))) == 0
    again = ["--config", str(tmp_path / "runs" / "run" / "config.yaml")]
    assert train_vae.main(again) == 0
    first, second = (values(tmp_path / "runs" / name) for name in ("run", "run-2"))
    assert first == second and len(first) == 3  # the same seed, data and order: the same losses, in a folder of its own


def test_fake_data_is_bounded_and_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at = SMALL.index("--epochs")
    assert train_vae.main([*SMALL[:at], *SMALL[at + 2 :], "--fake_data", "--loss_type", "lpips_l2"]) == 0
    (run,) = (tmp_path / "results").iterdir()
    assert run.name == "fake-augvae"
    assert len(values(run)) == 2
    assert values(run, "train/lpips_loss")


def test_single_level_from_multi_level(tmp_path, images):
    assert train_vae.main(small(tmp_path, *on(images), name="ml")) == 0
    sl = ["--finetune", "--attn_resolutions", "4", "--pretrained_path", str(tmp_path / "runs" / "ml")]
    assert train_vae.main(small(tmp_path, *on(images), *sl, name="sl")) == 0
    model = load_augvae(tmp_path / "runs" / "sl")
    assert model.config.single_level == 4 and model.config.attn_resolutions == (8, 4) and model.num_codes == 16
    assert values(tmp_path / "runs" / "sl", "val/perplexity_4")
    # a single-level model trains on from its own weights
    again = ["--pretrained_path", str(tmp_path / "runs" / "sl"), "--quant_beta", "0.5"]
    flags = [f for f in small(tmp_path, *on(images), *again, name="more")]
    assert train_vae.main(flags) == 0
    assert load_augvae(tmp_path / "runs" / "more").config.quant_beta == 0.5


def test_backup_is_not_touched_by_a_run_without_it(tmp_path, images):
    flags = small(tmp_path, *on(images), "--backup", "--backup_steps", "2")
    assert train_vae.main(flags) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "runs" / "run").rglob("*") if p.is_file()}
    assert train_vae.main(small(tmp_path, *on(images))) == 0
    assert all(p.read_bytes() == content for p, content in before.items())
    assert (tmp_path / "runs" / "run-2").is_dir()


def test_longer_epochs_resume_a_finished_run(tmp_path, images):
    straight = small(tmp_path, *on(images), "--backup", "--epochs", "2", "--lr_decay", name="straight")
    assert train_vae.main(straight) == 0
    for epochs in ("1", "2"):
        flags = small(tmp_path, *on(images), "--backup", "--epochs", epochs, "--lr_decay", name="parts")
        assert train_vae.main(flags) == 0
    assert values(tmp_path / "runs" / "parts") == values(tmp_path / "runs" / "straight")


def test_resume_flag_resumes_from_a_file(tmp_path, images, capsys):
    assert train_vae.main(small(tmp_path, *on(images), "--epochs", "2", name="straight")) == 0
    assert train_vae.main(small(tmp_path, *on(images), "--epochs", "1", name="first")) == 0
    last = next((tmp_path / "runs" / "first" / "checkpoints").glob("last*"))
    more = ["--epochs", "2", "--resume", "--ckpt_path", str(last)]
    assert train_vae.main(small(tmp_path, *on(images), *more, name="second")) == 0
    straight = values(tmp_path / "runs" / "straight")
    assert values(tmp_path / "runs" / "second") == {s: v for s, v in straight.items() if s >= 3}
    capsys.readouterr()
    assert train_vae.main(small(tmp_path, *on(images), "--ckpt_path", str(last), name="third")) == 0
    assert naming("ckpt_path", last, "--resume").search(capsys.readouterr().out)


def start(flags: list[str]) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    return subprocess.Popen(
        [sys.executable, str(REPO / "train_vae.py"), *flags],
        env=env,
        cwd=REPO,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process: subprocess.Popen, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


INTERRUPTED = ["--epochs", "9", "--backup", "--backup_steps", "2", "--dropout", "0.1", "--restart_threshold", "0.5",
               "--codebook_init", "data", "--lr_cosine", "--learning_rate", "1e-3", "--num_workers", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, one_thread):
    """Losses of a run that is left in peace, and its images."""
    place = tmp_path_factory.mktemp("peace")
    images = write_pictures(place / "train", 12), write_pictures(place / "val", 5)
    assert train_vae.main(small(place, *on(images), *INTERRUPTED)) == 0
    losses = values(place / "runs" / "run")
    assert len(losses) == 27
    return images, losses


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_interrupted_run_resumes_exactly(tmp_path, uninterrupted, number, capsys):
    """Losses after the interruption equal those of a run that was never interrupted: weights, optimiser, data order,
    augmentation, dropout and code restarts are all where they were."""
    images, expected = uninterrupted
    flags = small(tmp_path, *on(images), *INTERRUPTED)
    process = start(flags)
    run = tmp_path / "runs" / "run"
    # not between a backup and its row of the log, which comes after it
    wait_for(lambda: any(4 <= steps(p) <= logged(run) for p in (run / "backups").glob("step=*.ckpt")), process)
    os.killpg(process.pid, number)  # to the loader processes too, as Slurm and a terminal do
    said = process.communicate(timeout=120)[0]
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number, said
        assert naming("rerun", number.name, run).search(said) and "Traceback" not in said
    saved = max(map(steps, (run / "backups").glob("step=*.ckpt")))
    assert saved < 27, "the run was over before it could be interrupted"
    capsys.readouterr()
    assert train_vae.main(flags) == 0
    assert naming(run / "backups" / f"step={saved}.ckpt").search(capsys.readouterr().out)
    assert values(run) == expected  # no step is lost, none is there twice


def logged(run: Path) -> int:
    """The steps of a run of which the log has a row."""
    return max(values(run), default=-1) + 1 if (run / "logs" / "metrics.csv").exists() else 0


def steps(backup: Path) -> int:
    return int(backup.stem.split("=")[1])


def test_killed_between_the_last_batch_and_the_end_of_an_epoch(tmp_path, images, killed):
    """What an epoch adds up, its validation and its schedule are not lost, and not counted twice."""
    settings = ["--epochs", "4", "--backup", "--backup_steps", "1", "--lr_decay", "--learning_rate", "1e-3"]
    assert train_vae.main(small(tmp_path, *on(images), *settings, name="straight")) == 0
    flags = small(tmp_path, *on(images), *settings, name="cut")
    with killed(LitAugVAE, step=6, hook="validation_step"):  # which follows the last batch of the second epoch
        train_vae.main(flags)
    assert train_vae.main(flags) == 0
    straight, cut = tmp_path / "runs" / "straight", tmp_path / "runs" / "cut"
    for key in ("train/total_loss", "train/total_loss_epoch", "val/total_loss", "train/codes_used_8", "lr-AdamW"):
        assert values(cut, key) == values(straight, key), key


def test_killed_in_the_last_validation_of_a_run_that_ends_within_an_epoch(tmp_path, images, killed, capsys):
    settings = ["--max_steps", "5", "--epochs", "9", "--backup", "--backup_steps", "1", "--learning_rate", "1e-3"]
    assert train_vae.main(small(tmp_path, *on(images), *settings, name="straight")) == 0
    flags = small(tmp_path, *on(images), *settings, name="cut")
    with killed(LitAugVAE, step=5, hook="validation_step"):
        train_vae.main(flags)
    assert train_vae.main(flags) == 0
    assert "finished already" not in capsys.readouterr().out
    straight, cut = tmp_path / "runs" / "straight", tmp_path / "runs" / "cut"
    assert values(cut, "val/total_loss") == values(straight, "val/total_loss")
    names = sorted(p.name for p in (straight / "checkpoints").iterdir())
    assert names[-1] == "last-epoch=1-step=5.ckpt"
    assert sorted(p.name for p in (cut / "checkpoints").iterdir()) == names
    weights = [load_augvae(run).state_dict() for run in (straight, cut)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert train_vae.main(flags) == 0
    said, _, _ = capsys.readouterr().out.partition("\nNext:\n")  # the commands that follow repeat the flags
    assert "finished already" in said and "--max_steps" in said and "--epochs" not in said
    other = small(tmp_path, *on(images), *settings, "--resume", "--ckpt_path", str(cut), name="other")
    assert train_vae.main(other) == 2  # of another run: there is nothing to train
    assert naming(cut / "checkpoints" / names[-1], "--max_steps").search(capsys.readouterr().err)


@pytest.fixture
def stopped(monkeypatch):
    """Stops a run as a signal does, once `when(trainer)` is true: `with stopped(when): train_vae.main(...)`."""

    @contextmanager
    def stop(when):
        original = Backup.on_train_batch_end

        def stopping(self, trainer, *rest):
            self.told_to_stop |= when(trainer)
            original(self, trainer, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Backup, "on_train_batch_end", stopping)
            yield

    return stop


def test_stop_at_the_end_of_an_epoch(tmp_path, images, stopped, capsys):
    flags = small(tmp_path, *on(images), "--epochs", "3", "--backup")
    with stopped(lambda trainer: trainer.is_last_batch):
        assert train_vae.main(flags) == 143
    assert naming("step 3", tmp_path / "runs/run/checkpoints/last-epoch=0-step=3.ckpt").search(capsys.readouterr().err)
    assert train_vae.main(flags) == 0
    assert sorted(values(tmp_path / "runs" / "run")) == list(range(9))


def test_a_damaged_newest_backup_yields_to_the_one_before(tmp_path, images, stopped):
    flags = small(tmp_path, *on(images), "--epochs", "3", "--backup", "--backup_steps", "1")
    with stopped(lambda trainer: trainer.global_step == 5):
        assert train_vae.main(flags) == 143
    newest = tmp_path / "runs" / "run" / "backups" / "step=5.ckpt"
    newest.write_bytes(newest.read_bytes()[:3000])
    with pytest.warns(UserWarning, match=naming(newest)):
        assert train_vae.main(flags) == 0
    assert max(values(tmp_path / "runs" / "run")) == 8


def test_saved_config_of_a_fine_tune_runs_again(tmp_path, images):
    """It holds the shape that the checkpoint gave, though no flag named it."""
    assert train_vae.main(small(tmp_path, *on(images), name="ml")) == 0
    flags = ["--finetune", "--attn_resolutions", "4", "--pretrained_path", str(tmp_path / "runs" / "ml"), *on(images)]
    rest = [
        "--batch_size",
        "4",
        "--num_workers",
        "0",
        "--epochs",
        "1",
        "--logger",
        "csv",
        "--log_every_n_steps",
        "1",
        "--refresh_rate",
        "0",
        "--gpus",
        "0",
    ]
    assert train_vae.main([*flags, *rest, "--log_dir", str(tmp_path / "runs"), "--name", "sl"]) == 0
    assert train_vae.main(["--config", str(tmp_path / "runs" / "sl" / "config.yaml")]) == 0
    assert values(tmp_path / "runs" / "sl") == values(tmp_path / "runs" / "sl-2")


MISTAKES = {
    "misspelt flag": ("--batchsize 4", ["--batchsize", "--batch_size"]),
    "missing config": ("--config configs/none.yaml", ["configs/none.yaml"]),
    "missing folder": ("--train_dir nowhere", ["train_dir", "nowhere"]),
    "no folder": ("", ["train_dir", "--fake_data"]),
    "checkpoint absent": ("--train_dir {train} --resume --ckpt_path no.ckpt", ["no.ckpt"]),
    "batch above data": ("--train_dir {train} --batch_size 64", ["batch_size", 64, 12]),
}


@pytest.mark.parametrize(("flags", "facts"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_clear_line(tmp_path, images, capsys, flags, facts):
    assert train_vae.main(small(tmp_path, *flags.format(train=images[0]).split())) == 2
    said = capsys.readouterr().err
    assert naming(*facts).search(said) and said.startswith("error: ") and "Traceback" not in said
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


def test_more_gpus_than_the_machine_has(tmp_path, images, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert train_vae.main(small(tmp_path, *on(images), "--gpus", "4")) == 2
    assert naming("gpus", 4, 2).search(capsys.readouterr().err)


def test_no_gpu_is_said_in_one_line(tmp_path, images, caplog):
    from latent_verse.config.train import TrainerConfig
    from latent_verse.training.trainer import choose_devices

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with caplog.at_level("INFO"):
        assert choose_devices(TrainerConfig(gpus=8)) == ("cpu", 1)
    (record,) = caplog.records
    assert naming("GPU", "CPU", 8).search(record.message)
    assert choose_devices(TrainerConfig(gpus=0)) == ("cpu", 1)
    assert choose_devices(TrainerConfig(gpus=2, accelerator="cpu")) == ("cpu", 2)


def test_a_grid_is_written_once_a_step(tmp_path, images, killed, monkeypatch):
    """Not once for each accumulated batch, nor again by a run that resumes from a backup at such a step."""
    written = []
    monkeypatch.setattr(image_logging, "write_png", lambda grid_CHW, path: written.append(path.stem))
    flags = ["--log_images", "--image_log_steps", "1", "--batch_size", "1", "--accumulate_grad_batches", "5"]
    flags = small(tmp_path, *on(images), *flags, "--backup", "--backup_steps", "1")
    with killed(LitAugVAE, step=2):
        train_vae.main(flags)
    assert train_vae.main(flags) == 0
    assert written == ["train_step=1", "train_step=2", "train_step=3", "val_step=3"]


REFUSED = {
    "mps": (["--accelerator", "mps"], "mps"),
    "tpu": (["--accelerator", "tpu"], "torch_xla"),
    "transformer-engine": (["--precision", "transformer-engine"], "transformer_engine"),
}


@pytest.mark.parametrize(("flags", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_machine_or_its_packages_lack(tmp_path, images, capsys, flags, named):
    if importlib.util.find_spec(named) or (named == "mps" and torch.backends.mps.is_available()):
        pytest.skip("this machine has what the test asks for")
    assert train_vae.main(small(tmp_path, *on(images), *flags)) == (2 if named == "mps" else 1)  # a package: 1
    said = capsys.readouterr().err
    assert named in said.lower() and said.startswith("error: ") and said.count("\n") == 1


def test_wrong_checkpoints(tmp_path, images, capsys):
    assert train_vae.main(small(tmp_path, *on(images), name="ml")) == 0
    ml = tmp_path / "runs" / "ml"
    capsys.readouterr()
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(next((ml / "checkpoints").iterdir()).read_bytes()[:5000])
    load_augvae(ml).save_pretrained(tmp_path / "weights")
    weights = tmp_path / "weights" / "model.safetensors"
    for flags, facts in (
        (f"--finetune --attn_resolutions 2 --pretrained_path {ml}", ["attn_resolutions", 2, [8, 4], ml]),
        (f"--finetune --attn_resolutions 4 --hidden_dim 64 --pretrained_path {ml}", ["hidden_dim", 64, 32, ml]),
        (f"--resume --ckpt_path {cut}", [cut]),
        (f"--resume --ckpt_path {weights}", [weights, ".ckpt"]),
    ):
        assert train_vae.main(small(tmp_path, *on(images), *flags.split())) == 2
        assert naming(*facts).search(capsys.readouterr().err)


def test_changed_settings_do_not_resume_a_backup(tmp_path, images, capsys):
    flags = small(tmp_path, *on(images), "--backup")
    assert train_vae.main(flags) == 0
    capsys.readouterr()
    assert train_vae.main([*flags, "--quant_beta", "0.5"]) == 2
    assert naming("quant_beta", 0.25, 0.5).search(capsys.readouterr().err)


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_loggers_work_offline(tmp_path, images, logger, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags = small(tmp_path, *on(images), "--logger", logger, "--log_images", "--image_log_steps", "1")
    assert train_vae.main(flags) == 0
    run = tmp_path / "runs" / "run"
    if logger == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run / "logs"))
        events.Reload()
        assert "val/total_loss" in events.Tags()["scalars"] and "val/reconstructions" in events.Tags()["images"]
    else:
        assert list(run.glob("wandb/offline-run-*"))
        # the next run of this process gets a run of its own, after a failed one as well
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(LitAugVAE, "training_step", lambda *a: 1 / 0)
            train_vae.main([*flags, "--name", "failed"])
        assert train_vae.main([*flags, "--name", "second"]) == 0
        assert list((tmp_path / "runs" / "second").glob("wandb/offline-run-*"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one_on_the_joined_batch(tmp_path, images, strategy):
    common = [*on(images), "--epochs", "2", "--learning_rate", "1e-3", "--num_workers", "0"]
    two = ["--accelerator", "cpu", "--gpus", "2", "--batch_size", "2", "--strategy", strategy]
    process = start(small(tmp_path, *common, *two, name="two"))
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert train_vae.main(small(tmp_path, *common, "--batch_size", "4", name="one")) == 0
    one, other = (tmp_path / "runs" / name for name in ("one", "two"))
    for key in ("val/total_loss", "train/total_loss_epoch", "val/codes_used_8"):
        a, b = values(one, key), values(other, key)
        assert a.keys() == b.keys() and len(a) == 2
        assert all(abs(a[s] - b[s]) <= 1e-4 for s in a), (key, a, b)
    assert json.loads((other / "run.json").read_text())["id"]


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(tmp_path, images):
    assert train_vae.main(small(tmp_path, *on(images), name="eager")) == 0
    assert train_vae.main(small(tmp_path, *on(images), "--compile", name="compiled")) == 0
    eager, compiled = (values(tmp_path / "runs" / name) for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    assert all(abs(eager[s] - compiled[s]) < 1e-4 for s in eager)
    assert load_augvae(tmp_path / "runs" / "compiled").levels == (8, 4)  # keys kept their names


@pytest.mark.parametrize("precision", ["bf16", "bf16-true", "64"])
def test_precisions(tmp_path, images, precision):
    assert train_vae.main(small(tmp_path, *on(images), "--precision", precision, "--codebook_init", "data")) == 0
    losses = values(tmp_path / "runs" / "run")
    assert len(losses) == 3 and all(0 < v < 10 for v in losses.values())
    assert load_augvae(tmp_path / "runs" / "run").quantizer.embedding.weight.dtype == torch.float32


FOLDERS = {
    "name too long": (["--name", "a" * 300], ["name", "a" * 79 + "..."]),
    "name of control characters": (["--name", "a\nb"], ["name", r"'a\nb'"]),
    "name that is not UTF-8": (["--name", "lat\udce9"], ["name", r"'lat\udce9'"]),
    "log_dir below a file": (["--log_dir", "{there}/file/runs"], ["log_dir", "{there}/file"]),
    "log_dir too long": (["--log_dir", "{there}/" + "a" * 300], ["log_dir", "255"]),
    "backup_dir below a file": (["--backup", "--backup_dir", "{there}/file/b"], ["backup_dir", "{there}/file"]),
}


@pytest.mark.parametrize(("flags", "facts"), FOLDERS.values(), ids=FOLDERS.keys())
def test_folders_in_which_nothing_can_be_written_are_refused_before_the_data_is_read(tmp_path, capsys, flags, facts):
    (tmp_path / "file").touch()
    flags, facts = ([text.format(there=tmp_path) for text in texts] for texts in (flags, facts))
    assert train_vae.main([*small(tmp_path), "--train_dir", "absent", *flags]) == 2
    said = capsys.readouterr().err
    assert naming(*facts).search(said) and said.startswith("error: ") and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # and nothing is left of it


def test_a_second_run_of_a_name_is_refused_and_one_without_backup_gets_another_folder(tmp_path, images, capsys):
    with only_writer(tmp_path / "runs" / "run", "log_dir"):
        assert train_vae.main(small(tmp_path, *on(images), "--backup")) == 2
        said = capsys.readouterr().err
        assert naming(tmp_path / "runs" / "run", os.getpid()).search(said) and said.count("\n") == 1
        assert train_vae.main(small(tmp_path, *on(images))) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run-2"]
    assert train_vae.main(small(tmp_path, *on(images), "--backup")) == 0


def test_a_run_needs_no_folder_for_temporary_files(tmp_path, images, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    assert train_vae.main(small(tmp_path, *on(images), "--backup", "--backup_steps", "1", "--log_images")) == 0
    assert len(list((tmp_path / "runs" / "run").rglob("*.ckpt"))) == 4
