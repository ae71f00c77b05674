"""The joint vocabulary and the layout [reference ; target] of BiART (paper section 3.2). Integers only, no weights.

Shape suffixes: B samples, L text tokens, N image codes, K codes already known, T = L + N + 1 positions of the network.

    text_to_image   BOT t_1 .. t_L  BOI i_1 .. i_N        segment 0: BOT and the text, segment 1: BOI and the codes
    image_to_text   BOI i_1 .. i_N  BOT t_1 .. t_L        segment 0: BOI and the codes, segment 1: BOT and the text

The network reads all tokens but the last and predicts all but the first. Both directions have the same static length,
and causality is the only attention mask. The begin token of the second half is never predicted: the layout gives it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latent_verse.config import BiARTConfig

Direction = Literal["text_to_image", "image_to_text"]
Modality = Literal["text", "image"]
TEXT_TO_IMAGE: Direction = "text_to_image"
IMAGE_TO_TEXT: Direction = "image_to_text"
DIRECTIONS: tuple[Direction, ...] = (TEXT_TO_IMAGE, IMAGE_TO_TEXT)
MODALITIES: tuple[Modality, ...] = ("text", "image")
IGNORE = -100  # the class that a cross-entropy leaves out (torch's default ignore_index)


def target_modality(direction: Direction) -> Modality:
    """What `direction` generates.

    Raises:
        ValueError: there is no such direction.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; it must be one of {', '.join(DIRECTIONS)}.")
    return "image" if direction == TEXT_TO_IMAGE else "text"


@dataclass(frozen=True)
class Sequences:
    """A packed batch. Its first `num_text_to_image` rows are text_to_image, all others image_to_text.

    Attributes:
        idx_BT, seg_BT: what the network reads: joint ids and segments.
        text_BL, codes_BN: what it has to predict, as classes of each modality's head: a text id or `text_vocab` (the
            end of the text), and a code. IGNORE where nothing is to be learnt.
    """

    idx_BT: Tensor
    seg_BT: Tensor
    text_BL: Tensor
    codes_BN: Tensor
    num_text_to_image: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Sequences:
        """The same batch on `device`."""
        tensors = (self.idx_BT, self.seg_BT, self.text_BL, self.codes_BN)
        idx_BT, seg_BT, text_BL, codes_BN = (t.to(device, non_blocking=non_blocking) for t in tensors)
        return Sequences(idx_BT, seg_BT, text_BL, codes_BN, self.num_text_to_image)

    def classes(self, modality: Modality) -> Tensor:
        """`text_BL` or `codes_BN`."""
        return self.text_BL if modality == "text" else self.codes_BN

    def parts(self) -> Iterator[tuple[Direction, slice]]:
        """(direction, rows) of each direction that the batch holds."""
        n, batch = self.num_text_to_image, len(self.idx_BT)
        if n:
            yield TEXT_TO_IMAGE, slice(0, n)
        if n < batch:
            yield IMAGE_TO_TEXT, slice(n, batch)

    def counted(self) -> Tensor:
        """How many tokens each mean of the loss is over: (2, 2) float32, by direction and then by modality."""
        both_B2 = torch.stack([(self.classes(m) != IGNORE).sum(1) for m in MODALITIES], dim=1).float()
        return torch.stack([both_B2[: self.num_text_to_image].sum(0), both_B2[self.num_text_to_image :].sum(0)])


