"""The joint vocabulary and the packing of [reference ; target]."""

import pytest
import torch

from latent_verse.biart.sequence import IGNORE, IMAGE_TO_TEXT, TEXT_TO_IMAGE, Vocabulary, target_modality
from tests.messages import naming

VOCAB = Vocabulary(text_vocab=10, image_vocab=6, text_len=3, image_len=4)
PAD, BOT, BOI, NULL = 16, 17, 18, 19


def test_ids_are_text_then_codes_then_specials():
    assert (VOCAB.image_start, VOCAB.pad, VOCAB.begin_text, VOCAB.begin_image, VOCAB.null) == (10, PAD, BOT, BOI, NULL)
    assert VOCAB.size == 20
    assert VOCAB.class_ids("text").tolist() == [*range(10), PAD]
    assert VOCAB.class_ids("image").tolist() == list(range(10, 16))


def test_pad_and_unpad_text():
    ids = [[1, 2], [], [3, 4, 5]]
    text_BL = VOCAB.pad_text(ids)
    assert text_BL.tolist() == [[1, 2, PAD], [PAD, PAD, PAD], [3, 4, 5]]
    assert VOCAB.unpad_text(text_BL) == ids
    assert VOCAB.pad_text([[1, 2, 3, 4]], truncate=True).tolist() == [[1, 2, 3]]
    with pytest.raises(ValueError, match=naming("text 0", 4, "text_len", 3)):
        VOCAB.pad_text([[1, 2, 3, 4]])


def test_pack_by_hand_in_both_directions():
    text_BL, codes_BN = VOCAB.pad_text([[7]]), torch.tensor([[0, 5, 2, 2]])
    forth = VOCAB.pack(text_BL, codes_BN, TEXT_TO_IMAGE)
    assert forth.idx_BT.tolist() == [[BOT, 7, PAD, PAD, BOI, 10, 15, 12]]
    assert forth.seg_BT.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    back = VOCAB.pack(text_BL, codes_BN, IMAGE_TO_TEXT)
    assert back.idx_BT.tolist() == [[BOI, 10, 15, 12, 12, BOT, 7, PAD]]
    assert back.seg_BT.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    for packed in (forth, back):  # the first pad is learnt as the end of the text, the second is not
        assert packed.text_BL.tolist() == [[7, 10, IGNORE]]
        assert packed.codes_BN.tolist() == [[0, 5, 2, 2]]
        assert packed.idx_BT.shape[1] == VOCAB.input_len


@pytest.mark.parametrize("direction", [TEXT_TO_IMAGE, IMAGE_TO_TEXT])
def test_positions_point_at_the_input_before_each_target(direction):
    text_BL, codes_BN = torch.tensor([[7, 8, 9]]), torch.tensor([[0, 5, 2, 2]])
    packed = VOCAB.pack(text_BL, codes_BN, direction)
    following = packed.idx_BT[0, 1:].tolist()
    for modality, expected in (("text", [7, 8, 9]), ("image", [10, 15, 12, 12])):
        positions = list(range(VOCAB.input_len))[VOCAB.positions(direction, modality)]
        assert len(positions) == VOCAB.length(modality)
        assert [following[p] for p in positions if p < len(following)] == expected[: len(positions)][
            : sum(p < len(following) for p in positions)
        ]
    target = VOCAB.positions(direction, target_modality(direction))
    assert packed.seg_BT[0].tolist() == [int(target.start <= p < target.stop) for p in range(VOCAB.input_len)]


def test_mixed_batch_is_the_two_directions_stacked():
    text_BL, codes_BN = torch.randint(10, (5, 3)), torch.randint(6, (5, 4))
    mixed = VOCAB.pack(text_BL, codes_BN, 2)
    forth = VOCAB.pack(text_BL[:2], codes_BN[:2], TEXT_TO_IMAGE)
    back = VOCAB.pack(text_BL[2:], codes_BN[2:], IMAGE_TO_TEXT)
    for name in ("idx_BT", "seg_BT", "text_BL", "codes_BN"):
        assert torch.equal(getattr(mixed, name), torch.cat([getattr(forth, name), getattr(back, name)]))
    assert list(mixed.parts()) == [(TEXT_TO_IMAGE, slice(0, 2)), (IMAGE_TO_TEXT, slice(2, 5))]
    assert [d for d, _ in forth.parts()] == [TEXT_TO_IMAGE] and [d for d, _ in back.parts()] == [IMAGE_TO_TEXT]


