"""Every setting of eval_biart.py, and the rules across them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Optional, Tuple  # OmegaConf reads these annotations at run time

from latent_verse.config.settings import ConfigError, SamplingSettings, Settings, setting

TASKS = ("likelihood", "generation", "captions", "retrieval", "zero_shot", "round_trip", "shapes")
DTYPES = ("float32", "bfloat16", "float16")
# which tasks a setting changes; --generated_dir and --captions_file leave less (_check_effects)
EFFECTS = {
    "candidates": ("drawing", "shapes"),
    **dict.fromkeys(("temperature", "top_k", "top_p", "guidance"), ("drawing", "round_trip", "shapes")),
    **dict.fromkeys(("eval_captions", "fid_resolution", "reference", "reference_stats"), ("generation",)),
    **dict.fromkeys(("prc_pictures", "prc_neighbours", "is_splits"), ("generation",)),
    **dict.fromkeys(("blur_radii", "clip_model", "clip_weights", "download"), ("generation", "round_trip")),
    "caption_pictures": ("captions",),
    "beams": ("writing", "round_trip"),
    "likelihood_pairs": ("likelihood",),
    **dict.fromkeys(("retrieval_pictures", "retrieval_captions"), ("retrieval",)),
    **dict.fromkeys(("length_power", "prior_weight", "prior"), ("retrieval", "zero_shot")),
    **dict.fromkeys(("class_prompt", "class_pictures"), ("zero_shot",)),
    "round_trip_pairs": ("round_trip",),
}
DATASETS = ("pairs", "coco", "karpathy", "table", "shapes", "fake")


@dataclass(frozen=True)
class JudgedConfig(Settings):
    """What is judged: a model, another system's outputs, or two runs of this command side by side."""

    model: Optional[str] = setting(None, "bundle: a folder that train_biart.py wrote, or a hub id")
    generated_dir: Optional[str] = setting(None, "judge the pictures in this folder rather than draw any")
    captions_file: Optional[str] = setting(
        None, "judge these captions rather than write any: COCO results JSON, or JSON lines as generate.py writes"
    )
    tasks: Tuple[str, ...] = setting((), f"which of {' '.join(TASKS)}; default all that can be done with what is given")
    compare: Tuple[str, ...] = setting((), "print the figures of two runs, folders or metrics.json, side by side")


@dataclass(frozen=True)
class EvalDataConfig(Settings):
    """Pictures with captions that were kept out of training."""

    dataset: Optional[str] = setting(
        None, "layout: name.jpg with name.txt, captions files, or generated; default pairs", DATASETS
    )
    fake_data: bool = setting(False, "made-up pairs: a smoke test without data")
    test_dir: Optional[str] = setting(None, "pictures: pair folder, or image folder of coco and karpathy")
    test_captions: Optional[str] = setting(
        None, "captions file of coco (default ../annotations/captions_<folder>.json), karpathy, or the table itself"
    )
    world: str = setting("small", "which world the dataset shapes draws", ("small", "full"))
    split: str = setting(
        "val", "of shapes: unseen scenes, or pairs of colour and shape kept out of training", ("val", "heldout")
    )
    test_size: Optional[int] = setting(None, "pairs of shapes (default 256) or fake (32)", at_least=1)


@dataclass(frozen=True)
class GenerationConfig(SamplingSettings):
    """Text to image: the draw of captions, drawing, and what the pictures are compared with."""

    eval_captions: int = setting(
        30000, "captions to draw pictures for, by the fixed draw; at most those there are", at_least=1
    )
    candidates: int = setting(
        1, "pictures drawn for each caption; more are also re-ranked, by the model and by CLIP", at_least=1
    )
    blur_radii: Tuple[int, ...] = setting((0, 1, 2, 4, 8), "radii k of FID-k; both sides are blurred", at_least=0)
    fid_resolution: Optional[int] = setting(
        None, "pixels a side of both sides of FID; default the model's, else 256", at_least=1
    )
    reference: str = setting("all", "FID's other side: all pictures of the data, or the draw's", ("all", "drawn"))
    reference_stats: Optional[str] = setting(
        None, "file of FID's other side: read where it is there, else written; default in the run folder"
    )
    prc_pictures: int = setting(10000, "most pictures of each side that precision and recall compare", at_least=2)
    prc_neighbours: int = setting(3, "neighbours that precision and recall measure the manifold by", at_least=1)
    is_splits: int = setting(10, "parts of Inception Score's mean and deviation", at_least=1)


@dataclass(frozen=True)
class CaptionConfig(Settings):
    """Image to text."""

    caption_pictures: Optional[int] = setting(
        None, "write captions for so many pictures, the first; default all", at_least=1
    )
    beams: int = setting(1, "search for the likeliest caption with so many beams; 1 is greedy", at_least=1)
    java: bool = setting(True, "use Java where there is one: the field's tokenizer, METEOR and SPICE need it")


