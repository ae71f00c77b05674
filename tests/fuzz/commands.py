"""Whole commands: on the outputs of others, and with odd settings that stay small."""

from __future__ import annotations

import json
import shlex
import shutil

from latent_verse.commands import eval_biart, eval_vae, generate, train_biart, train_vae
from latent_verse.config.cli import leaves
from latent_verse.config.evaluate import EvalBiARTConfig
from latent_verse.config.generate import GenerateConfig
from latent_verse.config.train import EvalVAEConfig, TrainBiARTConfig, TrainVAEConfig
from latent_verse.metrics import networks
from tests.fuzz.cases import Area, Bench, Case
from tests.fuzz.models import command_case
from tests.fuzz.mutations import NUMBERS, TEXTS
from tests.fuzz.valid import BIART, CAPTIONS, MACHINE, VAE, image_bytes
from tests.stand_ins import Colours, Words

EVAL = "--gpus 0 --no-java --log_dir runs --name tried"


def evaluation_case(flags: str) -> Case:
    """eval_biart.py with small networks in the places of Inception and CLIP."""
    case = command_case(eval_biart, f"{EVAL} {flags}")

    def run() -> int:
        networks.open_inception = Colours
        networks.open_clip_network = lambda *arguments: Words()
        return case.run()

    return Case(run, case.replayed)


def make_outputs(bench: Bench) -> Case:
    """Generated images, captions, texts, class names or finished evaluations, changed; and what reads them."""
    m = bench.mutate
    kind = m.pick(("images", "own images", "captions", "coco captions", "compare", "text_file", "classes"))
    folder = bench.given / "outputs"
    shutil.copytree(bench.valid.outputs(), folder)
    pairs, m_bundle = bench.valid.pairs(), f"--model {bench.valid.bundle()}"
    m.note(kind)

    def changed(name: str) -> None:
        file = folder / name
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if bench.unchanged or m.chance(0.3):
            file.write_bytes(bench.text(file.read_text(encoding="utf-8")))
            return
        rows = m.tree(rows)
        file.write_bytes(m.encoded("".join(m.json(row) + "\n" for row in (rows if isinstance(rows, list) else [rows]))))

    if kind == "images":
        changed("images/pictures.jsonl")
        return evaluation_case(f"--generated_dir {folder / 'images'} --test_dir {pairs} --eval_captions 4")
    if kind == "own images":  # of another system: numbered, with captions beside them
        place = folder / "own"
        place.mkdir()
        for i in range(4):
            (place / f"{i}.png").write_bytes(image_bytes(".png", seed=i))
            (place / f"{i}.txt").write_text(CAPTIONS[i], encoding="utf-8")
        for _ in m.few() if not bench.unchanged else ():
            name = m.pick(
                ("._0.png", "x.png", "0.txt", "9.txt", "00.png", "a.jsonl", "pictures.jsonl", ".DS_Store", "2.png")
            )
            m.note(name)
            (place / name).unlink(missing_ok=True)
            way = m.pick(("text", "folder", "nothing", "image"))
            m.note(way)
            if way == "folder":
                (place / name).mkdir()
            elif way != "nothing":
                (place / name).write_bytes(
                    m.bytes(image_bytes(".png")) if way == "image" else m.encoded(m.text("größe"))
                )
        return evaluation_case(f"--generated_dir {place} --test_dir {pairs} --reference drawn --eval_captions 4")
    if kind == "captions":
        changed("captions/captions.jsonl")
        return evaluation_case(f"--captions_file {folder / 'captions' / 'captions.jsonl'} --test_dir {pairs}")
    if kind == "coco captions":
        file = folder / "results.json"
        file.write_bytes(bench.json([{"image_id": i + 10, "caption": text} for i, text in enumerate(CAPTIONS)]))
        coco = f"--dataset coco --test_dir {pairs} --test_captions {pairs / 'coco.json'}"
        return evaluation_case(f"--captions_file {file} {coco}")
    if kind == "compare":
        file = folder / "eval1" / "metrics.json"
        file.write_bytes(bench.json(json.loads(file.read_text(encoding="utf-8"))))
        return command_case(eval_biart, f"--compare {folder / 'eval1'} {folder / 'eval2'}")
    if kind == "text_file":
        file = folder / "texts.txt"
        file.write_bytes(bench.text("\n".join(CAPTIONS) + "\n"))
        return command_case(generate, f"{m_bundle} --text_file {file} --gpus 0 --seed 1 --out out")
    file = folder / "names.txt"
    file.write_bytes(bench.text("class0\tred\nclass1\ta blue thing\n"))
    classes = f"--classes_dir {bench.valid.images()} --class_names {file} --class_pictures 4"
    return evaluation_case(f"{m_bundle} --test_dir {pairs} --tasks zero_shot {classes}")


