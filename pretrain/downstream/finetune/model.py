"""A fine-tuned model, from its run: encoder, head, and what the outputs mean."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.downstream.finetune.head import Head, build_head, head_outputs
from pretrain.downstream.finetune.labels import LabelSpec
from pretrain.downstream.finetune.metrics import Answers
from pretrain.downstream.finetune.packs import LabelledBatch
from pretrain.downstream.finetune.pairs import PairOrder
from pretrain.downstream.load import checkpoint_of, encoder_of, is_fine_tuned
from pretrain.downstream.pretrained_encoder import PretrainedEncoder
from pretrain.errors import UserError
from pretrain.train.pretrained import HF_CONFIG


@dataclass
class FineTuned:
    """A fine-tuned model in eval mode.

    Attributes:
        encoder: The encoder; low-rank parts are merged.
        head: The head.
        spec: What its outputs mean.
        max_length: Tokens of a sequence that it was trained on, at most.
        pair_order: That of pairs, where it takes pairs; None where single sequences.
        step: After which optimizer step this is.
    """

    encoder: PretrainedEncoder
    head: Head
    spec: LabelSpec
    max_length: int
    pair_order: PairOrder | None
    step: int

    def answers(self, batches: Iterable[LabelledBatch], device: torch.device) -> Iterator[Answers]:
        """The model's outputs for batches, one by one.

        Raises:
            UserError: If one is infinite or NaN, as of weights that went astray in training.
        """
        self.encoder.to(device)
        self.head.to(device)
        for batch in batches:
            with torch.inference_mode(), self.encoder.precision():
                outputs = head_outputs(self.encoder, self.head, batch.to(device))
            if not bool(outputs.isfinite().all()):
                raise UserError(
                    f"the fine-tuned model's outputs are not finite (after step {self.step}); take an earlier "
                    "checkpoint, or fine-tune again with a lower model.learning_rate"
                )
            yield Answers.of(batch, outputs)


def load_fine_tuned(path: Path) -> FineTuned:
    """The best checkpoint of a fine-tuning run (the newest, where nothing was validated), or a checkpoint file.

    Raises:
        UserError: If there is none, or it was not fine-tuned.
    """
    if (path / HF_CONFIG).is_file():
        raise UserError(f"{path}: is an export, for transformers; give the fine-tuning run, or one of its checkpoints")
    checkpoint = checkpoint_of(path)
    if not is_fine_tuned(checkpoint):
        raise UserError(f"{path}: was pre-trained, not fine-tuned; fine-tune it first: pretrain finetune --from {path}")
    encoder = encoder_of(checkpoint, path)
    settings = checkpoint["hyper_parameters"]["fine_tuning"]
    spec = LabelSpec.from_plain(settings["labels"])
    head = build_head(encoder.config, spec, settings["pooling"])
    prefix = "head."
    head.load_state_dict(
        {name.removeprefix(prefix): t for name, t in checkpoint["state_dict"].items() if name.startswith(prefix)}
    )
    return FineTuned(
        encoder,
        head.eval(),
        spec,
        max_length=settings["max_length"],
        pair_order=settings["pair_order"],
        step=checkpoint["global_step"],
    )
