"""How the programs end when they are stopped, when their output is closed, and when loader processes are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latent_verse.config.program import SIGNALS
from tests.image_runs import SMALL, write_pictures
from tests.messages import naming
from tests.stand_ins import write_pairs
from tests.tiny_lverse import make_lverse

REPO = Path(__file__).parents[2]
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def start(script: str, *flags: object, **more) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(REPO / script), *map(str, flags)],
        cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}, start_new_session=True,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more,
    )  # fmt: skip


def wait_for(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def loads_torch(process: subprocess.Popen) -> bool:
    """Whether a program has come so far that it imports PyTorch, which takes seconds."""
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


def loaders(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def training(tmp_path: Path, *more: object) -> list[object]:
    flags = [
        *SMALL,
        "--train_dir",
        write_pictures(tmp_path / "train", 8),
        "--val_dir",
        write_pictures(tmp_path / "v", 8),
    ]
    return [*flags, "--log_dir", tmp_path / "runs", "--name", "run", "--epochs", 10_000, "--num_workers", 2, *more]


@linux
@pytest.mark.parametrize(
    ("script", "number"),
    [
        ("train_vae.py", signal.SIGINT),
        pytest.param("generate.py", signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param("train_biart.py", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("eval_vae.py", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("eval_biart.py", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_before_the_work_begins(tmp_path, tiny_augvae, script, number):
    bundle = tmp_path / "bundle"
    make_lverse(tiny_augvae(single_level=4), text_len=48).save_pretrained(bundle)
    flags = {
        "train_vae.py": ["--fake_data"],
        "train_biart.py": ["--fake_data"],
        "eval_vae.py": ["--fake_data", "--ckpt_path", bundle],
        "eval_biart.py": ["--model", bundle, "--test_dir", write_pairs(tmp_path / "pairs", 2)],
        "generate.py": ["--model", bundle, "--text", "a red circle", "--out", tmp_path / "out"],
    }[script]
    process = start(script, *flags, *(["--log_dir", tmp_path / "runs"] if script != "generate.py" else []))
    wait_for(lambda: loads_torch(process), process)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert naming(number.name).search(said) and said.count("\n") == 1, said


@linux
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, None], ids=["KILL", "SEGV", "frozen, Ctrl-C"])
def test_a_run_ends_when_a_loader_process_does(tmp_path, number):
    process = start("train_vae.py", *training(tmp_path))
    wait_for(lambda: list((tmp_path / "runs" / "run").glob("logs*/metrics.csv")), process)
    workers = loaders(process.pid)
    os.kill(workers[0], signal.SIGSTOP if number is None else number)
    before = ""
    if number is None:
        process.send_signal(signal.SIGINT)
        while "(SIGINT): saving" not in before:  # that it has arrived; two that wait would be one
            before += (line := process.stderr.readline())
            assert line, before
        process.send_signal(signal.SIGINT)
    said = before + process.communicate(timeout=60)[1]
    assert process.returncode == (130 if number is None else 1), said
    assert said.count("error: ") == 1 and "Traceback" not in said, said
    assert naming("SIGINT" if number is None else "--num_workers").search(said)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def at_work(tmp_path: Path, tiny_augvae, script: str) -> tuple[list[object], Path, str]:
    """Flags of a program that works for minutes, its folder, and a pattern of what it writes there on the way."""
    bundle, out = tmp_path / "bundle", tmp_path / "runs" / "run"
    make_lverse(tiny_augvae(single_level=4), text_len=48).save_pretrained(bundle)
    here = ["--log_dir", tmp_path / "runs", "--name", "run", "--gpus", 0]
    if script == "eval_vae.py":
        images = ["--test_dir", write_pictures(tmp_path / "test", 5000), "--save_images", 5000]
        return ["--ckpt_path", bundle / "vae", *images, "--batch_size", 1, "--num_workers", 2, *here], out, "*/*.png"
    if script == "eval_biart.py":
        data = ["--test_dir", write_pairs(tmp_path / "pairs", 2000, 1), "--no-java"]
        return ["--model", bundle, *data, "--tasks", "likelihood", "captions", "--beams", 16, *here], out, ".lock"
    if script == "train_biart.py":
        data = ["--train_dir", write_pairs(tmp_path / "pairs", 3000, 1), "--shard_size", 10]
        encode = ["--extract_codes", out, "--batch_size", 1, "--bpe_vocab_size", 300]
        return ["--vae_path", bundle / "vae", *data, *encode, "--gpus", 0], out, "train/*.tar"
    return ["--model", bundle, "--text", "a red circle", "--num", 5000, "--out", out, "--gpus", 0], out, ""


def computed(pid: int) -> float:
    """Seconds of a core that a process has used."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])) / TICKS


@linux
@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
@pytest.mark.parametrize("script", ["generate.py", "eval_vae.py", "eval_biart.py", "train_biart.py"])
def test_a_signal_in_the_midst_of_the_work(tmp_path, tiny_augvae, script, number):
    flags, out, written = at_work(tmp_path, tiny_augvae, script)
    process = start(script, *flags)
    wait_for(lambda: list(out.glob(written or "../run")), process)
    since = computed(process.pid)
    wait_for(lambda: computed(process.pid) > since + 1, process)
    workers = loaders(process.pid)
    assert bool(workers) == (script == "eval_vae.py")  # the others have none
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert naming(number.name).search(errors) and errors.count("error: ") == 1 and "Traceback" not in errors, errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert not (out / ".lock").exists() and not list(out.rglob("*.tmp"))
    if script == "generate.py":
        assert not out.exists()  # an empty folder is removed
    if script == "eval_biart.py" and "captions ..." in said:
        assert json.loads((out / "metrics.json").read_text())["tasks"] == ["likelihood"]


