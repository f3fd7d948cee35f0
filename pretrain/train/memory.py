"""How much memory training takes on one GPU: arithmetic over the encoder's shape; nothing is allocated.

What autograd keeps follows `Block.forward` line by line, and tests compare it with a real step on the CPU, with and
without activation checkpointing. What sharding gathers and the allowance for CUDA are estimates that nothing was
compared with.
"""

from bisect import bisect_right
from dataclasses import dataclass

from torch import nn

from pretrain.model.encoder import MAX_LOGITS, Encoder

GIB = 2**30

COMPUTE_SIZES = {"32-true": 4, "bf16-mixed": 2}
"""Bytes of a number that a block computes, by the Trainer's precision: those in which `fit` trains."""

_WEIGHT = 4  # bytes of one: float32 in any precision
_NORM_STATISTICS = 2  # mean and reciprocal deviation of a row, in float32
_CONTEXT = 1.5 * GIB  # the CUDA context, workspaces of cuBLAS and buffers of NCCL
_FRAGMENTATION = 0.05  # of all else; also covers packs that are somewhat larger than the mean


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of one GPU at the moment when it is fullest: the backward pass of a step's later micro-batches.

    Attributes:
        encoder: The encoder; on the meta device it takes no memory itself.
        precision: The Trainer's, a key of `COMPUTE_SIZES`.
        target_share: Targets per token.
        gpus: GPUs that train together.
        sharded: Whether they divide weights, gradients and optimizer state among themselves (FSDP2), or each has all.
        gradients_in_buckets: Whether DDP sends gradients from where they lie (``gradient_as_bucket_view``), or copies
            them.
        activation_checkpointing: As `Encoder` describes it.
        muon: Whether the hidden layers' matrices have Muon's one moment instead of AdamW's two.
    """

    encoder: Encoder
    precision: str
    target_share: float
    gpus: int = 1
    sharded: bool = False
    gradients_in_buckets: bool = False
    activation_checkpointing: bool = False
    muon: bool = False

    def split(self, tokens: int) -> dict[str, float]:
        """Bytes by what they are for, with packs of ``tokens`` tokens; the values add up to what the GPU must have."""
        parameters = [p.numel() for p in self.encoder.parameters()]
        share = _WEIGHT * sum(parameters) / (self.gpus if self.sharded else 1)
        parts = {
            "weights": share + _WEIGHT * sum(buffer.numel() for buffer in self.encoder.buffers()),
            "gradients": share,
            "optimizer state": self._optimizer_state(share),
        }
        if self.sharded:
            parts["gathered blocks"] = self._gathered()
        elif self.gpus > 1 and not self.gradients_in_buckets:
            parts["copies of gradients for DDP"] = share
        if copies := self._autocast_copies():
            parts["autocast copies"] = copies
        parts["activations"] = self.activations(tokens, self.target_share * tokens)
        parts["one block's backward"] = self._backward(tokens)
        parts["CUDA and fragmentation"] = _CONTEXT + _FRAGMENTATION * sum(parts.values())
        return parts

    def _optimizer_state(self, share: float) -> float:
        """Bytes of AdamW's two moments, each as large as the weights, and torch's count of steps; or less with Muon."""
        parameters = list(self.encoder.parameters())
        one_moment = [p for p in parameters if p.ndim == 2 and p is not self.encoder.embedding.weight and self.muon]
        part = sum(p.numel() for p in one_moment) / sum(p.numel() for p in parameters)
        return (2 - part) * share + 4 * (len(parameters) - len(one_moment))

    def total(self, tokens: int) -> float:
        """Bytes in all, with packs of ``tokens`` tokens."""
        return sum(self.split(tokens).values())

    def largest_pack(self, capacity: float) -> int:
        """Tokens in the largest pack that fits into ``capacity`` bytes; 0 if none does."""
        return bisect_right(range(1, 2**31), capacity, key=self.total)

    def activations(self, tokens: float, targets: float) -> float:
        """Bytes that the forward pass keeps for the backward pass, over a pack of so many tokens and targets.

        As on CUDA. On a CPU, where attention computes sequence by sequence, the attended values are kept twice.
        """
        config = self.encoder.config
        compute = COMPUTE_SIZES[self.precision]
        width, layers = config.hidden_size, config.num_hidden_layers
        ids_and_angles = tokens * (
            8 + _WEIGHT + _WEIGHT * config.head_dim
        )  # ids, token dropout's scale; cosines, sines
        if self.activation_checkpointing:
            blocks = layers * tokens * _WEIGHT * width  # each block's input
        else:
            blocks = (layers - 1) * self._block(tokens, tokens) + self._block(tokens, targets)
        # Final norm, dense layer, GELU and norm of the head, then the logits' log-softmax; the loss takes many logits
        # in parts, and computes them again.
        head = targets * (2 * _WEIGHT * width + 3 * compute * width + 4 * _NORM_STATISTICS)
        head += 4 * min(targets * config.vocab_size, MAX_LOGITS["cuda"]) + 16 * targets  # and positions, targets
        return ids_and_angles + blocks + head

    def _block(self, tokens: float, rows: float) -> float:
        """What a block keeps: keys and values of all tokens; all else of as many rows as it is asked for."""
        config = self.encoder.config
        compute = COMPUTE_SIZES[self.precision]
        width = config.hidden_size
        # The residual stream, which the norm reads, has the weights' type; what the norm gives has that of products.
        # A value is a view of the projection, which thereby stays whole: two widths of it, and the turned key.
        by_token = _WEIGHT * width + 4 * _NORM_STATISTICS + compute * width * (1 + 2 + 1)
        # The turned query, what attention gives with its log-sum-exp; the second norm, feed-forward layer and GELU.
        by_row = compute * width * 2 + 4 * config.num_attention_heads
        by_row += _WEIGHT * width + 4 * _NORM_STATISTICS + compute * (width + 2 * config.ffn_size)
        if config.hidden_dropout_prob:
            by_row += 2 * width  # what was dropped, a byte each
        if rows == tokens:
            by_row += compute * width  # the query's part of the whole projection
        else:
            by_row += compute * width + _WEIGHT * config.head_dim  # the norm's rows, and the rows' angles
        return tokens * by_token + rows * by_row

    def _backward(self, tokens: float) -> float:
        """What comes and goes in the backward pass, at most: of a block, its gradients; or of the logits, theirs."""
        config = self.encoder.config
        compute = COMPUTE_SIZES[self.precision]
        width = config.hidden_size
        feed_forward = 2 * compute * config.ffn_size
        attention = width * (6 * compute + 3 * _WEIGHT)  # of query, key and value, gathered in the angles' type
        matrix = width * config.ffn_size * (compute + _WEIGHT)  # the largest weight's gradient, before it is added
        block = tokens * (_WEIGHT * width + max(feed_forward, attention)) + matrix
        if self.activation_checkpointing:
            # The block has been computed again: all that it keeps, but for the GELU's output, is there when the
            # feed-forward layer's gradients are. Its own input is counted already; the last block's has gone.
            temporary = max(feed_forward / 2, attention - feed_forward)
            block = tokens * (temporary - _WEIGHT * width) + matrix + self._block(tokens, tokens)
        logits = min(self.target_share * tokens * config.vocab_size, MAX_LOGITS["cuda"]) * (8 + 2 * compute)
        logits += width * config.vocab_size * (compute + _WEIGHT)  # the embedding's gradient, before it is added
        return max(block, logits)

    def _autocast_copies(self) -> float:
        """Weights of products in the type of products: autocast makes them once a micro-batch, autograd keeps them."""
        compute = COMPUTE_SIZES[self.precision]
        if compute == _WEIGHT:
            return 0
        modules = self.encoder.head.modules() if self.sharded else self.encoder.modules()  # blocks are gathered so
        cast = [p for module in modules if isinstance(module, nn.Linear) for p in module.parameters()]
        return compute * sum(p.numel() for p in [*cast, self.encoder.embedding.weight, self.encoder.head.bias])

    def _gathered(self) -> float:
        """Whole tensors beside this GPU's shares: a block and the next one, a block's gradient; all outside blocks."""
        compute = COMPUTE_SIZES[self.precision]
        block = sum(p.numel() for p in self.encoder.blocks[0].parameters())
        outside = sum(p.numel() for p in self.encoder.parameters()) - block * len(self.encoder.blocks)
        return 3 * compute * block + 2 * _WEIGHT * outside
