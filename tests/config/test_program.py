"""What ends a program early: one line, an exit code, and no traceback but for faults of ours."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest
import torch

from latent_verse.config import program
from latent_verse.config.messages import ConfigError, UserError
from latent_verse.config.program import LOST, SAID, SIGNALS, Stopped, one_line_errors, verdict
from latent_verse.files import NotWritten
from latent_verse.training.divergence import Diverged
from tests.messages import naming

ROOT = Path(__file__).parents[2]
SCRIPTS = ["train_vae.py", "eval_vae.py", "train_biart.py", "eval_biart.py", "generate.py", "latent_verse/__main__.py"]


def failing(error: BaseException) -> int:
    def work() -> int:
        raise error

    return one_line_errors(work)()


WORKER = "DataLoader worker (pid 7) is killed by signal: "
SHM = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback: unable to allocate shared memory(shm)"


@pytest.mark.parametrize(
    ("error", "code", "facts"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/a.png"), 1, ("/x/a.png", "No space left on device")),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, ("/x", "Permission denied")),
        (OSError(errno.EMFILE, "Too many open files", "/x"), 1, ("/x", "ulimit -n", "--num_workers")),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), 1, ("ulimit -u",)),
        (OSError("no name and no number"), 1, ("OSError", "no name and no number")),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), 1, ("TMPDIR",)),
        (MemoryError(), 1, ("memory", "--batch_size")),
        (ImportError("libtorch_cuda.so: failed to map segment from shared object"), 1, ("memory",)),
        (ImportError("libtorch.so: cannot allocate memory in static TLS block"), 1, ("memory",)),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, ("memory", "--batch_size")),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, ("memory", "--batch_size")),
        (RuntimeError(WORKER + "Killed. "), 1, ("memory", "--num_workers")),
        (RuntimeError(WORKER + "Segmentation fault. "), 1, ("Segmentation fault", "--num_workers")),
        (RuntimeError(WORKER + "Bus error. It is possible that"), 1, ("/dev/shm", "--num_workers 0")),
        (RuntimeError(SHM), 1, ("/dev/shm", "--num_workers 0")),
        (RuntimeError("received 0 items of ancdata"), 1, ("ulimit -n",)),
        (RuntimeError("can't start new thread"), 1, ("ulimit -u",)),
        (RuntimeError("operator torchvision::nms does not exist"), 1, ("torchvision", "README.md")),
        (RuntimeError("DataLoader timed out after 1800 seconds"), 1, (1800,)),
        (UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"), 1, ("ascii", "UTF-8")),
        (RecursionError("maximum recursion depth exceeded"), 1, ("nested",)),
        (ModuleNotFoundError("No module named 'somewhere'", name="somewhere"), 1, ("pip install somewhere",)),
        (ModuleNotFoundError("Neither a nor b is there. Use pip install a"), 1, ("pip install a",)),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ("output",)),
        (KeyboardInterrupt(), 130, ("SIGINT",)),
        (Stopped(signal.SIGTERM), 143, ("SIGTERM",)),
        (Stopped(signal.SIGHUP), 129, ("SIGHUP",)),
    ],
)
def test_faults_of_the_machine_are_one_line(error, code, facts, capsys):
    assert failing(error) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert naming(*facts).search(said)


def test_a_message_is_one_line_whatever_a_name_in_it_holds(capsys):
    assert failing(UserError("file two\nlines\x1b[2J\udce9.png:\n  1 then, 2 now\n  3 then, 4 now")) == 2
    said = capsys.readouterr().err
    assert said == "error: file two\\nlines\\x1b[2J\\udce9.png:\n  1 then, 2 now\n  3 then, 4 now\n"
    assert failing(UserError("a" + "x" * 100_000 + "z")) == 2
    said = capsys.readouterr().err
    assert len(said) < 2100 and said.startswith("error: ax") and said.endswith("xz\n")


def test_a_warning_is_one_line():
    done = script(MAIN.format("import warnings; warnings.warn('look at x.ckpt')"))
    assert (done.returncode, done.stderr) == (0, "warning: look at x.ckpt\n")


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'latent_verse.nothing'", name="latent_verse.nothing"),
        ModuleNotFoundError("No module named 'torch.nothing'", name="torch.nothing"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        TypeError("ours"),
        AssertionError(),
    ],
)
def test_faults_of_ours_keep_their_traceback(error, capsys):
    with pytest.raises(type(error)):
        failing(error)
    assert naming("report").search(capsys.readouterr().err)


def test_of_several_processes_one_speaks(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(program.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5000")
    assert failing(OSError(errno.ENOSPC, "full", "/x")) == 1 and waited  # the first one may say the same
    assert failing(Stopped(signal.SIGTERM)) == 143
    capsys.readouterr()
    waited.clear()
    monkeypatch.setenv("RANK", "0")
    assert failing(lost) == 1 and waited and naming("another process").search(capsys.readouterr().err)
    waited.clear()
    monkeypatch.setattr(program, "_is_watched", lambda: True)  # by a process that knows more
    monkeypatch.setattr(program, "die_with", lambda parent: None)
    assert failing(lost) == LOST and not waited and not capsys.readouterr().err


@pytest.mark.parametrize("error", [ConfigError("look at the settings"), TypeError("ours")], ids=["mistake", "ours"])
def test_of_watched_processes_that_fail_at_the_same_moment_one_speaks(error, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(program, "GRACE", 0)
    monkeypatch.setenv(SAID, str(tmp_path / "said"))
    monkeypatch.setenv("RANK", "1")
    with contextlib.suppress(TypeError):  # Python prints the traceback
        failing(error)
    assert naming("report" if isinstance(error, TypeError) else "settings").search(capsys.readouterr().err)
    monkeypatch.setenv("RANK", "0")
    assert failing(error) == (1 if isinstance(error, TypeError) else 2) and not capsys.readouterr().err
    monkeypatch.setenv(SAID, str(tmp_path / "absent/said"))
    with contextlib.suppress(TypeError):
        failing(error)
    assert capsys.readouterr().err  # rather twice than not at all


@pytest.mark.parametrize(
    ("codes", "code", "facts"),
    [
        ((LOST, -9, None), 1, ("process 1 of 3", "SIGKILL", "memory")),
        ((LOST, -11), 1, ("process 1 of 2", "SIGSEGV")),
        ((LOST, 2), 2, ()),
        ((LOST, LOST), 1, ("another process",)),
        ((None, 143), 143, ()),
    ],
)
def test_what_started_the_processes_says_what_they_cannot(codes, code, facts, capsys):
    assert verdict(codes) == code
    said = capsys.readouterr().err
    assert naming(*facts).search(said) if facts else not said


def script(code: str, *, shell: str = "exec {}", **more) -> subprocess.CompletedProcess:
    code = "import os, signal, sys, time\nfrom latent_verse.config.program import *\n" + textwrap.dedent(code)
    command = shell.format(f'{sys.executable} -c "$CODE"')
    env = {**os.environ, "CODE": code, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.run(["bash", "-c", command], text=True, timeout=60, env=env, **pipes)


MAIN = """
@one_line_errors
def main():
    {}
    return 0