def test_reference_dropout_nulls_the_reference_and_its_loss_only():
    text_BL, codes_BN = torch.randint(10, (4, 3)), torch.randint(6, (4, 4))
    plain = VOCAB.pack(text_BL, codes_BN, 2)
    packed = VOCAB.pack(text_BL, codes_BN, 2, reference_dropout=1.0)
    assert packed.idx_BT[:2, :5].tolist() == [[BOT, NULL, NULL, NULL, BOI]] * 2
    assert packed.idx_BT[2:, :6].tolist() == [[BOI, NULL, NULL, NULL, NULL, BOT]] * 2
    assert torch.equal(packed.idx_BT[:2, 5:], plain.idx_BT[:2, 5:])
    assert torch.equal(packed.idx_BT[2:, 6:], plain.idx_BT[2:, 6:])
    assert (packed.text_BL[:2] == IGNORE).all() and torch.equal(packed.text_BL[2:], plain.text_BL[2:])
    assert (packed.codes_BN[2:] == IGNORE).all() and torch.equal(packed.codes_BN[:2], plain.codes_BN[:2])


def test_reference_dropout_is_per_sample_with_the_probability_and_the_generator():
    text_BL, codes_BN = torch.randint(10, (4000, 3)), torch.randint(6, (4000, 4))
    packed = [VOCAB.pack(text_BL, codes_BN, 2000, 0.1, torch.Generator().manual_seed(3)).idx_BT for _ in range(2)]
    assert torch.equal(*packed)
    share = (packed[0][:, 1] == NULL).float().mean()
    assert 0.08 < share < 0.12
    assert torch.equal((packed[0][:, 1] == NULL), (packed[0][:, 3] == NULL))


def test_random_choices_are_drawn_in_a_fixed_order():
    """A run that is resumed with another version of the code has the same numbers."""
    text_BL, codes_BN = torch.randint(10, (60, 3)), torch.randint(6, (60, 4))
    generator = torch.Generator().manual_seed(5)
    packed = VOCAB.pack(text_BL, codes_BN, 20, 0.3, generator, word_dropout=0.4, code_dropout=0.2)
    generator.manual_seed(5)
    dropped_B = torch.rand(60, generator=generator) < 0.3
    assert torch.equal(packed.idx_BT[:, 1] == NULL, dropped_B)
    for rows, start, share in ((slice(0, 20), 5, 0.2), (slice(20, 60), 6, 0.4)):
        size = packed.idx_BT[rows, start:].shape
        share_B1 = 2 * share * torch.rand(size[0], 1, generator=generator)
        assert torch.equal(packed.idx_BT[rows, start:] == NULL, torch.rand(size, generator=generator) < share_B1)


@pytest.mark.parametrize(
    "name, rows, start", [("code_dropout", slice(0, 2000), 5), ("word_dropout", slice(2000, 4000), 6)]
)
def test_what_is_dropped_is_hidden_from_what_comes_after_it_and_still_learnt(name, rows, start):
    text_BL, codes_BN = torch.randint(10, (4000, 3)), torch.randint(6, (4000, 4))
    plain = VOCAB.pack(text_BL, codes_BN, 2000)
    packed, again = (
        VOCAB.pack(text_BL, codes_BN, 2000, generator=torch.Generator().manual_seed(3), **{name: 0.3}) for _ in range(2)
    )
    assert torch.equal(packed.idx_BT, again.idx_BT)
    hidden_BT = packed.idx_BT == NULL
    assert torch.equal(packed.idx_BT[~hidden_BT], plain.idx_BT[~hidden_BT])
    target_BT = hidden_BT[rows, start:].clone()
    hidden_BT[rows, start:] = False
    assert not hidden_BT.any()  # the other direction, references and begin tokens stay
    assert 0.28 < target_BT.float().mean() < 0.32
    assert 0.10 < target_BT[:, :2].all(1).float().mean() < 0.14  # 0.12, as rows differ; with one share for all, 0.09
    assert torch.equal(packed.text_BL, plain.text_BL) and torch.equal(packed.codes_BN, plain.codes_BN)
    assert torch.equal(packed.seg_BT, plain.seg_BT)
    with pytest.raises(ValueError, match=naming(name, 0.6)):
        VOCAB.pack(text_BL, codes_BN, 2000, **{name: 0.6})