@dataclass(frozen=True)
class Vocabulary:
    """Joint ids: text ids [0, text_vocab), image codes, then the specials pad, begin-of-text, begin-of-image, null.

    `pad` fills a caption up to text_len; the first one is also the end of the text, where sampling stops.
    `null` replaces every token of a dropped reference (classifier-free guidance; Ho & Salimans, 2022).
    """

    text_vocab: int
    image_vocab: int
    text_len: int
    image_len: int

    @classmethod
    def of(cls, config: BiARTConfig) -> Vocabulary:
        return cls(config.text_vocab, config.image_vocab, config.text_len, config.image_len)

    @property
    def image_start(self) -> int:
        return self.text_vocab

    @property
    def pad(self) -> int:
        return self.text_vocab + self.image_vocab

    @property
    def begin_text(self) -> int:
        return self.pad + 1

    @property
    def begin_image(self) -> int:
        return self.pad + 2

    @property
    def null(self) -> int:
        return self.pad + 3

    @property
    def size(self) -> int:
        return self.pad + 4

    @property
    def input_len(self) -> int:
        """T, the number of positions that the network reads."""
        return self.text_len + self.image_len + 1

    def length(self, modality: Modality) -> int:
        """Tokens of a text or codes of an image."""
        return self.text_len if modality == "text" else self.image_len

    def num_classes(self, modality: Modality) -> int:
        """Number of classes of a modality's head: the text ids and the end of the text, or the codes."""
        return self.text_vocab + 1 if modality == "text" else self.image_vocab

    def positions(self, direction: Direction, modality: Modality) -> slice:
        """The L or N input positions whose next token belongs to `modality`."""
        length = self.length(modality)
        start = self.input_len - length if modality == target_modality(direction) else 0
        return slice(start, start + length)

    def pad_text(self, ids: Sequence[Sequence[int]], truncate: bool = False) -> Tensor:
        """Lists of text ids -> text_BL; `truncate` cuts those of more than text_len.

        Raises:
            ValueError: an id is not a text id, or a text is too long and not cut.
        """
        text_BL = torch.full((len(ids), self.text_len), self.pad, dtype=torch.long)
        for row, tokens in enumerate(ids):
            if len(tokens) > self.text_len and not truncate:
                raise ValueError(
                    f"text {row} has {len(tokens)} tokens, but text_len is {self.text_len}: shorten the text, "
                    "pass truncate=True, or train with a larger text_len."
                )
            text_BL[row, : len(tokens)] = torch.as_tensor(list(tokens)[: self.text_len], dtype=torch.long)
        self.check_text(text_BL)
        return text_BL

    def unpad_text(self, text_BL: Tensor) -> list[list[int]]:
        """The inverse of `pad_text`: the ids of each row up to its first pad."""
        return [row[: row.index(self.pad)] if self.pad in row else row for row in text_BL.tolist()]

    def null_reference(self, batch: int, direction: Direction, device: torch.device | str | None = None) -> Tensor:
        """A dropped reference, to generate without a text or an image: (batch, L or N) of `null`."""
        length = self.image_len if target_modality(direction) == "text" else self.text_len
        return torch.full((batch, length), self.null, dtype=torch.long, device=device)

    def check_text(self, text_BL: Tensor, allow_null: bool = False) -> None:
        """Check that each row of text_BL has text ids and then only pads, or with `allow_null` only nulls.

        Raises:
            ValueError: the shape is wrong, or a row has anything else.
        """
        if text_BL.dim() != 2 or text_BL.shape[1] != self.text_len:
            raise ValueError(
                f"text has shape {tuple(text_BL.shape)}; it must be (batch, text_len={self.text_len}): see pad_text."
            )
        is_pad = text_BL == self.pad
        allowed = (text_BL >= 0) & (text_BL < self.text_vocab) | is_pad
        if allow_null:
            allowed |= (text_BL == self.null).all(dim=1, keepdim=True)
        if not bool(allowed.all()):
            raise ValueError(
                f"text contains the id {int(text_BL[~allowed][0])}, outside of [0, {self.text_vocab}) and not pad "
                f"({self.pad}): encode it with the tokenizer BiART was trained with, and pad it with pad_text."
            )
        if bool((is_pad[:, :-1] & ~is_pad[:, 1:]).any()):
            raise ValueError("text continues after a pad: only the end of a row may be padded.")

    def check_codes(self, codes_BN: Tensor, allow_null: bool = False) -> None:
        """Check that each row of codes_BN has only codes, or with `allow_null` only nulls.

        Raises:
            ValueError: the shape is wrong, or a row has anything else.
        """
        if codes_BN.dim() != 2 or codes_BN.shape[1] != self.image_len:
            raise ValueError(
                f"codes have shape {tuple(codes_BN.shape)}; they must be (batch, {self.image_len}): "
                "check that the AugVAE and the image size are those BiART was built for."
            )
        allowed = (codes_BN >= 0) & (codes_BN < self.image_vocab)
        if allow_null:
            allowed |= (codes_BN == self.null).all(dim=1, keepdim=True)
        if not bool(allowed.all()):
            raise ValueError(
                f"codes contain {int(codes_BN[~allowed][0])}, outside of [0, {self.image_vocab}): "
                "encode the images with the AugVAE BiART was trained with."
            )

    def to_ids(self, classes: Tensor, modality: Modality) -> Tensor:
        """Classes of a modality's head -> joint ids."""
        if modality == "image":
            return classes + self.image_start
        return torch.where(classes == self.text_vocab, self.pad, classes)

    def class_ids(self, modality: Modality, device: torch.device | str | None = None) -> Tensor:
        """The joint id of every class of a modality's head, in order."""
        return self.to_ids(torch.arange(self.num_classes(modality), device=device), modality)

    def segments(self, direction: Direction, device: torch.device | str | None = None) -> Tensor:
        """seg_T: 0 in the part that is given (begin token and reference), 1 in the part that is generated."""
        seg_T = torch.zeros(self.input_len, dtype=torch.long, device=device)
        seg_T[self.positions(direction, target_modality(direction))] = 1
        return seg_T

    def pack(
        self,
        text_BL: Tensor,
        codes_BN: Tensor,
        direction: Direction | int,
        reference_dropout: float = 0.0,
        generator: torch.Generator | None = None,
        word_dropout: float = 0.0,
        code_dropout: float = 0.0,
        validate: bool = True,
    ) -> Sequences:
        """Pairs of text and codes -> what the network reads and what it has to predict.

        Args:
            direction: one of DIRECTIONS, or how many of the first rows are text_to_image, the others image_to_text; a
                constant number keeps every shape static.
            reference_dropout: the probability that all tokens of a sample's reference become `null`, except its begin
                token, and that its loss is left out.
            word_dropout, code_dropout: the share of the tokens of target texts and images that the tokens after them
                see as `null`, more in some rows and fewer in others. They are still predicted (Bowman et al., 2016).
            generator: makes the random choices reproducible; on the ids' device, whose own one is the default.
            validate: check that ids are in range, which waits for the GPU if the tensors are on one.

        Raises:
            ValueError: ids, a share or the number of rows are out of range.
        """
        text_BL, codes_BN = text_BL.long(), codes_BN.long()
        if validate:
            self.check_text(text_BL)
            self.check_codes(codes_BN)
        # Random numbers are made on the device: masks made on the CPU would have to be copied, and each copy waits.
        batch, device = len(text_BL), text_BL.device
        if len(codes_BN) != batch:
            raise ValueError(f"There are {batch} texts but codes of {len(codes_BN)} images: they must come in pairs.")
        n = batch * (target_modality(direction) == "image") if isinstance(direction, str) else direction
        if not 0 <= n <= batch:
            raise ValueError(f"direction asks for {n} rows text_to_image in a batch of {batch}.")
        if not 0 <= reference_dropout <= 1:
            raise ValueError(f"reference_dropout is {reference_dropout}; it is a probability.")
        for name, share in (("word_dropout", word_dropout), ("code_dropout", code_dropout)):
            if not 0 <= share <= 0.5:
                raise ValueError(f"{name} is {share}; it must lie between 0 and 0.5.")

        # The first pad is learnt as the end of the text; what follows it is not.
        is_pad_BL = text_BL == self.pad
        text_class_BL = text_BL.masked_fill(is_pad_BL, self.text_vocab)
        text_class_BL = text_class_BL.masked_fill(is_pad_BL.cumsum(dim=1) > 1, IGNORE)
        image_class_BN, image_BN = codes_BN, codes_BN + self.image_start

        if reference_dropout > 0:
            dropped_B = torch.rand(batch, generator=generator, device=device) < reference_dropout
            first_B = torch.arange(batch, device=device) < n
            text_dropped_B1, image_dropped_B1 = (dropped_B & first_B)[:, None], (dropped_B & ~first_B)[:, None]
            text_BL = text_BL.masked_fill(text_dropped_B1, self.null)
            text_class_BL = text_class_BL.masked_fill(text_dropped_B1, IGNORE)
            image_BN = image_BN.masked_fill(image_dropped_B1, self.null)
            image_class_BN = image_class_BN.masked_fill(image_dropped_B1, IGNORE)

        text = torch.cat([torch.full_like(text_BL[:, :1], self.begin_text), text_BL], dim=1)
        image = torch.cat([torch.full_like(image_BN[:, :1], self.begin_image), image_BN], dim=1)
        forth, back = torch.cat([text[:n], image[:n]], dim=1), torch.cat([image[n:], text[n:]], dim=1)
        idx_BT = torch.cat([forth, back])[:, :-1].contiguous()
        first_T, second_T = (self.segments(direction, device) for direction in DIRECTIONS)
        seg_BT = torch.cat([first_T.expand(n, -1), second_T.expand(batch - n, -1)])
        packed = Sequences(idx_BT, seg_BT, text_class_BL, image_class_BN, n)
        for part, rows in packed.parts():
            share = code_dropout if part == TEXT_TO_IMAGE else word_dropout
            if share > 0:
                modality = target_modality(part)
                target_BT = idx_BT[rows, self.positions(part, modality)][:, 1:]  # a view, without the begin token
                share_B1 = 2 * share * torch.rand(len(target_BT), 1, generator=generator, device=device)
                hidden_BT = torch.rand(target_BT.shape, generator=generator, device=device) < share_B1
                target_BT.masked_fill_(hidden_BT, self.null)
        return packed

    def prompt(self, reference: Tensor, direction: Direction, prefix_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What is known before sampling, as (idx_BT, seg_BT): begin token, reference, begin token, and `prefix_BK`.

        Args:
            reference: text_BL or codes_BN, by `direction`; all `null` in rows without a reference.
            prefix_BK: the first K tokens of the target: codes, or text ids without pads.

        Raises:
            ValueError: ids are out of range, or there are too many of them.
        """
        modality = target_modality(direction)
        reference = reference.long()
        if modality == "image":
            self.check_text(reference, allow_null=True)
            first, second = self.begin_text, self.begin_image
        else:
            self.check_codes(reference, allow_null=True)
            first, second = self.begin_image, self.begin_text
            reference = torch.where(reference == self.null, reference, reference + self.image_start)
        begin_B1 = torch.full_like(reference[:, :1], first)
        parts = [begin_B1, reference, torch.full_like(begin_B1, second)]
        if prefix_BK is not None:
            if len(prefix_BK) != len(reference):
                raise ValueError(f"There are {len(prefix_BK)} prefixes for {len(reference)} references.")
            if prefix_BK.shape[1] > self.length(modality):
                raise ValueError(f"the prefix has {prefix_BK.shape[1]} tokens, but the target {self.length(modality)}.")
            classes_BK = prefix_BK.long()
            limit = self.image_vocab if modality == "image" else self.text_vocab
            if bool(((classes_BK < 0) | (classes_BK >= limit)).any()):
                raise ValueError(f"the prefix contains ids outside of [0, {limit}), the {modality} vocabulary.")
            parts.append(self.to_ids(classes_BK, modality))
        # If the prefix is the whole target, its last token is not read: nothing comes after it.
        idx_BT = torch.cat(parts, dim=1)[:, : self.input_len]
        seg_BT = self.segments(direction, idx_BT.device)[: idx_BT.shape[1]].expand(len(idx_BT), -1)
        return idx_BT, seg_BT
