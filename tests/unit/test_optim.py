"""AdamW and its groups: what decays, and what the learning rate's name depends on."""

import torch

from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.train.module import MLMModule
from pretrain.train.optim import build_optimizer

CONFIG = EncoderConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2)


def test_everything_decays_in_one_group_by_default() -> None:
    """One group, so that Lightning logs the learning rate as ``lr-AdamW`` without a suffix."""
    module = MLMModule(CONFIG)
    optimizer = module.configure_optimizers()["optimizer"]  # type: ignore[index,typeddict-item]
    (group,) = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}
    settings = {name: group[name] for name in ("initial_lr", "betas", "eps", "weight_decay")}
    assert settings == {"initial_lr": 4e-4, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.01}


def test_only_matrices_decay_when_asked() -> None:
    encoder = Encoder(CONFIG)
    optimizer = build_optimizer(encoder, "adamw", 1e-3, (0.9, 0.98), 1e-8, 0.1, "matrices")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    decayed, others = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    for name, parameter in encoder.named_parameters():
        is_matrix = name.endswith("weight") and "norm" not in name
        assert (id(parameter) in decayed, id(parameter) in others) == (is_matrix, not is_matrix), name


def test_decay_moves_what_decays_and_nothing_else() -> None:
    for decay, bias_moves in (("all", True), ("matrices", False)):
        encoder = Encoder(CONFIG)
        torch.nn.init.ones_(encoder.head.bias)
        optimizer = build_optimizer(encoder, "adamw", 0.5, (0.9, 0.98), 1e-8, 0.1, decay)  # type: ignore[arg-type]
        before = encoder.head.dense.weight.detach().clone()
        for parameter in encoder.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        torch.testing.assert_close(encoder.head.dense.weight.detach(), before * 0.95)
        torch.testing.assert_close(encoder.head.bias.detach(), torch.full((33,), 0.95 if bias_moves else 1.0))


def test_adamw_is_fused() -> None:
    """Several times faster on CPU than the default, and what skipping a sick step on the device relies on."""
    for decay in ("all", "matrices"):
        optimizer = build_optimizer(Encoder(CONFIG), "adamw", 1e-3, (0.9, 0.98), 1e-8, 0.1, decay)  # type: ignore[arg-type]
        assert all(group["fused"] for group in optimizer.param_groups)


def test_frozen_parameters_are_left_out() -> None:
    encoder = Encoder(CONFIG)
    encoder.embedding.requires_grad_(False)
    for decay in ("all", "matrices"):
        optimizer = build_optimizer(encoder, "adamw", 1e-3, (0.9, 0.98), 1e-8, 0.1, decay)  # type: ignore[arg-type]
        assert id(encoder.embedding.weight) not in {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_the_schedule_is_stepped_at_every_optimizer_step_under_its_configured_name() -> None:
    entry = MLMModule(CONFIG, scheduler_name="lr").configure_optimizers()["lr_scheduler"]  # type: ignore[index,typeddict-item]
    assert (entry["interval"], entry["name"], entry.get("frequency", 1)) == ("step", "lr", 1)
