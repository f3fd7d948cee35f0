"""Variable-length attention over packed sequences: one function, a CUDA and a CPU backend.

Each token attends to the tokens of its own sequence, wherever that lies in the pack; nothing is padded.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from pretrain.errors import UserError, one_line
from pretrain.model.cpu_kernels import takes

NO_DROPOUT = (
    "attention over packs on CUDA drops no attention weights; set attention_probs_dropout_prob to 0 (model.encoder, or "
    "the config.json that training starts from), hidden_dropout_prob works on any device"
)


@dataclass(frozen=True)
class Layout:
    """Where the sequences lie in a pack, worked out once for all layers.

    Attributes:
        cu_seqlens: Where the sequences begin, and the number of tokens last.
        max_seqlen: Length of the longest sequence.
        lengths: Tokens of each sequence, as plain integers; None on CUDA, where reading them would stall the GPU.
    """

    cu_seqlens: Int[Tensor, " bounds"]
    max_seqlen: int
    lengths: list[int] | None

    @classmethod
    def of(cls, cu_seqlens: Int[Tensor, " bounds"], max_seqlen: int | None = None) -> "Layout":
        """The layout of a pack.

        On CUDA, passing ``max_seqlen`` avoids reading the lengths back to the host, which would synchronise with the
        GPU.
        """
        if cu_seqlens.is_cuda and max_seqlen is not None:
            return cls(cu_seqlens, max_seqlen, None)
        lengths = cu_seqlens.diff().tolist()
        longest = max(lengths, default=0)
        return cls(cu_seqlens, longest, None if cu_seqlens.is_cuda else lengths)


def variable_length_attention(
    query: Float[Tensor, "Q H d"],
    key: Float[Tensor, "T H d"],
    value: Float[Tensor, "T H d"],
    queries: Layout,
    keys: Layout,
    dropout: float = 0.0,
    llvm: bool = False,
) -> Float[Tensor, "Q H d"]:
    """Softmax attention within each sequence, scaled by 1/sqrt(d).

    Args:
        query: Queries of N sequences, end to end; a sequence may have fewer queries than keys, or none.
        key: Keys of the same sequences.
        value: Values of the same sequences.
        queries: Layout of ``query``.
        keys: Layout of ``key`` and ``value``.
        dropout: Share of the attention weights to drop; on the CPU only.
        llvm: Let the project's own kernels compute it, rather than SDPA's, where they can: see `takes`; and they drop
            nothing.

    Returns:
        The attended values, laid out as ``query``.
    """
    if query.is_cuda:
        if query.dtype not in (torch.bfloat16, torch.float16):
            raise UserError(
                f"attention on CUDA computes in bfloat16 or float16, not in {query.dtype}; train with "
                "--trainer.precision bf16-mixed (configs/gpu.yaml), or call the model under torch.autocast"
            )
        if dropout:
            raise UserError(NO_DROPOUT)
        from torch.nn.attention.varlen import varlen_attn

        # By position: the keyword arguments after these changed between torch 2.10 and 2.13.
        layout = (queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen)
        return cast(Tensor, varlen_attn(query, key, value, *layout))
    if llvm and takes(query, key, value) and not dropout:
        return cast(Tensor, _attention_by_llvm(query, key, value, queries, keys))
    return cast(Tensor, _attention_by_sequence(query, key, value, queries, keys, dropout))


def activate_flash_attention(implementation: str) -> None:
    """Let ``varlen_attn`` call another implementation of flash attention than torch's own, in this process.

    Args:
        implementation: As ``torch.nn.attention.activate_flash_attention_impl`` takes it: ``FA3``, for Hopper GPUs.

    Raises:
        UserError: If it is not installed.
    """
    from torch.nn.attention import activate_flash_attention_impl

    try:
        activate_flash_attention_impl(implementation)
    except (ImportError, RuntimeError, ValueError) as error:
        reason = one_line(error, 100)
        raise UserError(
            f"flash attention {implementation} cannot be used ({reason}); install it (flash_attn_interface, from "
            "flash-attention's folder hopper), or leave torch's own: --model.flash_attention FA2"
        ) from error


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attention_by_llvm(query: Tensor, key: Tensor, value: Tensor, queries: Layout, keys: Layout) -> Tensor:
    from pretrain.model.cpu_attention import cpu_attention

    cu_queries, cu_keys = (layout.cu_seqlens.int().contiguous() for layout in (queries, keys))
    return cpu_attention(query, key, value, cu_queries, cu_keys, keys.max_seqlen)


# Not compiled: the loop's lengths differ from pack to pack.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attention_by_sequence(
    query: Tensor, key: Tensor, value: Tensor, queries: Layout, keys: Layout, dropout: float
) -> Tensor:
    assert queries.lengths is not None
    assert keys.lengths is not None
    # Neighbours of the same shape go into one call; the sampler sorts packs by length, so there are many.
    shapes = [(shape, len(list(run))) for shape, run in groupby(zip(queries.lengths, keys.lengths, strict=True))]
    query_runs = [count * rows for (rows, _), count in shapes]
    key_runs = [count * length for (_, length), count in shapes]
    attended = []
    # One split for all sequences: its backward is one concatenation, where a slice's is a full-size tensor each.
    runs = zip(query.split(query_runs), key.split(key_runs), value.split(key_runs), shapes, strict=True)
    for q, k, v, ((rows, _), count) in runs:
        if not rows:
            continue
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))  # [count, H, length, d] each
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        attended.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(attended) if attended else query
