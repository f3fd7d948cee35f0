"""What TensorBoard shows beside the curves: their layout, config and command, and what validations look like."""

import shlex
import sys
from itertools import pairwise
from operator import methodcaller
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch.distributed.tensor import DTensor
from typing_extensions import override

from pretrain.corpus.blosum import RESIDUES
from pretrain.corpus.datamodule import MLMDataModule
from pretrain.corpus.padding import IGNORED
from pretrain.corpus.tokenizer import ProteinTokenizer, TextTokenizer
from pretrain.errors import UserError
from pretrain.train import substitutions
from pretrain.train.logging import EventLogger
from pretrain.train.module import MLMModule

_SAMPLES, _SAMPLE_TOKENS = 4, 200


class TensorBoardPages(pl.Callback):
    """Curves that belong together in one chart, the config as text, and at every validation a picture of it.

    Of proteins the picture is of the residues that are taken for each other, beside BLOSUM62; of text, some fill-ins.

    Args:
        config: The run's settings, as text.
    """

    def __init__(self, config: str) -> None:
        self.config = config

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        events = _events(trainer)
        if events is None:
            return
        step = trainer.global_step
        layout = _layout([config.name or "lr-" for config in trainer.lr_scheduler_configs])
        events.show(step, lambda writer: writer.add_custom_scalars(layout))
        command = f"    {shlex.join(sys.argv)}"
        events.show(step, lambda writer: writer.add_text("command", command, step))
        config = "\n".join(f"    {line}" for line in self.config.splitlines())
        events.show(step, lambda writer: writer.add_text("config", config, step))

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        events = _events(trainer)
        data = getattr(trainer, "datamodule", None)
        if events is None or not isinstance(pl_module, MLMModule) or not isinstance(data, MLMDataModule):
            return
        step = max(0, trainer.global_step - 1)  # where Lightning logs the validation's figures
        if isinstance(data.tokenizer, ProteinTokenizer):
            found = next(iter(pl_module.findings.values()))
            places = [data.tokenizer.tokens.index(residue) for residue in RESIDUES]
            image = substitutions.picture(found.confusion.numpy()[np.ix_(places, places)])
            events.show(step, lambda writer: writer.add_image("val/substitutions", image, step, dataformats="HWC"))
        elif isinstance(data.tokenizer, TextTokenizer):
            text = fill_ins(pl_module, data.tokenizer)
            events.show(step, lambda writer: writer.add_text("val/fill_ins", text, step))


class Histograms(pl.Callback):
    """Histograms of weights and gradients, by parameter; add it as ``--trainer.callbacks+=Histograms``.

    Args:
        every_n_steps: Steps between them: each reads all weights from the device.
    """

    def __init__(self, every_n_steps: int = 1000) -> None:
        if every_n_steps < 1:
            raise UserError(f"every_n_steps of Histograms is {every_n_steps}; give 1 or more")
        self.every_n_steps = every_n_steps

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if any(isinstance(parameter, DTensor) for parameter in pl_module.parameters()):
            raise UserError("Histograms needs whole weights, and FSDP2 divides them; leave it out of trainer.callbacks")

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        events, step = _events(trainer), trainer.global_step
        if events is None or step % self.every_n_steps:
            return
        for name, parameter in pl_module.named_parameters():
            for kind, tensor in (("weights", parameter.detach()), ("gradients", parameter.grad)):
                if tensor is not None and bool(tensor.isfinite().all()):
                    histogram = {"tag": f"{kind}/{name}", "values": tensor.float().cpu(), "global_step": step}
                    events.show(step, methodcaller("add_histogram", **histogram))


def fill_ins(module: MLMModule, tokenizer: TextTokenizer) -> str:
    """Beginnings of some validation texts as Markdown: each masked token, and what was predicted where that differs."""
    assert module.sample is not None
    batch, predictions = module.sample[0].to("cpu"), module.sample[1].cpu()
    rows = zip(batch.target_positions.tolist(), batch.targets.tolist(), predictions.tolist(), strict=True)
    asked = [row for row in rows if row[1] != IGNORED]
    true, predicted = ({row[0]: row[i] for row in asked} for i in (1, 2))
    bounds = batch.cu_seqlens.tolist()[: len(batch.pack.lengths) + 1]  # what follows is padding
    lines = []
    for start, end in list(pairwise(bounds))[:_SAMPLES]:
        parts, run = [], list[int]()
        for place in range(start + 1, min(end - 1, start + _SAMPLE_TOKENS)):
            if place not in true:
                run.append(int(batch.input_ids[place]))
                continue
            wanted, given = (tokenizer.backend.decode([ids[place]]) for ids in (true, predicted))
            shown = (
                f"**{wanted.strip()}**"
                if true[place] == predicted[place]
                else f"**{wanted.strip()}** ~~{given.strip()}~~"
            )
            parts += [tokenizer.backend.decode(run), f" {shown} "]
            run = []
        lines.append("".join([*parts, tokenizer.backend.decode(run)]))
    return "**masked**, ~~predicted instead~~\n\n" + "\n\n".join(lines)


def _events(trainer: pl.Trainer) -> EventLogger | None:
    """The run's events, on the process that writes them."""
    if not trainer.is_global_zero:
        return None
    return next((logger for logger in trainer.loggers if isinstance(logger, EventLogger)), None)


def _layout(rates: list[str]) -> dict[str, dict[str, list[Any]]]:
    """What is drawn in one chart; tags are regular expressions. ``rates`` is how the learning rates' tags begin."""

    def lines(*tags: str) -> list[Any]:
        return ["Multiline", list(tags)]

    return {
        "training": {
            "loss: training and validation": lines("^train/loss$", "^val/([^/]*/)?loss$"),
            "learning rate": lines(*(f"^{rate}" for rate in rates)),
            "gradient norm": lines("^train/grad_norm$"),
            "epochs of the data": lines("^data/epoch$"),
        },
        "validation": {
            "perplexity": lines("^val/([^/]*/)?perplexity$", "^val/pseudo_perplexity$"),
            "accuracy on masked tokens": lines("^val/accuracy$"),
            "accuracy by class of residue": lines("^val/accuracy/"),
        },
        "speed": {
            "tokens per second": lines("^throughput/tokens_per_second$"),
            "model FLOPs utilisation": lines("^throughput/mfu$"),
            "share of time waiting for data": lines("^throughput/data_wait$"),
        },
    }
