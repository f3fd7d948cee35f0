"""What the encoder asks of `varlen_attn` on a GPU, asked of a plain function that checks what the kernels check."""

import pytest
import torch
from torch import Tensor

from pretrain import Encoder, EncoderConfig
from pretrain.model import encoder as room
from pretrain.model.attention import Layout

CONFIG = EncoderConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, initializer_range=0.2)
LENGTHS = [30, 1, 12, 7, 20]


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    """Attention within sequences by its formula; raises where torch's flash kernels would, or would read amiss."""
    for x in (query, key, value):
        assert x.dtype in (torch.bfloat16, torch.float16)
        assert x.stride(-1) == 1
        assert x.shape[1:] == (2, 16)
    assert query.dtype == key.dtype == value.dtype
    for bounds, tokens, longest in ((cu_seq_q, query, max_q), (cu_seq_k, key, max_k)):
        assert bounds.dtype == torch.int32
        assert bounds.is_contiguous()
        assert type(longest) is int
        assert bounds[0] == 0
        assert bounds[-1] == len(tokens)
        assert bounds.diff().min() >= 0
        assert bounds.diff().max() <= longest, "a kernel leaves out what is beyond"
    assert len(cu_seq_q) == len(cu_seq_k)
    parts = [x.split(bounds.diff().tolist()) for x, bounds in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))]
    attended = []
    for q, k, v in zip(*parts, strict=True):
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * q.shape[-1] ** -0.5
        attended.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.float()))
    return torch.cat(attended).to(query.dtype)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(
        query: Tensor, key: Tensor, value: Tensor, queries: Layout, keys: Layout, dropout: float, on_cpu: str
    ) -> Tensor:
        assert not dropout
        return varlen_attn(query, key, value, queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen)

    def layout(cu_seqlens: Tensor, max_seqlen: int | None = None) -> Layout:
        assert max_seqlen is not None, "to read the lengths would be to wait for the GPU"
        return Layout(cu_seqlens, max_seqlen, None)

    monkeypatch.setattr(room, "variable_length_attention", attention)
    monkeypatch.setattr(Layout, "of", layout)


def pack(empty: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Five sequences, with targets in the first and the last two only, and empty sequences as static shapes have."""
    bounds = torch.tensor([0, *LENGTHS, *[0] * empty]).cumsum(0, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 24, (sum(LENGTHS),), generator=generator)
    positions = torch.tensor([0, 3, 29, 45, 50, 51, 69])
    targets = ids[positions].clone()
    targets[-1] = -100  # a row that fills up a static shape
    return ids, bounds, positions, targets


def loss_and_gradients(encoder: Encoder, empty: int, max_seqlen: int | None) -> tuple[Tensor, list[Tensor]]:
    ids, bounds, positions, targets = pack(empty)
    encoder.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = encoder.loss(ids, bounds, max_seqlen, positions, targets)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in encoder.parameters() if p.grad is not None]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("empty", [0, 3])
def test_loss_and_gradients_are_those_of_the_cpu(request: pytest.FixtureRequest, empty: int, recompute: bool) -> None:
    torch.manual_seed(0)
    encoder = Encoder(CONFIG)
    encoder.activation_checkpointing = recompute
    expected, theirs = loss_and_gradients(encoder, empty, None)
    request.getfixturevalue("on_gpu")
    found, ours = loss_and_gradients(encoder, empty, 64)
    assert torch.allclose(found, expected, rtol=1e-2)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= 3e-2 * other.norm() + 1e-6
