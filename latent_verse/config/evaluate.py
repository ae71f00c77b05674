"""Every setting of eval_biart.py, and the rules across them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Optional, Tuple

from latent_verse.config.datasets import EVAL_DATASETS, PAIR_DATASETS, check_effects, check_files, check_local
from latent_verse.config.messages import ConfigError, shown
from latent_verse.config.settings import SamplingSettings, Settings, check_rules, require, same, setting
from latent_verse.config.train import ImageDataConfig, PairDataConfig, TrainerConfig
from latent_verse.config.train_rules import check_processes

TASKS = ("likelihood", "generation", "captions", "retrieval", "zero_shot", "round_trip", "shapes")
DTYPES = ("float32", "bfloat16", "float16")
# which tasks a setting changes; these two stand for a task whose samples the model generates
IMAGES, CAPTIONS = "generation without --generated_dir", "captions without --captions_file"
EFFECTS = {
    "candidates": (IMAGES, "shapes"),
    **dict.fromkeys(("temperature", "top_k", "top_p", "guidance"), (IMAGES, "round_trip", "shapes")),
    **dict.fromkeys(("eval_captions", "fid_resolution", "reference", "reference_stats"), ("generation",)),
    **dict.fromkeys(("generated_dir", "prc_pictures", "prc_neighbours", "is_splits"), ("generation",)),
    **dict.fromkeys(("blur_radii", "clip_model", "clip_weights", "download"), ("generation", "round_trip")),
    **dict.fromkeys(("captions_file", "caption_pictures"), ("captions",)),
    "beams": (CAPTIONS, "round_trip"),
    "likelihood_pairs": ("likelihood",),
    **dict.fromkeys(("retrieval_pictures", "retrieval_captions"), ("retrieval",)),
    **dict.fromkeys(("length_power", "prior_weight", "prior"), ("retrieval", "zero_shot")),
    **dict.fromkeys(("classes_dir", "class_prompt", "class_pictures"), ("zero_shot",)),
    "round_trip_pairs": ("round_trip",),
}
NEEDS = {"candidates": "temperature", "prior": "prior_weight", "class_names": "classes_dir"}
NEEDS |= dict.fromkeys(("classes_dir", "dtype"), "model")


@dataclass(frozen=True)
class EvaluatedConfig(Settings):
    """What to evaluate: a model, another system's outputs, or two finished evaluations side by side."""

    model: Optional[str] = setting(
        None, "model to evaluate: bundle of train_biart.py, hub id, or name of a shipped model", path="hub"
    )
    generated_dir: Optional[str] = setting(None, "evaluate the images in this folder, generate none", path=True)
    captions_file: Optional[str] = setting(None, "captions: COCO results, or captions.jsonl of generate.py", path=True)
    tasks: Tuple[str, ...] = setting((), f"tasks to run, of {' '.join(TASKS)}; default all that are possible", TASKS)
    compare: Tuple[str, ...] = setting((), "two runs (folders or metrics.json files) to print side by side", path=True)


@dataclass(frozen=True)
class EvalDataConfig(Settings):
    """Test images with captions."""

    dataset: Optional[str] = setting(
        None, "layout: name.jpg with name.txt, caption files, or generated; default pairs", EVAL_DATASETS
    )
    fake_data: bool = same(ImageDataConfig, "fake_data", False, "same as --dataset fake: a smoke test without data")
    test_dir: Optional[str] = same(ImageDataConfig, "test_dir", None, "test pairs, or images of coco or karpathy")
    test_captions: Optional[str] = same(PairDataConfig, "train_captions")
    world: str = same(PairDataConfig, "world")
    split: str = setting("val", "shapes: unseen scenes, or held-out pairs of colour and shape", ("val", "heldout"))
    test_size: Optional[int] = setting(
        None, "test pairs for shapes (default 256) or fake (32)", at_least=1, at_most=10**7
    )