def make_commands(bench: Bench) -> Case:
    """A whole small run with one or a few odd settings of a modest size."""
    m, v = bench.mutate, bench.valid
    pairs, images = f"--train_dir {v.pairs()} --val_dir {v.pairs()}", f"--train_dir {v.images()} --dataset flat"
    runs = "--log_dir runs --name tried"
    commands = {
        train_vae: (TrainVAEConfig, f"{VAE} {MACHINE} {runs} {images}"),
        eval_vae: (EvalVAEConfig, f"--ckpt_path {v.vae_run()} --test_dir {v.images()} --dataset flat {MACHINE} {runs}"),
        train_biart: (TrainBiARTConfig, f"{BIART} {MACHINE} {runs} {pairs} --vae_path {v.vae_run()}"),
        eval_biart: (EvalBiARTConfig, f"{EVAL} --model {v.bundle()} --test_dir {v.pairs()} --eval_captions 4"),
        generate: (GenerateConfig, f"--model {v.bundle()} --text 'a red circle' --gpus 0 --out out --seed 1"),
    }
    command = m.pick(commands)
    config, flags = commands[command]
    known = [f for _, f, _ in leaves(config) if f.name not in HEAVY]
    for _ in m.few() if not bench.unchanged else ():
        f = m.pick(known)
        value = m.pick((f.default, *SMALL, m.pick(SMALL), *(f.metadata["choices"] or ())))
        value = value[0] if isinstance(value, tuple) and value else value
        flags += f" --{f.name} {shlex.quote(str(value))}"
        m.note(f.name, value)
    return evaluation_case(flags.removeprefix(EVAL)) if command is eval_biart else command_case(command, flags)


SMALL = (*(n for n in NUMBERS if abs(n) <= 1), 2, 3, 7, 33, 0.25, 1e-3, 1e10, *(t for t in TEXTS if len(t) < 400))
# settings that may ask for much work, memory, processes or the network, by design
HEAVY = (
    *(
        "gpus",
        "nodes",
        "num_workers",
        "accelerator",
        "strategy",
        "max_steps",
        "epochs",
        "resolution",
        "hidden_dim",
        "z_channels",
    ),
    *(
        "codebook_dim",
        "num_tokens",
        "ch_mult",
        "attn_resolutions",
        "num_res_blocks",
        "compile",
        "download",
        "loss_type",
        "world",
    ),
    *(
        "dataset_size",
        "val_size",
        "test_size",
        "batch_size",
        "n_layer",
        "n_embd",
        "preset",
        "text_len",
        "crops_per_image",
    ),
    *(
        "num",
        "rerank",
        "candidates",
        "beams",
        "logger",
        "clip_model",
        "clip_weights",
        "java",
        "train_dir",
        "model",
        "debug",
    ),
    *(
        "prefetch_factor",
        "accumulate_grad_batches",
        "shuffle_buffer",
        "fake_data",
        "refresh_rate",
        "blur_radii",
        "fid_resolution",
    ),
)

AREAS = {
    "outputs": Area(make_outputs, 60, ("outputs", "pairs", "images")),
    "commands": Area(make_commands, 30, ("outputs", "vae_run", "images", "pairs"), seconds=90, codes=(1, 2)),
}
