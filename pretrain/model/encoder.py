"""The ESM-2 encoder and its masked-language-model head, over packed sequences.

Lin et al., "Evolutionary-scale prediction of atomic-level protein structure with a language model", Science 2023; the
function computed is that of transformers' ``EsmForMaskedLM`` (and of facebookresearch/esm, ``esm/model/esm2.py``) with
the same weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.errors import UserError
from pretrain.model.attention import Layout, variable_length_attention
from pretrain.model.config import EncoderConfig
from pretrain.model.cpu_kernels import CPUKernels, by_llvm
from pretrain.model.linear import Linear, linear
from pretrain.model.rotary import rotate

TOKEN_DROPOUT_TRAIN_RATIO = 0.15 * 0.8
"""Share of masked tokens in ESM's training: a constant at every masking rate, or exports would not be equal."""


MAX_LOGITS = {"cpu": 2**25, "cuda": 2**27}
"""Logits that the loss holds at a time: 128 and 512 MiB of float32. With each part of them the whole embedding is cast
anew under autocast, and its whole gradient added: a GPU, whose packs have many targets, should take few parts."""


class Encoder(nn.Module):
    """Packed token ids to logits.

    Args:
        config: The encoder's shape.

    Attributes:
        activation_checkpointing: Keep only each block's input for the backward pass, and compute the rest again: about
            a third more work for a fraction of the memory (Chen et al. 2016).
        cpu_kernels: Whose kernels compute on a CPU; see `use_cpu_kernels`.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.head = MaskedLMHead(config)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", 1.0 / config.rope_theta**exponents)
        self.use_cpu_kernels("auto")
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Encoder":
        """As any module is moved or cast, but for the rotary frequencies: 16 bits would not tell positions apart."""
        exact = self.inv_freq
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if torch.finfo(self.inv_freq.dtype).bits < 32:
            self.inv_freq = exact.to(self.inv_freq.device)
        return self

    def use_cpu_kernels(self, kernels: CPUKernels) -> None:
        """Choose whose kernels compute on a CPU; it is ``auto`` otherwise.

        Raises:
            UserError: If they do not run here; see `by_llvm`.
        """
        self.cpu_kernels = kernels
        attention, products = by_llvm(kernels, self.config.head_dim)
        for module in self.modules():
            if isinstance(module, Block):
                module.llvm_attention = attention
            if isinstance(module, Linear):
                module.llvm = products

    def reset_parameters(self) -> None:
        """Initialise as BERT and transformers' ESM do: weights normal, biases zero, layer norms one."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.zeros_(self.embedding.weight[self.config.pad_token_id].detach())
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        input_ids: Int[Tensor, " T"],
        cu_seqlens: Int[Tensor, " bounds"],
        max_seqlen: int | None = None,
        positions: Int[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "M V"]:
        """Logits at ``positions``, or everywhere.

        Args:
            input_ids: T tokens of N whole sequences, end to end.
            cu_seqlens: Where the sequences begin in ``input_ids``, and T last; int32.
            max_seqlen: Length of the longest sequence, or a bound of it; read from ``cu_seqlens`` if not given.
            positions: The M places in the pack to predict, ascending; all T if not given. The last block and the head
                compute no other.

        Returns:
            Logits over the vocabulary, one row a position.
        """
        hidden = self.hidden_states(input_ids, cu_seqlens, max_seqlen, positions)
        logits: Tensor = self.head(hidden, self.embedding.weight)
        return logits

    def hidden_states(
        self,
        input_ids: Int[Tensor, " T"],
        cu_seqlens: Int[Tensor, " bounds"],
        max_seqlen: int | None = None,
        positions: Int[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "M D"]:
        """The final layer-normed hidden states: what the head reads. Arguments as for `forward`."""
        layout = Layout.of(cu_seqlens, max_seqlen)
        hidden, rotation, sequence = self._embed(input_ids, cu_seqlens)
        rows = None if positions is None else Rows.of(positions, sequence, layout)
        for block in self.blocks:
            inputs = hidden, rotation, layout, rows if block is self.blocks[-1] else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=self.config.drops)
            else:
                hidden = block(*inputs)
        normed: Tensor = self.norm(hidden)
        return normed

    def loss(
        self,
        input_ids: Int[Tensor, " T"],
        cu_seqlens: Int[Tensor, " bounds"],
        max_seqlen: int | None,
        positions: Int[Tensor, " M"],
        targets: Int[Tensor, " M"],
    ) -> Float[Tensor, ""]:
        """Cross-entropy at ``positions``.

        Args:
            input_ids: As for `forward`.
            cu_seqlens: As for `forward`.
            max_seqlen: As for `forward`.
            positions: As for `forward`.
            targets: The original tokens at ``positions``; rows of -100 are left out.

        Returns:
            The cross-entropy summed over the targets, in nats and float32.
        """
        hidden = self.hidden_states(input_ids, cu_seqlens, max_seqlen, positions)
        return self.head.loss(hidden, self.embedding.weight, targets)

    @torch.no_grad()
    def score(
        self,
        input_ids: Int[Tensor, " T"],
        cu_seqlens: Int[Tensor, " bounds"],
        max_seqlen: int | None,
        positions: Int[Tensor, " M"],
        targets: Int[Tensor, " M"],
    ) -> tuple[Float[Tensor, " M"], Int[Tensor, " M"]]:
        """Each target's cross-entropy, in nats and float32, and the most likely token there; without gradients.

        Arguments as for `loss`; rows of -100 have cross-entropy 0.
        """
        hidden = self.hidden_states(input_ids, cu_seqlens, max_seqlen, positions)
        return self.head.score(hidden, self.embedding.weight, targets)

    def attention_maps(self, input_ids: Int[Tensor, " T"]) -> Iterator[Float[Tensor, "H T T"]]:
        """One sequence's attention maps, a block at a time, by attention's formula rather than a kernel.

        As transformers' ``output_attentions``: who attends (rows) to whom (columns); rows sum to 1.
        """
        cu_seqlens = torch.tensor([0, len(input_ids)], dtype=torch.int32, device=input_ids.device)
        hidden, rotation, _ = self._embed(input_ids, cu_seqlens)
        for block in self.blocks:
            assert isinstance(block, Block)
            hidden, maps = block.trace(hidden, rotation)
            yield maps

    def _embed(
        self, input_ids: Int[Tensor, " T"], cu_seqlens: Int[Tensor, " bounds"]
    ) -> tuple[Float[Tensor, "T D"], tuple[Float[Tensor, "T half"], Float[Tensor, "T half"]], Int[Tensor, " T"]]:
        """What the first block reads, each token's rotation (cosines, sines), and which sequence it is of."""
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        sequence = torch.repeat_interleave(lengths, output_size=len(input_ids))  # [T], which sequence a token is of

        hidden = self.embedding(input_ids)
        if self.config.token_dropout:
            hidden = hidden * self._token_dropout_scale(input_ids, sequence, lengths)[:, None]

        angles = (torch.arange(len(input_ids), device=input_ids.device) - starts[sequence])[:, None] * self.inv_freq
        rotation = angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)  # [T, d/2] each
        return hidden, rotation, sequence

    def _token_dropout_scale(
        self, input_ids: Int[Tensor, " T"], sequence: Int[Tensor, " T"], lengths: Int[Tensor, " N"]
    ) -> Float[Tensor, " T"]:
        """Zero at masked tokens; elsewhere what keeps the sequence's expected sum as in training (ESM-1b's trick)."""
        masked = input_ids == self.config.mask_token_id
        weight = self.embedding.weight
        observed = torch.zeros(len(lengths), dtype=torch.float32, device=weight.device)
        observed = observed.index_add(0, sequence, masked.float()) / lengths.clamp(min=1)
        scale = (1 - TOKEN_DROPOUT_TRAIN_RATIO) / (1 - observed)
        return torch.where(masked, 0.0, scale[sequence]).to(weight.dtype)