@dataclass(frozen=True)
class GenerationConfig(SamplingSettings):
    """Text to image: which captions, how images are sampled, and what they are compared with."""

    eval_captions: int = setting(30000, "number of captions to generate images for, at most all there are", at_least=1)
    candidates: int = setting(
        1, "images per caption; several are also re-ranked by the model and by CLIP", at_least=1, at_most=4096
    )
    blur_radii: Tuple[int, ...] = setting(
        (0, 1, 2, 4, 8), "radii k of FID-k, which blurs both image sets", at_least=0, at_most=1024
    )
    fid_resolution: Optional[int] = setting(
        None, "resolution for FID; default the model's, else 256", at_least=1, at_most=2**14
    )
    reference: str = setting("all", "FID's reference images: all, or those of the sampled captions", ("all", "drawn"))
    reference_stats: Optional[str] = setting(
        None, "statistics of FID's reference set: read if there, else written; default in the run folder", path=True
    )
    prc_pictures: int = setting(
        10000, "largest number of images per set for precision and recall", at_least=2, at_most=10**6
    )
    prc_neighbours: int = setting(
        3, "nearest neighbours that define the manifold for precision and recall", at_least=1, at_most=10**4
    )
    is_splits: int = setting(10, "splits for the mean and deviation of Inception Score", at_least=1, at_most=10**4)


@dataclass(frozen=True)
class CaptionConfig(Settings):
    """Image to text."""

    caption_pictures: Optional[int] = setting(None, "largest number of images to caption; default all", at_least=1)
    beams: int = setting(1, "beam search for captions with this many beams; 1 is greedy", at_least=1, at_most=1024)
    java: bool = setting(True, "use Java if installed, for the standard caption tokenizer, METEOR and SPICE")


@dataclass(frozen=True)
class LikelihoodConfig(Settings):
    """What is measured with log p(text | image) and log p(image | text)."""

    likelihood_pairs: int = setting(1000, "sampled pairs to measure the held-out likelihood on", at_least=1)
    retrieval_pictures: int = setting(
        100, "images in the retrieval pool, each scored with every caption", at_least=2, at_most=10**5
    )
    retrieval_captions: int = setting(
        1, "captions per image in the retrieval pool (Karpathy: 5)", at_least=1, at_most=1000
    )
    length_power: float = setting(0.0, "divide log p(text | image) by tokens^this: 0 gives sum, 1 mean", at_least=0)
    prior_weight: float = setting(0.0, "subtract this x the candidate's prior log p; 1: mutual information", at_least=0)
    prior: str = setting("null", "null: log p without a reference; pool: mean over the pool", ("null", "pool"))
    classes_dir: Optional[str] = setting(None, "class folders of images, for zero-shot classification", path=True)
    class_names: Optional[str] = setting(None, "file of lines `folder<TAB>class name`; default folder names", path=True)
    class_prompt: str = setting("a photo of a {}", "text that is scored for a class; {} stands for its name")
    class_pictures: Optional[int] = setting(None, "largest number of images to classify; default all", at_least=1)
    round_trip_pairs: int = setting(100, "sampled pairs for round trips, in both directions", at_least=2)


@dataclass(frozen=True)
class NetworksConfig(Settings):
    """Networks of the metrics. Metrics whose weights are missing are skipped and reported; the rest still run."""

    clip_model: str = setting("ViT-B-32", "architecture for CLIP scores, as open_clip names it")
    clip_weights: str = setting("openai", "weights of clip_model: a tag of open_clip, or a file", path=True)
    download: bool = setting(False, "download missing weights once, hash-checked, to the caches of torch and CLIP")


@dataclass(frozen=True)
class EvalWriteConfig(Settings):
    """Where results go, and which machine computes."""

    name: Optional[str] = same(TrainerConfig, "name", None, "run folder; default eval-[fake-]<model>-<tasks given>")
    log_dir: str = same(TrainerConfig, "log_dir")
    seed: int = setting(0, "seed for the choice of pairs and for sampling", at_least=0)
    gpus: int = same(
        TrainerConfig, "gpus", 1, "number of processes, each with a GPU of CUDA_VISIBLE_DEVICES; 0 is the CPU"
    )
    accelerator: str = setting("auto", "auto, or cpu (then gpus is the number of processes)", ("auto", "cpu"))
    dtype: str = setting("float32", "precision of BiART on every device; if not float32, each metric says so", DTYPES)
    num_workers: Optional[int] = setting(
        None, "threads that read and blur images; default by machine", at_least=1, at_most=512
    )
    batch_size: int = same(ImageDataConfig, "batch_size", 64, "batch size for generating and for evaluating")
    page_cases: int = setting(8, "examples on the page, for each of best, median and worst", at_least=0, at_most=1000)


