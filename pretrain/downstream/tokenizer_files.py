"""Tokenizers as transformers stores them beside a model: read and written."""

import json
from pathlib import Path
from typing import Any

from pretrain.corpus.tokenizer import ESM_ALPHABET, ProteinTokenizer, TextTokenizer, Tokenizer, load_tokenizer
from pretrain.errors import UserError
from pretrain.model.config import EncoderConfig
from pretrain.train.pretrained import HF_CONFIG, read_json

VOCABULARY, TOKENIZER = "vocab.txt", "tokenizer.json"
SPECIAL_TOKENS = ("tokenizer_config.json", "special_tokens_map.json")


def read_tokenizer(directory: Path, stored: dict[str, Any]) -> Tokenizer:
    """The tokenizer that is saved beside a model.

    Args:
        directory: A transformers directory.
        stored: The content of its ``config.json``, which may hold the vocabulary.

    Raises:
        UserError: If there is none, or it is neither ESM's nor a ``tokenizer.json``.
    """
    vocabulary = directory / VOCABULARY
    if (directory / TOKENIZER).is_file():
        tokenizer = load_tokenizer(directory / TOKENIZER)
        return ProteinTokenizer() if tokenizer.tokens == ESM_ALPHABET else tokenizer
    if vocabulary.is_file():
        tokens, where = vocabulary.read_text(encoding="utf-8", errors="replace").split(), str(vocabulary)
    elif stored.get("vocab_list"):
        tokens, where = list(stored["vocab_list"]), f"vocab_list in {directory / HF_CONFIG}"
    else:
        raise UserError(
            f"{directory}: has no tokenizer; save it there, too: {VOCABULARY} with ESM's 33 tokens or a {TOKENIZER}"
        )
    if tuple(tokens) != ESM_ALPHABET:
        raise UserError(
            f"{where}: {len(tokens)} tokens, and not ESM's 33 in ESM's order; supported are that alphabet, or any "
            f"tokenizer as a {TOKENIZER}"
        )
    return ProteinTokenizer()


def check_special_tokens(directory: Path, config: EncoderConfig, tokenizer: Tokenizer) -> None:
    """Make sure that model, tokenizer files and our tokenizer mean the same ids.

    Raises:
        UserError: If they do not.
    """
    for name in ("vocab_size", "pad_token_id", "mask_token_id"):
        if (theirs := getattr(config, name)) != (ours := getattr(tokenizer, name)):
            raise UserError(
                f"{directory}: {HF_CONFIG} has {name} {theirs}, its tokenizer {ours}; give the tokenizer that the "
                "model was trained with"
            )
    for file in SPECIAL_TOKENS:
        settings = read_json(directory / file) if (directory / file).is_file() else {}
        for role in ("cls", "pad", "eos", "unk", "mask"):
            given = settings.get(f"{role}_token")
            token = given.get("content") if isinstance(given, dict) else given
            if token is not None and token != (ours := tokenizer.tokens[getattr(tokenizer, f"{role}_token_id")]):
                raise UserError(f"{directory / file}: {role}_token is {token!r}; only {ours!r} is supported here")


def write_tokenizer(tokenizer: Tokenizer, max_length: int, out: Path) -> None:
    """Write what transformers' ``AutoTokenizer`` loads into the directory ``out``."""
    from transformers import AddedToken, EsmTokenizer, PreTrainedTokenizerFast

    if isinstance(tokenizer, TextTokenizer):
        from tokenizers.processors import TemplateProcessing

        cls, eos = (tokenizer.tokens[i] for i in (tokenizer.cls_token_id, tokenizer.eos_token_id))
        content = json.loads(tokenizer.serialize())
        for token in content["added_tokens"]:
            # The space before a mask is the masked word's: byte-level tokens begin with theirs (as in RoBERTa).
            token["lstrip"] = token["lstrip"] or token["id"] == tokenizer.mask_token_id
        backend = type(tokenizer.backend).from_str(json.dumps(content))
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
            mask_token=AddedToken(tokenizer.tokens[tokenizer.mask_token_id], lstrip=True, special=True),
        ).save_pretrained(out)
        return
    vocabulary = out / "vocab.txt"
    vocabulary.write_text("\n".join(tokenizer.tokens), encoding="utf-8")
    EsmTokenizer(str(vocabulary), model_max_length=max_length).save_pretrained(out)
