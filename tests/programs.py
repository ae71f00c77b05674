"""The settings of every program, for tests of what holds for all of them."""

from __future__ import annotations

from latent_verse.config.evaluate import EvalBiARTConfig
from latent_verse.config.generate import GenerateConfig
from latent_verse.config.train import EvalVAEConfig, TrainBiARTConfig, TrainVAEConfig
from latent_verse.demo.run import DemoConfig
from latent_verse.evaluation.shapes_truth import ShapesEvalConfig

PROGRAMS = [
    TrainVAEConfig,
    EvalVAEConfig,
    TrainBiARTConfig,
    EvalBiARTConfig,
    GenerateConfig,
    ShapesEvalConfig,
    DemoConfig,
]
