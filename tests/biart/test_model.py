"""BiART against a textbook GPT-2, the full masked softmax, a loss by hand, and itself with and without a cache."""

import contextlib
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from latent_verse.biart.model import BiART, KVCache, loss_weights
from latent_verse.biart.sequence import DIRECTIONS, IGNORE, IMAGE_TO_TEXT, TEXT_TO_IMAGE, target_modality
from latent_verse.config import PRESETS, BiARTConfig, ConfigError, as_plain
from latent_verse.config.models import BiARTModelConfig, BiARTVariant
from tests.biart.tiny_biart import CONFIG, lively
from tests.messages import naming

BY_MODALITY = dataclasses.replace(CONFIG, pos_by_modality=True)


def pairs(model, batch=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    vocab = model.vocab
    lengths = torch.randint(0, vocab.text_len + 1, (batch,), generator=generator).tolist()
    ids = [torch.randint(vocab.text_vocab, (n,), generator=generator).tolist() for n in lengths]
    codes_BN = torch.randint(vocab.image_vocab, (batch, vocab.image_len), generator=generator)
    return vocab.pad_text(ids), codes_BN


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


def masked_log_softmax(model, sequences):
    """log p by the plain formulation: the full head, -inf outside of the modality that comes next."""
    logits_BTV = model(sequences.idx_BT, sequences.seg_BT)
    mask_BTV = torch.ones_like(logits_BTV, dtype=torch.bool)
    for direction, rows in sequences.parts():
        for modality in ("text", "image"):
            positions = model.vocab.positions(direction, modality)
            ids = model.vocab.class_ids(modality)
            for row in range(rows.start, rows.stop):
                mask_BTV[row, positions] = mask_BTV[row, positions].index_fill(1, ids, False)
    return logits_BTV.masked_fill(mask_BTV, -math.inf).log_softmax(-1)


@pytest.mark.parametrize("chunk", [None, 4])
def test_loss_equals_the_full_masked_softmax_gradients_included(chunk):
    model = lively()
    vocab, weight = model.vocab, 0.3
    sequences = vocab.pack(*pairs(model), 1, reference_dropout=0.5, generator=torch.Generator().manual_seed(5))
    loss, means = model.loss(sequences, loss_weights(weight), chunk)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    log_p_BTV = masked_log_softmax(model, sequences)
    expected = 0.0
    for direction, rows in sequences.parts():
        for modality, class_BT in (("text", sequences.text_BL), ("image", sequences.codes_BN)):
            terms = []
            for row in range(rows.start, rows.stop):
                for i, position in enumerate(range(vocab.input_len)[vocab.positions(direction, modality)]):
                    target = class_BT[row, i]
                    if target != IGNORE:
                        terms.append(-log_p_BTV[row, position, vocab.to_ids(target, modality)])
            mean = torch.stack(terms).mean()
            torch.testing.assert_close(means[f"{direction}/{modality}"], mean.detach())
            share = (rows.stop - rows.start) / len(class_BT)
            expected = expected + share * mean * (1 if modality == target_modality(direction) else weight)
    torch.testing.assert_close(loss, expected)
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_loss_by_hand():
    """A head that says the same everywhere: text id 0 three times as likely as each other class, codes all alike."""
    config = BiARTConfig(text_vocab=3, image_vocab=4, text_len=3, image_len=2, n_layer=1, n_head=1, n_embd=2)
    model = BiART(config)
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(torch.tensor([1.0, 0.0]))
        model.head.weight.zero_()
        model.head.weight[0, 0] = math.log(3)
    text_BL, codes_BN = model.vocab.pad_text([[0, 1], [0]]), torch.tensor([[0, 1], [2, 3]])
    # Text classes 0, 1, 2, end: p(0) = 3/6, the others 1/6. Row 0 has the reference 0, 1, end; row 1 the target 0, end.
    loss, means = model.loss(model.vocab.pack(text_BL, codes_BN, 1), loss_weights(0.5))
    assert means["text_to_image/image"].item() == pytest.approx(math.log(4))
    assert means["text_to_image/text"].item() == pytest.approx((math.log(2) + 2 * math.log(6)) / 3)
    assert means["image_to_text/text"].item() == pytest.approx((math.log(2) + math.log(6)) / 2)
    assert means["image_to_text/image"].item() == pytest.approx(math.log(4))
    forth = math.log(4) + 0.5 * (math.log(2) + 2 * math.log(6)) / 3
    back = (math.log(2) + math.log(6)) / 2 + 0.5 * math.log(4)
    assert loss.item() == pytest.approx((forth + back) / 2)


def test_loss_without_references_and_with_all_of_them_dropped():
    model = lively()
    text_BL, codes_BN = pairs(model)
    loss, means = model.loss(model.vocab.pack(text_BL, codes_BN, 2), loss_weights(0))
    assert set(means) == {"text_to_image/image", "image_to_text/text"}
    assert loss.item() == pytest.approx(sum(m.item() for m in means.values()) / 2)
    loss, means = model.loss(model.vocab.pack(text_BL, codes_BN, 2, reference_dropout=1.0), loss_weights(0.5))
    assert loss.isfinite() and means["text_to_image/text"] == 0


@pytest.mark.parametrize("chunk", [None, 4])
def test_weighted_loss_equals_a_forward_pass_for_each_direction_gradients_included(chunk):
    """The plain formulation: split the batch, weigh the reference against the target, then the modalities."""
    model = lively()
    vocab, own, reference_weight = model.vocab, {"text": 4.0, "image": 0.5}, 0.3
    sequences = vocab.pack(*pairs(model), 1)
    loss, means = model.loss(sequences, loss_weights(reference_weight, **own), chunk)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    expected = 0.0
    for direction, rows in sequences.parts():
        features_BTC = model.features(sequences.idx_BT[rows], sequences.seg_BT[rows])
        classes = {"text": sequences.text_BL[rows], "image": sequences.codes_BN[rows]}
        for modality, class_BT in classes.items():
            logits_BTV = model.modality_logits(features_BTC[:, vocab.positions(direction, modality)], modality)
            mean = F.cross_entropy(logits_BTV.flatten(0, 1), class_BT.flatten(), ignore_index=IGNORE)
            torch.testing.assert_close(means[f"{direction}/{modality}"], mean.detach())
            weight = own[modality] * (1 if modality == target_modality(direction) else reference_weight)
            expected = expected + (rows.stop - rows.start) / len(sequences.idx_BT) * weight * mean
    torch.testing.assert_close(loss, expected)
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_batch_is_read_once_and_heads_without_weight_are_left_out(monkeypatch):
    model, passes = lively(), []
    features = model.features
    monkeypatch.setattr(model, "features", lambda *args: passes.append(len(args[0])) or features(*args))
    sequences = model.vocab.pack(*pairs(model), 1)
    weights = loss_weights(0.5, text=2.0) | {"text_to_image/text": 0}
    _, means = model.loss(sequences, weights)
    assert passes == [4] and set(means) == set(weights) - {"text_to_image/text"}
    with pytest.raises(KeyError, match="image_to_text"):
        model.loss(sequences, {f"text_to_image/{modality}": 1.0 for modality in ("text", "image")})


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_losses_of_two_processes_average_to_that_of_the_joined_batch(direction):
    model = lively()
    text_BL = model.vocab.pad_text([[1], [2, 3, 4, 5, 6], [], [7, 8]])
    codes_BN = pairs(model)[1]
    halves, joined = (
        [model.vocab.pack(text_BL[rows], codes_BN[rows], direction) for rows in parts]
        for parts in ((slice(0, 1), slice(1, 4)), (slice(0, 4),))
    )
    counted = [half.counted() for half in halves]
    at = DIRECTIONS.index(direction)
    assert [c[at].tolist() for c in counted] == [[2, 7], [5 + 1 + 3, 3 * 7]]  # a text that is not full has an end
    assert all(c[1 - at].tolist() == [0, 0] for c in counted)
    average = sum(counted) / 2
    shares = [dict(zip((f"{direction}/text", f"{direction}/image"), (c / average)[at], strict=True)) for c in counted]
    losses = [
        model.loss(half, loss_weights(0.5), token_share=share)[0] for half, share in zip(halves, shares, strict=True)
    ]
    expected = model.loss(joined[0], loss_weights(0.5))[0]
    torch.testing.assert_close(sum(losses) / 2, expected)
    assert abs(sum(model.loss(half, loss_weights(0.5))[0] for half in halves) / 2 - expected) > 1e-3


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


def test_bfloat16_weights_run():
    model = lively().bfloat16()
    sequences = model.vocab.pack(*pairs(model), 2)
    loss, _ = model.loss(sequences, loss_weights(0.1))
    reference, _ = model.float().loss(sequences, loss_weights(0.1))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=0.05, atol=0.05)


