"""The settings of eval_biart.py: what contradicts, what would have no effect, and which tasks follow from them."""

from __future__ import annotations

import pytest

from latent_verse.config import ConfigError
from latent_verse.config.cli import parse
from latent_verse.config.evaluate import EFFECTS, TASKS, EvalBiARTConfig, resolve_eval_biart
from tests.messages import naming


def tasks(flags: str) -> set[str]:
    config, given = parse(EvalBiARTConfig, flags.split(), "")
    return set(resolve_eval_biart(config, given)[1])


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        ("", "model generated_dir captions_file compare"),
        ("--model x", "test_dir"),
        ("--model x --dataset table", "test_captions table"),
        ("--model x --dataset karpathy --test_dir d", "test_captions dataset_coco.json"),
        ("--model x --test_dir d --test_captions f", "test_captions pairs"),
        ("--model x --fake_data --test_dir d", "test_dir fake"),
        ("--model x --fake_data --dataset coco", "coco fake_data"),
        ("--model x --test_dir d --test_size 3", "test_size pairs"),
        ("--model x --fake_data --tasks sampling", "tasks sampling likelihood"),
        ("--generated_dir x --fake_data --tasks retrieval", "tasks retrieval model"),
        ("--model x --fake_data --tasks zero_shot", "tasks zero_shot classes_dir"),
        ("--model x --fake_data --tasks shapes", "tasks shapes dataset"),
        ("--model x --fake_data --tasks captions --generated_dir d", "generated_dir generation"),
        ("--generated_dir x --fake_data --classes_dir d", "classes_dir model"),
        ("--model x --test_dir d --tasks captions --classes_dir c", "classes_dir zero_shot"),
        ("--compare a", "compare 1"),
        ("--compare a b --model x", "model compare"),
        ("--model x --fake_data --candidates 0", "candidates 0"),
        ("--model x --fake_data --candidates 2 --temperature 0", "candidates 2 temperature"),
        ("--model x --fake_data --blur_radii 0 0", "blur_radii 0"),
        ("--model x --fake_data --class_prompt hello", "class_prompt hello {}"),
        ("--model x --fake_data --class_names f", "class_names classes_dir"),
        ("--model x --fake_data --retrieval_picture 3", "--retrieval_picture --retrieval_pictures"),
        ("--model x --fake_data --tasks captions --candidates 8", "candidates generation captions"),
        ("--generated_dir x --fake_data --guidance 2", "guidance generated_dir generation"),
        ("--generated_dir x --fake_data --eval_captions 9", "eval_captions generated_dir"),
        ("--captions_file x --fake_data --beams 4", "beams captions_file round_trip"),
        ("--captions_file x --fake_data --dtype bfloat16", "dtype bfloat16 model"),
        ("--model x --fake_data --tasks generation --prior_weight 1", "prior_weight retrieval zero_shot"),
        ("--model x --fake_data --class_pictures 5", "class_pictures zero_shot"),
        ("--model x --fake_data --prior pool", "prior pool prior_weight"),
        ("--model x --fake_data --world full", "world fake shapes"),
    ],
)
def test_mistakes(flags, facts):
    with pytest.raises(ConfigError, match=naming(*facts.split())):
        tasks(flags)


def test_every_setting_of_a_task_names_the_task():
    """Otherwise a new setting would be accepted silently by runs that do not read it."""
    config = EvalBiARTConfig()
    # what there is to evaluate; of the machine; of classes_dir, which names its task
    free = {"model", "tasks", "compare", "java", "class_names"}
    sections = (config.judged, config.generation, config.captions, config.likelihood, config.networks)
    assert {name for section in sections for name in vars(section)} - free == EFFECTS.keys()


def test_tasks_follow_from_what_is_given():
    everything = set(TASKS)
    assert tasks("--model x --test_dir d") == everything - {"zero_shot", "shapes"}
    assert tasks("--model x --dataset shapes --classes_dir c") == everything
    assert tasks("--generated_dir x --test_dir d") == {"generation"}
    assert tasks("--captions_file x --test_dir d") == {"captions"}
    assert tasks("--generated_dir y --captions_file x --test_dir d") == {"generation", "captions"}
    assert tasks("--model x --test_dir d --tasks captions") == {"captions"}
