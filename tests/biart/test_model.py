"""BiART against a textbook GPT-2, and itself with and without a cache; its shapes, parameters and compilation."""

import dataclasses
import math

import pytest
import torch

from latent_verse.biart.model import BiART, KVCache, loss_weights
from latent_verse.biart.sequence import DIRECTIONS, target_modality
from latent_verse.config import PRESETS, BiARTConfig, ConfigError, as_plain
from latent_verse.config.models import BiARTModelConfig, BiARTVariant
from tests.biart.tiny_biart import CONFIG, lively, pairs
from tests.messages import naming

BY_MODALITY = dataclasses.replace(CONFIG, pos_by_modality=True)


def test_logits_equal_hugging_face_gpt2():
    transformers = pytest.importorskip("transformers")
    model = lively()
    with torch.no_grad():
        model.seg_emb.weight.zero_()
    c, vocab = CONFIG, model.vocab
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocab.size,
            n_positions=vocab.input_len,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            activation_function="gelu",
            tie_word_embeddings=False,
        )
    ).eval()
    names = {"wte": "tok_emb", "ln_f": "ln_f", "ln_1": "ln1", "ln_2": "ln2"}
    names |= {"attn.c_attn": "attn.qkv", "attn.c_proj": "attn.proj", "mlp.c_fc": "mlp.0", "mlp.c_proj": "mlp.2"}
    ours, theirs = model.state_dict(), {"lm_head.weight": model.head.weight, "transformer.wpe.weight": model.pos_emb[0]}
    for name in gpt2.state_dict():
        if name in theirs:
            continue
        key = name.removeprefix("transformer.").replace("h.", "blocks.", 1)
        for hf, own in names.items():
            key = key.replace(hf, own)
        # Hugging Face's Conv1D keeps its matrices transposed.
        transposed = key.endswith("weight") and (".attn." in key or ".mlp." in key)
        theirs[name] = ours[key].T if transposed else ours[key]
    gpt2.load_state_dict(theirs)
    idx_BT = torch.randint(vocab.size, (3, vocab.input_len))
    with torch.no_grad():
        expected = gpt2(idx_BT).logits
        logits = model(idx_BT, torch.randint(2, idx_BT.shape))
    assert expected.std() > 0.3  # weights that say something
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_future_tokens_change_nothing_before_them_and_segments_matter():
    model = lively()
    idx_BT = model.vocab.pack(*pairs(model), 2).idx_BT
    seg_BT = model.vocab.pack(*pairs(model), 2).seg_BT
    with torch.no_grad():
        logits = model(idx_BT, seg_BT)
        for t in range(1, idx_BT.shape[1]):
            changed = idx_BT.clone()
            changed[:, t:] = (changed[:, t:] + 1) % model.vocab.size
            other = model(changed, seg_BT)
            assert torch.equal(other[:, :t], logits[:, :t])
            assert not torch.equal(other[:, t], logits[:, t])
        assert (model(idx_BT, 1 - seg_BT) - logits).abs().max() > 1e-2


def test_modality_logits_are_the_full_heads_rows():
    model = lively()
    sequences = model.vocab.pack(*pairs(model), 2)
    with torch.no_grad():
        full = model(sequences.idx_BT, sequences.seg_BT)
        features = model.features(sequences.idx_BT, sequences.seg_BT)
        for modality in ("text", "image"):
            part = model.modality_logits(features, modality)
            torch.testing.assert_close(part, full[..., model.vocab.class_ids(modality)])
    assert model.head_weight("image").data_ptr() == model.head.weight[model.vocab.image_start].data_ptr()


@pytest.mark.parametrize("bucket", [1, 4, 128])  # 1: the CPU's exact slots; larger: the GPU's static shapes
@pytest.mark.parametrize("config", [CONFIG, BY_MODALITY])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_cached_logits_equal_uncached_at_every_step(direction, config, bucket):
    model = lively(config)
    vocab = model.vocab
    sequences = vocab.pack(*pairs(model), direction)
    idx_BT, seg_BT = sequences.idx_BT, sequences.seg_BT
    with torch.no_grad():
        expected = model(idx_BT, seg_BT)
        for start in (1, vocab.positions(direction, target_modality(direction)).start + 1, vocab.input_len):
            cache = KVCache(config, len(idx_BT), "cpu", torch.float32, bucket)
            features = [model.prefill(idx_BT[:, :start], seg_BT[:, :start], cache)]
            for t in range(start, vocab.input_len):
                pos_1 = torch.tensor([t])
                features.append(model.decode(idx_BT[:, t : t + 1], seg_BT[:, t : t + 1], cache, pos_1, cache.slots(t)))
            logits = model.head(torch.cat(features, dim=1))
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
            assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_positions_by_modality_are_the_same_in_both_directions():
    model = lively(BY_MODALITY)
    vocab, embedded = model.vocab, []
    model.seg_emb.weight.data.zero_()
    model.blocks[0].register_forward_pre_hook(lambda module, args: embedded.append(args[0]))
    text_BL, codes_BN = pairs(model)
    sequences = vocab.pack(text_BL.repeat(2, 1), codes_BN.repeat(2, 1), len(text_BL))  # both directions in one batch
    model(sequences.idx_BT, sequences.seg_BT)
    forth, back = embedded[0].chunk(2)
    L, N = vocab.text_len, vocab.image_len
    assert torch.equal(forth[:, :L], back[:, N + 1 :])  # BOT and the text but its last token
    assert torch.equal(forth[:, L + 1 :], back[:, :N])  # BOI and the codes but the last
    plain = lively()
    assert plain.pos_emb.shape[1] == vocab.input_len == model.pos_emb.shape[1] - 1