def test_cross_entropy_is_float32_under_autocast():
    model = lively()
    sequences = model.vocab.pack(*pairs(model), IMAGE_TO_TEXT)
    with torch.autocast("cpu", torch.bfloat16):
        features = model.features(sequences.idx_BT, sequences.seg_BT)
        logits = model.modality_logits(features, "text")
        here = features[:, model.vocab.positions(IMAGE_TO_TEXT, "text")]
        losses = model.token_losses(here, sequences.text_BL, model.head_weight("text"))
        expected = F.cross_entropy(
            logits[:, model.vocab.positions(IMAGE_TO_TEXT, "text")].float().transpose(1, 2),
            sequences.text_BL,
            ignore_index=IGNORE,
            reduction="none",
        )
    assert logits.dtype == torch.bfloat16 and losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-2)


@contextlib.contextmanager
def what_blocks_pass_on(model):
    """The streams that the blocks get and give, and what they add to them, in order."""
    seen = []
    note = lambda block, args, outputs: seen.extend(t for t in (*args, *outputs) if isinstance(t, torch.Tensor))  # noqa: E731
    hooks = [block.register_forward_hook(note) for block in model.blocks]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("autocast", "expected"),
    [(None, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_the_residual_stream_is_bfloat16_under_an_autocast_to_that_only(autocast, expected):
    """float16 might overflow, at 65,504: it is the type of what a block adds, but not of the stream."""
    model = lively()
    sequences = model.vocab.pack(*pairs(model), 2)
    idx_BT, seg_BT = sequences.idx_BT, sequences.seg_BT
    with torch.no_grad(), torch.autocast("cpu", autocast, enabled=autocast is not None):
        for cached in (False, True):
            with what_blocks_pass_on(model) as seen:
                if cached:
                    cache = KVCache(CONFIG, 4, "cpu", autocast or torch.float32)
                    model.prefill(idx_BT[:, :6], seg_BT[:, :6], cache)
                    model.decode(idx_BT[:, 6:7], seg_BT[:, 6:7], cache, torch.tensor([6]), cache.slots(6))
                else:
                    model.features(idx_BT, seg_BT)
            assert len(seen) == (1 + cached) * (3 + 4)  # the first block gets one tensor, the second two
            assert {t.dtype for t in (seen[0], seen[1], seen[3], seen[5])} == {expected}  # streams
            assert seen[2].dtype == (autocast or torch.float32)
    double = model.double()
    with torch.no_grad():
        assert double.features(idx_BT, seg_BT).dtype == torch.float64


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_float32_numbers_are_those_of_whole_blocks_to_the_bit_gradients_included(dropout):
    """The plain formulation: every block ends with its sum, and norms are nn.LayerNorm."""
    model = lively(dataclasses.replace(CONFIG, n_layer=3, resid_pdrop=dropout, embd_pdrop=dropout)).train()
    sequences = model.vocab.pack(*pairs(model), 2)
    idx_BT, seg_BT = sequences.idx_BT, sequences.seg_BT

    def norm(layer, x_BTC):
        return F.layer_norm(x_BTC, layer.normalized_shape, layer.weight, layer.bias, layer.eps)

    def plain():
        x_BTC = model.tok_emb(idx_BT) + model.seg_emb(seg_BT) + model.pos_emb[0, : idx_BT.shape[1]]
        x_BTC = F.dropout(x_BTC, dropout)
        for block in model.blocks:
            x_BTC = x_BTC + block.attn(norm(block.ln1, x_BTC))
            x_BTC = x_BTC + F.dropout(block.mlp(norm(block.ln2, x_BTC)), dropout)
        return norm(model.ln_f, x_BTC)

    results = []
    for features in (plain, lambda: model.features(idx_BT, seg_BT)):
        torch.manual_seed(3)
        model.zero_grad()
        features_BTC = features()
        features_BTC.square().sin().sum().backward()
        results.append([features_BTC.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_losses_and_gradients_under_autocast_are_close_to_those_in_float32():
    torch.manual_seed(0)
    model = BiART(dataclasses.replace(CONFIG, n_layer=24, n_embd=64))  # deep: each block rounds the stream twice
    sequences = model.vocab.pack(*pairs(model, batch=16), 8)
    losses, gradients = [], []
    for autocast in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = model.loss(sequences, loss_weights(0.1))
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    for name, gradient in gradients[0].items():
        assert gradients[1][name].dtype == torch.float32
        assert F.cosine_similarity(gradients[1][name].flatten(), gradient.flatten(), dim=0) > 0.995, name


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_cached_features_under_autocast_equal_uncached(direction):
    model = lively()
    sequences = model.vocab.pack(*pairs(model), direction)
    idx_BT, seg_BT = sequences.idx_BT, sequences.seg_BT
    with torch.no_grad():
        exact = model.features(idx_BT, seg_BT)
        with torch.autocast("cpu", torch.bfloat16):
            expected = model.features(idx_BT, seg_BT)
            cache = KVCache(CONFIG, len(idx_BT), "cpu", torch.bfloat16)
            features = [model.prefill(idx_BT[:, :6], seg_BT[:, :6], cache)]
            for t in range(6, model.vocab.input_len):
                pos_1 = torch.tensor([t])
                features.append(model.decode(idx_BT[:, t : t + 1], seg_BT[:, t : t + 1], cache, pos_1, cache.slots(t)))
    features_BTC = torch.cat(features, dim=1)
    assert features_BTC.dtype == expected.dtype == torch.bfloat16
    rounding = (expected - exact).abs().mean()
    assert (features_BTC - expected).abs().mean() < 1.5 * rounding < 0.02 * exact.abs().mean() * 1.5


def test_import_is_light():
    import subprocess
    import sys

    code = (
        "import sys, latent_verse.biart.sampling;"
        "heavy = {'pytorch_lightning', 'torchvision', 'transformers', 'yaml', 'latent_verse.augvae'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_text_to_image_alone_and_the_other_way_alone():
    model = lively()
    text_BL, codes_BN = pairs(model)
    forth, _ = model.loss(model.vocab.pack(text_BL[:2], codes_BN[:2], TEXT_TO_IMAGE), loss_weights(0.5))
    back, _ = model.loss(model.vocab.pack(text_BL[2:], codes_BN[2:], IMAGE_TO_TEXT), loss_weights(0.5))
    both, _ = model.loss(model.vocab.pack(text_BL, codes_BN, 2), loss_weights(0.5))
    torch.testing.assert_close(both, (forth + back) / 2)
