"""`pretrain export`: a run as a directory that transformers, and everything built on it, loads."""

from pathlib import Path
from typing import Any

import torch
import yaml

from pretrain.corpus.tokenizer import Tokenizer
from pretrain.downstream.card import CURVES, model_card, settings_at
from pretrain.downstream.contact_regression import OLDER, read_regression
from pretrain.downstream.finetune.export import check_exportable, hf_class, verify_fine_tuned, write_fine_tuned
from pretrain.downstream.finetune.export import model_card as fine_tuned_card
from pretrain.downstream.finetune.model import load_fine_tuned
from pretrain.downstream.hf_files import check_equal, hf_config, hf_state, load_hf, probe, save_hf
from pretrain.downstream.inspect import inspect
from pretrain.downstream.load import checkpoint_of, encoder_of, is_fine_tuned
from pretrain.downstream.tokenizer_files import write_tokenizer
from pretrain.errors import UserError
from pretrain.files import new_directory, refuse_existing
from pretrain.model.contacts import ContactRegression
from pretrain.model.encoder import Encoder
from pretrain.train.logging import METRICS_FILE, read_metrics
from pretrain.train.run import CONFIG, Run


def export(run: Path, out: Path, regression: Path | None = None) -> str:
    """Write ``config.json``, ``model.safetensors``, the tokenizer and a model card, and compare the logits of both.

    Args:
        run: A run directory, or a checkpoint in one.
        out: The directory to write: whole, or not at all.
        regression: From `pretrain contacts --save_regression`: the contact head, with which transformers'
            ``predict_contacts`` works. By default the one of the model that the run grew from, or none.

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
        if regression:
            raise UserError(f"{run}: is a fine-tuning run; a contact regression goes with a pre-trained one")
        return _export_fine_tuned(run, home, settings, out)
    encoder = encoder_of(checkpoint, run)
    tokenizer, max_length = encoder.tokenizer, settings["data"]["max_length"]
    contacts = OLDER if encoder.contacts else ""
    if regression:
        encoder.contacts = read_regression(regression)
        encoder.contacts.check(encoder.config, str(regression))
        contacts = "a regression that was fitted on structures after training"

    with new_directory(out) as partial:
        write_model(encoder, tokenizer, max_length, partial, encoder.contacts)
        write_tokenizer(tokenizer, max_length, partial)
        result = Run(home).result or {}
        settings, changes = settings_at(settings, home, checkpoint["global_step"])
        metrics = read_metrics(home / METRICS_FILE)
        curves = any(name == "train/loss" for _, name, _ in metrics)
        last = checkpoint["global_step"] - 1
        biology = {name: value for step, name, value in metrics if step == last and name.startswith("biology/")}
        if curves:
            inspect(home, picture=partial / CURVES)
        name = home.absolute().name
        card = model_card(encoder, checkpoint, settings, result, name, changes, curves, biology, contacts)
        (partial / "README.md").write_text(card, encoding="utf-8")
        difference = verify(encoder, tokenizer, max_length, partial, encoder.contacts)
    return (
        f"{out}: step {checkpoint['global_step']} of {home}, for transformers' AutoModelForMaskedLM and AutoTokenizer; "
        f"logits agree within {difference:.1e}\n  publish it  hf upload ORG/NAME {out}"
    )


def _export_fine_tuned(run: Path, home: Path, settings: dict[str, Any], out: Path) -> str:
    model = load_fine_tuned(run)
    check_exportable(model, run)
    with new_directory(out) as partial:
        write_fine_tuned(model, partial)
        write_tokenizer(model.encoder.tokenizer, model.max_length, partial)
        result = Run(home).result or {}
        if result.get("best_step") != model.step:
            result = {}
        card = fine_tuned_card(model, settings, result, home.absolute().name)
        (partial / "README.md").write_text(card, encoding="utf-8")
        difference = verify_fine_tuned(model, partial)
    return (
        f"{out}: step {model.step} of {home}, for transformers' {hf_class(model.spec)} and AutoTokenizer; logits agree "
        f"within {difference:.1e}"
    )


def write_model(
    encoder: Encoder, tokenizer: Tokenizer, max_length: int, out: Path, contacts: ContactRegression | None = None
) -> None:
    """Write ``config.json`` and ``model.safetensors``, or its shards and their index, into the directory ``out``."""
    from transformers import EsmForMaskedLM

    model = EsmForMaskedLM(hf_config(encoder, tokenizer, max_length))
    model.load_state_dict(hf_state(encoder, contacts))
    save_hf(model, out)


def verify(
    encoder: Encoder, tokenizer: Tokenizer, max_length: int, out: Path, contacts: ContactRegression | None = None
) -> float:
    """The largest difference between our logits and those of the files just written, on a random masked sequence.

    Where there is a contact head, its predictions are compared, too.

    Raises:
        RuntimeError: If it is no rounding error.
    """
    from transformers import AutoModelForMaskedLM

    model = load_hf(AutoModelForMaskedLM, out)
    input_ids = probe(tokenizer, max_length)
    batch = input_ids[None], torch.ones_like(input_ids)[None]
    with torch.no_grad():
        ours = encoder(input_ids, torch.tensor([0, len(input_ids)], dtype=torch.int32))
        difference = check_equal(ours, model(*batch).logits[0], "logits")
        if contacts:
            model.set_attn_implementation("eager")  # the one that gives attention maps
            check_equal(contacts.predict(encoder, input_ids), model.predict_contacts(*batch)[0], "contacts")
    return difference
