"""The valid inputs that cases are made from: each made once, into one folder, by the programs themselves."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF"}
FORMATS |= {".tiff": "TIFF", ".ppm": "PPM", ".pgm": "PPM", ".gif": "GIF", ".jfif": "JPEG"}
MODES = {
    ".png": ("RGB", "L", "P", "RGBA", "LA", "1", "I;16"),
    ".jpg": ("RGB", "L", "CMYK"),
    ".pgm": ("L",),
    ".gif": ("P", "L", "RGBA"),
}
MODES |= {".tif": ("RGB", "L", "CMYK", "F", "I;16"), ".tiff": ("RGB", "LAB"), ".webp": ("RGB", "RGBA")}

MACHINE = "--gpus 0 --num_workers 0 --refresh_rate 0 --logger csv --log_every_n_steps 1"
VAE = (
    "--hidden_dim 32 --ch_mult 1 1 --num_res_blocks 1 --resolution 16 --attn_resolutions 8 --z_channels 16 "
    "--codebook_dim 8 --num_tokens 32 --batch_size 4 --max_steps 2 --epochs 1 "
)
BIART = "--n_layer 1 --n_head 2 --n_embd 16 --tokenizer bpe --bpe_vocab_size 300 --text_len 8 --batch_size 2 "
BIART += "--max_steps 2 --epochs 1 --num_samples 1 "
NAMES = ("a", "b", "c", "d")  # of images with captions
CAPTIONS = ("a red circle", "two small blue squares", "größer, « as said »", "赤い丸")


def image_bytes(extension: str, mode: str = "RGB", seed: int = 0, size: tuple[int, int] = (20, 24)) -> bytes:
    """A small image file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)
    elif mode == "F":
        image = Image.fromarray(pixels[..., 0].astype(np.float32) / 255)
    elif mode == "LAB":
        image = Image.merge("LAB", image.split())
    else:
        image = image.convert(mode)
    options = {"exif": exif} if extension in (".jpg", ".png") and seed % 3 == 0 and (exif := _exif(seed)) else {}
    image.save(data := io.BytesIO(), FORMATS[extension], **options)
    return data.getvalue()


def _exif(seed: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = seed % 8 + 1
    return exif.tobytes()


def tar_bytes(members: dict[str, bytes], mode: str = "w") -> bytes:
    """A tar of files."""
    with tarfile.open(fileobj=(data := io.BytesIO()), mode=mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


class Valid:
    """The folder of valid inputs. Each method makes one if it is absent, and returns its path."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _made(self, name: str, make) -> Path:
        path = self.folder / name
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = self.folder / f"unfinished-{name}"
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(path)
        return path

    def images(self) -> Path:
        """Two class folders of images in every format and mode."""

        def make(folder: Path) -> None:
            number = 0
            for extension in FORMATS:
                for mode in MODES.get(extension, ("RGB",)):
                    place = folder / f"class{number % 2}"
                    place.mkdir(parents=True, exist_ok=True)
                    name = f"{number:02d}-{mode.replace(';', '')}{extension}"
                    (place / name).write_bytes(image_bytes(extension, mode, number))
                    number += 1

        return self._made("images", make)

    def pairs(self) -> Path:
        """Four images with captions: as name.txt, in every kind of captions file, and in a tar."""

        def make(folder: Path) -> None:
            folder.mkdir()
            members, coco, karpathy, rows = {}, {"images": [], "annotations": []}, [], []
            for i, (name, caption) in enumerate(zip(NAMES, CAPTIONS, strict=True)):
                data, texts = image_bytes(".png", seed=i), [caption, f"{caption} again"]
                (folder / f"{name}.png").write_bytes(data)
                (folder / f"{name}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
                members |= {f"{name}.png": data, f"{name}.txt": texts[0].encode(), f"{name}.cls": b"3"}
                coco["images"].append({"id": i + 10, "file_name": f"{name}.png"})
                coco["annotations"] += [{"image_id": i + 10, "caption": text, "id": 0} for text in texts]
                of_split = {"split": ("train", "val")[i % 2], "sentences": [{"raw": text} for text in texts]}
                karpathy.append({"filename": f"{name}.png", "filepath": "", "cocoid": i + 10, **of_split})
                rows += [(f"{name}.png", text) for text in texts]
            (folder / "shard.tar").write_bytes(tar_bytes(members))
            (folder / "coco.json").write_text(json.dumps(coco))
            (folder / "karpathy.json").write_text(json.dumps({"images": karpathy}))
            quoted = "".join(f'{image},"{text}"\n' for image, text in rows)
            (folder / "table.csv").write_text(f"image,caption\n{quoted}", encoding="utf-8")
            lines = "".join(f"{image}\t{text}\n" for image, text in rows)
            (folder / "table.tsv").write_text(f"image\tcaption\n{lines}", encoding="utf-8")
            lines = "".join(json.dumps({"image": image, "caption": text}) + "\n" for image, text in rows)
            (folder / "table.jsonl").write_text(lines, encoding="utf-8")

        return self._made("pairs", make)

    def vae_run(self) -> Path:
        """A run folder of train_vae.py, with backups."""
        from latent_verse.commands import train_vae

        flags = f"{VAE} {MACHINE} --train_dir {self.images()} --dataset flat --backup --backup_steps 1"
        return self._run(train_vae.main, "vae_run", flags)

    def biart_run(self) -> Path:
        """A run folder of train_biart.py, with backups and a bundle."""
        from latent_verse.commands import train_biart

        pairs = f"--train_dir {self.pairs()} --val_dir {self.pairs()} --vae_path {self.vae_run()}"
        return self._run(train_biart.main, "biart_run", f"{BIART} {MACHINE} {pairs} --backup --backup_steps 1")

    def bundle(self) -> Path:
        """A bundle."""
        return self.biart_run() / "bundle"

    def codes(self) -> Path:
        """A folder of codes."""
        from latent_verse.commands import train_biart

        def make(folder: Path) -> None:
            flags = f"{BIART} {MACHINE} --train_dir {self.pairs()} --vae_path {self.vae_run()} --extract_codes {folder}"
            _done(train_biart.main(shlex.split(flags)))

        return self._made("codes", make)

    def outputs(self) -> Path:
        """images/ and captions/, as generate.py writes them; two finished evaluations, eval1/ and eval2/."""
        from latent_verse.commands import eval_biart, generate

        def make(folder: Path) -> None:
            folder.mkdir()
            model, pairs = ["--model", str(self.bundle()), "--gpus", "0"], str(self.pairs())
            _done(generate.main([*model, "--text", *CAPTIONS, "--out", str(folder / "images")]))
            _done(generate.main([*model, "--image", pairs, "--out", str(folder / "captions")]))
            for number in ("1", "2"):
                flags = f"--tasks likelihood --test_dir {pairs} --log_dir {folder} --name eval{number} --seed {number}"
                _done(eval_biart.main([*model, *shlex.split(flags)]))

        return self._made("outputs", make)

    def _run(self, main, name: str, flags: str) -> Path:
        return self._made(
            name,
            lambda folder: _done(main([*shlex.split(flags), "--log_dir", str(self.folder), "--name", folder.name])),
        )


def _done(code: int) -> None:
    if code:
        raise RuntimeError(f"a valid input could not be made: exit code {code}")