def test_cache_reorder_moves_rows_in_its_slots_alone():
    cache = KVCache(CONFIG, 3, "cpu", torch.float32)
    before = [torch.randn(cache.k_LBHSD.shape) for _ in range(2)]
    cache.k_LBHSD.copy_(before[0])
    cache.v_LBHSD.copy_(before[1])
    cache.reorder(torch.tensor([2, 2, 0]), slice(4, 6))
    for now, then in zip((cache.k_LBHSD, cache.v_LBHSD), before, strict=True):
        assert torch.equal(now[:, :, :, 4:6], then[:, [2, 2, 0], :, 4:6])
        assert torch.equal(now[:, :, :, :4], then[:, :, :, :4])
        assert torch.equal(now[:, :, :, 6:], then[:, :, :, 6:])


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    config = BiARTConfig(text_vocab=500, image_vocab=500, n_layer=8, n_head=2, n_embd=128)
    model = BiART(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif ".ln" in name or name.startswith("ln"):
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("attn.proj.weight", "mlp.2.weight"))
            expected = 0.02 / math.sqrt(16) if residual else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
    assert model.head.weight is not model.tok_emb.weight


def test_weight_decay_covers_matrices_only_and_every_parameter_once():
    model = BiART(CONFIG)
    decay, rest = model.parameter_groups(0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    listed = [names[id(p)] for p in decay["params"] + rest["params"]]
    assert sorted(listed) == sorted(names.values())
    undecayed = {names[id(p)] for p in rest["params"]}
    assert {n for n in undecayed if n.endswith("weight") and ".ln" not in n} == {
        "tok_emb.weight",
        "seg_emb.weight",
        "ln_f.weight",
    }
    assert "pos_emb" in undecayed


def test_state_dict_keys_are_the_contract():
    block = ["ln1", "attn.qkv", "attn.proj", "ln2", "mlp.0", "mlp.2"]
    expected = {f"blocks.{i}.{n}.{k}" for i in range(2) for n in block for k in ("weight", "bias")}
    expected |= {"tok_emb.weight", "seg_emb.weight", "pos_emb", "ln_f.weight", "ln_f.bias", "head.weight"}
    assert set(BiART(CONFIG).state_dict()) == expected


def test_a_run_names_a_preset_and_what_differs_from_it():
    run = BiARTModelConfig(preset="tiny", n_embd=64)
    lengths = {"text_vocab": 5, "image_vocab": 6, "text_len": 7, "image_len": 8}
    assert run.resolve(**lengths) == BiARTConfig(**lengths, n_layer=4, n_head=4, n_embd=64)
    with pytest.raises(ConfigError, match=naming("n_embd", 64, "n_head", 3)):
        dataclasses.replace(run, n_head=3).resolve(**lengths)
    for variant in dataclasses.fields(BiARTVariant):  # each setting reaches the transformer without being named again
        value = True if variant.default is False else 0.25
        whole = dataclasses.replace(run, **{variant.name: value}).resolve(**lengths)
        assert getattr(whole, variant.name) == value


def test_a_shape_saved_by_an_earlier_version_is_read():
    """What checkpoints and bundles hold: BiARTConfig as a dictionary, in any order, without settings added since."""
    saved = {"text_vocab": 11, "image_vocab": 13, "text_len": 5, "image_len": 7, "n_layer": 2, "n_head": 2}
    saved |= {"n_embd": 32, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    assert BiARTConfig(**saved) == CONFIG
    assert set(as_plain(CONFIG)) == {*saved, "pos_by_modality"}


def test_presets_parameters_and_flops():
    for name, sizes in PRESETS.items():
        config = BiARTConfig(**sizes)
        with torch.device("meta"):
            model = BiART(config)
        blocks = 12 * config.n_layer * config.n_embd**2
        matrices = sum(p.numel() for n, p in model.named_parameters() if n.startswith("blocks") and p.dim() == 2)
        assert matrices == blocks
        assert model.num_parameters() > blocks
        # Between the blocks alone, and the blocks with the whole head.
        attention = 12 * config.n_layer * config.n_embd * 1089
        full = 6 * (blocks + model.vocab.size * config.n_embd) + attention
        assert 6 * blocks + attention < model.flops_per_token() < full, name
    assert CONFIG.n_embd == 32 and BiART(CONFIG).flops_per_token() == pytest.approx(
        6 * (12 * 2 * 32**2 + (5 * 12 + 7 * 13) * 32 / 13) + 12 * 2 * 32 * 13
    )


def test_loss_and_decoding_trace_without_graph_breaks():
    model = lively()
    sequences = model.vocab.pack(*pairs(model), 2)
    torch._dynamo.reset()

    def loss(idx_BT, seg_BT, text_BL, codes_BN):
        return model.loss(type(sequences)(idx_BT, seg_BT, text_BL, codes_BN, 2), loss_weights(0.1))[0]

    compiled = torch.compile(loss, backend="eager", fullgraph=True, dynamic=False)
    arguments = sequences.idx_BT, sequences.seg_BT, sequences.text_BL, sequences.codes_BN
    torch.testing.assert_close(compiled(*arguments), loss(*arguments))

    cache = KVCache(CONFIG, 4, "cpu", torch.float32, bucket=8)
    with torch.no_grad():
        model.prefill(sequences.idx_BT[:, :6], sequences.seg_BT[:, :6], cache)
        step = torch.compile(model.decode, backend="eager", fullgraph=True, dynamic=False)
        expected = model.features(sequences.idx_BT, sequences.seg_BT)
        for t in range(6, 13):
            idx_B1, seg_B1 = sequences.idx_BT[:, t : t + 1], sequences.seg_BT[:, t : t + 1]
            feature_B1C = step(idx_B1, seg_B1, cache, torch.tensor([t]), cache.slots(t))
            torch.testing.assert_close(feature_B1C[:, 0], expected[:, t], atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_blocks_are_compiled_once_for_all_and_cached_decoding_compiles_nothing():
    """Once for the first block, which gets no branch, and once for all others."""
    config = dataclasses.replace(CONFIG, n_layer=5)
    model, compiled = lively(config), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    sequences = model.vocab.pack(*pairs(model), 2)
    idx_BT, seg_BT = sequences.idx_BT, sequences.seg_BT
    torch._dynamo.reset()
    model.call_block = torch.compile(BiART.call_block, dynamic=False, backend=backend)
    with torch.no_grad():
        cache = KVCache(config, 4, "cpu", torch.float32)
        model.prefill(idx_BT[:, :6], seg_BT[:, :6], cache)
        feature_B1C = model.decode(idx_BT[:, 6:7], seg_BT[:, 6:7], cache, torch.tensor([6]), cache.slots(6))
        assert not compiled
        expected = model.features(idx_BT, seg_BT)
    assert len(compiled) == 2 < len(model.blocks) - 1
    torch.testing.assert_close(feature_B1C[:, 0], expected[:, 6], atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_dropout_acts_in_training_only():
    config = BiARTConfig(**{**vars(CONFIG), "embd_pdrop": 0.2, "resid_pdrop": 0.2, "attn_pdrop": 0.2})
    model = lively(config)
    sequences = model.vocab.pack(*pairs(model), 2)
    with torch.no_grad():
        assert torch.equal(model(sequences.idx_BT, sequences.seg_BT), model.eval()(sequences.idx_BT, sequences.seg_BT))
        model.train()
        assert not torch.equal(model(sequences.idx_BT, sequences.seg_BT), model(sequences.idx_BT, sequences.seg_BT))


def test_a_few_steps_learn_both_directions_of_one_batch():
    torch.manual_seed(0)
    model = BiART(CONFIG)
    sequences = model.vocab.pack(*pairs(model), 2)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.01), lr=1e-2)
    for _ in range(60):
        loss, means = model.loss(sequences, loss_weights(0.1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert means["text_to_image/image"] < 0.3 and means["image_to_text/text"] < 0.3


def test_import_is_light():
    import subprocess
    import sys

    code = (
        "import sys, latent_verse.biart.sampling;"
        "heavy = {'pytorch_lightning', 'torchvision', 'transformers', 'yaml', 'latent_verse.augvae'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
