"""The parts of a run of BiART, as far as no command tests them."""

from __future__ import annotations

from latent_verse.config.cli import parse
from latent_verse.config.train import TrainBiARTConfig
from latent_verse.training.biart_setup import frozen_vae
from tests.messages import naming


def test_an_augvae_of_several_levels_is_told_and_how_to_make_one_of_it(tmp_path, tiny_augvae, capsys):
    """It works, but the transformer has to learn the codes of all levels."""
    multi, single = tiny_augvae(), tiny_augvae().to_single_level(4)
    for name, vae in (("multi", multi), ("single", single)):
        vae.save_pretrained(tmp_path / name)
        config, _ = parse(TrainBiARTConfig, ["--vae_path", str(tmp_path / name)], "")
        _, loaded = frozen_vae(config)
        said = capsys.readouterr().out
        if name == "single":
            assert not said and loaded.num_codes == 16
    config, _ = parse(TrainBiARTConfig, ["--vae_path", str(tmp_path / "multi")], "")
    frozen_vae(config)
    said = capsys.readouterr().out
    flags = f"--finetune --attn_resolutions 8 --pretrained_path {tmp_path / 'multi'}"
    assert naming("AugVAE-ML", "84 codes", "8, 4, 2", "64", flags).search(said) and said.count("\n") == 1