@dataclass(frozen=True)
class Rows:
    """The places of a pack that the last block is asked for, and how they divide among the sequences."""

    positions: Int[Tensor, " M"]
    layout: Layout

    @classmethod
    def of(cls, positions: Int[Tensor, " M"], sequence: Int[Tensor, " T"], pack: Layout) -> "Rows":
        """Rows at ``positions`` (ascending) of a pack; ``sequence`` says whose each token is."""
        num_sequences = len(pack.cu_seqlens) - 1
        counts = torch.zeros(num_sequences + 1, dtype=torch.int32, device=positions.device)
        counts.index_add_(0, sequence[positions] + 1, torch.ones_like(positions, dtype=torch.int32))
        # A sequence has no more rows than tokens, so the pack's longest bounds them without a look at the counts.
        return cls(positions, Layout.of(counts.cumsum(0, dtype=torch.int32), pack.max_seqlen))


class Block(nn.Module):
    """A pre-norm transformer block: rotary self-attention, then a GELU feed-forward layer.

    Args:
        config: The encoder's shape.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads, config.head_dim
        self.attention_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.ffn_in = Linear(width, config.ffn_size)
        self.ffn_out = Linear(config.ffn_size, width)
        self.llvm_attention = False
        self.hidden_dropout, self.attention_dropout = config.hidden_dropout_prob, config.attention_probs_dropout_prob

    def forward(
        self,
        hidden: Float[Tensor, "T D"],
        rotation: tuple[Float[Tensor, "T half"], Float[Tensor, "T half"]],
        layout: Layout,
        rows: Rows | None = None,
    ) -> Float[Tensor, "Q D"]:
        """The block's output at ``rows``, or everywhere: keys and values always come from the whole pack."""
        normed = self.attention_norm(hidden)
        if rows is None:
            query_layout = layout
            query, key, value = rotate(
                self.qkv(normed).unflatten(-1, (3, *self.heads)), rotation, 2, self.llvm_attention
            )
        else:
            query_layout = rows.layout
            hidden = hidden[rows.positions]
            width = hidden.shape[-1]
            query = linear(normed[rows.positions], self.qkv.weight[:width], self.qkv.bias[:width], self.qkv.llvm)
            key_value = linear(normed, self.qkv.weight[width:], self.qkv.bias[width:], self.qkv.llvm)
            of_rows = rotation[0][rows.positions], rotation[1][rows.positions]
            (query,) = rotate(query.unflatten(-1, (1, *self.heads)), of_rows, 1, self.llvm_attention)
            key, value = rotate(key_value.unflatten(-1, (2, *self.heads)), rotation, 1, self.llvm_attention)
        dropout = self.attention_dropout if self.training else 0.0
        attended = variable_length_attention(query, key, value, query_layout, layout, dropout, self.llvm_attention)
        hidden = hidden + self._dropped(self.out(attended.flatten(1)))
        output: Tensor = hidden + self._dropped(self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(hidden)))))
        return output

    def _dropped(self, output: Tensor) -> Tensor:
        return F.dropout(output, self.hidden_dropout) if self.training and self.hidden_dropout else output

    def trace(
        self,
        hidden: Float[Tensor, "T D"],
        rotation: tuple[Float[Tensor, "T half"], Float[Tensor, "T half"]],
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, "H T T"]]:
        """The block's output for a single sequence, and its attention maps; see `Encoder.attention_maps`."""
        query, key, value = rotate(self.qkv(self.attention_norm(hidden)).unflatten(-1, (3, *self.heads)), rotation, 2)
        scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
        maps = scores.softmax(-1)
        hidden = hidden + self.out(torch.einsum("hqk,khd->qhd", maps, value).flatten(1))
        return hidden + self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(hidden)))), maps


