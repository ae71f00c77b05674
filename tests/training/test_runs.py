"""Run folders: free names, resuming only one's own interrupted run, the newest checkpoint by its step."""

from __future__ import annotations

import copy
import json
import os
import shutil

import pytest

from latent_verse.config import ConfigError, as_plain
from latent_verse.config.train import TrainVAEConfig
from latent_verse.files import FileError, InUse
from latent_verse.training import runs
from latent_verse.training.runs import Run, hold_new_folder, hold_run, new_folder, open_run, run_folder, states, stem
from tests.messages import naming

CONFIG = as_plain(TrainVAEConfig())


def changed(section: str, leaf: str, value) -> dict:
    config = copy.deepcopy(CONFIG)
    config[section][leaf] = value
    return config


def begin(log_dir, name="a", backup_dir=None, config=CONFIG, steps=(), last=(), best=()) -> Run:
    """A run that was interrupted after it had saved at these steps."""
    run = open_run(str(log_dir), name, True, backup_dir, config)
    runs.start(run, config, "model: {}\n")
    for place, pattern, numbers in (
        (run.backups(), "step={}.ckpt", steps),
        (run.checkpoints, "last-epoch=0-step={}.ckpt", last),
        (run.checkpoints, "best-epoch=0-step={}.ckpt", best),
    ):
        place.mkdir(parents=True, exist_ok=True)
        for n in numbers:
            (place / pattern.format(n)).touch()
    return run


def resumes_from(log_dir, name="a", backup_dir=None, config=CONFIG) -> str | None:
    """The name of the file that a rerun resumes from."""
    found = states(open_run(str(log_dir), name, True, backup_dir, config))
    return found[0].name if found else None


# ---------------------------------------------------------------------------------------------------------- free names


def test_without_backup_a_taken_name_is_left_alone(tmp_path):
    for expected in ("a", "a-2", "a-3"):
        run = open_run(str(tmp_path), "a", False, None, CONFIG)
        assert (run.folder, states(run)) == (tmp_path / expected, [])
        assert not run.folder.exists()  # nothing is written yet
        run.folder.mkdir()
    assert open_run(str(tmp_path), "b", False, None, CONFIG).folder.name == "b"


def test_without_backup_an_interrupted_run_is_not_resumes_from(tmp_path):
    begin(tmp_path, steps=[5])
    run = open_run(str(tmp_path), "a", False, None, CONFIG)
    assert run.folder.name == "a-2"
    assert not states(run)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\nb", "a\0", "\x1b[1m", "lat\udce9", "\u2028"])
def test_names_that_are_no_folder_names(tmp_path, name):
    for make in (new_folder, lambda *place: open_run(*place, False, None, CONFIG), run_folder):
        with pytest.raises(ConfigError, match=naming("name", ascii(name))) as caught:
            make(str(tmp_path), name)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["-a", "a b", " ", "é字", "a" * 200])
def test_unusual_names(tmp_path, name):
    for backup in (True, False):
        with hold_run(str(tmp_path), name, backup, str(tmp_path / "backups"), CONFIG) as run:
            runs.start(run, CONFIG, "model: {}\n")
            run.backups().joinpath("step=1.ckpt").touch() if backup else None
    assert (tmp_path / name / "run.json").is_file() and (tmp_path / f"{name}-2" / "run.json").is_file()


@pytest.mark.parametrize("letter", ["a", "é"])
def test_a_name_that_is_too_long_is_one_short_line(tmp_path, letter):
    with pytest.raises(ConfigError, match=naming("name", letter * 79 + "...", 200)) as caught:
        open_run(str(tmp_path), letter * 300, True, None, CONFIG)
    assert len(str(caught.value)) < 200


