"""Heads: from hidden states of a pack to outputs for each sequence or residue."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pretrain.downstream.finetune.labels import LabelSpec
from pretrain.downstream.finetune.packs import LabelledBatch
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder

Pooling = Literal["cls", "mean", "attention"]


class SequenceHead(nn.Module):
    """Pool each sequence, then dense, tanh, and an output layer: with ``cls``, transformers' ``EsmClassificationHead``.

    Args:
        config: The encoder's shape.
        num_outputs: Outputs for each sequence.
        pooling: ``cls``: the state of ``<cls>``, which also spares the last block's work on all other tokens.
            ``mean``: the mean over the residues. ``attention``: a learned softmax over the residues.
    """

    def __init__(self, config: EncoderConfig, num_outputs: int, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, num_outputs)
        self.score = nn.Linear(config.hidden_size, 1) if pooling == "attention" else None
        _initialize(self, config)

    def forward(
        self,
        hidden: Float[Tensor, "M D"],
        cu_seqlens: Int[Tensor, " bounds"],
        between: Int[Tensor, " pairs"] | None = None,
    ) -> Float[Tensor, "N K"]:
        """Outputs for each sequence.

        Args:
            hidden: With ``cls`` pooling the N states of ``<cls>``, else those of all tokens of the pack.
            cu_seqlens: Where the sequences begin, and the number of tokens last.
            between: Places of the ``<eos>`` inside pairs, which are no residues.
        """
        pooled = hidden if self.pooling == "cls" else self._pool(hidden, cu_seqlens, between)
        outputs: Tensor = self.out_proj(torch.tanh(self.dense(pooled)))
        return outputs

    def _pool(self, hidden: Tensor, cu_seqlens: Tensor, between: Tensor | None) -> Tensor:
        """Weighted mean over each sequence's residues: its tokens but ``<cls>`` and every ``<eos>``."""
        bounds = cu_seqlens.long()
        count = len(bounds) - 1
        sequence = torch.repeat_interleave(bounds.diff(), output_size=len(hidden))  # [T], which sequence a token is of
        residue = hidden.new_ones(len(hidden), dtype=torch.float32)
        residue[bounds[:-1]] = 0
        residue[bounds[1:] - 1] = 0
        if between is not None:
            residue[between] = 0
        if self.score is None:
            weight = residue
        else:
            score = self.score(hidden)[:, 0].float().masked_fill(residue == 0, -torch.inf)
            lowest = torch.finfo(score.dtype).min  # of a sequence without residues
            highest = score.new_full((count,), lowest).scatter_reduce(0, sequence, score.detach(), "amax")
            weight = (score - highest[sequence]).exp()
        total = weight.new_zeros(count).index_add(0, sequence, weight)
        summed = weight.new_zeros(count, hidden.shape[1]).index_add(0, sequence, hidden.float() * weight[:, None])
        return (summed / total.clamp(min=1e-12)[:, None]).to(hidden.dtype)


class TokenHead(nn.Module):
    """One linear layer: the classifier of transformers' ``EsmForTokenClassification``.

    Args:
        config: The encoder's shape.
        num_outputs: Outputs for each residue.
    """

    def __init__(self, config: EncoderConfig, num_outputs: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(config.hidden_size, num_outputs)
        _initialize(self, config)

    def forward(
        self, hidden: Float[Tensor, "M D"], cu_seqlens: Int[Tensor, " bounds"], between: Tensor | None = None
    ) -> Float[Tensor, "M K"]:
        """Outputs for each state given."""
        outputs: Tensor = self.classifier(hidden)
        return outputs


Head = SequenceHead | TokenHead


def build_head(config: EncoderConfig, spec: LabelSpec, pooling: Pooling) -> Head:
    """The head that a task needs, freshly initialised."""
    if spec.task == "token":
        return TokenHead(config, spec.num_outputs)
    return SequenceHead(config, spec.num_outputs, pooling)


def head_outputs(encoder: Encoder, head: Head, batch: LabelledBatch) -> Float[Tensor, "M K"]:
    """The head's outputs at a batch's targets, in float32: logits, or of a regression standardised values."""
    everywhere = isinstance(head, SequenceHead) and head.pooling != "cls"
    positions = None if everywhere else batch.target_positions
    hidden = encoder.hidden_states(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, positions)
    outputs: Tensor = head(hidden, batch.cu_seqlens, batch.between)
    return outputs.float()


def _initialize(head: nn.Module, config: EncoderConfig) -> None:
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=config.initializer_range)
            nn.init.zeros_(module.bias)
