"""Parts of the tasks that need no model: the truth of a round trip, and the names of classes."""

from __future__ import annotations

import pytest

from latent_verse.config import UserError
from latent_verse.data import DataError
from latent_verse.data.shapes import World
from latent_verse.evaluation import image_tasks, shapes_truth
from latent_verse.evaluation.round_trips import Trip, check_trip
from latent_verse.evaluation.text_tasks import class_names
from latent_verse.evaluation.worker import _keep_earlier
from tests.messages import naming
from tests.stand_ins import Oracle


def test_a_wrong_step_makes_a_trip_wrong():
    world = World.preset("small")
    oracle = Oracle(world)
    scene = oracle.scene_of("a red square")
    good, other = "a red square", "a blue square"
    render = lambda text: world.render(oracle.scene_of(text))  # noqa: E731
    right = check_trip(world, scene, good, Trip(good, render(good), render(good), good))
    assert right["image_text_image"]["all"] and right["text_image_text"]["all"]
    for trip, name in (
        (Trip(other, render(other), render(good), good), "image_text_image"),  # a wrong caption, rendered faithfully
        (Trip(good, render(other), render(good), good), "image_text_image"),
        (Trip(good, render(good), render(other), other), "text_image_text"),
        (Trip(good, render(good), render(good), other), "text_image_text"),
    ):
        found = check_trip(world, scene, good, trip)
        assert not found[name]["all"] and not found[name]["colour"] and found[name]["shape"]
        assert sum(trip_found["all"] for trip_found in found.values()) == 1


def test_class_names_of_a_file_and_of_folders(tmp_path):
    assert class_names(["red_fox", "dog"], None) == ["red fox", "dog"]
    file = tmp_path / "names.txt"
    file.write_text("n01\tred fox\nn02\tdog, domestic dog\n")
    assert class_names(["n01", "n02"], str(file)) == ["red fox", "dog, domestic dog"]
    with pytest.raises(DataError, match=naming("class_names", file, "n03", 1)):
        class_names(["n01", "n03"], str(file))
    with pytest.raises(UserError, match=naming("class_names", tmp_path / "none")):
        class_names(["n01"], str(tmp_path / "none"))


def test_class_names_show_something_and_are_told_apart(tmp_path, caplog):
    file = tmp_path / "names.txt"
    for text, fact in (("n01\t\u200b\n", "n01"), ("n01\ta\0b\n", "line 1"), ("n02\tx\nn01\ta\0b\n", "line 2")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=naming("class_names", file, fact)):
            class_names(["n01"], str(file))
    file.write_text("n01\ta\tcrane\nn02\ta\tcrane\n")
    assert class_names(["n01", "n02"], str(file)) == ["a crane", "a crane"]
    assert class_names(["a_b", "a b"], None) == ["a b", "a b"] and naming("a crane", "a b").search(caplog.text)


def test_lines_of_class_names_end_at_newlines_only(tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeffn01\tred\u2028fox\r\nn02\tdog\nn02\tdog\n".encode())
    assert class_names(["n01", "n02"], str(file)) == ["red\u2028fox", "dog"]
    file.write_bytes(b"n01\tfox\nn01\tdog\n")
    with pytest.raises(DataError, match=naming("class_names", file, "line 2", "n01")):
        class_names(["n01"], str(file))
    file.write_bytes(b"n01\tfox\nn02\tB\xe4r\n")
    with pytest.raises(UserError, match=naming("class_names", file, "UTF-8", "line 2", "byte 13")):
        class_names(["n01"], str(file))


@pytest.mark.parametrize("content", ["[" * 100_000, "[1]", "{}", "\xe9", '{"settings": {"a": 1}}'])
def test_results_of_another_kind_are_kept_beside(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content, encoding="latin-1")
    assert naming("metrics-1.json").search(_keep_earlier(tmp_path, {"a": {}}))
    assert (tmp_path / "metrics-1.json").is_file() and not (tmp_path / "metrics.json").exists()


def test_a_wrong_scene_is_shown_with_what_was_read_in_it():
    world = World.preset("small")
    asked, other = (world.scene(i) for i in range(2))
    images = {"image": world.render(asked), "reconstruction": world.render(asked), "generated": world.render(other)}
    right = {"text_to_image": False, "image_to_text": True, "reconstruction": True}
    case = shapes_truth.Case(asked, "a text", caption="a caption", reranked=None, right=right, **images)
    shown, texts = image_tasks._in_words(world, case)
    assert list(shown) == ["true image", "generated: wrong"] and shown["generated: wrong"] is case.generated
    assert texts == {
        "text": ["a text"],
        "caption of the true image: right": ["a caption"],
        "generated, read as": [world.describe(other)],
    }
