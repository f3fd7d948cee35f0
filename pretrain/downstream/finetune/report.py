"""What fine-tuning tells people: the header before it, and after it the test split, once, with a picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from pretrain.downstream.finetune.data import FineTuneDataModule
from pretrain.downstream.finetune.labels import LabelSpec
from pretrain.downstream.finetune.metrics import Answers, bootstrap, f1_scores, main_metric, metrics, predictions
from pretrain.downstream.finetune.model import FineTuned, load_fine_tuned
from pretrain.downstream.finetune.module import FineTuneModule
from pretrain.train.picture import drawing
from pretrain.train.report import described, execution, program
from pretrain.train.run import Run

PICTURE = "test.png"
_TUNED = {
    "full": "all of the encoder is trained",
    "frozen": "the encoder is frozen",
    "last": "the last blocks are trained",
    "lora": "low-rank parts of the blocks are trained",
}


_UNVALIDATED = "  validated on nothing: give a column split (or name it, --data.split_column), or --data.validation"


def header(run: Run, trainer: pl.Trainer, module: FineTuneModule, data: FineTuneDataModule) -> str:
    """Model, labels, data and where the run begins, in a few lines."""
    config, spec = module.encoder.config, data.spec
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    begin = f"continues after step {run.step} of {trainer.max_steps}" if run.step else f"{trainer.max_steps} steps"
    sizes = ", ".join(f"{len(part.corpus):,} {split}" for split, part in data.splits.items())
    epoch = data.train_corpus.num_tokens / data.global_batch_tokens
    classes = f", {len(spec.classes)} classes: {', '.join(spec.classes[:8])}" if spec.classes else ""
    head = (
        "a linear layer on each residue" if spec.task == "token" else f"{module.pooling} pooling, dense, tanh, output"
    )
    what = {None: "sequences", "given": "pairs", "any": "pairs in either order"}[data.pair_order]
    return "\n".join(
        [
            f"{run.directory}: {begin}",
            f"  model     {config.num_hidden_layers} layers, {config.hidden_size} wide, from "
            f"{module.initialized_from or ('its checkpoint' if run.checkpoint else 'random weights')}",
            f"  training  {trained:,} parameters ({_TUNED[module.tune]}); head: {head}",
            f"  labels    {spec.described}{classes}{', ...' if len(spec.classes) > 8 else ''}",
            f"  data      {what}: {sizes}",
            *([] if "validation" in data.splits else [_UNVALIDATED]),
            f"  step      {data.global_batch_tokens:,} tokens, at most {data.max_length} of a sequence; an epoch is "
            f"about {max(1, round(epoch)):,} steps",
            f"  hardware  {described(execution(trainer, module))}",
        ]
    )


def final_figures(
    run: Run, trainer: pl.Trainer, data: FineTuneDataModule, initialized_from: str | None, stopped_early: bool
) -> dict[str, Any]:
    """What ``result.json`` holds. The best checkpoint answers validation and, only now, the test split.

    The figures of the test split are made on the first process only.

    Raises:
        UserError: If an output of it is not finite: there is no result then.
    """
    state = data.state_dict()
    model = load_fine_tuned(run.directory)
    device = trainer.strategy.root_device
    result: dict[str, Any] = {
        "task": data.spec.task,
        "classes": list(data.spec.classes),
        "main_metric": main_metric(data.spec),
        "steps": trainer.global_step,
        "stopped_early": stopped_early,
        "best_step": model.step,
        "initialized_from": initialized_from,
        "tokens_seen": state["tokens"],
        "epochs": state["cursor"] / len(data.train_corpus),
    }
    for split in data.splits:
        result[f"{split}_sequences"] = len(data.splits[split].corpus)
    if "validation" in data.splits:
        result["validation"] = metrics(data.spec, _answer(model, data, "validation", device))
    if "test" in data.splits:
        answers = _answer(model, data, "test", device)  # by each process, so that all end in the same way
        if trainer.is_global_zero:
            intervals = bootstrap(data.spec, answers)
            values = metrics(data.spec, answers)
            result["test"] = {name: {"value": value, "interval": intervals[name]} for name, value in values.items()}
            draw(data.spec, answers, run.directory / PICTURE)
            _show_in_tensorboard(trainer, run.directory / PICTURE)
    return result


def _answer(model: FineTuned, data: FineTuneDataModule, split: str, device: torch.device) -> Answers:
    return Answers.join(model.answers(data.batches(split), device))


def summary(run: Path, result: dict[str, Any]) -> str:
    """The end of a run: the test split's figures with their intervals, and what to do next."""
    early = ", stopped early" if result["stopped_early"] else ""
    best = f"best after step {result['best_step']}" if "validation" in result else "nothing was validated"
    lines = [f"  {result['steps']:,} steps{early}, {result['epochs']:.1f} epochs; {best}"]
    if validation := result.get("validation"):
        lines += ["", f"  validation  {'  '.join(f'{name} {value:.3f}' for name, value in validation.items())}"]
    if test := result.get("test"):
        lines += ["", f"  test, {result['test_sequences']:,} sequences, looked at once (95 % interval by bootstrap)"]
        for name, figure in test.items():
            low, high = figure["interval"]
            lines.append(f"    {name:10} {figure['value']:7.3f}   [{low:.3f}, {high:.3f}]")
        lines.append(f"  picture       {run / PICTURE}")
    lines += [
        "",
        f"  look at it    {program('tensorboard')} --logdir {run}",
        f"  predict       {program('pretrain')} predict {run} FILE --out predictions.csv",
        f"  export it     {program('pretrain')} export {run} --out {run.name}-export",
    ]
    return "\n".join(lines)


