"""AdamW, its groups, and Muon: what decays, and what the learning rate's name depends on."""

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


def test_muon_moves_and_decays_hidden_matrices_as_adamw_would() -> None:
    """Liu et al. 2025, section 2.2: with an update of about AdamW's root mean square, 0.2 of the learning rate."""
    for drawn in (True, False):
        encoder = Encoder(CONFIG)
        optimizer = build_optimizer(encoder, "muon", 0.5, (0.9, 0.98), 1e-8, 0.1, "all")
        hidden, others = optimizer.param_groups
        assert id(encoder.embedding.weight) in {id(p) for p in others["params"]}
        assert {id(p) for p in hidden["params"]} == {
            id(p) for p in encoder.parameters() if p.ndim == 2 and p is not encoder.embedding.weight
        }
        torch.manual_seed(0)
        for parameter in encoder.parameters():
            parameter.grad = torch.randn_like(parameter) if drawn else torch.zeros_like(parameter)
        before = [p.detach().clone() for p in hidden["params"]]
        optimizer.step()
        for old, new in zip(before, hidden["params"], strict=True):
            moved = new.detach() - 0.95 * old
            # Muon makes the gradient's singular values 0.7 to 1.2, not quite 1.
            size = float(moved.square().mean().sqrt())
            assert 0.7 * 0.2 * 0.5 < size < 1.2 * 0.2 * 0.5 if drawn else size < 1e-7


def test_frozen_parameters_are_left_out() -> None:
    encoder = Encoder(CONFIG)
    encoder.embedding.requires_grad_(False)
    for decay in ("all", "matrices"):
        optimizer = build_optimizer(encoder, "adamw", 1e-3, (0.9, 0.98), 1e-8, 0.1, decay)  # type: ignore[arg-type]
        assert id(encoder.embedding.weight) not in {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_the_schedule_is_stepped_at_every_optimizer_step_under_its_configured_name() -> None:
    entry = MLMModule(CONFIG, scheduler_name="lr").configure_optimizers()["lr_scheduler"]  # type: ignore[index,typeddict-item]
    assert (entry["interval"], entry["name"], entry.get("frequency", 1)) == ("step", "lr", 1)
