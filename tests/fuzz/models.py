"""What holds weights or a run's state: checkpoints, bundles, run folders and folders of codes."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import torch

from latent_verse.checkpoints.augvae import load_augvae
from latent_verse.checkpoints.biart import load_pretrained
from latent_verse.checkpoints.ckpt_files import check_resumable
from latent_verse.checkpoints.model_folders import SETTINGS_FINGERPRINT
from latent_verse.commands import generate, train_biart, train_vae
from latent_verse.data.codes import CodesDataset
from latent_verse.inference.pipeline import LVerse
from tests.fuzz.cases import Area, Bench, Case
from tests.fuzz.mutations import Mutator
from tests.fuzz.reading import loader_case
from tests.fuzz.valid import BIART, MACHINE, VAE, tar_bytes


def best(run: Path) -> Path:
    """The checkpoint of a run folder that is named best, or else its last."""
    files = sorted((run / "checkpoints").glob("*.ckpt"))
    return next((file for file in files if file.name.startswith("best-")), files[-1])


# --------------------------------------------------------------------------------------------------------- checkpoints


def make_checkpoints(bench: Bench) -> Case:
    """A checkpoint of either stage with damaged bytes or other content: loaded, started from, resumed, exported."""
    m = bench.mutate
    kind = m.pick(("augvae", "biart"))
    run = bench.valid.vae_run() if kind == "augvae" else bench.valid.biart_run()
    file = bench.given / best(run).name
    shutil.copyfile(best(run), file)
    bench.either(lambda: _damage(m, file), *[lambda: _change_content(m, file)] * 2)
    damaged = bool(m.notes) and m.notes[-1].startswith("damaged")
    vae = bench.valid.vae_run()
    longer = "--max_steps 3 --epochs 3"
    images = f"{VAE} {MACHINE} --train_dir {bench.valid.images()} --dataset flat {longer}"
    pairs = (
        f"{BIART} {MACHINE} --train_dir {bench.valid.pairs()} --val_dir {bench.valid.pairs()} --vae_path {vae} {longer}"
    )
    flags = {
        ("augvae", "start"): f"{images} --pretrained_path {file}",
        ("augvae", "resume"): f"{images} --resume --ckpt_path {file}",
        ("biart", "start"): f"{pairs} --pretrained_path {file}",
        ("biart", "resume"): f"{pairs} --resume --ckpt_path {file}",
        ("biart", "export"): f"--export bundle --ckpt_path {file} --vae_path {vae}",
    }
    use = m.pick(("load", "load", "load", "check", "start", "resume", *(["export"] if kind == "biart" else [])))
    if use == "load":
        load = load_augvae if kind == "augvae" else load_pretrained
        original = best(run) if damaged else None
        return loader_case(lambda: _try(load(file), original and load(original)), f"{load.__name__}({str(file)!r})")
    if use == "check":
        return loader_case(lambda: check_resumable(file, kind) and None, f"check_resumable({str(file)!r}, {kind!r})")
    command = train_vae if kind == "augvae" else train_biart
    return command_case(command, flags[kind, use])


def command_case(command, flags: str) -> Case:
    """A whole command."""
    argv = shlex.split(flags)
    return Case(lambda: command.main(argv), f"{command.__name__.rpartition('.')[2]}.py {flags}")


def _try(loaded, original=None) -> None:
    """Check what was loaded: its weights are finite and, if the file was only damaged, those of the original."""
    weights = getattr(loaded, "biart", loaded).state_dict()
    assert all(torch.isfinite(weight).all() for weight in weights.values()), "the weights are not finite"
    if original is not None:
        there = getattr(original, "biart", original).state_dict()
        assert all(torch.equal(weights[name], there[name]) for name in there), "other weights than before the damage"


def _replace(m: Mutator, file: Path, link: str) -> None:
    """Remove a file, and perhaps put something else in its place."""
    file.unlink()
    way = m.pick(("nothing", "folder", "empty", "link"))
    m.note("is now", way)
    if way == "folder":
        file.mkdir()
    elif way == "empty":
        file.touch()
    elif way == "link":
        file.symlink_to(link)


def _damage(m: Mutator, file: Path) -> None:
    file.write_bytes(m.bytes(file.read_bytes()))
    m.note("damaged")


def _change_content(m: Mutator, file: Path) -> None:
    """Load a checkpoint, change one or a few entries of its tree or its tensors, and save it again."""
    content = torch.load(file, map_location="cpu", weights_only=True)
    for _ in m.few():
        way = m.pick(("tensor", "tensor", "settings", "settings", "tree"))
        if way == "tensor":
            holder, key, path = m.pick(_tensors(content, ()))
            holder[key] = odd_tensor(m, holder[key])
            m.note("at", "/".join(map(str, path)))
        elif way == "settings" and isinstance(content.get("latent_verse"), dict):
            content["latent_verse"] = m.tree(content["latent_verse"])
        elif way == "tree":
            content = m.tree(content)
        if not isinstance(content, dict) or not list(_tensors(content, ())):
            break
    torch.save(content, data := io.BytesIO(), _use_new_zipfile_serialization=m.chance(0.9))
    file.write_bytes(data.getvalue())


def _tensors(tree, path: tuple):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [
        found
        for key, value in items
        for found in ([(tree, key, (*path, key))] if isinstance(value, torch.Tensor) else _tensors(value, (*path, key)))
    ]


def odd_tensor(m: Mutator, old: torch.Tensor) -> object:
    """Another tensor in the place of one: of another shape, type or layout, or with numbers that are none."""
    way = m.pick(
        ("nan", "inf", "huge", "shape", "shape", "flat", "empty", "dtype", "dtype", "sparse", "complex", "list", "none")
    )
    m.note(way, tuple(old.shape))
    new = old.clone()
    if way in ("nan", "inf", "huge"):
        if new.is_floating_point() and new.numel():
            new.view(-1)[m.rng.randrange(new.numel())] = {"nan": float("nan"), "inf": float("inf"), "huge": 3e38}[way]
        return new
    if way == "shape":
        return m.pick(
            (new[None], torch.cat([new.reshape(-1), new.reshape(-1)]), new.reshape(-1)[:-1], new.expand(1, *new.shape))
        )
    if way == "dtype":
        return new.to(m.pick((torch.float64, torch.float16, torch.int64, torch.bool, torch.uint8)))
    if way == "list":
        return new.reshape(-1)[:10].tolist()
    others = {"flat": new.reshape(-1), "empty": torch.empty(0), "none": None}
    others |= {"sparse": new.to_sparse() if new.dim() else new, "complex": new.to(torch.complex64)}
    return others[way]


# ------------------------------------------------------------------------------------------------------------- bundles


def make_bundles(bench: Bench) -> Case:
    """A bundle with one or a few changed files: loaded, generated with."""
    m = bench.mutate
    folder = bench.given / "bundle"
    shutil.copytree(bench.valid.bundle(), folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if m.chance(0.3) and not bench.unchanged:
        _change_settings(m, folder)
        return _compared(bench, folder)
    for file in m.some(files) if not bench.unchanged else ():
        m.note(file.relative_to(folder))
        if m.chance(0.1):
            _replace(m, file, "/dev/zero")
        elif file.suffix == ".json":
            file.write_bytes(bench.json(json.loads(file.read_text(encoding="utf-8"))))
        elif file.suffix == ".safetensors" and m.chance(0.6):
            file.write_bytes(odd_safetensors(m, file.read_bytes()))
        else:
            file.write_bytes(m.bytes(file.read_bytes()))
    if m.chance(0.25):
        return command_case(generate, f"--model {folder} --text 'a red circle' --gpus 0 --out out --seed 1")
    if m.chance(0.3):
        return loader_case(lambda: _try(load_augvae(folder / "vae")), f"load_augvae({str(folder / 'vae')!r})")
    return _compared(bench, folder)


# settings that could be right, and of which the weights say nothing
SILENT = {
    ("config.json", "biart", "n_head"): (1, 2, 4, 8),
    ("config.json", "info", "reference_dropout"): (0, 0.5, 1),
    ("config.json", "vae", "norm"): ("pixel", "group"),
    ("vae/config.json", "config", "norm"): ("pixel", "group"),
}


def _change_settings(m: Mutator, folder: Path) -> None:
    """Other settings in a config.json, often some of SILENT; the JSON is written in another way."""
    if m.chance(0.6):
        name, part, setting = place = m.pick(SILENT)
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        content[part][setting] = m.pick(SILENT[place])
        m.note(name, setting, "is now", content[part][setting])
    else:
        name = m.pick(("config.json", "vae/config.json"))
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        for _ in m.few():
            settings = content[m.pick(key for key in ("biart", "vae", "info", "config") if key in content)]
            setting = m.pick(sorted(settings))
            settings[setting] = _another(m, settings[setting])
            m.note(name, setting, "is now", repr(settings[setting])[:80])
    ordered = sorted(content) if m.chance(0.5) else reversed(content)
    text = json.dumps({key: content[key] for key in ordered}, indent=m.pick((None, 1, 8)))
    (folder / name).write_text(text, encoding="utf-8")


def _another(m: Mutator, old):
    """A value of the same kind, mostly one that a setting may have."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, (int, float)):
        return m.pick((1, 2 * old, old // 2, old + 1, float(old), int(old), 0))
    if isinstance(old, list):
        return m.pick((old[::-1], [2 * item for item in old], old[:1], [*old, *old[-1:]]))
    return m.pick(("pixel", "group", "ema", "truncate", "error", None, 1, f"{old} "))


def _recorded(folder: Path) -> bool:
    """Whether the files of a bundle still hold the fingerprints of their settings, which earlier versions lack."""
    try:
        return all(
            SETTINGS_FINGERPRINT in json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("config.json", "vae/config.json")
        )
    except (OSError, ValueError, RecursionError, TypeError):
        return False


def _compared(bench: Bench, folder: Path) -> Case:
    original = bench.valid.bundle() if _recorded(folder) else None
    return loader_case(lambda: _same_results(folder, original), f"LVerse.from_pretrained({str(folder)!r})")


def _same_results(folder: Path, original: Path | None) -> None:
    """Generate with a bundle, which has to give what the `original` gives: what was changed is found, or nothing."""

    def results(bundle: Path) -> tuple[str, float, float, float]:
        model = LVerse.from_pretrained(bundle, "cpu")
        [[image]] = model.text_to_image(["a red circle"], seed=1)
        [[caption]] = model.image_to_text([image])
        assert isinstance(caption, str)
        x = model.vae.decode_codes(model.codes([image]))  # numbers: images of so small a model are much alike
        return caption, model.score([image], ["a red circle"]).item(), x.sum().item(), float(model.null_trained)

    found = results(folder)
    assert original is None or found == results(original), "other results than before the change"


def odd_safetensors(m: Mutator, data: bytes) -> bytes:
    """A safetensors file with another header, or with other numbers."""
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    way = m.pick(("tree", "shape", "dtype", "offsets", "size", "nan"))
    m.note("safetensors:", way)
    name = m.pick(name for name in header if name != "__metadata__")
    entry = header[name]
    if way == "nan":
        at = m.rng.randrange(len(body) // 4) * 4
        body = body[:at] + m.pick((b"\0\0\xc0\x7f", b"\0\0\x80\xff")) + body[at + 4 :]
    elif way == "shape":
        entry["shape"] = m.pick(([10**12], [], [*entry["shape"], 1], entry["shape"][::-1], [2**63, 2], [-1], [0]))
    elif way == "dtype":
        entry["dtype"] = m.pick(("F64", "I64", "BF16", "F8_E5M2", "U8", "BOOL", "X", ""))
    elif way == "offsets":
        entry["data_offsets"] = m.pick(([0, 10**12], [0, 0], [4, 0], [-1, 3], [0, len(body)], [2**63, 2**64 - 1]))
    text = m.json(m.tree(header) if way == "tree" else header).encode("utf-8", "surrogatepass")
    declared = m.pick((0, 1, 2**63, 2**64 - 1, len(text) * 2, 10**9)) if way == "size" else len(text)
    return struct.pack("<Q", declared) + text + body


# ---------------------------------------------------------------------------------------------------------------- runs


def make_runs(bench: Bench) -> Case:
    """A run folder that was interrupted, with changed or missing files; the command is rerun, with --backup."""
    m = bench.mutate
    kind = m.pick(("augvae", "augvae", "biart"))
    run = bench.valid.vae_run() if kind == "augvae" else bench.valid.biart_run()
    folder = bench.place / "runs" / run.name
    shutil.copytree(run, folder)
    name = f"unfinished-{run.name}"  # as it was called when it was made
    folder = folder.rename(folder.with_name(name))
    for file in (*folder.glob("checkpoints/*"), *folder.glob("bundle")):  # the end of the run is not there yet
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in (
        m.some([*files, *[folder / "run.json"] * 3, *sorted(folder.glob("backups/*"))]) if not bench.unchanged else ()
    ):
        m.note(file.relative_to(folder))
        if m.chance(0.2):
            _replace(m, file, "nowhere")
        elif file.suffix == ".json":
            file.write_bytes(bench.json(json.loads(file.read_text(encoding="utf-8"))))
        elif file.suffix == ".ckpt":
            m.pick((_damage, _change_content))(m, file)
        else:
            file.write_bytes(m.bytes(file.read_bytes()))
    if not bench.unchanged and m.chance(0.2):
        odd = m.pick(
            (".step=1.ckpt.tmp", "step=99.ckpt", "step=x.ckpt", "step=-1.ckpt", f"step={10**30}.ckpt", "a.ckpt", "lock")
        )
        (folder / "backups").mkdir(exist_ok=True)
        (folder / "backups" / odd).write_bytes(b"half")
        m.note("there is", odd)
    runs = f"--log_dir runs --name {name} --backup --backup_steps 1"
    if kind == "augvae":
        return command_case(train_vae, f"{VAE} {MACHINE} --train_dir {bench.valid.images()} --dataset flat {runs}")
    pairs = f"--train_dir {bench.valid.pairs()} --val_dir {bench.valid.pairs()} --vae_path {bench.valid.vae_run()}"
    return command_case(train_biart, f"{BIART} {MACHINE} {pairs} {runs}")


# --------------------------------------------------------------------------------------------------------------- codes


def make_codes(bench: Bench) -> Case:
    """A folder of codes with changed files: opened and read whole, sometimes by a run."""
    m = bench.mutate
    folder = bench.given / "codes"
    shutil.copytree(bench.valid.codes(), folder)
    train = folder / "train"
    files = sorted(file for file in train.rglob("*") if file.is_file())
    for file in m.some([*files, train / "codes.json"]) if not bench.unchanged else ():
        m.note(file.relative_to(train))
        if m.chance(0.1):
            file.rename(file.with_name("unfinished.json"))
            m.note("renamed to unfinished.json")
        elif file.suffix == ".json":
            file.write_bytes(bench.json(json.loads(file.read_text(encoding="utf-8"))))
        elif m.chance(0.7):
            file.write_bytes(_odd_codes(m, file.read_bytes()))
        else:
            file.write_bytes(m.bytes(file.read_bytes()))
    if m.chance(0.3):
        flags = f"{BIART} {MACHINE} --dataset codes --train_dir {train} --vae_path {bench.valid.vae_run()}"
        return command_case(train_biart, flags)

    def read() -> None:
        dataset = CodesDataset(train)
        for i in range(min(len(dataset), 40)):
            codes, caption = dataset[(1, i)]
            assert 0 <= codes.min() <= codes.max() < dataset.meta["codebook_size"]
            assert caption.text.strip() and all(0 <= t < dataset.meta["text_vocab"] for t in caption.ids)

    return loader_case(read, f"CodesDataset({str(train)!r})")


def _odd_codes(m: Mutator, data: bytes) -> bytes:
    """A shard of codes with a changed member."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    name = m.pick(members)
    m.note("member", name)
    if name.endswith(".json"):
        members[name] = m.encoded(m.json(m.tree(json.loads(members[name]))))
    elif m.chance(0.5):
        members[name] = m.bytes(members[name])
    else:
        codes = np.load(io.BytesIO(members[name]))
        way = m.pick(("float", "negative", "shape", "objects", "large", "empty"))
        m.note(way)
        changed = {
            "float": codes.astype(np.float32) + 0.5,
            "negative": codes.astype(np.int64) - 5,
            "shape": codes.reshape(-1),
            "objects": np.array([{"a": 1}], dtype=object),
            "large": codes.astype(np.uint64) + m.pick((1000, 2**40)),
            "empty": codes[:, :0],
        }
        np.save(new := io.BytesIO(), changed[way])
        members[name] = new.getvalue()
    if m.chance(0.15):
        del members[m.pick(members)]
    return tar_bytes(members)


AREAS = {
    "checkpoints": Area(make_checkpoints, 110, ("vae_run", "biart_run"), codes=(1, 2)),
    "bundles": Area(make_bundles, 120, ("bundle",)),
    "runs": Area(make_runs, 40, ("vae_run", "biart_run"), codes=(1, 2), changes_given=True),
    "codes": Area(make_codes, 60, ("codes",)),
}
