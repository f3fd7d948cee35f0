"""Ways to compute the same with less memory: activation checkpointing, and the loss over a large vocabulary."""

from dataclasses import replace

import pytest
import torch

from pretrain import Encoder, EncoderConfig
from pretrain.model import encoder as encoder_module

CONFIG = EncoderConfig(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, vocab_size=500)
INPUT_IDS = torch.randint(4, 500, (120,), generator=torch.Generator().manual_seed(0))
CU_SEQLENS = torch.tensor([0, 50, 57, 120], dtype=torch.int32)
POSITIONS = torch.arange(2, 120, 5)


def train(encoder: Encoder) -> tuple[list[torch.Tensor], int]:
    """Loss and gradients, and the bytes that autograd keeps for the backward pass."""
    encoder.zero_grad()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = encoder.loss(INPUT_IDS, CU_SEQLENS, None, POSITIONS, INPUT_IDS[POSITIONS])
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)], sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_changes_no_bit_and_keeps_less(dropout: float) -> None:
    encoder = Encoder(replace(CONFIG, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout))
    torch.manual_seed(1)
    plain, kept = train(encoder)
    encoder.activation_checkpointing = True
    torch.manual_seed(1)
    recomputed, kept_less = train(encoder)
    assert all(ours.equal(theirs) for ours, theirs in zip(recomputed, plain, strict=True))
    assert kept_less < 0.5 * kept


@pytest.mark.parametrize("rows", [1, 7, 24])
def test_the_loss_in_parts_is_the_loss(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(CONFIG).double()
    plain, _ = train(encoder)
    monkeypatch.setitem(encoder_module.MAX_LOGITS, "cpu", rows * CONFIG.vocab_size + 3)
    in_parts, _ = train(encoder)
    for ours, theirs in zip(in_parts, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_loss_never_holds_more_logits_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = encoder_module.MaskedLMHead.forward
    monkeypatch.setattr(
        encoder_module.MaskedLMHead, "forward", lambda *args: (seen.append(len(args[1])), plain(*args))[1]
    )
    monkeypatch.setitem(encoder_module.MAX_LOGITS, "cpu", 7 * CONFIG.vocab_size)
    train(Encoder(CONFIG))
    assert max(seen) == 7
    assert sum(seen) == 2 * len(POSITIONS), "once forward, once again for the backward pass"
