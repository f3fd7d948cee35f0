"""Low-rank parts against peft's LoRA: of the same A, B and alpha, the same logits, gradients and merged weights."""

import pytest
import torch
from torch import Tensor, nn
from transformers import EsmConfig, EsmForMaskedLM

from pretrain.downstream.finetune.lora import LowRank, add_lora, merge_lora
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.model.hf import to_hf, to_hf_config

RANK, ALPHA, WIDTH = 4, 10.0, 48
LAYERS = r".*layer\.\d+\.(attention\.(self\.(query|key|value)|output\.dense)|intermediate\.dense|output\.dense)"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_the_same_low_rank_parts_are_the_same_function_with_the_same_gradients() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = EncoderConfig(hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=3, initializer_range=0.2)
    ours, theirs = Encoder(config), EsmForMaskedLM(EsmConfig(**to_hf_config(config)))
    missing, unexpected = theirs.load_state_dict(to_hf(ours.state_dict()), strict=False)
    assert not unexpected
    assert all("contact_head" in name for name in missing)
    add_lora(ours, RANK, ALPHA)
    adapted = peft.get_peft_model(
        theirs, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=LAYERS)
    ).eval()

    parts: list[tuple[LowRank, list[nn.Module]]] = []  # each of ours beside theirs; ours has q, k and v in one
    for block, layer in zip(ours.blocks, theirs.esm.encoder.layer, strict=True):
        attention = layer.attention
        beside = {
            "qkv": [attention.self.query, attention.self.key, attention.self.value],
            "out": [attention.output.dense],
            "ffn_in": [layer.intermediate.dense],
            "ffn_out": [layer.output.dense],
        }
        for name, layers in beside.items():
            low = block.get_submodule(f"{name}.parametrizations.weight.0")
            assert isinstance(low, LowRank)
            nn.init.normal_(low.A, std=0.2)
            nn.init.normal_(low.B, std=0.2)
            parts.append((low, layers))
            for each, b in zip(layers, low.B.detach().chunk(len(layers)), strict=True):
                each.lora_A["default"].weight.data.copy_(low.A)
                each.lora_B["default"].weight.data.copy_(b)

    tokens, positions = torch.randint(4, 24, (40,)), torch.tensor([0, 3, 17, 39])
    cu_seqlens = torch.tensor([0, 40], dtype=torch.int32)
    mine: Tensor = ours(tokens, cu_seqlens, 40, positions)  # the last block for these rows only
    other: Tensor = adapted(tokens[None], attention_mask=torch.ones_like(tokens)[None]).logits[0, positions]
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    plain = Encoder(config)
    plain.load_state_dict(merge_lora(ours.state_dict(), ALPHA / RANK))
    torch.testing.assert_close(plain(tokens, cu_seqlens, 40, positions), other, rtol=1e-4, atol=1e-4)

    weight = torch.randn_like(mine)
    (mine * weight).sum().backward()
    (other * weight).sum().backward()
    for low, layers in parts:
        theirs_a = torch.stack([each.lora_A["default"].weight.grad for each in layers]).sum(0)
        theirs_b = torch.cat([each.lora_B["default"].weight.grad for each in layers])
        for gradient, expected in ((low.A.grad, theirs_a), (low.B.grad, theirs_b)):
            assert float(expected.abs().max()) > 1e-3
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    trained = {name for name, p in ours.named_parameters() if p.grad is not None}
    assert all(name.rsplit(".", 1)[1] in ("A", "B") for name in trained)

    state = adapted.merge_and_unload().state_dict()
    expected_state = to_hf(plain.state_dict())
    for name, tensor in expected_state.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)