@dataclass(frozen=True)
class LikelihoodConfig(Settings):
    """What is asked of log p(text | image) and log p(image | text)."""

    likelihood_pairs: int = setting(1000, "pairs of the fixed draw whose held-out likelihood is measured", at_least=1)
    retrieval_pictures: int = setting(
        100, "pictures in the pool of retrieval; every one is scored with every caption", at_least=2
    )
    retrieval_captions: int = setting(
        1, "captions of each picture in the pool; the Karpathy protocol has 5", at_least=1
    )
    length_power: float = setting(
        0.0, "divide log p(text | image) by tokens to this power: 0 is the sum, 1 the mean", at_least=0
    )
    prior_weight: float = setting(
        0.0, "subtract so much of the candidate's own log p: 1 ranks by mutual information", at_least=0
    )
    prior: str = setting(
        "null", "that log p: of the model without a reference, or its mean over the pool's references", ("null", "pool")
    )
    classes_dir: Optional[str] = setting(None, "zero-shot classification: a folder of class folders of pictures")
    class_names: Optional[str] = setting(None, "file with `folder<TAB>name` a line; default the folders' own names")
    class_prompt: str = setting("a photo of a {}", "what is scored for a class; {} is its name")
    class_pictures: Optional[int] = setting(
        None, "most pictures to classify, by the fixed draw; default all", at_least=1
    )
    round_trip_pairs: int = setting(
        100, "pairs of the fixed draw that go there and back, in both directions", at_least=2
    )


@dataclass(frozen=True)
class NetworksConfig(Settings):
    """Networks of the metrics. One that is absent is named with its file and place; the other figures are given."""

    clip_model: str = setting("ViT-B-32", "open_clip's architecture for CLIP scores")
    clip_weights: str = setting("openai", "its weights: a tag of open_clip, or a file")
    download: bool = setting(False, "download absent networks once, hash-checked, to torch's and CLIP's caches")


@dataclass(frozen=True)
class EvalWriteConfig(Settings):
    """Where results go, and which machine computes."""

    name: Optional[str] = setting(
        None, "name of the run's folder in log_dir; default eval-<what is judged>-<tasks given>"
    )
    log_dir: str = setting("results", "folder that holds the run folders")
    seed: int = setting(0, "seed of the draws of captions and of pictures", at_least=0)
    gpus: int = setting(1, "processes that share the work, a GPU each; 0 is the CPU", at_least=0)
    accelerator: str = setting("auto", "auto, or cpu: gpus is then the number of processes on it", ("auto", "cpu"))
    dtype: str = setting(
        "float32", "BiART's precision; lower ones draw faster, and are named with every figure", DTYPES
    )
    num_workers: Optional[int] = setting(
        None, "threads that read and blur pictures; default what the machine has", at_least=1
    )
    batch_size: int = setting(64, "captions drawn for, and pictures judged, at a time", at_least=1)
    page_cases: int = setting(8, "pictures and captions shown on the page as best, as median and as worst", at_least=0)


@dataclass(frozen=True)
class EvalBiARTConfig:
    """Everything eval_biart.py can be told."""

    judged: JudgedConfig = field(default_factory=JudgedConfig)
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    networks: NetworksConfig = field(default_factory=NetworksConfig)
    write: EvalWriteConfig = field(default_factory=EvalWriteConfig)


# -------------------------------------------------------------------------------------------------- rules across fields


def resolve_eval_biart(config: EvalBiARTConfig, given: Mapping[str, str]) -> tuple[EvalBiARTConfig, tuple[str, ...]]:
    """The configuration of an evaluation, and its tasks, none for --compare.

    Args:
        given: where each given setting came from, as `cli.parse` returns it.

    Raises:
        ConfigError: a configuration that could never work, naming the setting, its value and the remedy.
    """
    j = config.judged
    if j.compare:
        others = sorted(leaf for leaf in given if leaf != "compare")
        if len(j.compare) != 2:
            raise ConfigError(f"compare has {len(j.compare)} runs; give two folders or metrics.json files.")
        if others:
            raise ConfigError(f"--{others[0]} has no effect with --compare, which reads two finished runs.")
        return config, ()
    if not (j.model or j.generated_dir or j.captions_file):
        raise ConfigError(
            "Nothing to judge: give --model, or another system's outputs as --generated_dir or --captions_file, or "
            "two finished runs to --compare."
        )
    config = replace(config, data=_resolve_data(config.data))
    _check_numbers(config)
    tasks = _tasks(config)
    _check_effects(config, tasks)
    return config, tasks


