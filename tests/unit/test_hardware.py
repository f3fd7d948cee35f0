"""What the machine cannot run is refused in one line, before anything is written."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.exc import Unsupported

from pretrain import EncoderConfig, MLMModule
from pretrain.errors import UserError
from pretrain.train.fit import fit
from pretrain.train.hardware import check_hardware


def check(
    precision: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch, attention_dropout: float = 0.0
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cuda", 0)), precision=precision, world_size=1
    )
    config = EncoderConfig(attention_probs_dropout_prob=attention_dropout)
    module: Any = SimpleNamespace(compile_blocks=False, encoder=SimpleNamespace(config=config))
    check_hardware(trainer, module, SimpleNamespace(static_shapes=False))  # type: ignore[arg-type]


def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"Tesla V100 has compute capability 7\.0; .* need 8\.0"):
        check("bf16-mixed", (7, 0), monkeypatch)


def test_single_precision_on_a_gpu_names_the_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"trainer\.precision is 32-true; .* configs/gpu\.yaml"):
        check("32-true", (9, 0), monkeypatch)
    check("bf16-mixed", (9, 0), monkeypatch)


def test_attention_dropout_on_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"drops no attention weights; set attention_probs_dropout_prob to 0"):
        check("bf16-mixed", (9, 0), monkeypatch, attention_dropout=0.1)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\n..."), "accumulate_grad_batches 4"),
        (Unsupported("no compiler\nfound"), r"model\.compile failed \(no compiler found.*--model.compile false"),
    ],
)
def test_what_fails_in_the_first_step_says_what_to_do(
    error: Exception, message: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(MLMModule, "training_step", fail)
    with pytest.raises(UserError, match=message) as raised:
        fit(["-c", str(tiny()), "--run", str(tmp_path / "run")])
    assert "\n" not in str(raised.value)
