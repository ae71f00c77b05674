"""The shapes world: what is rendered, said and read back agree; splits are disjoint; junk is never right."""

import dataclasses
import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from latent_verse.data import DataError
from latent_verse.data.captions import PairFolder
from latent_verse.data.shapes import SPLITS, ShapesDataset, World, write_pairs
from latent_verse.data.shapes.drawing import BACKGROUND, PALETTE, SHAPES, UNKNOWN, Obj, Scene, coverage
from latent_verse.data.shapes.grammar import RELATIONS, SYNONYMS
from tests.messages import naming

SMALL, FULL = World.preset("small"), World.preset("full")
both = pytest.mark.parametrize("world", [SMALL, FULL], ids=lambda world: world.name)


def scenes(world, count):
    return [world.scene(i, SPLITS[i % 3]) for i in range(count)]


def every_small_scene():
    kinds = list(itertools.product(SMALL.shapes, SMALL.colours))
    centres = list(itertools.product((8, 24), repeat=2))
    for count in (1, 2):
        for places in itertools.combinations(centres, count):
            for chosen in itertools.product(kinds, repeat=count):
                yield Scene(
                    tuple(Obj(shape, colour, "large", *at) for (shape, colour), at in zip(chosen, places, strict=True))
                )


# -------------------------------------------------------------------------------------------------------------- scenes


def test_presets_are_what_the_documents_say():
    assert (SMALL.image_size, SMALL.max_objects, len(SMALL.shapes), len(SMALL.colours)) == (32, 2, 10, 8)
    assert (FULL.image_size, FULL.max_objects, len(FULL.shapes), len(FULL.colours), len(FULL.sizes)) == (64, 3, 4, 6, 2)
    kinds = len(FULL.shapes) * len(FULL.colours) * len(FULL.sizes)
    assert sum(math.comb(FULL.grid**2, n) * kinds**n for n in (1, 2, 3)) == 456_384
    with pytest.raises(ValueError, match=naming("medium", "small", "full")):
        World.preset("medium")


def test_small_world_by_the_numbers():
    keys = {SMALL.key(scene): SMALL.split_of(scene) for scene in every_small_scene()}
    assert len(keys) == 38_720
    assert Counter(keys.values()) == {"train": 25_176, "val": 6216, "heldout": 7328}
    some = {SMALL.key(SMALL.scene(i)) for i in range(3000)}
    assert some <= {key for key, split in keys.items() if split == "train"}
    assert len(some) > 2200  # of 25,176; there are only 320 single objects


@both
def test_splits_are_disjoint_and_held_out_pairs_are_new(world):
    sampled = {split: [world.scene(i, split) for i in range(400)] for split in SPLITS}
    keys = {split: {world.key(scene) for scene in sampled[split]} for split in SPLITS}
    assert not keys["train"] & keys["val"] and not (keys["train"] | keys["val"]) & keys["heldout"]
    for split, some in sampled.items():
        pairs = [{(o.colour, o.shape) for o in scene.objects} & world.heldout for scene in some]
        assert all(pairs) if split == "heldout" else not any(pairs)
    objects = [o for scene in sampled["train"] for o in scene.objects]
    assert {o.shape for o in objects} == set(world.shapes)
    assert {o.colour for o in objects} == set(world.colours)
    assert {o.size for o in objects} == set(world.sizes)
    for attribute in (0, 1):  # no colour and no shape loses more than one partner
        assert len({pair[attribute] for pair in world.heldout}) == len(world.heldout)
    counts = Counter(len(scene) for scene in sampled["train"])
    assert set(counts) == set(range(1, world.max_objects + 1))


@both
def test_scenes_follow_from_their_index(world):
    assert world.scene(7, "val") == world.scene(7, "val") != world.scene(8, "val")
    first, second = (np.asarray(world.render(world.scene(7, "val"))) for _ in range(2))
    assert np.array_equal(first, second)
    with pytest.raises(ValueError, match=naming("test", "train", "val", "heldout")):
        world.scene(0, "test")


