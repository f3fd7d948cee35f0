"""`EncoderConfig`: the encoder's shape, the named sizes, and the arithmetic that a step costs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pretrain.errors import UserError


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of an ESM-2 encoder; the names are those of transformers' ``EsmConfig``.

    Attributes:
        hidden_size: Width of the residual stream.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Heads in each block; they divide ``hidden_size`` into even parts.
        intermediate_size: Width of the feed-forward layer; four times ``hidden_size`` if not given.
        vocab_size: Number of token ids.
        pad_token_id: Id of the padding token; its embedding begins as zero.
        mask_token_id: Id of the mask token, for token dropout.
        token_dropout: Zero the embeddings of masked tokens and rescale the rest (ESM-1b and ESM-2).
        layer_norm_eps: Epsilon of every layer norm.
        rope_theta: Base period of the rotary embedding.
        initializer_range: Standard deviation of the initial weights.
        hidden_dropout_prob: Share of each block's two outputs that training drops, before they are added to the
            residual stream.
        attention_probs_dropout_prob: Share of the attention weights that training drops; on the CPU only.
    """

    hidden_size: int = 320
    num_hidden_layers: int = 6
    num_attention_heads: int = 20
    intermediate_size: int | None = None
    vocab_size: int = 33
    pad_token_id: int = 1
    mask_token_id: int = 32
    token_dropout: bool = True
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    initializer_range: float = 0.02
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0

    def __post_init__(self) -> None:
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        if min(self.hidden_size, self.num_hidden_layers, self.num_attention_heads, self.ffn_size, self.vocab_size) < 1:
            raise UserError(f"every size of an encoder must be at least 1; given: {self}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise UserError(
                f"hidden_size {self.hidden_size} cannot be divided into {self.num_attention_heads} heads of even size "
                f"(rotary embeddings turn pairs); give a multiple of {2 * self.num_attention_heads}"
            )

        for name in DROPOUT:
            if not 0 <= (share := getattr(self, name)) < 1:
                raise UserError(f"{name} is {share}; give a share of at least 0 and less than 1")

    @classmethod
    def named(cls, size: str) -> "EncoderConfig":
        """A published shape.

        Args:
            size: ESM-2's 8M, 35M, 150M, 650M, 3B or 15B (Lin et al. 2023, supplementary table 1); or BERT-base or
                BERT-large (Devlin et al. 2019, section 3) for text: BERT's depth, width, heads and vocabulary size, in
                this encoder's architecture, without token dropout, with the special ids of `pretrain tokenizer`.

        Raises:
            UserError: If there is no such size.
        """
        sizes = {**ESM2_SIZES, **BERT_SIZES}
        if size not in sizes:
            raise UserError(f"no size '{size}'; there are {', '.join(sizes)}")
        layers, width, heads = sizes[size]
        shape = cls(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads)
        return replace(shape, **_TEXT) if size in BERT_SIZES else shape

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """``intermediate_size``, filled in."""
        assert self.intermediate_size is not None
        return self.intermediate_size

    @property
    def drops(self) -> bool:
        """Whether training draws random numbers."""
        return any(getattr(self, name) for name in DROPOUT)

    def check_size(self, elements: int) -> None:
        """Refuse a shape that so many stored numbers cannot fill, before memory is asked for.

        Raises:
            UserError: If the embedding and the blocks' matrices alone have more elements.
        """
        block = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.ffn_size
        needed = self.vocab_size * self.hidden_size + self.num_hidden_layers * block
        if needed > elements:
            raise UserError(
                f"the config's sizes ({self.num_hidden_layers} layers, {self.hidden_size} wide, {self.vocab_size} ids) "
                f"need more than {needed:.3g} numbers, the model's tensors hold {elements:,}; give the config that was "
                "saved with it"
            )

    def training_flops(self, lengths: Sequence[int] | np.ndarray, targets: Sequence[int] | np.ndarray) -> float:
        """Floating-point operations of forward and backward over a pack, of its matrix products only.

        The last block's queries, output projection and feed-forward, and the head, run on target positions only. A
        multiplication and an addition are two operations; the backward pass costs twice the forward.

        Args:
            lengths: Tokens of each sequence.
            targets: Target positions in each sequence.
        """
        lengths, targets = np.asarray(lengths, np.float64), np.asarray(targets, np.float64)
        width, tokens, rows = self.hidden_size, lengths.sum(), targets.sum()
        after_attention = 2 * width * width + 4 * width * self.ffn_size  # output projection, feed-forward
        block = tokens * (6 * width * width + after_attention) + 4 * width * (lengths**2).sum()
        last = tokens * 4 * width * width + rows * (2 * width * width + after_attention)
        last += 4 * width * (targets * lengths).sum()
        head = rows * (2 * width * width + 2 * width * self.vocab_size)
        return float(3 * ((self.num_hidden_layers - 1) * block + last + head))


DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
"""The fields that say how to train, and nothing about the function that is trained."""

ESM2_SIZES = {
    "8M": (6, 320, 20),
    "35M": (12, 480, 20),
    "150M": (30, 640, 20),
    "650M": (33, 1280, 20),
    "3B": (36, 2560, 40),
    "15B": (48, 5120, 40),
}
"""Layers, width and heads of the published models."""

BERT_SIZES = {"BERT-base": (12, 768, 12), "BERT-large": (24, 1024, 16)}
"""The same of Devlin et al. 2019."""

_TEXT: dict[str, Any] = {"vocab_size": 30_522, "mask_token_id": 4, "token_dropout": False}
