"""`pretrain export`: a run as a directory that transformers, and everything built on it, loads."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from pretrain.corpus.tokenizer import ESM_ALPHABET, TextTokenizer, Tokenizer, tokenizer_from_string
from pretrain.downstream.finetune.export import check_exportable, hf_class, verify_fine_tuned, write_fine_tuned
from pretrain.downstream.finetune.export import model_card as fine_tuned_card
from pretrain.downstream.finetune.model import is_fine_tuned, load_fine_tuned
from pretrain.downstream.load import checkpoint_of, encoder_of
from pretrain.errors import UserError
from pretrain.model.encoder import Encoder
from pretrain.model.hf import to_hf, to_hf_config
from pretrain.train.run import CONFIG, RESULT


def export(run: Path, out: Path) -> str:
    """Write ``config.json``, ``model.safetensors``, the tokenizer and a model card, and compare the logits of both.

    Args:
        run: A run directory, or a checkpoint in one.
        out: The directory to write: whole, or not at all.

    Returns:
        What was written and how it was verified, for people.

    Raises:
        UserError: If ``out`` exists, or ``run`` is no run.
    """
    refuse_existing(out)
    checkpoint = checkpoint_of(run)
    home = run if run.is_dir() else run.absolute().parent.parent
    if not (home / CONFIG).is_file():
        raise UserError(f"{home}: has no {CONFIG}; give a run directory, or a checkpoint inside one")
    settings = yaml.safe_load((home / CONFIG).read_text(encoding="utf-8"))
    if is_fine_tuned(checkpoint):
        return _export_fine_tuned(run, home, settings, out)
    encoder = encoder_of(checkpoint, run)
    tokenizer = tokenizer_from_string(checkpoint["MLMDataModule"]["tokenizer"], str(run))
    max_length = settings["data"]["max_length"]

    with new_directory(out) as partial:
        write_model(encoder, tokenizer, max_length, partial)
        write_tokenizer(tokenizer, max_length, partial)
        result = json.loads((home / RESULT).read_text(encoding="utf-8")) if (home / RESULT).is_file() else {}
        card = model_card(encoder, checkpoint, settings, result, home.absolute().name)
        (partial / "README.md").write_text(card, encoding="utf-8")
        difference = verify(encoder, tokenizer, max_length, partial)
    return (
        f"{out}: step {checkpoint['global_step']} of {home}, for transformers' AutoModelForMaskedLM and AutoTokenizer; "
        f"logits agree within {difference:.1e}"
    )


def _export_fine_tuned(run: Path, home: Path, settings: dict[str, Any], out: Path) -> str:
    model = load_fine_tuned(run)
    check_exportable(model, run)
    with new_directory(out) as partial:
        write_fine_tuned(model, partial)
        write_tokenizer(model.tokenizer, model.max_length, partial)
        result = json.loads((home / RESULT).read_text(encoding="utf-8")) if (home / RESULT).is_file() else {}
        card = fine_tuned_card(model, settings, result if result.get("best_step") == model.step else {}, out.name)
        (partial / "README.md").write_text(card, encoding="utf-8")
        difference = verify_fine_tuned(model, partial)
    return (
        f"{out}: step {model.step} of {home}, for transformers' {hf_class(model.spec)} and AutoTokenizer; logits agree "
        f"within {difference:.1e}"
    )


def refuse_existing(out: Path) -> None:
    """Raises `UserError` if there is something at ``out``."""
    if out.exists():
        raise UserError(f"{out}: exists already; choose another directory, or remove it first")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory beside ``out`` that becomes ``out`` when the block ends, and vanishes when it fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _hf_model(encoder: Encoder, tokenizer: Tokenizer, max_length: int) -> Any:
    from transformers import EsmConfig, EsmForMaskedLM

    config = EsmConfig(
        **to_hf_config(
            encoder.config,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.eos_token_id,
            cls_token_id=tokenizer.cls_token_id,
            max_position_embeddings=max_length + 2,  # transformers' ESM counts positions from the padding id on
            vocab_list=list(tokenizer.tokens) if tokenizer.tokens == ESM_ALPHABET else None,
        )
    )
    model = EsmForMaskedLM(config)
    missing, unexpected = model.load_state_dict(to_hf(encoder.state_dict()), strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith("esm.contact_head.") for name in missing), missing
    return model.eval()


def write_model(encoder: Encoder, tokenizer: Tokenizer, max_length: int, out: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` into the directory ``out``."""
    model = _hf_model(encoder, tokenizer, max_length)
    for parameter in model.esm.contact_head.parameters():
        torch.nn.init.zeros_(parameter)  # no contact head was trained: better none than a random one
    # Under the names that the model itself and every published ESM-2 have, not those of TensorFlow's times.
    model.save_pretrained(out, save_original_format=False)