sys.exit(main())
"""


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_a_signal_ends_a_program(number):
    done = script(MAIN.format(f"os.kill(os.getpid(), {number:d}); time.sleep(50)"))
    assert done.returncode == 128 + number and done.stderr.count("\n") == 1
    assert naming(number.name).search(done.stderr)


def test_signals_that_come_again_while_a_program_saves():
    """SIGTERM may come twice, from a launcher and its group; a second Ctrl-C means at once."""
    again = """
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(50)
    finally:
        os.kill(os.getpid(), signal.{})
        print("saved", flush=True)"""
    done = script(MAIN.format(again.format("SIGTERM")))
    assert (done.returncode, done.stdout) == (130, "saved\n") and "Traceback" not in done.stderr
    done = script(MAIN.format(again.format("SIGINT")))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("times", [1, 2])
def test_a_second_ctrl_c_ends_a_program_that_waits_in_c_code(times):
    """As a process does that waits for another one, which hangs: Python's handlers do not run meanwhile."""
    waits = """
    program.GRACE = 0.5
    if not os.fork():  # a forked process's signals do not count
        os.kill(os.getpid(), signal.SIGINT); time.sleep(50)
    for i in range({}):
        threading.Timer(0.5 + 0.3 * i, os.kill, (os.getpid(), signal.SIGINT)).start()
    while True:
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", {})"""
    heading = "import hashlib, threading\nfrom latent_verse.config import program\n"
    done = script(heading + MAIN.format(waits.format(times, 10**9 if times == 2 else 10**6)))
    assert done.returncode == 130 and done.stderr.count("\n") == 1, done.stderr
    assert naming("SIGINT").search(done.stderr) and ("does not answer" in done.stderr) == (times == 2)