class MaskedLMHead(nn.Module):
    """Dense, GELU, layer norm, then the transposed embedding and a bias (RoBERTa's head, as ESM uses it).

    Args:
        config: The encoder's shape.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Float[Tensor, "M D"], embedding: Float[Tensor, "V D"]) -> Float[Tensor, "M V"]:
        """Logits; ``embedding`` is the encoder's own (tied) embedding matrix."""
        return linear(self.norm(F.gelu(self.dense(hidden))), embedding, self.bias, self.dense.llvm)

    def loss(
        self, hidden: Float[Tensor, "M D"], embedding: Float[Tensor, "V D"], targets: Int[Tensor, " M"]
    ) -> Float[Tensor, ""]:
        """See `Encoder.loss`. With a large vocabulary only some rows' logits exist at a time, also in the backward."""
        rows = _rows_at_a_time(hidden, embedding)
        if len(hidden) <= rows:
            return self._loss(hidden, embedding, targets)
        chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
        losses = [checkpoint(self._loss, h, embedding, t, use_reentrant=False) for h, t in chunks]
        return torch.stack(losses).sum()

    def score(
        self, hidden: Float[Tensor, "M D"], embedding: Float[Tensor, "V D"], targets: Int[Tensor, " M"]
    ) -> tuple[Float[Tensor, " M"], Int[Tensor, " M"]]:
        """See `Encoder.score`. With a large vocabulary only some rows' logits exist at a time."""
        losses, best = [], []
        rows = _rows_at_a_time(hidden, embedding)
        for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = self(part, embedding).float()
            losses.append(F.cross_entropy(logits, wanted, reduction="none"))
            best.append(logits.argmax(-1))
        return torch.cat(losses), torch.cat(best)

    def _loss(self, hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(hidden, embedding).float(), targets, reduction="sum")


def check_finite(outputs: Tensor) -> Tensor:
    """A model's outputs, as they are.

    Raises:
        UserError: If one is infinite or NaN, as of weights that went astray in training.
    """
    if not bool(outputs.isfinite().all()):
        raise UserError("the model's outputs are not finite; take an earlier checkpoint")
    return outputs


def _rows_at_a_time(hidden: Tensor, embedding: Tensor) -> int:
    return max(1, MAX_LOGITS["cuda" if hidden.is_cuda else "cpu"] // len(embedding))