def draw(spec: LabelSpec, answers: Answers, picture: Path) -> None:
    """Predictions against labels: a scatter plot, a confusion matrix, or of several labels the F1 of each."""
    predicted = predictions(spec, answers.outputs)
    if spec.task == "regression":
        with drawing(picture, (5, 5)) as (plot,):
            _scatter(plot, answers.targets.numpy(), predicted.numpy())
    elif spec.task == "multilabel":
        with drawing(picture, (7, 0.8 + 0.32 * len(spec.classes))) as (plot,):
            _bars(plot, spec, predicted.numpy() > 0.5, answers.targets.numpy() > 0.5)
    else:
        side = max(4.2, 2.2 + 0.62 * len(spec.classes))
        with drawing(picture, (side * 1.15, side)) as (plot,):
            _confusion(plot, spec, predicted.argmax(-1).numpy(), answers.targets.numpy())


def _scatter(plot: Any, labels: Any, predicted: Any) -> None:
    plot.plot(labels, predicted, "o", markersize=3, alpha=0.5, markeredgewidth=0)
    ends = [min(labels.min(), predicted.min()), max(labels.max(), predicted.max())]
    plot.plot(ends, ends, color="black", linewidth=0.8, linestyle=":")
    plot.set(xlabel="label", ylabel="prediction", title=f"test, {len(labels):,} sequences")


def _bars(plot: Any, spec: LabelSpec, predicted: Any, labels: Any) -> None:
    true = labels.sum(0)
    f1 = f1_scores((predicted & labels).sum(0), predicted.sum(0), true)
    names = [f"{name} ({count:,})" for name, count in zip(spec.classes, true, strict=True)]
    defined = np.flatnonzero(~np.isnan(f1))
    plot.barh([names[i] for i in defined], f1[defined])
    plot.invert_yaxis()
    plot.set(xlabel="F1", xlim=(0, 1), title=f"test, {len(labels):,} sequences")


def _confusion(plot: Any, spec: LabelSpec, predicted: Any, labels: Any) -> None:
    count = len(spec.classes)
    matrix = np.zeros((count, count), int)
    np.add.at(matrix, (labels, predicted), 1)
    share = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    image = plot.imshow(share, cmap="Blues", vmin=0, vmax=1, zorder=1)  # above the grid
    for row, column in np.ndindex(matrix.shape) if count <= 20 else ():
        colour = "white" if share[row, column] > 0.5 else "black"
        plot.text(column, row, f"{matrix[row, column]:,}", ha="center", va="center", color=colour, fontsize=8)
    long = max(map(len, spec.classes)) > 3
    plot.set_xticks(range(count), spec.classes, rotation=40 if long else 0, ha="right" if long else "center")
    plot.set_yticks(range(count), spec.classes)
    unit = "residues" if spec.task == "token" else "sequences"
    plot.set(xlabel="predicted", ylabel="label", title=f"test, {len(labels):,} {unit}")
    plot.figure.colorbar(image, ax=plot, label="share of the label", shrink=0.8)
    plot.tick_params(length=0)


def _show_in_tensorboard(trainer: pl.Trainer, picture: Path) -> None:
    import matplotlib.image
    from pytorch_lightning.loggers import TensorBoardLogger

    image = (matplotlib.image.imread(picture) * 255).astype(np.uint8)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image("test", image, trainer.global_step, dataformats="HWC")
            logger.experiment.flush()
