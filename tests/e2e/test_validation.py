"""Several validation sets, and what is told of each: exact, whatever the processes and packs."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from test_logging import scalars

from pretrain import EncoderConfig, MLMDataModule, MLMModule
from pretrain.cli import main
from pretrain.errors import UserError
from pretrain.train.fit import fit as fit_here
from pretrain.train.pseudo_perplexity import PseudoPerplexity
from pretrain.train.schedule import LinearDecay
from pretrain.train.validation import LENGTH_BINS, RESIDUE_CLASSES, Findings


@pytest.fixture
def far(tmp_path: Path) -> Path:
    generator = random.Random(1)
    path = tmp_path / "far.fasta"
    path.write_text("".join(f">{n}\n{''.join(generator.choices('LAGVSE', k=20 + 3 * n))}\n" for n in range(60)))
    return path


def test_every_set_has_its_figures_and_the_first_is_the_one_that_counts(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, proteins: Path, far: Path
) -> None:
    config = tiny(data__validation={"far": [str(far)], "near": str(proteins)}, trainer__max_steps=4)
    assert fit("-c", config, "--run", tmp_path / "run") == 0
    assert fit("-c", tiny(trainer__max_steps=4), "--run", tmp_path / "alone") == 0
    logged, on_its_own = scalars(tmp_path / "run"), scalars(tmp_path / "alone")
    for figure in ("loss", "perplexity", "accuracy"):
        assert logged[f"val/{figure}"] == logged[f"val/far/{figure}"]
        assert logged[f"val/near/{figure}"] == on_its_own[f"val/{figure}"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["val/loss"] == result["val/far/loss"] == result["validation"]["far"]["loss"]
    for name, found in result["validation"].items():
        loss, perplexity, accuracy = (logged[f"val/{name}/{x}"][-1][1] for x in ("loss", "perplexity", "accuracy"))
        assert loss == pytest.approx(found["loss"], rel=1e-6)
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-5)
        assert accuracy == pytest.approx(found["accuracy"], rel=1e-6)
    assert accuracy > 0, "of the last set, near, some are right"
    for found in result["validation"].values():
        for group in (found["by_length"], found["by_token"].values()):
            targets = sum(part["targets"] for part in group)
            assert sum(part["targets"] * part["loss"] for part in group) / targets == pytest.approx(found["loss"])
            assert sum(part["targets"] * part["accuracy"] for part in group) / targets == pytest.approx(
                found["accuracy"]
            )
        assert found["bits_per_token"]["model"] == pytest.approx(found["loss"] / math.log(2))
    assert set(result["validation"]["far"]["by_token"]) == set("LAGVSE")


def test_a_checkpoint_is_validated_by_anyones_trainer_which_has_no_steps(proteins: Path, tmp_path: Path) -> None:
    shape = EncoderConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    data = MLMDataModule(str(proteins), str(proteins), max_length=40, global_batch_tokens=512)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    module = MLMModule(shape, schedule=LinearDecay())
    trainer = pl.Trainer(max_steps=2, enable_checkpointing=False, **quiet)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    other = pl.Trainer(enable_checkpointing=False, **quiet)
    fresh = MLMModule(shape, schedule=LinearDecay())
    (found,) = other.validate(fresh, data, tmp_path / "mine.ckpt", verbose=False, weights_only=True)
    assert found["val/loss"] == float(validated(module, data).callback_metrics["val/loss"])


def test_a_loss_too_large_for_a_perplexity_is_infinite() -> None:
    found = Findings(torch.tensor([[8000.0, 0.0, 10.0]]), torch.empty(0), torch.empty(0, 0))
    assert found.figures(())["perplexity"] == math.inf
    assert found.figures(())["loss"] == 800


def test_who_validates_on_what_is_trained_on_is_told(
    tiny: Callable[..., Path], tmp_path: Path, proteins: Path, far: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warnings = []
    for sources in (str(far), {"far": str(far), "near": [str(far), str(proteins)]}):
        fit_here(
            [
                "-c",
                str(tiny(data__validation=sources, trainer__max_steps=1)),
                "--run",
                str(tmp_path / f"{len(sources)}"),
            ]
        )
        warnings += [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert warnings == [f"  warning   {proteins}: trained on, too; what validation says of it flatters"]


def validated(module: MLMModule, data: MLMDataModule, *callbacks: pl.Callback) -> pl.Trainer:
    options = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", logger=False, max_steps=1, callbacks=[*callbacks], **options)  # type: ignore[arg-type]
    trainer.validate(module, data, verbose=False)
    return trainer


@pytest.mark.parametrize("static_shapes", [False, True])
def test_what_is_found_is_what_one_sequence_at_a_time_gives(proteins: Path, far: Path, static_shapes: bool) -> None:
    torch.manual_seed(0)
    module = MLMModule(EncoderConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with torch.no_grad():
        module.encoder.embedding.weight.mul_(50)  # so that predictions differ
    sets = {"near": str(proteins), "far": str(far)}
    data = MLMDataModule(str(proteins), sets, max_length=256, validation_pack_tokens=900, static_shapes=static_shapes)
    trainer = validated(module, data)
    for name, loader in zip(sets, data.val_dataloader(), strict=True):
        size = data.tokenizer.vocab_size
        confusion, token_losses = torch.zeros(size, size), torch.zeros(size)
        lengths = torch.zeros(len(LENGTH_BINS) + 1, 3, dtype=torch.float64)
        for batch in loader:
            logits = module.encoder(batch.input_ids, batch.cu_seqlens).detach()
            for place, target in zip(batch.target_positions.tolist(), batch.targets.tolist(), strict=True):
                if target < 0:
                    continue
                (first,) = [i for i, (a, b) in enumerate(batch.cu_seqlens.unfold(0, 2, 1).tolist()) if a <= place < b]
                length = int(batch.cu_seqlens.diff()[first])
                loss, best = float(F.cross_entropy(logits[place], torch.tensor(target))), int(logits[place].argmax())
                confusion[target, best] += 1
                token_losses[target] += loss
                row = next((i for i, bound in enumerate(LENGTH_BINS) if length <= bound), len(LENGTH_BINS))
                lengths[row] += torch.tensor([loss, target == best, 1.0], dtype=torch.float64)
        found = module.findings[name]
        assert torch.equal(found.confusion.float(), confusion)
        assert torch.allclose(found.token_losses.float(), token_losses, rtol=1e-4)
        assert torch.allclose(found.lengths, lengths, rtol=1e-4)
        assert float(trainer.callback_metrics[f"val/{name}/loss"]) == pytest.approx(float(found.loss))
    tokens = data.tokenizer.tokens
    by_class = module.findings["near"].class_accuracies(tokens)
    assert set(by_class) == set(RESIDUE_CLASSES)
    rows = [tokens.index(residue) for residue in "DE"]
    right = sum(float(module.findings["near"].confusion[row, row]) for row in rows)
    assert by_class["negative"] == pytest.approx(right / float(module.findings["near"].confusion[rows].sum()))


def test_pseudo_perplexity_is_that_of_one_masked_token_at_a_time(proteins: Path) -> None:
    torch.manual_seed(0)
    module = MLMModule(EncoderConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with torch.no_grad():
        module.encoder.embedding.weight.mul_(50)
    data = MLMDataModule(str(proteins), str(proteins), max_length=40, validation_pack_tokens=200)
    for sample in (30, 10**6):  # some of the places, and all of them
        trainer = validated(module, data, PseudoPerplexity(sample))
        losses = []
        for batch in data.val_dataloader():
            truth = batch.input_ids.clone()
            truth[batch.target_positions] = batch.targets
            for place in batch.target_positions.tolist():
                (first, end) = next(pair for pair in batch.cu_seqlens.unfold(0, 2, 1).tolist() if place < pair[1])
                alone, true = truth[first:end].clone(), int(truth[place])
                alone[place - first] = data.tokenizer.mask_token_id
                logits = module.encoder(alone, torch.tensor([0, end - first], dtype=torch.int32))[place - first]
                losses.append(float(F.cross_entropy(logits.detach(), torch.tensor(true))))
        chosen = losses if sample > len(losses) else [losses[i * len(losses) // sample] for i in range(sample)]
        assert float(trainer.callback_metrics["val/pseudo_perplexity"]) == pytest.approx(
            math.exp(sum(chosen) / len(chosen)), rel=1e-4
        )


def test_a_run_tells_its_pseudo_perplexity(tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path) -> None:
    options = ("--trainer.callbacks+=PseudoPerplexity", "--trainer.callbacks.sample=20")
    assert fit("-c", tiny(trainer__max_steps=2), *options, "--run", tmp_path / "run") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert scalars(tmp_path / "run")["val/pseudo_perplexity"][-1][1] == pytest.approx(result["val/pseudo_perplexity"])


def test_every_residue_has_one_class() -> None:
    assert sorted("".join(RESIDUE_CLASSES.values())) == sorted("LAGVSERTIDPKQNFYMHWC")


@pytest.mark.parametrize(
    ("sets", "said"),
    [({"a/b": "x.fasta"}, "a set named 'a/b'"), ({"loss": "x.fasta"}, "'loss'"), ({"near": []}, "names no source")],
)
def test_a_set_that_cannot_be_named_is_a_mistake(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], sets: dict[str, object], said: str
) -> None:
    assert main(["fit", "-c", str(tiny(data__validation=sets)), "--run", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_another_order_of_the_sets_is_a_change_since_the_first_one_counts(
    tiny: Callable[..., Path], tmp_path: Path, proteins: Path, far: Path
) -> None:
    sets = {"near": str(proteins), "far": str(far)}
    config = str(tiny())

    def command(sets: dict[str, str], *more: str) -> list[str]:
        return ["-c", config, "--run", str(tmp_path / "run"), "--data.validation", json.dumps(sets), *more]

    assert main(["fit", *command(sets, "--trainer.max_steps", "2")]) == 0
    assert main(["fit", *command(sets, "--trainer.max_steps", "2")]) == 0
    other = dict(reversed(sets.items()))
    with pytest.raises(UserError, match=r"data\.validation: \{'near': .* -> \{'far': .*add --allow_change"):
        fit_here(command(other, "--trainer.max_steps", "2"))
    assert main(["fit", *command(other, "--trainer.max_steps", "3", "--allow_change")]) == 0
    starts = (tmp_path / "run" / "starts.jsonl").read_text().splitlines()
    assert any(change["name"] == "data.validation" for change in json.loads(starts[-1])["changes"])