def write_tokenizer(tokenizer: Tokenizer, max_length: int, out: Path) -> None:
    """Write what transformers' ``AutoTokenizer`` loads into the directory ``out``."""
    from transformers import EsmTokenizer, PreTrainedTokenizerFast

    if isinstance(tokenizer, TextTokenizer):
        from tokenizers.processors import TemplateProcessing

        cls, eos = (tokenizer.tokens[i] for i in (tokenizer.cls_token_id, tokenizer.eos_token_id))
        backend = type(tokenizer.backend).from_str(tokenizer.serialize())
        backend.post_processor = TemplateProcessing(
            single=f"{cls} $A {eos}",
            pair=f"{cls} $A {eos} $B {eos}",
            special_tokens=[(cls, tokenizer.cls_token_id), (eos, tokenizer.eos_token_id)],
        )
        backend.encode_special_tokens = False
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            model_max_length=max_length,
            cls_token=cls,
            eos_token=eos,
            sep_token=eos,
            pad_token=tokenizer.tokens[tokenizer.pad_token_id],
            unk_token=tokenizer.tokens[tokenizer.unk_token_id],
            mask_token=tokenizer.tokens[tokenizer.mask_token_id],
        ).save_pretrained(out)
        return
    vocabulary = out / "vocab.txt"
    vocabulary.write_text("\n".join(tokenizer.tokens), encoding="utf-8")
    EsmTokenizer(str(vocabulary), model_max_length=max_length).save_pretrained(out)


def verify(encoder: Encoder, tokenizer: Tokenizer, max_length: int, out: Path) -> float:
    """The largest difference between our logits and those of the files just written, on a random masked sequence."""
    from transformers import AutoModelForMaskedLM

    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(len(tokenizer.replacement_ids), (min(max_length, 256),), generator=generator)
    input_ids = torch.from_numpy(tokenizer.replacement_ids)[choice]
    input_ids[0], input_ids[-1], input_ids[5::7] = (
        tokenizer.cls_token_id,
        tokenizer.eos_token_id,
        tokenizer.mask_token_id,
    )
    with torch.no_grad():
        ours = encoder(input_ids, torch.tensor([0, len(input_ids)], dtype=torch.int32))
        model = AutoModelForMaskedLM.from_pretrained(out).eval()
        theirs = model(input_ids[None], attention_mask=torch.ones_like(input_ids)[None]).logits[0]
    difference = float((ours - theirs).abs().max())
    if not difference < 1e-3 * max(1.0, float(ours.abs().max())):
        raise RuntimeError(f"exported logits differ from the run's by {difference}: this is a bug, please report it")
    return difference


def model_card(
    encoder: Encoder, checkpoint: dict[str, Any], settings: dict[str, Any], result: dict[str, Any], name: str
) -> str:
    """The README of an exported model: data, steps, loss, licence, and what it was not tested for."""
    config, model, data = encoder.config, settings["model"], settings["data"]
    shape = f"{config.num_hidden_layers} layers, {config.hidden_size} wide, {config.num_attention_heads} heads"
    finished = result.get("steps") == checkpoint["global_step"]
    figures = result if finished and "val/loss" in result else {}
    protein = data["tokenizer"] == "esm"
    sources = data["train"] if isinstance(data["train"], list) else [data["train"]]
    # UniProt's licence asks for attribution; of other data than what ships with the project nothing is known.
    uniprot = protein and all(Path(source).parts[-3:] == ("data", "proteins", "train.fasta.gz") for source in sources)
    header = {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "license": "cc-by-4.0" if uniprot else "other",
        "tags": ["esm", "masked-lm", *(["biology", "protein"] if protein else [])],
    }
    parameters = sum(p.numel() for p in encoder.parameters())
    rows = [
        ("Parameters", f"{parameters:,} ({shape})"),
        (
            "Optimizer steps",
            f"{checkpoint['global_step']:,} of {data['global_batch_tokens']:,} tokens, crops of {data['max_length']}",
        ),
        ("Training data", ", ".join(f"`{source}`" for source in sources)),
        (
            "Peak learning rate",
            f"{model['learning_rate']:g}, inverse square root after {model['warmup_steps']:,} steps",
        ),
        ("Masking", f"{data['mlm_probability']:.0%} of tokens"),
    ]
    if "tokens_seen" in result and finished:
        rows.insert(2, ("Tokens seen", f"{result['tokens_seen']:,} ({result['epochs']:.1f} epochs)"))
    if figures:
        rows += [
            (
                "Validation loss",
                f"{figures['val/loss']:.4f}: perplexity {figures['val/perplexity']:.3f}, "
                f"accuracy {figures['val/accuracy']:.1%}",
            ),
            (
                "Unigram, bigram perplexity",
                f"{figures['unigram_perplexity']:.3f}, {figures['bigram_perplexity']:.3f} on the same positions",
            ),
        ]
    else:
        rows.append(("Validation loss", "not measured at this step"))
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    licence = (
        "Trained on UniProt sequences (The UniProt Consortium), which are available under CC BY 4.0."
        if uniprot
        else "The licence of the training data decides; state it here before you publish the model."
    )
    example = "MKTAYIAKQR<mask>ISFVKSHFSRQ" if protein else "The state of the <mask> is strong."
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {name}

An ESM-2 style masked language model of {"protein sequences" if protein else "text"}.

| | |
| --- | --- |
{table}

Validation positions: 15 % of the held-out tokens, all replaced by the mask token.

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForMaskedLM.from_pretrained("PATH")
logits = model(**tokenizer("{example}", return_tensors="pt")).logits
```

## Limits

Not evaluated on any downstream task. The contact-prediction head is untrained (all zeros).

## Licence

{licence}
"""