@both
def test_objects_stand_apart_and_inside(world):
    for scene in scenes(world, 200):
        for o in scene.objects:
            radius = world.sizes[o.size]
            assert radius <= o.x <= world.image_size - radius and radius <= o.y <= world.image_size - radius
        for a, b in itertools.combinations(scene.objects, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= world.sizes[a.size] + world.sizes[b.size] + 3


# -------------------------------------------------------------------------------------------------------------- images


def test_shapes_cover_the_area_they_should():
    for radius in (6, 9):
        areas = {"circle": np.pi, "square": 4, "triangle": 2}
        areas |= {"cross": 4 * 5 / 9, "ring": 4 * 8 / 9, "arch": 4 * 7 / 9, "staircase": 4 * 6 / 9}
        areas |= {"cup": 4 * 7 / 9, "tee": 4 * 5 / 9, "ell": 4 * 5 / 9, "zigzag": 4 * 5 / 9, "ladder": 4 * 7 / 9}
        for shape, area in areas.items():
            assert coverage(shape, radius).sum() / radius**2 == pytest.approx(area, rel=0.01)


def test_a_rendered_image():
    image = SMALL.render(Scene((Obj("square", "red", "large", 8, 24),)))
    assert image.size == (32, 32) and image.mode == "RGB"
    pixels = np.asarray(image)
    assert (pixels[18:30, 2:14] == PALETTE["red"]).all()
    pixels = pixels.copy()
    pixels[18:30, 2:14] = BACKGROUND
    assert (pixels == BACKGROUND).all()


def test_small_images_are_made_of_patches_of_one_colour():
    for scene in scenes(SMALL, 300):
        patches = np.asarray(SMALL.render(scene)).reshape(8, 4, 8, 4, 3).transpose(0, 2, 1, 3, 4).reshape(64, 16, 3)
        assert (patches == patches[:, :1]).all()


def test_objects_of_the_full_world_stand_anywhere_in_their_cells_in_steps_of_a_patch():
    corners = {size: set() for size in FULL.sizes}
    for scene in scenes(FULL, 600):
        for o in scene.objects:
            corners[o.size].add((o.x - FULL.sizes[o.size], o.y - FULL.sizes[o.size]))
    starts = {"small": (0, 8, 16, 32, 40, 48), "large": (0, 8, 32, 40)}  # a cell is 32 px, objects 16 and 24
    assert corners == {size: set(itertools.product(at, repeat=2)) for size, at in starts.items()}


def test_texture_is_soft_and_varies():
    blank = [np.asarray(FULL.render(Scene((), texture=seed))).astype(int) for seed in (1, 2)]
    assert not np.array_equal(*blank)
    for image in blank:
        assert 2 < image.std() < 8
        assert np.abs(np.diff(image, axis=0)).max() <= 5
        assert np.abs(image - 235).max() <= 16


# -------------------------------------------------------------------------------------------------------- reading back


def read_right(world, scene, image):
    return world.key(world.parse_image(image)) == world.key(scene)


def reconstructed(image, blur, sigma, rng):
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(blur))) + rng.normal(0, sigma, (*image.size, 3))
    return pixels.round().clip(0, 255).astype(np.uint8)


@both
def test_images_are_read_back_exactly(world):
    some = scenes(world, 300)
    read = [world.parse_image(world.render(scene)) for scene in some]
    assert [r.objects for r in read] == [s.objects for s in some]  # positions to the pixel


@both
@pytest.mark.parametrize("blur, sigma", [(0.0, 8), (0.7, 8), (1.0, 8), (0.7, 16)])
def test_blurred_and_noisy_images_are_read_back(world, blur, sigma):
    rng = np.random.default_rng(0)
    some = scenes(world, 100)
    assert sum(read_right(world, s, reconstructed(world.render(s), blur, sigma, rng)) for s in some) >= 0.98 * len(some)


@both
def test_empty_and_wrong_images_are_never_right(world):
    rng = np.random.default_rng(0)
    side = (world.image_size, world.image_size, 3)
    junk = [np.full(side, value, np.uint8) for value in (0, 128, 235, 255)]
    junk += [np.full(side, 1, np.uint8) * np.array(PALETTE[colour], np.uint8) for colour in world.colours]
    junk += [rng.integers(0, 256, side).astype(np.uint8) for _ in range(20)]
    junk += [np.clip(235 + rng.normal(0, s, side), 0, 255).astype(np.uint8) for s in (20, 40, 80) for _ in range(10)]
    captions = [world.caption(scene, random.Random(0)) for scene in scenes(world, 50)]
    for image in junk:
        read = world.parse_image(image)
        assert not any(o.shape != UNKNOWN for o in read.objects)
        assert not any(world.satisfies(read, world.parse_caption(text)) for text in captions)