def test_prompt_is_the_beginning_of_the_packed_sequence():
    text_BL, codes_BN = VOCAB.pad_text([[7], [1, 2, 3]]), torch.randint(6, (2, 4))
    for direction, reference, target in (
        (TEXT_TO_IMAGE, text_BL, codes_BN),
        (IMAGE_TO_TEXT, codes_BN, torch.tensor([[1, 2, 3], [4, 5, 6]])),
    ):
        whole = VOCAB.pack(text_BL if direction == TEXT_TO_IMAGE else target, codes_BN, direction)
        for known in range(target.shape[1] + 1):
            idx_BT, seg_BT = VOCAB.prompt(reference, direction, target[:, :known])
            assert torch.equal(idx_BT, whole.idx_BT[:, : idx_BT.shape[1]])
            assert torch.equal(seg_BT, whole.seg_BT[:, : idx_BT.shape[1]])
        null = VOCAB.null_reference(2, direction)
        dropped = VOCAB.pack(text_BL, codes_BN, direction, reference_dropout=1.0)
        idx_BT, _ = VOCAB.prompt(null, direction)
        assert torch.equal(idx_BT, dropped.idx_BT[:, : idx_BT.shape[1]])


@pytest.mark.parametrize(
    ("text", "codes", "facts"),
    [
        ([[10, 1, 2]], [[0, 0, 0, 0]], ["text", 10, "[0, 10)", PAD]),
        ([[-1, 1, 2]], [[0, 0, 0, 0]], ["text", -1, "[0, 10)", PAD]),
        ([[PAD, 1, PAD]], [[0, 0, 0, 0]], ["text", "pad"]),
        ([[1, 2]], [[0, 0, 0, 0]], ["text", (1, 2), "text_len", 3]),
        ([[1, 2, 3]], [[0, 6, 0, 0]], ["codes", 6, "[0, 6)", "AugVAE"]),
        ([[1, 2, 3]], [[0, 0, 0]], ["codes", (1, 3), 4]),
        ([[1, 2, 3], [1, 2, 3]], [[0, 0, 0, 0]], [2, 1, "pairs"]),
        ([[NULL, NULL, NULL]], [[0, 0, 0, 0]], ["text", NULL, "[0, 10)", PAD]),
    ],
)
def test_bad_ids_are_refused(text, codes, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        VOCAB.pack(torch.tensor(text), torch.tensor(codes), TEXT_TO_IMAGE)


def test_unknown_direction_and_bad_prefix_are_refused():
    text_BL, codes_BN = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 2, 3]])
    with pytest.raises(ValueError, match=naming("direction", "sideways", TEXT_TO_IMAGE, IMAGE_TO_TEXT)):
        VOCAB.pack(text_BL, codes_BN, "sideways")
    with pytest.raises(ValueError, match=naming("direction", 2, 1)):
        VOCAB.pack(text_BL, codes_BN, 2)
    with pytest.raises(ValueError, match=naming("prefix", "[0, 6)", "image")):
        VOCAB.prompt(text_BL, TEXT_TO_IMAGE, torch.tensor([[6]]))
    with pytest.raises(ValueError, match=naming("prefix", 5, 4)):
        VOCAB.prompt(text_BL, TEXT_TO_IMAGE, torch.zeros(1, 5, dtype=torch.long))


def test_codes_of_small_integer_types_pack_alike():
    text_BL, codes_BN = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 2, 3]])
    small = VOCAB.pack(text_BL.int(), codes_BN.to(torch.uint8), TEXT_TO_IMAGE)
    assert torch.equal(small.idx_BT, VOCAB.pack(text_BL, codes_BN, TEXT_TO_IMAGE).idx_BT)