def test_a_new_folder_is_the_first_free_name(tmp_path):
    assert new_folder(str(tmp_path), "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    assert new_folder(str(tmp_path), "a") == tmp_path / "a-2"
    assert run_folder(str(tmp_path), "a") == tmp_path / "a"


# ------------------------------------------------------------------------------------------------------------- holding


def hold(log_dir, name="a", backup=True, backup_dir=None):
    return hold_run(str(log_dir), name, backup, backup_dir and str(backup_dir), CONFIG)


def test_a_run_of_one_name_with_backup_has_one_process(tmp_path):
    with hold(tmp_path) as run:
        with pytest.raises(InUse, match=naming("log_dir", tmp_path / "a", os.getpid())), hold(tmp_path):
            raise AssertionError
        runs.start(run, CONFIG, "")
    with hold(tmp_path) as again:
        assert again.id == run.id


def test_runs_of_one_name_without_backup_get_folders_of_their_own(tmp_path):
    with hold(tmp_path, backup=False) as first, hold(tmp_path, backup=False) as second:
        assert [run.folder.name for run in (first, second)] == ["a", "a-2"]


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_copied_run_leaves_the_backups_of_its_original_alone(tmp_path, name):
    """It resumes from its own checkpoints, and saves its own backups, at the same time too."""
    shared = tmp_path / "shared"
    original = begin(tmp_path / "one", "a", str(shared), steps=[3], last=[2])
    shutil.copytree(original.folder, tmp_path / "two" / name)
    told = pytest.warns(UserWarning, match=naming(tmp_path / "two" / name, original.folder, shared))
    with hold(tmp_path / "one", backup_dir=shared) as first, told, hold(tmp_path / "two", name, True, shared) as second:
        assert first == original and [file.name for file in states(first)] == [
            "step=3.ckpt",
            "last-epoch=0-step=2.ckpt",
        ]
        assert second.backups() != first.backups()
        assert states(second) == [second.checkpoints / "last-epoch=0-step=2.ckpt"]
        runs.start(second, CONFIG, "")
    (second.backups() / "step=5.ckpt").touch()
    assert resumes_from(tmp_path / "two", name, str(shared)) == "step=5.ckpt"  # and says nothing more
    shutil.rmtree(original.folder)
    assert resumes_from(tmp_path / "two", name, str(shared)) == "step=5.ckpt"


def test_a_moved_run_keeps_its_backups_although_another_run_has_its_place(tmp_path):
    shared = tmp_path / "shared"
    original = begin(tmp_path / "one", "a", str(shared), steps=[3])
    original.folder.rename(tmp_path / "b")
    begin(tmp_path / "one", "a", str(shared), steps=[7])
    assert resumes_from(tmp_path, "b", str(shared)) == "step=3.ckpt"


def test_backups_of_an_earlier_version_do_not_say_whose_they_are(tmp_path):
    """Then only one of the two copies runs at a time."""
    shared = tmp_path / "shared"
    original = begin(tmp_path / "one", "a", str(shared), steps=[3])
    (original.backups() / "run.json").unlink()
    shutil.copytree(original.folder, tmp_path / "two" / "a")
    told = pytest.raises(InUse, match=naming("backup_dir", original.backups()))
    with hold(tmp_path / "one", backup_dir=shared), told, hold(tmp_path / "two", backup_dir=shared):
        raise AssertionError


def test_the_other_processes_of_a_run_hold_nothing(tmp_path, monkeypatch):
    with hold(tmp_path) as run:
        for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
            with monkeypatch.context() as patch:
                patch.setenv(name, "1")
                with hold(tmp_path) as other, hold(tmp_path, backup=False) as elsewhere:
                    assert other.folder == run.folder and elsewhere.folder.name == "a-2"
                    assert not elsewhere.folder.exists()  # it learns of the first one's once they have met
                with hold_new_folder(str(tmp_path), "new") as folder:
                    assert not folder.exists()
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.setenv(name, "0")
    with hold_new_folder(str(tmp_path), "new") as folder:
        assert folder.is_dir()


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path):
    for backup in (True, False):
        with pytest.raises(KeyError), hold(tmp_path / "runs", backup=backup, backup_dir=tmp_path / "backups"):
            raise KeyError
        assert not list(tmp_path.iterdir())
    (tmp_path / "runs" / "a").mkdir(parents=True)  # of a process that was killed there
    (tmp_path / "runs" / "a" / ".lock").touch()
    with hold(tmp_path / "runs") as run:
        assert run.folder == tmp_path / "runs" / "a" and not states(run)


def test_what_killed_processes_were_writing_is_removed_before_anything_is_written(tmp_path):
    run = begin(tmp_path, steps=[3], last=[4], best=[4])
    for folder in (run.folder, run.checkpoints, run.backups(), run.images):
        (folder / ".best-epoch=0-step=8.ckpt.abcdefgh.tmp").mkdir(parents=True)
        (folder / ".best-epoch=0-step=8.ckpt.abcdefgh.tmp" / "new").touch()
        (folder / ".step=5.ckpt.tmp").touch()  # of an earlier version
    with hold(tmp_path):
        assert not list(run.folder.rglob("*.tmp"))
    assert [path.name for path in states(run)] == ["last-epoch=0-step=4.ckpt", "step=3.ckpt"]