SWALLOWED = {
    "finalizer": """
    class Held:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000): pass
    del_me = Held()
    del del_me
    time.sleep(50)""",
    "import": """
    with nothing_begun():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(50)
        except BaseException:
            pass
    time.sleep(50)""",
}


@pytest.mark.parametrize("how", SWALLOWED)
def test_a_signal_is_not_lost_where_exceptions_are_swallowed(how):
    done = script(MAIN.format(SWALLOWED[how]))
    assert done.returncode == 143 and done.stderr.count("\n") == 1, done.stderr
    assert naming("SIGTERM").search(done.stderr)


@pytest.mark.parametrize("ends", ["os.kill(os.getpid(), signal.SIGINT); time.sleep(50)", "raise MemoryError"])
def test_a_signal_while_the_interpreter_ends_prints_nothing(ends):
    at_exit = "import atexit; atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(50)))\n"
    done = script(at_exit + MAIN.format(ends))
    assert done.returncode == 130 and done.stderr.count("\n") == 1, done.stderr


def test_what_a_failed_program_leaves_half_made_prints_nothing():
    half = """class Half:
        def __del__(self): self.never_made
    kept = Half()
    raise MemoryError"""
    done = script(MAIN.format(half))
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    done = script(MAIN.format(half.replace("raise MemoryError", "del kept")))
    assert done.returncode == 0 and "never_made" in done.stderr  # a program that works on does say it


def test_who_calls_a_program_in_its_own_process_gets_its_handlers_back():
    before = {number: signal.getsignal(number) for number in SIGNALS}, sys.unraisablehook
    assert failing(UserError("x")) == 2 and failing(Stopped(signal.SIGINT)) == 130
    assert before == ({number: signal.getsignal(number) for number in SIGNALS}, sys.unraisablehook)


def test_what_signals_were_written_to_before_gets_them_again():
    """asyncio's loop, for example, or another program's pipe around this one."""
    done = script("""
    import socket
    before = socket.socketpair()[0]
    before.setblocking(False)
    signal.set_wakeup_fd(before.fileno())
    inner = []
    @one_line_errors
    def main():
        inner.append(signal.set_wakeup_fd(-1))
        signal.set_wakeup_fd(inner[0])
        return 0
    main()
    print(signal.set_wakeup_fd(-1) == before.fileno(), inner[0] != before.fileno())
    """)
    assert done.stdout == "True True\n", done.stderr


def test_an_ignored_signal_stays_ignored():
    assert script(MAIN.format("os.kill(os.getpid(), signal.SIGHUP)"), shell="trap '' HUP; exec {}").returncode == 0


