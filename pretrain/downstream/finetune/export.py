"""A fine-tuned run as transformers' ``EsmForSequenceClassification`` or ``EsmForTokenClassification``."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.corpus.tokenizer import ProteinTokenizer
from pretrain.downstream.card import data_name, starting_point
from pretrain.downstream.finetune.head import SequenceHead, TokenHead
from pretrain.downstream.finetune.labels import LabelSpec
from pretrain.downstream.finetune.model import FineTuned
from pretrain.downstream.hf_files import check_equal, hf_config, hf_state, load_hf, probe, save_hf
from pretrain.errors import UserError

_PROBLEM = {
    "regression": "regression",
    "binary": "single_label_classification",
    "multiclass": "single_label_classification",
    "multilabel": "multi_label_classification",
}

_PROTEINS = ("MKTAYIAKQRQISFVKSHFSRQ", "MSLLLVALLAAPALAQ")
_TEXTS = ("The state of the union is strong.", "It is.")

_ANY_ORDER = """
A pair's order has no meaning; the figures are those of pairs in alphabetical order: `tokenizer(*sorted([one, other]))`.
"""


def hf_class(spec: LabelSpec) -> str:
    """The transformers class that a task's export is for."""
    return "EsmForTokenClassification" if spec.task == "token" else "EsmForSequenceClassification"


def check_exportable(model: FineTuned, source: Path) -> None:
    """Refuse heads that transformers has no class for.

    Raises:
        UserError: If the head pools by more than ``<cls>``.
    """
    if isinstance(model.head, SequenceHead) and model.head.pooling != "cls":
        raise UserError(
            f"{source}: the head pools by {model.head.pooling}, transformers' EsmForSequenceClassification by <cls> "
            "only, so its function cannot be exported; use `pretrain predict`, or fine-tune with --model.pooling cls"
        )


def write_fine_tuned(model: FineTuned, out: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``, or its shards and their index, into the directory ``out``."""
    import transformers

    spec = model.spec
    names = spec.classes or ("value",)
    labels: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if spec.task != "token":
        labels["problem_type"] = _PROBLEM[spec.task]
    config = hf_config(model.encoder, model.encoder.tokenizer, model.max_length, **labels)
    theirs = getattr(transformers, hf_class(spec))(config)
    state = {name: t for name, t in hf_state(model.encoder).items() if not name.startswith("lm_head.")}
    theirs.load_state_dict({**state, **_head_state(model)})
    save_hf(theirs, out)


def _head_state(model: FineTuned) -> dict[str, Tensor]:
    if isinstance(model.head, TokenHead):
        return model.head.state_dict()
    state = model.head.state_dict()
    # A regression's outputs are standardised here; there they are in the labels' own units.
    state["out_proj.weight"] = state["out_proj.weight"] * model.spec.std
    state["out_proj.bias"] = state["out_proj.bias"] * model.spec.std + model.spec.mean
    return {f"classifier.{name}": tensor for name, tensor in state.items()}


def verify_fine_tuned(model: FineTuned, out: Path) -> float:
    """The largest difference between our outputs and those of the files just written, on a random sequence.

    Raises:
        RuntimeError: If it is no rounding error.
    """
    import transformers

    input_ids = probe(model.encoder.tokenizer, model.max_length)
    length = len(input_ids)
    if model.pair_order:
        input_ids[length // 2] = model.encoder.tokenizer.eos_token_id
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    token = isinstance(model.head, TokenHead)
    positions = torch.arange(length) if token else torch.zeros(1, dtype=torch.int64)
    theirs = load_hf(getattr(transformers, hf_class(model.spec)), out)
    with torch.no_grad():
        hidden = model.encoder.hidden_states(input_ids, cu_seqlens, length, positions)
        ours = model.head(hidden, cu_seqlens) * model.spec.std + model.spec.mean
        logits = theirs(input_ids[None], attention_mask=torch.ones_like(input_ids)[None]).logits
    return check_equal(ours, logits[0] if token else logits, "logits")


def model_card(model: FineTuned, settings: dict[str, Any], result: dict[str, Any], name: str) -> str:
    """The README of an exported fine-tuned model: task, data, the test split's figures, licence, limits."""
    spec, data = model.spec, settings["data"]
    source = None if settings["model"]["from_scratch"] else settings["model"]["initialize_from"]
    start = f"`{starting_point(source)}`" if source else "random weights"
    rows = [
        ("Task", spec.described + (f": {', '.join(spec.classes)}" if spec.classes else "")),
        ("Labelled data", f"`{data_name(data['train'])}`"),
        ("Fine-tuned from", f"{start} ({settings['model']['tune']})"),
        ("Optimizer step", f"{model.step:,}"),
        ("Sequence length", f"at most {model.max_length} tokens"),
    ]
    if test := result.get("test"):
        for metric, figure in test.items():
            low, high = figure["interval"]
            told = f"{figure['value']:.3f} (95 % interval {low:.3f} to {high:.3f})"
            rows.append((f"Test {metric}", "undefined" if math.isnan(figure["value"]) else told))
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    kind = hf_class(spec).replace("Esm", "AutoModel")
    protein = isinstance(model.encoder.tokenizer, ProteinTokenizer)
    first, second = _PROTEINS if protein else _TEXTS
    example = f'"{first}"' + (f', "{second}"' if model.pair_order else "")
    order = _ANY_ORDER if model.pair_order == "any" else ""
    tags = "token-classification" if spec.task == "token" else "text-classification"
    return f"""---
library_name: transformers
pipeline_tag: {tags}
license: other
tags: [esm]
---

# {name}

| | |
| --- | --- |
{table}

```python
from transformers import AutoTokenizer, {kind}

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = {kind}.from_pretrained("PATH")
outputs = model(**tokenizer({example}, return_tensors="pt")).logits
```
{order}
## Limits

The figures are those of one test split; sequences unlike it may fare worse. The contact-prediction head is untrained.

## Licence

The licences of the labelled data and of the pre-trained model decide; state one here before you publish the model.
"""