@pytest.mark.parametrize("setting", ["log_dir", "backup_dir"])
def test_folders_where_nothing_can_be_written(tmp_path, monkeypatch, setting):
    (tmp_path / "file").touch()
    places = {"log_dir": tmp_path / "runs", "backup_dir": tmp_path / "backups"}
    for place, reason in ((tmp_path / "file" / "below", "file is not a folder"), (tmp_path / ("a" * 300), "too long")):
        at = places | {setting: place}
        with pytest.raises(FileError, match=naming(setting, reason)), hold(at["log_dir"], "a", True, at["backup_dir"]):
            raise AssertionError
    if setting == "log_dir":
        told = pytest.raises(FileError, match=naming(setting, "too long"))
        with told, hold_new_folder(str(tmp_path / ("a" * 300)), "a"):
            raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ------------------------------------------------------------------------------------------------------------ resuming


def test_with_backup_a_new_name_is_a_new_run(tmp_path):
    run = open_run(str(tmp_path / "deep" / "er"), "a", True, None, CONFIG)
    assert run == Run(tmp_path / "deep" / "er" / "a", run.id) and run.id
    assert not (tmp_path / "deep").exists()


def test_with_backup_a_rerun_is_the_same_run(tmp_path):
    first = begin(tmp_path, steps=[5])
    again = open_run(str(tmp_path), "a", True, None, CONFIG)
    assert (again.folder, again.id) == (first.folder, first.id)
    assert states(again) == [first.folder / "backups" / "step=5.ckpt"]


def test_a_run_that_saved_nothing_starts_anew_in_its_folder(tmp_path):
    first = begin(tmp_path)
    again = open_run(str(tmp_path), "a", True, None, CONFIG)
    assert (again.id, states(again)) == (first.id, [])


def test_a_run_that_saved_nothing_may_begin_with_other_settings(tmp_path):
    first = begin(tmp_path)
    assert open_run(str(tmp_path), "a", True, None, changed("data", "batch_size", 3)).id == first.id


def test_a_path_that_an_earlier_version_recorded_with_a_tilde_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    begin(tmp_path, config=changed("data", "train_dir", "~/images"), steps=[5])
    assert resumes_from(tmp_path, config=changed("data", "train_dir", "/home/me/images")) == "step=5.ckpt"


def test_a_setting_that_is_newer_than_the_run_does_not_stop_it(tmp_path):
    begin(tmp_path, steps=[5])
    assert resumes_from(tmp_path, config=changed("model", "setting_of_a_later_version", "default")) == "step=5.ckpt"


def test_log_dir_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=naming("log_dir", tmp_path / "file")):
        open_run(str(tmp_path / "file"), "a", False, None, CONFIG)


def test_newest_by_step_not_by_name(tmp_path):
    begin(tmp_path, steps=[9, 10])
    assert resumes_from(tmp_path) == "step=10.ckpt"
    begin(tmp_path, "b", steps=[900], last=[1000, 99])
    assert resumes_from(tmp_path, "b") == "last-epoch=0-step=1000.ckpt"


def test_newest_by_step_not_by_time(tmp_path):
    run = begin(tmp_path, steps=[9, 10])
    os.utime(run.backups() / "step=10.ckpt", (1, 1))
    assert resumes_from(tmp_path) == "step=10.ckpt"


def test_best_checkpoints_and_unfinished_files_are_not_resumed_from(tmp_path):
    run = begin(tmp_path, steps=[5], best=[50])
    (run.backups() / ".step=70.ckpt.tmp").touch()
    (run.backups() / "step=80.ckpt.part").touch()
    assert resumes_from(tmp_path) == "step=5.ckpt"


@pytest.mark.parametrize(
    ("section", "leaf", "value"),
    [
        ("model", "num_tokens", 100),
        ("data", "batch_size", 3),
        ("data", "train_dir", "elsewhere"),
        ("optim", "learning_rate", 1.0),
        ("loss", "loss_type", "l1"),
        ("trainer", "seed", 1),
        ("trainer", "precision", "bf16-mixed"),
        ("trainer", "accumulate_grad_batches", 2),
    ],
)
def test_other_settings_are_refused_and_listed(tmp_path, section, leaf, value):
    begin(tmp_path, steps=[5])
    with pytest.raises(ConfigError) as error:
        open_run(str(tmp_path), "a", True, None, changed(section, leaf, value))
    message = str(error.value)
    assert naming(tmp_path / "a", leaf, CONFIG[section][leaf], value, "--name").search(message)
    other = {"num_tokens", "batch_size", "learning_rate", "loss_type", "seed"} - {leaf}
    assert not [name for name in other if naming(name).search(message)]  # only what changed is listed