@linux
@pytest.mark.slow
def test_a_signal_in_the_midst_of_an_evaluation_by_two_processes(tmp_path, tiny_augvae):
    flags, out, _ = at_work(tmp_path, tiny_augvae, "eval_biart.py")
    process = start("eval_biart.py", *flags, "--accelerator", "cpu", "--gpus", 2)
    wait_for(lambda: (out / ".lock").exists(), process)
    started = loaders(process.pid)
    ranks = [pid for pid in started if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    since = {pid: computed(pid) for pid in ranks}
    wait_for(lambda: all(computed(pid) > since[pid] + 1 for pid in ranks), process)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and errors.count("error: ") == 1 and "Traceback" not in errors, errors
    assert len(ranks) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert not (out / ".lock").exists() and (out / "metrics.json").exists() == ("captions ..." in said)


IMPATIENT = """
import importlib, sys
from latent_verse.data import loader_processes
loader_processes.PATIENCE = 15
sys.exit(importlib.import_module(f"latent_verse.commands.{sys.argv.pop(1)}").main())
"""


@linux
@pytest.mark.slow
@pytest.mark.parametrize("program", ["train_vae", "eval_vae"])
def test_loader_processes_that_give_nothing_are_waited_for_only_so_long(tmp_path, tiny_augvae, program):
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    flags = training(tmp_path) if program == "train_vae" else at_work(tmp_path, tiny_augvae, "eval_vae.py")[0]
    process = start(str(tmp_path / "impatient.py"), program, *flags)
    wait_for(lambda: list((tmp_path / "runs" / "run").rglob("*.csv" if program == "train_vae" else "*.png")), process)
    workers = loaders(process.pid)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and said.count("error: ") == 1 and "Traceback" not in said, said
    assert naming("15 seconds").search(said)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@linux
@pytest.mark.slow
def test_loader_processes_end_with_a_run_that_is_killed(tmp_path):
    process = start("train_vae.py", *training(tmp_path))
    wait_for(lambda: list((tmp_path / "runs" / "run").glob("logs*/metrics.csv")), process)
    workers = loaders(process.pid)
    process.kill()
    process.communicate(timeout=60)
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_output_to_a_file_has_no_bars_and_no_control_characters(tmp_path):
    flags = training(tmp_path, "--refresh_rate", 1)
    flags[flags.index("--epochs", len(SMALL)) + 1] = 2
    process = start("train_vae.py", *flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert not any(c < " " and c != "\n" for c in out + err)
    assert len((out + err).splitlines()) < 15, out + err


def limited(command: list[object], limit: str, folder: Path) -> list[str]:
    """A command that runs where /dev/shm or the folder for temporary files is full, or few files may be open."""
    if limit == "files":
        return ["bash", "-c", 'ulimit -n 24; exec "$@"', "bash", *map(str, command)]
    place = folder if limit == "tmp" else Path("/dev/shm")
    full = f"mount -t tmpfs -o size=4k none {place} && head -c 4k /dev/zero > {place}/x || exit 99"
    return ["unshare", "-rm", "bash", "-c", f'{full}; export TMPDIR={folder}; exec "$@"', "bash", *map(str, command)]


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "limit", "code", "facts"),
    [
        ("generate.py", "shm", 0, ()),
        ("generate.py", "tmp", 0, ()),
        ("generate.py", "files", 0, ()),
        ("eval_vae.py", "shm", 1, ("/dev/shm", "--shm-size")),
        ("eval_vae.py", "tmp", 0, ()),
        ("eval_vae.py", "files", 1, ("ulimit -n",)),
        ("eval_biart.py", "shm", 1, ("/dev/shm", "--shm-size")),
        ("eval_biart.py", "tmp", 0, ()),
        ("eval_biart.py", "files", 0, ()),
    ],
)
def test_a_machine_that_has_run_out_of_something(tmp_path, tiny_augvae, script, limit, code, facts):
    (tmp_path / "temporary").mkdir()
    if limit != "files" and subprocess.run(limited(["true"], limit, tmp_path / "temporary")).returncode:
        pytest.skip("no file systems may be mounted here")
    bundle, here = tmp_path / "bundle", ["--log_dir", tmp_path / "runs", "--gpus", 0]
    make_lverse(tiny_augvae(single_level=4), text_len=48).save_pretrained(bundle)
    flags = {
        "generate.py": ["--model", bundle, "--text", "a red circle", "--out", tmp_path / "out", "--gpus", 0],
        "eval_vae.py": ["--ckpt_path", bundle / "vae", "--test_dir", write_pictures(tmp_path / "test", 40), *here],
        "eval_biart.py": ["--model", bundle, "--test_dir", write_pairs(tmp_path / "pairs", 4), *here],
    }[script]
    flags += {"eval_vae.py": ["--num_workers", 2, "--batch_size", 4], "eval_biart.py": ["--tasks", "likelihood"]}.get(
        script, []
    )
    command = limited([sys.executable, REPO / script, *flags], limit, tmp_path / "temporary")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == bool(facts), done.stderr
    assert naming(*facts).search(done.stderr)
