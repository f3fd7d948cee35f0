"""`pretrain import`: a transformers model as the start of a run."""

import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from pretrain.corpus.tokenizer import ProteinTokenizer, Tokenizer
from pretrain.downstream.export import verify, write_model
from pretrain.downstream.tokenizer_files import (
    SPECIAL_TOKENS,
    TOKENIZER,
    VOCABULARY,
    check_special_tokens,
    read_tokenizer,
    write_tokenizer,
)
from pretrain.errors import UserError, one_line
from pretrain.files import new_directory, refuse_existing
from pretrain.model.config import BERT_SIZES, ESM2_SIZES, EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.model.hf import (
    CONTACT_BIAS,
    CONTACT_WEIGHT,
    DECODER,
    contacts_from_hf,
    from_hf_config,
    max_length_of,
    published_names,
    to_hf,
)
from pretrain.train.pretrained import HF_CONFIG, INDEX, load_tensors, read_config, read_tensors

OVERLAY = "fit.yaml"
_FILES = (HF_CONFIG, "*.safetensors", INDEX, VOCABULARY, TOKENIZER, *SPECIAL_TOKENS)
_HEAD = "lm_head."


def import_model(source: str, out: Path, seed: int = 0) -> str:
    """Bring a transformers ESM-2 model: the same tensors, and an overlay with which `pretrain fit` starts from them.

    Args:
        source: A directory that ``save_pretrained`` wrote, or a model's name on the Hub. Only its config, safetensors
            and tokenizer files are read: nothing that was pickled, and no code.
        out: The directory to write: whole, or not at all. It holds a complete transformers model, its tokenizer and
            the overlay ``fit.yaml``.
        seed: Seed of the masked-LM head, where the model has none.

    Returns:
        What was brought, what was missing or left out, and the next command, for people.

    Raises:
        UserError: If ``out`` exists, there is no such model, or it is of another kind.
    """
    refuse_existing(out)
    directory = _find(source)
    stored = read_config(directory)
    config, max_length = from_hf_config(stored), max_length_of(stored) or 1024
    tokenizer = read_tokenizer(directory, stored)
    check_special_tokens(directory, config, tokenizer)

    tensors = published_names(read_tensors(directory))
    config.check_size(sum(tensor.numel() for tensor in tensors.values()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(config)
    fresh = to_hf(encoder.state_dict())
    contacts = contacts_from_hf(tensors)
    left_out = _modules(tensors.keys() - fresh.keys() - {CONTACT_WEIGHT, CONTACT_BIAS})
    headless = not any(name.startswith(_HEAD) for name in tensors)
    if headless:
        tensors |= {name: tensor for name, tensor in fresh.items() if name.startswith(_HEAD) and name != DECODER}
    load_tensors(encoder, tensors, directory)
    if contacts:
        contacts.check(config, str(directory))
    encoder.eval()
    with new_directory(out) as partial:
        write_model(encoder, tokenizer, max_length, partial, contacts)
        write_tokenizer(tokenizer, max_length, partial)
        (partial / OVERLAY).write_text(_overlay(source, encoder.config, tokenizer, out.absolute()), encoding="utf-8")
        difference = verify(encoder, tokenizer, max_length, partial, contacts)

    parts = ["embedding", f"{config.num_hidden_layers} blocks", "final layer norm"]
    parts += [] if headless else ["masked-LM head"]
    parts += ["contact head"] if contacts else []
    parts += ["stored rotary frequencies"] if "esm.rotary_embeddings.inv_freq" in tensors else []
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()} - {"float32"})
    return "\n".join(
        [
            f"{out}: {source}, {sum(p.numel() for p in encoder.parameters()):,} parameters; transformers' logits agree "
            f"within {difference:.1e}",
            f"  brought   {', '.join(parts)}; tokenizer {tokenizer.name}, {tokenizer.vocab_size:,} ids",
            *([f"  stored    in {', '.join(dtypes)}; written in float32"] if dtypes else []),
            f"  missing   {f'masked-LM head: initialised, seed {seed}' if headless else 'nothing'}",
            f"  left out  {', '.join(left_out) or 'nothing'}",
            f"  next      pretrain fit -c {_recipe(config, tokenizer)} -c {out / OVERLAY} --data.train FILE",
        ]
    )


def _find(source: str) -> Path:
    """The directory itself, or where the Hub's files were downloaded to."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or Path(source).exists():
        raise UserError(f"{source}: no such directory; give one that save_pretrained wrote, or a model's Hub name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(_FILES)))
    except Exception as error:  # the library raises whatever its transport meets
        raise UserError(
            f"{source}: no such directory, and the Hub gave no model of that name ({one_line(error, 150)}); check the "
            "name and the connection"
        ) from error


def _modules(names: Iterable[str]) -> list[str]:
    """The modules that tensors belong to: a head as a whole, others each by its name."""
    modules = set()
    for name in names:
        first, *rest = name.removeprefix("esm.").split(".")
        modules.add(".".join([first, *rest[:-1]]) if first in ("embeddings", "encoder") else first)
    return sorted(modules)


def _overlay(source: str, config: EncoderConfig, tokenizer: Tokenizer, home: Path) -> str:
    from_tokenizer = ("vocab_size", "pad_token_id", "mask_token_id")  # `fit` takes these from the tokenizer itself
    settings = {
        "model": {
            "initialize_from": str(home),
            "encoder": {name: value for name, value in asdict(config).items() if name not in from_tokenizer},
        },
        "data": {
            "tokenizer": tokenizer.name if isinstance(tokenizer, ProteinTokenizer) else str(home / TOKENIZER),
        },
    }
    return (
        f"# Overlay: continue to pre-train {source}.\n#\n"
        f"#   pretrain fit -c {_recipe(config, tokenizer)} -c {home / OVERLAY}\n"
        f"{yaml.safe_dump(settings, sort_keys=False)}"
    )


def _recipe(config: EncoderConfig, tokenizer: Tokenizer) -> str:
    """The recipe of the model's size, or the smallest of its kind: the overlay sets the shape in any case."""
    shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
    recipes = {
        **{size: f"esm2_{name}" for name, size in ESM2_SIZES.items()},
        **{size: name.lower().replace("-", "_") for name, size in BERT_SIZES.items()},
    }
    protein = isinstance(tokenizer, ProteinTokenizer)
    return recipes.get(shape, "esm2_8M" if protein else "bert_base")
