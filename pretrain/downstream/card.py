"""The model card of an export: what the model is, how it came about, how well it does, and what nobody looked at."""

import ast
import filecmp
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from pretrain.model.encoder import Encoder
from pretrain.shipped import shipped
from pretrain.train.changes import Change
from pretrain.train.run import STARTS

CURVES = "curves.png"
_RECIPE = {
    "model": None,
    "data": (
        "max_length", "long_sequences", "global_batch_tokens", "mlm_probability", "mask_replace_prob",
        "random_replace_prob", "mask_unit", "mask_draws", "mean_span_length", "seed",
    ),
    "trainer": ("max_steps", "precision", "gradient_clip_val"),
}  # fmt: skip
"""The settings that make a model what it is (None: all but `_HOW`); none of how and where it was computed."""
_HOW = ("activation_checkpointing", "compile", "flash_attention", "cpu_kernels")


def settings_at(settings: dict[str, Any], home: Path, step: int) -> tuple[dict[str, Any], list[tuple[int, str]]]:
    """A run's settings when it had done ``step`` steps, and how they had changed until then.

    Args:
        settings: The run's settings now.
        home: The run directory.
        step: Optimizer steps.

    Returns:
        The settings then; and each change, as ``name: old -> new``, with the step that it followed.
    """
    settings, made = deepcopy(settings), list[tuple[int, str]]()
    lines = (home / STARTS).read_bytes().splitlines() if (home / STARTS).is_file() else []
    starts = []
    for line in lines:
        with suppress(ValueError):  # one that a power cut or a full disk left by half
            starts.append(json.loads(line))
    for start in reversed(starts):
        for recorded in start.get("changes", ()):
            name, was, shown = _change(recorded)
            if start["step"] < step:
                made.append((start["step"], shown))
                continue
            *parents, last = name.split(".")
            place = settings
            for parent in parents:
                place = place.get(parent) or {}
            place[last] = was
    return settings, sorted(made, key=lambda change: change[0])


def _change(recorded: dict[str, Any] | str) -> tuple[str, Any, str]:
    """Of a recorded change the setting's name, what it was, and the change for people."""
    if not isinstance(recorded, str):
        return recorded["name"], recorded["was"], str(Change(**recorded))
    name, _, values = recorded.partition(": ")  # older versions recorded what people see
    was = values.partition(" -> ")[0]
    for read in (ast.literal_eval, float):
        with suppress(ValueError, SyntaxError):
            return name, read(was), recorded
    return name, was, recorded


def model_card(
    encoder: Encoder,
    checkpoint: dict[str, Any],
    settings: dict[str, Any],
    result: dict[str, Any],
    name: str,
    changes: Sequence[tuple[int, str]] = (),
    curves: bool = False,
    biology: Mapping[str, float] | None = None,
    contacts: str = "",
) -> str:
    """The README of an exported model, with the head that the Hub reads.

    Args:
        encoder: The model.
        checkpoint: What it was loaded from.
        settings: The run's settings at that step.
        result: The run's final figures; of another step they are left out.
        name: The run's name.
        changes: How settings changed on the way, with the steps that the changes followed.
        curves: Whether there is a picture of the curves.
        biology: What `pretrain.downstream.biology.Biology` found at that step, by the names that it logs.
        contacts: Where the contact head is from; nothing if it is one of zeros.
    """
    data = settings["data"]
    protein = data["tokenizer"] == "esm"
    sources = [data["train"]] if isinstance(data["train"], str) else list(data["train"])
    # UniProt's licence asks for attribution; of other data than what ships with the project nothing is known.
    uniprot = protein and all(map(_is_sample, sources))
    header = {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "license": "cc-by-4.0" if uniprot else "other",
        "tags": ["esm", "masked-lm", *(["biology", "protein"] if protein else [])],
    }
    licence = (
        "Trained on UniProt sequences (The UniProt Consortium), which are available under CC BY 4.0."
        if uniprot
        else "The licence of the training data decides; state it here before you publish the model."
    )
    example = "MKTAYIAKQR<mask>ISFVKSHFSRQ" if protein else "The state of the <mask> is strong."
    rows = _rows(encoder, checkpoint, settings, result, sources)
    rows += _biology_rows(biology or {})
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    history = "".join(f"- after step {step:,}: `{change}`\n" for step, change in changes)
    history = f"Settings were changed during the run:\n\n{history}\nThe last ones:\n\n" if changes else ""
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {name}

An ESM-2 style masked language model of {"protein sequences" if protein else "text"}.

| | |
| --- | --- |
{table}

Validation positions: 15 % of the held-out tokens, all replaced by the mask token.
{f"{chr(10)}![Loss and learning rate, step by step]({CURVES}){chr(10)}" if curves else ""}
```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForMaskedLM.from_pretrained("PATH")
logits = model(**tokenizer("{example}", return_tensors="pt")).logits
```

## Recipe

{history}```yaml
{yaml.safe_dump(_recipe(settings), sort_keys=False).strip()}
```

## Limits

{"Evaluated on nothing but what stands above." if biology else "Not evaluated on any downstream task."} \
{f"The contact-prediction head: {contacts}." if contacts else "The contact-prediction head is untrained (all zeros)."} \
Sequences longer than {data["max_length"]} tokens are longer than anything that the model was trained on.