def _check_effects(config: EvalBiARTConfig, tasks: tuple[str, ...]) -> None:
    """Raises ConfigError for a setting that is not its default and that nothing of this run reads."""
    j, g, d = config.judged, config.generation, config.data
    done = set(tasks)
    done |= {"drawing"} if "generation" in tasks and not j.generated_dir else set()
    done |= {"writing"} if "captions" in tasks and not j.captions_file else set()
    default = EvalBiARTConfig()
    for section in ("generation", "captions", "likelihood", "networks"):
        for name, value in vars(getattr(config, section)).items():
            changed = value != getattr(getattr(default, section), name)
            if changed and name in EFFECTS and not done & set(EFFECTS[name]):
                named = {"drawing": "generation without --generated_dir", "writing": "captions without --captions_file"}
                readers = " or ".join(named.get(task, task) for task in EFFECTS[name])
                raise ConfigError(
                    f"{name} has no effect here: it is read by {readers}, and this run does {', '.join(tasks)}."
                )
    if j.generated_dir and g.reference == "all" and g.eval_captions != default.generation.eval_captions:
        raise ConfigError(
            "eval_captions has no effect with --generated_dir: all its pictures are judged, against all pictures of "
            "the data. With --reference drawn it says which those are."
        )
    if config.likelihood.prior != default.likelihood.prior and not config.likelihood.prior_weight:
        raise ConfigError(f"prior {config.likelihood.prior} has no effect with prior_weight 0.")
    for name in ("world", "split"):
        if d.dataset != "shapes" and getattr(d, name) != getattr(default.data, name):
            raise ConfigError(f"{name} has no effect with dataset {d.dataset}: it is of shapes.")
    if config.write.dtype != default.write.dtype and not j.model:
        raise ConfigError(f"dtype {config.write.dtype} has no effect without --model: it is BiART's.")


def _tasks(config: EvalBiARTConfig) -> tuple[str, ...]:
    j, shapes = config.judged, config.data.dataset == "shapes"
    can = {
        "generation": bool(j.model or j.generated_dir),
        "captions": bool(j.model or j.captions_file),
        "zero_shot": bool(j.model and config.likelihood.classes_dir),
        "shapes": bool(j.model and shapes),
    }
    needs = {
        "generation": "--model or --generated_dir",
        "captions": "--model or --captions_file",
        "zero_shot": "--model and --classes_dir",
        "shapes": "--model and --dataset shapes",
    }
    for task in j.tasks:
        if task not in TASKS:
            raise ConfigError(f"tasks: {task!r} is not one of {', '.join(TASKS)}.")
        if not can.get(task, bool(j.model)):
            raise ConfigError(f"tasks: {task} needs {needs.get(task, '--model')}.")
    if not (j.model or j.tasks) and config.likelihood.classes_dir:
        raise ConfigError("classes_dir: classification is by a model's likelihood; give --model.")
    chosen = tuple(task for task in TASKS if (task in j.tasks if j.tasks else can.get(task, bool(j.model))))
    for task, name in (("generation", "generated_dir"), ("captions", "captions_file"), ("zero_shot", "classes_dir")):
        where = config.likelihood if name == "classes_dir" else j
        if getattr(where, name) and task not in chosen:
            raise ConfigError(f"{name} has no effect without the task {task}: leave it out, or add it to tasks.")
    return chosen


def _resolve_data(d: EvalDataConfig) -> EvalDataConfig:
    if d.fake_data and d.dataset not in (None, "fake"):
        raise ConfigError(f"dataset: {d.dataset} contradicts fake_data: true. Give one of them.")
    dataset = "fake" if d.fake_data else d.dataset or "pairs"
    d = replace(d, dataset=dataset, fake_data=dataset == "fake")
    made = d.dataset in ("fake", "shapes")
    if d.test_size is not None and not made:
        raise ConfigError(f"test_size has no effect with dataset {d.dataset}: all its pairs are used.")
    if made and (d.test_dir or d.test_captions):
        raise ConfigError(f"test_dir and test_captions have no effect with dataset {d.dataset}, which is made up.")
    if made:
        return d
    if d.dataset == "table" and not d.test_captions:
        raise ConfigError("test_captions is not given; dataset table needs it: the .csv, .tsv or .jsonl.")
    if d.dataset != "table" and not d.test_dir:
        raise ConfigError("test_dir is not given: name the test pictures, or try --fake_data or --dataset shapes.")
    if d.dataset == "karpathy" and not d.test_captions:
        raise ConfigError("test_captions is not given; dataset karpathy needs it: dataset_coco.json.")
    if d.dataset == "pairs" and d.test_captions:
        raise ConfigError("test_captions has no effect with dataset pairs: choose coco, karpathy or table.")
    return d


def _check_numbers(config: EvalBiARTConfig) -> None:
    g = config.generation
    if g.is_greedy and g.candidates > 1:
        raise ConfigError(f"candidates {g.candidates} has no effect at temperature 0: raise temperature.")
    if not g.blur_radii or len(set(g.blur_radii)) < len(g.blur_radii):
        raise ConfigError(f"blur_radii is {list(g.blur_radii)}; give one or more different radii.")
    if "{}" not in config.likelihood.class_prompt:
        raise ConfigError(f"class_prompt is {config.likelihood.class_prompt!r}; it needs {{}} where the name goes.")
    if config.likelihood.class_names and not config.likelihood.classes_dir:
        raise ConfigError("class_names has no effect without classes_dir.")