@dataclass(frozen=True)
class EvalBiARTConfig:
    """Every setting of eval_biart.py."""

    judged: EvaluatedConfig = field(default_factory=EvaluatedConfig)
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    networks: NetworksConfig = field(default_factory=NetworksConfig)
    write: EvalWriteConfig = field(default_factory=EvalWriteConfig)


def resolve_eval_biart(config: EvalBiARTConfig, given: Mapping[str, str]) -> tuple[EvalBiARTConfig, tuple[str, ...]]:
    """The configuration of an evaluation, and its tasks, none for --compare.

    Raises:
        ConfigError: a configuration that could never work, naming the setting, its value and the remedy.
    """
    j = config.judged
    if j.compare:
        others = sorted(leaf for leaf in given if leaf != "compare")
        if len(j.compare) != 2:
            raise ConfigError(f"compare needs two folders or metrics.json files, but has {len(j.compare)}.")
        if others:
            raise ConfigError(f"--{others[0]} has no effect with --compare, which reads two finished runs.")
        return config, ()
    require([j], "model", "generated_dir", "captions_file", "compare")
    check_rules(vars(config).values(), NEEDS)
    check_processes(config.write.gpus, config.write.accelerator)
    config = replace(config, data=_resolve_data(config.data))
    if len(set(config.generation.blur_radii)) < len(config.generation.blur_radii):
        raise ConfigError(f"blur_radii is {list(config.generation.blur_radii)}; give different radii.")
    if "{}" not in config.likelihood.class_prompt:
        raise ConfigError(
            f"class_prompt is {shown(config.likelihood.class_prompt)}; it needs {{}} where the name goes."
        )
    tasks = _tasks(config)
    _check_effects(config, tasks)
    return config, tasks


def _check_effects(config: EvalBiARTConfig, tasks: tuple[str, ...]) -> None:
    """Refuse a setting that is not its default and that nothing of this run reads."""
    j, g = config.judged, config.generation
    done = {*tasks}
    done |= {IMAGES} if "generation" in tasks and not j.generated_dir else set()
    done |= {CAPTIONS} if "captions" in tasks and not j.captions_file else set()
    default = EvalBiARTConfig()
    for section in ("judged", "generation", "captions", "likelihood", "networks"):
        for name, value in vars(getattr(config, section)).items():
            changed = value != getattr(getattr(default, section), name)
            if changed and name in EFFECTS and not done & set(EFFECTS[name]):
                where = f"it is read by {' or '.join(EFFECTS[name])}, and this run does {', '.join(tasks)}"
                raise ConfigError(f"{name} has no effect here: {where}.")
    if j.generated_dir and g.reference == "all" and g.eval_captions != default.generation.eval_captions:
        raise ConfigError("eval_captions has no effect with --generated_dir and --reference all: all are evaluated.")


def _tasks(config: EvalBiARTConfig) -> tuple[str, ...]:
    j, shapes = config.judged, config.data.dataset == "shapes"
    needs = dict.fromkeys(TASKS, ("--model", j.model)) | {
        "generation": ("--model or --generated_dir", j.model or j.generated_dir),
        "captions": ("--model or --captions_file", j.model or j.captions_file),
        "zero_shot": ("--model and --classes_dir", j.model and config.likelihood.classes_dir),
        "shapes": ("--model and --dataset shapes", j.model and shapes),
    }
    for task in j.tasks:
        if not needs[task][1]:
            raise ConfigError(f"tasks: {task} needs {needs[task][0]}.")
    return tuple(task for task in TASKS if (task in j.tasks if j.tasks else needs[task][1]))


def _resolve_data(d: EvalDataConfig) -> EvalDataConfig:
    if d.fake_data and d.dataset not in (None, "fake"):
        raise ConfigError(f"dataset: {d.dataset} contradicts fake_data: true. Give one of them.")
    dataset = "fake" if d.fake_data else d.dataset or "pairs"
    d = replace(d, dataset=dataset, fake_data=dataset == "fake")
    layouts = {name: PAIR_DATASETS[name] for name in EVAL_DATASETS}
    check_files(layouts, d, "test")
    check_local(d, dataset, "test_dir")
    check_effects(layouts, d, "test", ("dir", "captions", "size", "world", "split"))
    return d
