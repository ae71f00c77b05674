"""training/resume.py: which checkpoint a rerun takes, and that nothing is restored which does not fit."""

from __future__ import annotations

import csv
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from latent_verse.checkpoints.ckpt_files import CheckpointError, described
from latent_verse.commands import train_biart, train_vae
from latent_verse.config.train import BiARTOptimConfig, TrainBiARTConfig, VAEOptimConfig
from latent_verse.training.changes import changes
from latent_verse.training.resume import starting_point
from latent_verse.training.runs import Run
from tests.image_runs import SMALL, write_pictures
from tests.messages import naming
from tests.small_checkpoints import changed, flip, own_ckpt, put

TINY = (
    "--n_layer 1 --n_head 2 --n_embd 16 --tokenizer bpe --bpe_vocab_size 300 --text_len 8 --batch_size 4 --fake_data "
    "--num_workers 0 --gpus 0 --logger csv --refresh_rate 0 --num_samples 0"
).split()
STATE = ("optimizer_states", 0, "state", 0)
GROUP = ("optimizer_states", 0, "param_groups", 0)
LOOPS = ("loops", "fit_loop")
BEST = "ModelCheckpoint{'monitor': 'val/total_loss', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, 'train_time_interval': None}"  # noqa: E501


def flags(folder: Path, *more: str) -> list[str]:
    return [*TINY, "--log_dir", str(folder), "--name", "run", "--backup", "--backup_steps", "1", *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The log_dir of a run of train_biart, stopped after its first epoch: a backup at step 1, last at 2."""
    folder = tmp_path_factory.mktemp("runs")
    assert train_biart.main(flags(folder)) == 0
    return folder


@pytest.fixture
def place(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


@pytest.fixture
def run(place) -> Run:
    return Run(place / "run", "id")


@pytest.fixture
def last(run) -> Path:
    return run.checkpoints / "last-epoch=0-step=2.ckpt"


@pytest.fixture
def backup(run) -> Path:
    return run.backups() / "step=1.ckpt"


@pytest.fixture(scope="module")
def trained_vae(tmp_path_factory) -> Path:
    """The last checkpoint of a run of train_vae with lr_decay."""
    folder = tmp_path_factory.mktemp("vae")
    images = write_pictures(folder / "images", 4)
    places = ["--train_dir", str(images), "--log_dir", str(folder), "--name", "run", "--lr_decay"]
    assert train_vae.main([*SMALL, *places]) == 0
    return folder / "run" / "checkpoints" / "last-epoch=0-step=1.ckpt"


@pytest.fixture(scope="module", params=["adamw", "muon", "adamw with averaged weights"])
def trained_biart(request, tmp_path_factory) -> Path:
    """The last checkpoint of a smoke test of train_biart."""
    folder = tmp_path_factory.mktemp("biart")
    optimizer, _, averaged = request.param.partition(" ")
    more = ["--optimizer", optimizer, "--ema_decay", "0.9" if averaged else "0"]
    assert train_biart.main([*TINY, *more, "--log_dir", str(folder), "--name", "run"]) == 0
    (file,) = (folder / "run").glob("checkpoints/last-*.ckpt")
    return file


# ---------------------------------------------------------------------------------------------------- which is taken


def test_the_newest_by_its_stored_step_is_taken(run, last, backup):
    assert starting_point(run, None, "biart") == (last, 2)
    last.rename(last.with_name("last-epoch=0-step=0.ckpt"))  # a name says less than the file
    assert starting_point(run, None, "biart") == (last.with_name("last-epoch=0-step=0.ckpt"), 2)
    last.with_name("last-epoch=0-step=0.ckpt").rename(last.with_name("last-epoch=0-step=2-v1.ckpt"))
    assert starting_point(run, None, "biart") == (last.with_name("last-epoch=0-step=2-v1.ckpt"), 2)
    last.with_name("last-epoch=0-step=2-v1.ckpt").unlink()
    assert starting_point(run, None, "biart") == (backup, 1)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def flipped(file: Path) -> None:
    flip(file, file.stat().st_size // 3)


def not_finite(file: Path) -> None:
    changed(file, put("state_dict", "model.ln_f.bias", value=lambda weight: weight * torch.nan))


def moments_not_finite(file: Path) -> None:
    changed(file, put(*STATE, "exp_avg", value=lambda moment: moment * torch.nan))


@pytest.mark.parametrize("damage", [cut, flipped, not_finite, moments_not_finite])
def test_a_damaged_newest_yields_to_the_one_before_with_one_warning(run, last, backup, damage):
    damage(last)
    with pytest.warns(UserWarning, match=naming(last, backup)) as said:
        assert starting_point(run, None, "biart") == (backup, 1)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    damage(backup)
    with pytest.raises(CheckpointError, match=naming(last)):
        starting_point(run, None, "biart")


@pytest.mark.parametrize("damage", [cut, flipped])
def test_a_folder_that_was_named_gives_its_newest_whole_file(run, last, backup, damage, tmp_path):
    new = Run(tmp_path / "new", "other")
    assert starting_point(new, str(run.folder), "biart") == (last, 2)
    damage(last)
    with pytest.warns(UserWarning, match=naming(last)):
        best, _ = starting_point(new, str(run.folder), "biart")
    assert best == run.checkpoints / "best-epoch=0-step=2.ckpt"
    damage(best)
    with pytest.warns(UserWarning, match=naming(backup)):
        assert starting_point(new, str(run.folder), "biart") == (backup, 1)


def test_a_damaged_file_that_was_named_is_refused_and_whole_ones_are_named(run, last, tmp_path):
    cut(last)
    with pytest.raises(CheckpointError, match=naming(last, "best-epoch=0-step=2.ckpt")) as error:
        starting_point(Run(tmp_path / "new", "other"), str(last), "biart")
    assert "\n" not in str(error.value)


def test_paths_that_cannot_be_resumed_from(run, tiny_augvae, tmp_path):
    os.mkfifo(tmp_path / "pipe.ckpt")
    tiny_augvae().save_pretrained(tmp_path / "saved")
    for path, *facts in (
        ("a" * 300, "too long"),
        ("a" * 300 + ".ckpt", "too long"),
        ("a\0b",),
        (tmp_path / "pipe.ckpt", tmp_path / "pipe.ckpt", "pipe"),
        (tmp_path / "absent.ckpt", tmp_path / "absent.ckpt"),
        (tmp_path / "saved", tmp_path / "saved", "--pretrained_path"),
        (tmp_path / "saved" / "model.safetensors", "model.safetensors", "--pretrained_path"),
        (own_ckpt(tiny_augvae(), tmp_path / "a.ckpt"), tmp_path / "a.ckpt", "augvae"),
    ):
        with pytest.raises(CheckpointError, match=naming(*facts)) as error:
            starting_point(run, str(path), "biart")
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- what would be restored


def group_of(name: str, value: object):
    return put(*GROUP, name, value=value)


WRONG = {
    "no optimiser": put("optimizer_states", value=[]),
    "optimizer_states None": put("optimizer_states", value=None),
    "optimizer_states text": put("optimizer_states", value="adamw"),
    "two optimisers": put("optimizer_states", value=lambda states: states * 2),
    "an optimiser without groups": lambda content: content["optimizer_states"][0].pop("param_groups"),
    "an optimiser without state": lambda content: content["optimizer_states"][0].pop("state"),
    "empty state": put("optimizer_states", 0, "state", value={}),
    "two groups": put("optimizer_states", 0, "param_groups", value=lambda groups: groups * 2),
    "a parameter less": group_of("params", lambda numbers: numbers[:-1]),
    "a parameter twice": group_of("params", lambda numbers: [*numbers[:-1], 0]),
    "parameters text": group_of("params", "all"),
    "parameters nested": group_of("params", lambda numbers: [[n] for n in numbers]),
    "a group is a list": put("optimizer_states", 0, "param_groups", 0, value=[1]),
    "lr text": group_of("lr", "1e-3"),
    "lr NaN": group_of("lr", float("nan")),
    "no betas": lambda content: content["optimizer_states"][0]["param_groups"][0].pop("betas"),
    "one beta": group_of("betas", 0.9),
    "three betas": group_of("betas", [0.9, 0.9, 0.9]),
    "amsgrad": group_of("amsgrad", True),
    "maximize": group_of("maximize", True),
    "fused text": group_of("fused", "yes"),
    "a state too many": put("optimizer_states", 0, "state", 10**6, value={}),
    "a state is a list": put(*STATE, value=[1]),
    "a smaller average": put(*STATE, "exp_avg", value=torch.zeros(1)),
    "a larger average": put(*STATE, "exp_avg", value=torch.zeros(10**5)),
    "a smaller square": put(*STATE, "exp_avg_sq", value=torch.zeros(0)),
    "another order": lambda content: content["optimizer_states"][0]["state"].update(
        {0: content["optimizer_states"][0]["state"][1], 1: content["optimizer_states"][0]["state"][0]}
    ),
    "whole numbers": put(*STATE, "exp_avg", value=lambda moment: moment.long()),
    "an average is a number": put(*STATE, "exp_avg", value=0.0),
    "an average is missing": lambda content: content["optimizer_states"][0]["state"][0].pop("exp_avg"),
    "an expanded average": put(*STATE, "exp_avg", value=lambda moment: torch.zeros(1).expand(moment.shape)),
    "a sparse average": put(*STATE, "exp_avg", value=lambda moment: moment.to_sparse()),
    "NaN": put(*STATE, "exp_avg_sq", value=lambda moment: moment * torch.nan),
    "a negative square": put(*STATE, "exp_avg_sq", value=lambda moment: -1 - moment),
    "step text": put(*STATE, "step", value="3"),
    "step NaN": put(*STATE, "step", value=torch.tensor(torch.nan)),
    "step negative": put(*STATE, "step", value=torch.tensor(-5.0)),
    "two steps": put(*STATE, "step", value=torch.tensor([1.0, 2.0])),
    "lr_schedulers missing": lambda content: content.pop("lr_schedulers"),
    "lr_schedulers text": put("lr_schedulers", value="cosine"),
    "a schedule is a list": put("lr_schedulers", value=[[1]]),
    "a schedule is empty": put("lr_schedulers", value=[{}]),
    "a schedule's method": put(
        "lr_schedulers", value=[{"last_epoch": 1, "base_lrs": [0.1], "_last_lr": [0.1], "step": 5}]
    ),
    "a schedule's rates": put("lr_schedulers", value=[{"last_epoch": 1, "base_lrs": [0.1] * 3, "_last_lr": [0.1] * 3}]),
    "loops missing": lambda content: content.pop("loops"),
    "loops a list": put("loops", value=[1]),
    "fit_loop text": put("loops", "fit_loop", value="3"),
    "epoch_progress missing": lambda content: content["loops"]["fit_loop"].pop("epoch_progress"),
    "a name that is no text": put("MixedPrecision", value={7: 1.0}),
    "a name with control characters": put("MixedPrecision", value={"\n\x1b[2J": 1.0}),
    "epoch text": put(*LOOPS, "epoch_progress", "current", "completed", value="1"),
    "epoch negative": put(*LOOPS, "epoch_progress", "current", "completed", value=-1),
    "epoch huge": put(*LOOPS, "epoch_progress", "total", "ready", value=10**30),
    "batches completed missing": lambda content: content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"].pop(
        "completed"
    ),
    "batches missing": lambda content: content["loops"]["fit_loop"]["epoch_loop.batch_progress"].pop("current"),
    "steps that are not the step": put("global_step", value=7),
    "steps missing": lambda content: content["loops"]["fit_loop"].pop(
        "epoch_loop.automatic_optimization.optim_progress"
    ),
    "an epoch that is over or not": lambda content: content["loops"]["fit_loop"]["epoch_loop.batch_progress"].pop(
        "is_last_batch"
    ),
    "settings text": put("latent_verse", "run", value="x"),
    "a section of settings is a list": put("latent_verse", "run", "optim", value=[1]),
    "data text": put(*LOOPS, "state_dict", "combined_loader", value=["0"]),
    "other counts without a part": put(*LOOPS, "epoch_loop.scheduler_progress", value={"total": {}}),
    "data empty": put(*LOOPS, "state_dict", "combined_loader", value=[{}]),
    "callbacks' names": put("callbacks", 5, value={}),
    "callbacks' states": put("callbacks", BEST, value=[1]),
    "a best score of NaN": put("callbacks", BEST, value={"best_model_score": torch.tensor(torch.nan)}),
    "a best score of text": put("callbacks", BEST, value={"best_model_score": "0.1"}),
    "best_k_models": put("callbacks", BEST, value={"best_k_models": [1]}),
    "a best path": put("callbacks", BEST, value={"best_model_path": 7}),
    "process_states text": put("process_states", value="seed"),
    "process_states empty": put("process_states", value=[{}]),
    "random numbers": put("process_states", 0, "rng", "torch", value=torch.zeros(3)),
    "Python's random numbers": put("process_states", 0, "rng", "python", value=[3, [1, 2], None]),
    "NumPy's random numbers": put("process_states", 0, "rng", "numpy", value="MT19937"),
    "Lightning's version": put("pytorch-lightning_version", value="new"),
    "no version": lambda content: content.pop("pytorch-lightning_version"),
    "numbers of a module that has none": put("process_states", 0, "module", value={"epoch_loss": torch.zeros(2)}),
    "a GPU's random numbers": put("process_states", 0, "rng", "cuda", value="seed"),
    "a scale without the rest": put("MixedPrecision", value={"scale": 65536.0}),
    "a scale of text": put("MixedPrecision", value={"scale": "65536"}),
    "a weight of another shape": put("state_dict", "model.ln_f.bias", value=torch.zeros(5)),
    "a weight more": put("state_dict", "loss.weight", value=torch.zeros(5)),
    "averaged weights": put("state_dict", "ema.weight", value=torch.zeros(5)),
    "no AugVAE": put("latent_verse", "vae", value="vae"),
    "no tokenizer": lambda content: content["latent_verse"].pop("tokenizer"),
}
WRONG_VAE = {
    "plateau text": put("latent_verse", "plateau", value="min"),
    "plateau without settings": lambda content: content["latent_verse"].pop("run"),
    "plateau without a rate": lambda content: content["latent_verse"]["run"].pop("optim"),
    "plateau's rate": put("latent_verse", "run", "optim", "learning_rate", value="a"),
    "plateau's batch": put("latent_verse", "run", "data", "batch_size", value=None),
    "plateau's method": put("latent_verse", "plateau", "step", value=5),
    "plateau's optimiser": put("latent_verse", "plateau", "optimizer", value=5),
    "plateau's rates": put("latent_verse", "plateau", "min_lrs", value=[0.0] * 3),
    "plateau's best": put("latent_verse", "plateau", "best", value=float("nan")),
    "the epoch's loss": put("process_states", 0, "module", "epoch_loss", value=torch.zeros(3)),
    "codes' counts": put("process_states", 0, "module", "train_counts", value=torch.zeros(1, 1, dtype=torch.int64)),
    "averaged weights": put("state_dict", "ema.weight", value=torch.zeros(5)),
    "an average": put(*STATE, "exp_avg", value=torch.zeros(1)),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_not_restored(run, last, tmp_path, case):
    changed(last, WRONG[case])
    with pytest.raises(CheckpointError, match=naming(last)) as error:
        starting_point(Run(tmp_path / "new", "other"), str(last), "biart")
    assert len(str(error.value)) < 2000 and str(error.value).replace("\n  ", "").isprintable()
    with pytest.warns(UserWarning, match=naming(last)):  # among the run's own it is skipped
        file, step = starting_point(run, None, "biart")
        assert (file.name, step) == ("step=1.ckpt", 1)


@pytest.mark.parametrize(("value", "said"), [("1", "'1'"), (None, "None"), (-1, "-1"), ([1], "a list")])
def test_what_was_expected_is_said(last, tmp_path, value, said):
    changed(last, put(*LOOPS, "epoch_progress", "current", "completed", value=value))
    with pytest.raises(CheckpointError, match=f"completed is {said}, where a count is expected"):
        starting_point(Run(tmp_path / "new", "other"), str(last), "biart")


@pytest.mark.parametrize("case", WRONG_VAE)
def test_what_does_not_fit_an_augvae(trained_vae, tmp_path, case):
    file = changed(trained_vae, WRONG_VAE[case], to=tmp_path / "wrong.ckpt")
    with pytest.raises(CheckpointError, match=naming(file)):
        starting_point(Run(tmp_path / "new", "other"), str(file), "augvae")


OF_OTHER_VERSIONS = {
    "a schedule's verbose": put("lr_schedulers", 0, "verbose", value=False),
    "a schedule's beginning": lambda content: content["lr_schedulers"][0].pop("_is_initial"),
    "a setting of the optimiser": group_of("tensors", True),
    "the optimiser's kernel": group_of("foreach", True),
    "a count that Lightning added": put(*LOOPS, "epoch_loop.new_progress", value={"total": 3}),
    "a count that Lightning has added since": lambda content: content["loops"]["fit_loop"].pop(
        "epoch_loop.scheduler_progress"
    ),
    "a count within one that Lightning added": put(*LOOPS, "epoch_progress", "current", "newer", value=3),
    "a count within one that Lightning has added since": lambda content: content["loops"]["fit_loop"][
        "epoch_loop.automatic_optimization.optim_progress"
    ]["optimizer"]["zero_grad"]["current"].pop("started"),
    "a part of a state that Lightning added": put(*LOOPS, "epoch_loop.state_dict", "newer", value="x"),
    "fp16": put("MixedPrecision", value=torch.amp.GradScaler("cpu").state_dict()),
    "no settings": lambda content: content["latent_verse"].pop("run"),
    "no states of processes": lambda content: content.pop("process_states"),
    "no state of the module": put("process_states", 0, "module", value=None),
    "a score as a tensor": put("callbacks", BEST, value={"best_model_score": torch.tensor(0.5), "dirpath": None}),
    "two best": put("callbacks", BEST, value={"best_k_models": {"a.ckpt": torch.tensor(0.5), "b.ckpt": 0.6}}),
    "none so far": put("callbacks", BEST, value={"kth_value": torch.tensor(torch.inf), "best_model_path": ""}),
}


@pytest.mark.parametrize("case", OF_OTHER_VERSIONS)
def test_what_other_versions_saved_is_restored(run, last, case):
    changed(last, OF_OTHER_VERSIONS[case])
    assert starting_point(run, None, "biart") == (last, 2)


def test_a_checkpoint_is_unpickled_and_checked_once(last, tmp_path, monkeypatch):
    """Each takes seconds per gigabyte or thousand tensors; a file that is written again is another one."""
    done: list[str] = []
    for owner, name in ((torch, "load"), (zipfile.ZipFile, "testzip")):
        original = getattr(owner, name)
        counted = lambda *args, of=name, call=original, **more: done.append(of) or call(*args, **more)  # noqa: E731
        monkeypatch.setattr(owner, name, counted)
    file = Path(shutil.copy(last, tmp_path / "a.ckpt"))
    starting_point(Run(tmp_path / "new", "other"), str(file), "biart")
    assert changes(file, TrainBiARTConfig()) and "fingerprint" in described(file)["vae"]
    assert sorted(done) == ["load", "testzip"]
    changed(file, put("latent_verse", "vae", value="new"))
    assert described(file)["vae"] == "new"


def test_an_average_of_another_shape_ends_the_command_in_one_line(place, last, backup, capsys):
    """A fused AdamW would read and write beyond it."""
    backup.unlink()
    changed(last, put(*STATE, "exp_avg", value=torch.zeros(1)))
    assert train_biart.main(flags(place)) == 2
    said = capsys.readouterr().err
    assert naming(last, "exp_avg", (1,)).search(said) and "Traceback" not in said


def test_a_flipped_byte_in_the_newest_is_noticed_by_the_command(place, run, last, backup, capsys):
    flipped(last)
    with pytest.warns(UserWarning, match=naming(last, backup)):
        assert train_biart.main(flags(place)) == 0
    assert naming("Resuming", backup).search(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["last-copied.ckpt", "last-epoch=0-step=9.ckpt"])
def test_a_renamed_file_counts_by_the_step_that_it_stores(place, run, last, name, capsys):
    """In the logs, whose later rows are computed again, and in what is said of a run that was finished."""

    def logged() -> list[int]:
        with (run.folder / "logs" / "metrics.csv").open() as file:
            return [int(row["step"]) for row in csv.DictReader(file)]

    before = logged()
    last.rename(last.with_name(name))
    assert train_biart.main(flags(place)) == 0
    said = capsys.readouterr().out
    assert naming("finished already", "--epochs").search(said) and naming("Resuming", name).search(said)
    with (run.folder / "logs" / "metrics.csv").open("a") as file:  # as a run writes that is killed before it saves
        columns = (run.folder / "logs" / "metrics.csv").read_text().split("\n")[0].split(",")
        file.write(",".join("5" if column == "step" else "" for column in columns) + "\n")
    assert train_biart.main(flags(place, *"--epochs 2 --limit_train_batches 2 --limit_val_batches 1".split())) == 0
    assert before == [1] and logged() == [1, 3]


# ------------------------------------------------------------------------------------------------------------ BiART


def test_checkpoints_of_biart(trained_biart, tmp_path):
    run = Run(tmp_path / "new", "id")
    assert starting_point(run, str(trained_biart), "biart")[0] == trained_biart
    content = torch.load(trained_biart, weights_only=True)
    optim = content["latent_verse"]["run"]["optim"]
    same = BiARTOptimConfig(optimizer=optim["optimizer"], ema_decay=optim["ema_decay"])
    assert starting_point(run, str(trained_biart), "biart", optim=same)[0] == trained_biart
    other = "adamw" if same.optimizer == "muon" else "muon"
    with pytest.raises(CheckpointError, match=naming(trained_biart, "optimizer", "adamw", "muon", "--optimizer")):
        other_settings = BiARTOptimConfig(optimizer=other, ema_decay=optim["ema_decay"])
        starting_point(run, str(trained_biart), "biart", optim=other_settings)
    with pytest.raises(CheckpointError, match=naming(trained_biart, "ema_decay")):
        other_settings = BiARTOptimConfig(optimizer=same.optimizer, ema_decay=0 if same.ema_decay else 0.5)
        starting_point(run, str(trained_biart), "biart", optim=other_settings)
    file = changed(trained_biart, wrong_averages, to=tmp_path / "wrong.ckpt")
    with pytest.raises(CheckpointError, match=naming(file, (3,))):
        starting_point(run, str(file), "biart")


def wrong_averages(content: dict) -> None:
    for state in content["optimizer_states"][0]["state"].values():
        state.update({name: torch.zeros(3) for name in state if name != "step"})


def test_another_optimizer_of_an_augvae(trained_vae, tmp_path):
    run, file = Run(tmp_path, "id"), str(trained_vae)
    assert starting_point(run, file, "augvae", optim=VAEOptimConfig()) == (trained_vae, 1)
    with pytest.raises(CheckpointError, match=naming(file, "adamw", "muon", "--optimizer")):
        starting_point(run, file, "augvae", optim=VAEOptimConfig(optimizer="muon"))