def test_a_forked_process_takes_no_part_in_it():
    done = script(
        MAIN.format("""
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGTERM); time.sleep(50)
    print(os.waitpid(child, 0)[1])""")
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{signal.SIGTERM:d}\n", "")


@pytest.mark.parametrize("much", [1, 100_000])
def test_output_that_cannot_be_written(much):
    printing = MAIN.format(f"print('x' * {much})")
    full = script(printing, shell="{} > /dev/full")
    assert full.returncode == 1 and full.stderr.count("\n") == 1 and full.stderr.startswith("error: ")
    assert naming("printed").search(full.stderr)
    closed = "read, write = os.pipe(); os.close(read); os.dup2(write, 1); "
    closed = script(MAIN.format(f"{closed}print('x' * {much})"))
    assert closed.returncode == 141 and closed.stderr.count("\n") == 1
    none = script(printing + "\n", shell="{} >&- 2>&-")
    assert none.returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_warnings_that_cannot_be_written(unbuffered):
    """Python would leave with 120, as it tries once more at the very end."""
    shell = f"export PYTHONUNBUFFERED={unbuffered}; {{}} 2> /dev/full"
    lost = "try: sys.stderr.write('x\\n')\n    except OSError: pass"  # as warnings and logs do
    assert script(MAIN.format(lost), shell=shell).returncode == 0
    closed = "read, write = os.pipe(); os.close(read); os.dup2(write, 1); os.dup2(write, 2)\n    "
    assert script(MAIN.format(closed + lost), shell=shell).returncode == 0
    assert script(MAIN.format(f"{closed}{lost}\n    print('x')"), shell=shell).returncode == 141
    failed = MAIN.format("from latent_verse.config.messages import UserError; raise UserError('x')")
    assert script(failed, shell=shell).returncode == 2


@pytest.mark.parametrize(
    "command", [*(f"{name} --help" for name in SCRIPTS[:5]), "-m latent_verse --help", "-m latent_verse demo"]
)
def test_what_a_program_says_of_itself_cannot_be_written(command):
    for where, code in ((">", 1), ("2>", 0)):
        shell = f"cd {ROOT} && exec {sys.executable} {command} {where} /dev/full"
        done = subprocess.run(["bash", "-c", shell], text=True, timeout=60, capture_output=True)
        assert done.returncode == (2 if "demo" in command else code), done.stderr
        assert done.stderr.count("\n") == (where == ">"), done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_the_output_is_told_from_others(unbuffered):
    """Starting a process flushes stdout, or the print itself fails: long before the program's end."""
    printing = MAIN.format("print('x'); sys.stdout.flush()")
    full = script(printing, shell=f"PYTHONUNBUFFERED={unbuffered} {{}} > /dev/full")
    assert full.returncode == 1 and naming("printed").search(full.stderr) and full.stderr.count("\n") == 1
    other = script(MAIN.format("os.write(os.open('/dev/full', os.O_WRONLY), b'x')"))
    assert other.returncode == 1 and "printed" not in other.stderr
    none = script(MAIN.format("raise OSError('no name and no number')"))
    assert (none.returncode, none.stdout) == (1, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_while_a_program_is_imported_prints_no_traceback(name):
    interrupted = f"""
    import runpy
    class CtrlC:
        def find_spec(self, name, path, target=None):
            if name == "latent_verse.config.cli":
                os.kill(os.getpid(), signal.SIGINT)
    for loaded in [loaded for loaded in sys.modules if loaded.startswith("latent_verse")]:
        del sys.modules[loaded]
    sys.meta_path.insert(0, CtrlC())
    sys.argv = [{str(ROOT / name)!r}, *({{"__main__.py": ["train-vae"]}}).get({Path(name).name!r}, [])]
    runpy.run_path(sys.argv[0], run_name="__main__")
    """
    done = script(interrupted, shell="{}; exit $?")
    assert (done.returncode, done.stderr.count("Traceback")) == (130, 0), done.stderr


def test_the_package_itself_imports_nothing_in_which_ctrl_c_would_print_a_traceback():
    code = "import sys; before = {*sys.modules}; import latent_verse; print(sorted({*sys.modules} - before))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, text=True, timeout=60, capture_output=True)
    assert done.stdout == "['__future__', 'latent_verse']\n", done.stderr


def test_ctrl_c_is_left_to_other_programs_that_import_one():
    left = script("import latent_verse.commands; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)")
    assert left.stdout == "True\n"


NUMBERS = ["RANK", "NODE_RANK", "SLURM_PROCID", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["abc", "1.5", "-1"])
def test_a_number_of_a_launcher_that_is_none_is_named(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(program, "GRACE", 0)
    assert one_line_errors(lambda: 0)() == 2
    assert naming(name, repr(value), "whole number from 0").search(capsys.readouterr().err)


@pytest.mark.parametrize("name", NUMBERS)
def test_an_empty_number_of_a_launcher_is_as_if_unset(name, monkeypatch):
    monkeypatch.setenv(name, "")
    assert one_line_errors(lambda: int(name in os.environ))() == 0


def test_a_port_that_kubernetes_sets_is_no_launcher_s(monkeypatch):
    monkeypatch.setattr(program, "GRACE", 0)
    for name, code in ((None, 0), ("NODE_RANK", 2)):
        monkeypatch.setenv("MASTER_PORT", "tcp://10.0.0.1:80")
        if name:
            monkeypatch.setenv(name, "0")
        assert one_line_errors(lambda: int("MASTER_PORT" in os.environ))() == code


def test_a_failure_of_weights_and_biases_is_one_line(monkeypatch, capsys):
    errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(errors=errors))
    assert failing(errors.Error("no network\nmore")) == 1
    assert naming("no network", "WANDB_MODE=offline").search(capsys.readouterr().err)


def test_a_terminal_without_utf_8_takes_every_text():
    done = script(MAIN.format(r"print('\u00e9')"), shell="export PYTHONIOENCODING=ascii; exec {}")
    assert (done.returncode, done.stdout) == (0, "\\xe9\n")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux kills the process")
def test_a_process_ends_with_its_parent(tmp_path):
    code = f"""
    import subprocess
    child = "import os, time; from latent_verse.config.program import die_with; die_with({{}});"
    child += "open({str(tmp_path / "ready")!r}, 'w').write(str(os.getpid())); time.sleep(50)"
    command = [sys.executable, "-c", child.format(os.getpid())]
    subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not os.path.exists({str(tmp_path / "ready")!r}) or not os.path.getsize({str(tmp_path / "ready")!r}):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    assert script(code).returncode == -signal.SIGKILL
    pid, end = int((tmp_path / "ready").read_text()), time.monotonic() + 30
    while (stat := Path(f"/proc/{pid}/stat")).exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < end, "it runs on"
        time.sleep(0.05)


EXIT_CODES = {  # what the guide's table says of each code, shown by a program
    0: ("pass", "exec {}"),
    2: ("from latent_verse.config.messages import UserError; raise UserError('a mistake')", "exec {}"),
    1: ("raise MemoryError", "exec {}"),
    130: ("os.kill(os.getpid(), signal.SIGINT); time.sleep(50)", "exec {}"),
    143: ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(50)", "exec {}"),
    129: ("os.kill(os.getpid(), signal.SIGHUP); time.sleep(50)", "exec {}"),
    141: ("r, w = os.pipe(); os.close(r); os.dup2(w, 1); print('x')", "exec {}"),
}


def test_the_exit_codes_are_those_that_the_guide_promises():
    guide = (ROOT / "docs" / "guide.md").read_text()
    table = guide.split("| exit code | meaning |\n|---|---|\n")[1].split("\n\n")[0]
    promised = [int(code) for row in table.splitlines() for code in row.split("|")[1].split(",")]
    assert sorted(promised) == sorted(EXIT_CODES)
    for code, (work, shell) in EXIT_CODES.items():
        done = script(MAIN.format(work), shell=shell)
        assert done.returncode == code and done.stderr.count("\n") == bool(code), (code, done.stderr)
    bug = script(MAIN.format("raise TypeError('ours')"))
    assert bug.returncode == 1 and "Traceback" in bug.stderr and "report" in bug.stderr
    assert UserError.exit_code == 2 and Diverged.exit_code == NotWritten.exit_code == 1