## Licence

{licence}
"""


def _biology_rows(figures: Mapping[str, float]) -> list[tuple[str, str]]:
    """Contacts by range, and agreement with measured variants by table."""
    rows = []
    for span in ("short", "medium", "long"):
        if f"biology/p_at_l/{span}" in figures:
            values = [figures[f"biology/{top}/{span}"] for top in ("p_at_l", "p_at_l5", "chance")]
            shown = "P@L {:.3f}, P@L/5 {:.3f}, by chance {:.3f}".format(*values)
            rows.append((f"Contacts, {span} range", shown))
    prefix = "biology/spearman/"
    tables = {name.removeprefix(prefix): value for name, value in figures.items() if name.startswith(prefix)}
    rows += [(f"Variants of `{name}`", f"Spearman {value:.3f}, zero-shot") for name, value in tables.items()]
    return rows


def _share(mlm_probability: float | list[float]) -> str:
    shares = mlm_probability if isinstance(mlm_probability, list | tuple) else [mlm_probability]
    return " to ".join(f"{share:.0%}" for share in shares)


def _rows(
    encoder: Encoder,
    checkpoint: dict[str, Any],
    settings: dict[str, Any],
    result: dict[str, Any],
    sources: Sequence[str],
) -> list[tuple[str, str]]:
    config, model, data = encoder.config, settings["model"], settings["data"]
    step = checkpoint["global_step"]
    finished = result.get("steps") == step
    size = f"{data['global_batch_tokens']:,} tokens"
    if warmup := data.get("batch_warmup"):
        size = f"{warmup['first']:,} growing to {size}"
    rows = [
        (
            "Parameters",
            f"{sum(p.numel() for p in encoder.parameters()):,} ({config.num_hidden_layers} layers, "
            f"{config.hidden_size} wide, {config.num_attention_heads} heads)",
        ),
        ("Optimizer steps", f"{step:,} of {size}, crops of {data['max_length']}"),
        ("Training data", ", ".join(f"`{data_name(source)}`" for source in sources)),
        (
            "Peak learning rate",
            f"{model['learning_rate']:g}, {_schedule(model)}",
        ),
        ("Masking", f"{_share(data['mlm_probability'])} of tokens"),
    ]
    if "tokens_seen" in result and finished:
        rows.insert(2, ("Tokens seen", f"{result['tokens_seen']:,} ({result['epochs']:.1f} epochs)"))
    if not finished or "val/loss" not in result:
        return [*rows, ("Validation loss", "not measured at this step")]
    return [
        *rows,
        (
            "Validation loss",
            f"{result['val/loss']:.4f}: perplexity {result['val/perplexity']:.3f}, "
            f"accuracy {result['val/accuracy']:.1%}",
        ),
        (
            "Unigram, bigram perplexity",
            f"{result['unigram_perplexity']:.3f}, {result['bigram_perplexity']:.3f} on the same positions",
        ),
    ]


def _schedule(model: dict[str, Any]) -> str:
    warmup = f"after {model['warmup_steps']:,} steps"
    if not (schedule := model.get("schedule")):
        return f"inverse square root {warmup}"
    home, _, name = schedule["class_path"].rpartition(".")
    settings = ", ".join(f"{key} {value}" for key, value in (schedule.get("init_args") or {}).items())
    said = f"`{name}` ({settings})" if settings else f"`{name}`"
    return f"{said} {warmup}" if home == "pretrain.train.schedule" else said


def _recipe(settings: dict[str, Any]) -> dict[str, Any]:
    recipe: dict[str, Any] = {"seed_everything": settings.get("seed_everything")}
    for part, names in _RECIPE.items():
        given = settings.get(part) or {}
        wanted = names or [name for name in given if name not in _HOW]
        recipe[part] = {name: given[name] for name in wanted if given.get(name) is not None}
    if source := recipe["model"].get("initialize_from"):
        recipe["model"]["initialize_from"] = starting_point(source)
    return recipe


def data_name(source: str) -> str:
    """What a card calls data: what ships and data sets on the Hub by their names, others not by where they lie."""
    path, data = _found(source), shipped("data")
    if path and data and path.resolve().is_relative_to(data.resolve()):
        return (data.name / path.resolve().relative_to(data.resolve())).as_posix()
    if source.startswith("hf://"):
        return source
    return Path(source.partition("?")[0] if "://" in source else source).name or source


def _is_sample(source: str) -> bool:
    """Whether data are the proteins that ship, or a copy of them: what a file holds tells it, not what it is called."""
    path, sample = _found(source), shipped("data/proteins/train.fasta.gz")
    return path is not None and sample is not None and path.is_file() and filecmp.cmp(path, sample, shallow=False)


def _found(source: str) -> Path | None:
    """The file or directory that a run meant, as far as it is still there."""
    return path if (path := Path(source)).exists() else shipped(source)


def starting_point(path: str) -> str:
    """What a model grew from, as a card names it: a run, a directory or a checkpoint, not where it lies."""
    parts = Path(path).parts
    return "/".join(parts[-3:]) if path.endswith(".ckpt") else (parts or (path,))[-1]  # RUN/checkpoints/NAME.ckpt