def _without(part):
    def damage(pixels, o, r):
        left, right, top, bottom = max(o.x - r, 0), o.x + r, max(o.y - r, 0), o.y + r
        boxes = {
            "left half": (slice(top, bottom), slice(left, o.x)),
            "top half": (slice(top, o.y), slice(left, right)),
            "left third": (slice(top, bottom), slice(left, o.x - r // 3)),
            "quarter": (slice(o.y, bottom), slice(o.x, right)),
            "core": (slice(o.y - r // 3, o.y + r // 3), slice(o.x - r // 3, o.x + r // 3)),
        }
        pixels[boxes[part]] = BACKGROUND

    damage.__name__ = part
    return damage


def _two_coloured(pixels, o, r):
    own = np.array(PALETTE[o.colour])
    other = min((c for c in PALETTE.values() if np.linalg.norm(own - c) > 120), key=lambda c: np.linalg.norm(own - c))
    top = pixels[o.y : o.y + r, max(o.x - r, 0) : o.x + r]
    top[np.abs(top - np.array(PALETTE[o.colour])).sum(-1) < 90] = other


def _pale(pixels, o, r):
    pixels[max(o.y - r, 0) : o.y + r, max(o.x - r, 0) : o.x + r] *= 0.5
    pixels[max(o.y - r, 0) : o.y + r, max(o.x - r, 0) : o.x + r] += 0.5 * 235


@both
@pytest.mark.parametrize(
    "damage",
    [*map(_without, ("left half", "top half", "left third", "quarter", "core")), _two_coloured, _pale],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_object_is_not_right(world, damage):
    for scene in scenes(world, 60):
        pixels = np.asarray(world.render(scene)).astype(np.float64)
        damage(pixels, scene.objects[0], world.sizes[scene.objects[0].size] + 1)
        if np.array_equal(pixels, world.render(scene)):  # a ring has no core to lose
            assert damage.__name__ == "core" and scene.objects[0].shape in ("ring", "arch", "cup", "ell")
            continue
        assert not read_right(world, scene, pixels.astype(np.uint8))


@both
def test_more_than_the_scene_is_not_right(world):
    for scene in scenes(world, 60):
        corner = np.asarray(world.render(scene)).copy()
        for y, x in itertools.product((0, -4), repeat=2):
            if any(
                abs(o.x - (x % world.image_size)) < 16 and abs(o.y - (y % world.image_size)) < 16 for o in scene.objects
            ):
                continue
            extra = corner.copy()
            extra[y : y + 4 or None, x : x + 4 or None] = PALETTE["blue"]
            assert not read_right(world, scene, extra)


@pytest.mark.parametrize("dark", [(90, 20, 20), (75, 25, 30), (20, 60, 90), (60, 20, 80)])
def test_a_dark_colour_is_not_black(dark):
    """Maroon is nearer to black than to red, but nobody would call it black."""
    scene = Scene((Obj("ladder", "black", "large", 24, 8),))
    black, statement = np.asarray(SMALL.render(scene)), SMALL.parse_caption("a black ladder at the top right")
    for shade, right in ((PALETTE["black"], True), ((40, 28, 36), True), (dark, False)):
        pixels = np.where((black == PALETTE["black"]).all(-1, keepdims=True), np.array(shade, np.uint8), black)
        assert SMALL.satisfies(SMALL.parse_image(pixels), statement) is right


@both
def test_what_is_read_in_an_image_in_words(world):
    for scene in scenes(world, 60):
        text = world.describe(world.parse_image(world.render(scene)))
        assert world.satisfies(scene, world.parse_caption(text)), text
    assert world.describe(Scene(())) == "nothing"
    pixels = np.asarray(world.render(world.scene(0))).copy()
    pixels[:] = BACKGROUND
    pixels[-9:, :9] = (120, 120, 120)
    pixels[:8, -8:] = PALETTE["red"]
    pixels[3:5, -8:] = BACKGROUND
    assert world.describe(world.parse_image(pixels)).count("something") == 3
    assert "something red at the top right" in world.describe(world.parse_image(pixels))
    pixels[:] = BACKGROUND
    pixels[::8, ::8] = 0
    assert world.describe(world.parse_image(pixels)) == "scattered pixels"


def test_two_objects_run_together_are_unknown():
    pixels = np.asarray(SMALL.render(Scene((Obj("ring", "red", "large", 8, 8), Obj("square", "red", "large", 24, 8)))))
    pixels = pixels.copy()
    pixels[6:10, 12:20] = PALETTE["red"]
    assert [o.shape for o in SMALL.parse_image(pixels).objects] == [UNKNOWN]


def test_reader_refuses_other_sizes_and_takes_other_modes():
    with pytest.raises(ValueError, match=naming("small", (32, 32, 3), (64, 64, 3))):
        SMALL.parse_image(Image.new("RGB", (64, 64)))
    scene = SMALL.scene(0)
    assert read_right(SMALL, scene, SMALL.render(scene).convert("RGBA"))


# ------------------------------------------------------------------------------------------------------------ captions


@both
def test_every_caption_is_true_of_its_scene_and_of_its_image(world):
    rng = random.Random(0)
    for scene in scenes(world, 200):
        read = world.parse_image(world.render(scene))
        for _ in range(5):
            text = world.caption(scene, rng)
            statement = world.parse_caption(text)
            assert statement is not None, text
            for which in (scene, read):
                assert world.compare(which, statement) == dict.fromkeys(
                    ("count", "colour", "shape", "size", "layout", "all"), True
                ), text


@both
def test_captions_vary_and_use_the_whole_grammar(world):
    rng = random.Random(0)
    texts = [world.caption(scene, rng) for scene in scenes(world, 1500)]
    words = " ".join(texts)
    for word in (*world.shapes, *world.colours, *RELATIONS, "at the top left", " and "):
        assert word in words, word
    if world is FULL:
        for word in (*world.sizes, *itertools.chain(*SYNONYMS.values()), "there is", ", "):
            assert word in words, word
    assert max(len(text.split()) for text in texts) <= (15 if world is SMALL else 30)
    assert len({world.caption(world.scene(1), rng) for _ in range(50)}) >= 2


def small(*objects):
    return Scene(tuple(Obj(shape, colour, "large", x, y) for colour, shape, x, y in objects))


PAIR = small(("red", "ring", 8, 8), ("blue", "square", 24, 24))  # the ring above and left of the square


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("a red ring left of a blue square", ""),
        ("A red ring above a blue square.", ""),
        ("a blue square right of a red ring", ""),
        ("a blue square and a red ring", ""),
        ("a red ring to the left of a blue square", ""),
        ("a red ring right of a blue square", "layout"),
        ("a blue square above a red ring", "layout"),
        ("a blue ring left of a red square", "binding"),
        ("a red ring and a red square", "colour"),
        ("a red ring and a blue ring", "shape"),
        ("a red ring", "count colour shape size layout"),
        ("a red ring at the top left", "count colour shape size layout"),
    ],
)
def test_captions_against_a_known_scene(text, wrong):
    report = SMALL.compare(PAIR, SMALL.parse_caption(text))
    assert report.pop("all") == (not wrong)
    assert SMALL.satisfies(PAIR, SMALL.parse_caption(text)) == (not wrong)
    if wrong != "binding":  # the colours and shapes are there, each on the other object
        assert {name for name, right in report.items() if not right} == set(wrong.split())


NINE = dataclasses.replace(FULL, grid=3, sizes={"small": 6, "large": 9}, jitter=0)


def test_places_and_sizes_are_compared():
    scene = Scene((Obj("circle", "green", "small", 11, 11), Obj("cross", "red", "large", 32, 32)))
    assert NINE.satisfies(
        scene, NINE.parse_caption("a small green circle at the top left and a red cross at the centre")
    )
    assert not NINE.satisfies(scene, NINE.parse_caption("a green circle at the top and a red cross at the centre"))
    report = NINE.compare(scene, NINE.parse_caption("a large green circle above a red cross"))
    assert report["layout"] and not report["size"] and not report["all"]
    three = Scene((*scene.objects, Obj("circle", "green", "large", 53, 11)))
    for text, right in {
        "a green circle left of a green circle and above a red cross": True,
        "a red cross below a small green circle and left of a large green circle": True,
        "a red cross below a large green circle and left of a small green circle": False,
        "a green circle, a red cross and a green circle": True,
        "there is a large green circle , a red cross and a small green circle.": True,
        "a green circle and a red cross": False,
    }.items():
        assert NINE.satisfies(three, NINE.parse_caption(text)) == right, text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "red ring",
        "a red",
        "a ring",
        "a pink ring",
        "a red circle",
        "a large red ring left of",
        "a red ring left a blue square",
        "a red ring left of a blue square and above a green cross",  # three, in a world of two
        "a red ring, a blue square",
        "a red ring a blue square",
        "a red ring at the centre",
        "a red ring at the top left and a blue square",
        "a red ring and",
        "a red ring left of a blue square!",
        "a red ringa blue square",
    ],
)
def test_ill_formed_captions_are_none(text):
    assert SMALL.parse_caption(text) is None
    assert not SMALL.satisfies(PAIR, None)


# ------------------------------------------------------------------------------------------------------------- dataset


def test_dataset_follows_seed_epoch_and_index():
    one, two, other = (ShapesDataset(SMALL, "train", 100, seed=s) for s in (1, 1, 2))
    image, text = one[(3, 5)]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32
    assert image.min() >= -1 and image.max() <= 1
    assert torch.equal(image, two[(3, 5)][0]) and text == two[(3, 5)][1]
    assert torch.equal(image, one[(4, 5)][0])  # the scene stays, its caption changes
    assert len({one[(epoch, 5)][1] for epoch in range(30)}) > 1
    assert {SMALL.key(one.scene(i)) for i in range(100)} != {SMALL.key(other.scene(i)) for i in range(100)}
    two.epoch = 3
    assert two[5][1] == text
    assert one[5][0].dtype == torch.float32 and ShapesDataset(SMALL, as_uint8=True)[0][0].dtype == torch.uint8
    with pytest.raises(IndexError):
        one[100]


def test_fresh_datasets_have_new_scenes_each_epoch():
    dataset = ShapesDataset(SMALL, "train", 10, fresh=True)
    keys = {SMALL.key(dataset.scene((epoch, i))) for epoch in range(20) for i in range(10)}
    assert len(keys) > 100
    text = dataset[(7, 2)][1]
    assert SMALL.satisfies(dataset.scene((7, 2)), SMALL.parse_caption(text))


@both
def test_items_and_references_are_true(world):
    dataset = ShapesDataset(world, "heldout", 20, as_uint8=True)
    for i in range(20):
        image, text = dataset[i]
        read = world.parse_image(image.permute(1, 2, 0).numpy())
        assert all(world.satisfies(read, world.parse_caption(t)) for t in [text, *dataset.captions(i)])
        assert len(set(dataset.captions(i))) == len(dataset.captions(i)) <= 5
    assert dataset.describe() == {"source": f"shapes {world.name} heldout", "pairs": 20}
    assert dataset.image_path(0) is None


def test_a_dataset_of_nothing_is_refused():
    with pytest.raises(DataError, match="size"):
        ShapesDataset(SMALL, "val", 0)


@pytest.mark.parametrize("split", ["val", "heldout"])
def test_evaluation_scenes_are_all_different(split):
    dataset = ShapesDataset(SMALL, split, 300)
    assert len({SMALL.key(dataset.scene(i)) for i in range(300)}) == 300
    assert {SMALL.split_of(dataset.scene(i)) for i in range(300)} == {split}


def test_dataset_errors():
    single = dataclasses.replace(SMALL, counts=(1,))
    with pytest.raises(DataError, match=naming("dataset_size", 100, "val", "small")):
        ShapesDataset(single, "val", 100)
    with pytest.raises(ValueError, match=naming("test", "train", "val", "heldout")):
        ShapesDataset(SMALL, "test", 1)


def test_written_pairs_are_a_pair_folder(tmp_path):
    write_pairs(SMALL, tmp_path / "pairs", 6, split="val", captions=3)
    dataset = PairFolder(tmp_path / "pairs", 32, train=False, as_uint8=True)
    source = ShapesDataset(SMALL, "val", 6)
    assert len(dataset) == 6
    for i in range(6):
        read = SMALL.parse_image(dataset[i][0].permute(1, 2, 0).numpy())
        assert SMALL.key(read) == SMALL.key(source.scene(i))
        assert dataset.captions(i) == source.sample_captions(i, 3)


def test_every_shape_has_a_name_in_a_world():
    assert {*SMALL.shapes, *FULL.shapes} == set(SHAPES) and {*SMALL.colours, *FULL.colours} == set(PALETTE)