@pytest.mark.parametrize(
    ("section", "leaf", "value"),
    [("trainer", "epochs", 500), ("trainer", "gpus", 0), ("data", "num_workers", 3), ("data", "prefetch_factor", 9)],
)
def test_length_and_machine_may_change(tmp_path, section, leaf, value):
    begin(tmp_path, steps=[5])
    assert resumes_from(tmp_path, config=changed(section, leaf, value)) == "step=5.ckpt"


@pytest.mark.parametrize(
    "content",
    [
        *(None, "", "{", "[]", "1", "\xff", "[" * 100_000, '{"id": "a"}', '{"id": "a", "config": []}'),
        *('{"id": "a", "config": {"trainer": 1}}', '{"id": "../b", "config": {}}', '{"id": 3, "config": {}}'),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "photo.txt").touch()
    if content is not None:
        (tmp_path / "a" / "run.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=naming(tmp_path / "a", "--name")) as caught:
        open_run(str(tmp_path), "a", True, None, CONFIG)
    assert "\n" not in str(caught.value) and "run.json" in str(caught.value) and "Error" not in str(caught.value)


def test_run_json_of_another_program_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.json").write_text('{"version": 1}')
    with pytest.raises(ConfigError, match=naming(tmp_path / "a", "--name", "lacks 'id'")):
        open_run(str(tmp_path), "a", True, None, CONFIG)


# ------------------------------------------------------------------------------------------------- shared backup folder


def test_another_runs_backups_in_a_shared_folder_are_never_picked(tmp_path):
    shared = str(tmp_path / "backups")
    fake = begin(tmp_path / "smoke tests", "a", shared, steps=[999])  # of the same name, further on
    mine = begin(tmp_path / "mine", "a", shared, steps=[3])
    begin(tmp_path / "mine", "b", shared, steps=[500])
    assert fake.backups() != mine.backups()
    assert fake.backups().parent == mine.backups().parent == tmp_path / "backups"
    assert resumes_from(tmp_path / "mine", "a", shared) == "step=3.ckpt"
    assert resumes_from(tmp_path / "new", "a", shared) is None


def test_at_the_same_step_last_is_before_a_backup_wherever_that_is(tmp_path):
    run = begin(tmp_path, "a", str(tmp_path / "z" / "backups"), steps=[4, 5], last=[5])
    assert str(run.backups()) > str(run.checkpoints)
    assert [p.name for p in states(run)] == ["last-epoch=0-step=5.ckpt", "step=5.ckpt", "step=4.ckpt"]


def test_a_deleted_and_begun_again_run_does_not_find_its_old_backups(tmp_path):
    shared = str(tmp_path / "backups")
    shutil.rmtree(begin(tmp_path, "a", shared, steps=[999]).folder)
    begin(tmp_path, "a", shared)
    assert resumes_from(tmp_path, "a", shared) is None


def test_a_run_folder_that_is_renamed_finds_its_backups_in_a_shared_folder(tmp_path):
    shared = str(tmp_path / "backups")
    begin(tmp_path, "another", shared, steps=(40,))
    begin(tmp_path, "a", shared, steps=(10, 20))
    (tmp_path / "a").rename(tmp_path / "b")
    run = open_run(str(tmp_path), "b", True, shared, CONFIG)
    assert resumes_from(tmp_path, "b", shared) == "step=20.ckpt" and "another" not in str(states(run))
    run.backups().mkdir()
    (run.backups() / "step=30.ckpt").touch()
    assert [file.name for file in states(run)] == ["step=30.ckpt"]  # its own from now on


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("results/run/checkpoints/best-epoch=1-step=2.ckpt", "run"),
        ("results/run/backups/step=2.ckpt", "run"),
        ("results/run", "run"),
        ("files/augvae.ckpt", "augvae"),
        ("some/hub-id", "hub-id"),
    ],
)
def test_stem(checkpoint, name):
    assert stem(checkpoint) == name


def test_start_writes_what_a_rerun_reads(tmp_path):
    run = Run(tmp_path / "a" / "b", "some-id")
    runs.start(run, CONFIG, "trainer: {}\n")
    assert json.loads((run.folder / "run.json").read_text()) == {"id": "some-id", "config": CONFIG}
    assert (run.folder / "config.yaml").read_text() == "trainer: {}\n"


def test_ids_differ(tmp_path):
    assert len({open_run(str(tmp_path), "a", False, None, CONFIG).id for _ in range(100)}) == 100
