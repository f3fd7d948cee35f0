"""Tokenizers: strings to ids. The ESM alphabet for proteins; trained or loaded `tokenizers` files for text.

The only place in the project that knows a token's id by heart.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from pretrain.errors import UserError, one_line
from pretrain.shipped import shipped

if TYPE_CHECKING:
    import tokenizers

SPECIAL_TOKENS = ("<cls>", "<pad>", "<eos>", "<unk>")
ESM_ALPHABET = (*SPECIAL_TOKENS, *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>")
"""The 33 tokens of ESM-1b and ESM-2, in their order (facebookresearch/esm, `esm/data.py`, "ESM-1b")."""

TokenizerAlgorithm = Literal["bpe", "wordpiece", "unigram"]

_WORDPIECE_WORD = 100
"""Bytes: longer words are cut, since matching the longest piece takes the square of a word's length."""

_RESIDUES = "LAGVSERTIDPKQNFYMHWC"
_NOT_IN_ALPHABET = 255


class InvalidSymbolError(ValueError):
    """A symbol, as a message shows it, that the tokenizer does not know, with its place in the string (from 1)."""

    def __init__(self, symbol: str, position: int, allowed: str) -> None:
        super().__init__(f"{symbol} at position {position}")
        self.symbol, self.position, self.allowed = symbol, position, allowed


class Tokenizer(ABC):
    """What the corpus needs of a tokenizer.

    Every sequence is stored as ``<cls> tokens <eos>``; so a crop shows the model whether it holds a real beginning or
    a real end, as in ESM-2 (Lin et al. 2023, supplementary A.2).
    """

    name: str
    tokens: tuple[str, ...]
    cls_token_id: int
    pad_token_id: int
    eos_token_id: int
    unk_token_id: int
    mask_token_id: int
    replacement_ids: NDArray[np.int64]
    """Ids that masking may draw random tokens from: never a special one."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return len(self.tokens)

    @property
    def fingerprint(self) -> str:
        """Identifies the mapping from strings to ids; two corpora can only be used together if theirs agree."""
        return hashlib.sha256(self.serialize().encode()).hexdigest()[:16]

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest unsigned integer type that holds every id."""
        return np.dtype(np.min_scalar_type(self.vocab_size - 1))

    @abstractmethod
    def encode(self, text: bytes) -> NDArray[np.unsignedinteger]:
        """One sequence (UTF-8 or ASCII) to ids with ``<cls>`` in front and ``<eos>`` behind.

        Raises:
            InvalidSymbolError: If a symbol has no id.
        """

    def encode_words(self, text: bytes) -> tuple[NDArray[np.unsignedinteger], NDArray[np.bool_] | None]:
        """The same, and whether a word begins at each id; None for a tokenizer that knows no words."""
        return self.encode(text), None

    @abstractmethod
    def serialize(self) -> str:
        """The tokenizer as text: what `tokenizer_from_string` reads back."""


class ProteinTokenizer(Tokenizer):
    """ESM's alphabet, one token a residue. Lower case counts as upper case; a ``*`` at the end (stop) is dropped.

    ``J`` (leucine or isoleucine) has no token in ESM's alphabet and is read as ``X``.
    """

    name = "esm"
    tokens = ESM_ALPHABET
    cls_token_id, pad_token_id, eos_token_id, unk_token_id = range(4)
    mask_token_id = ESM_ALPHABET.index("<mask>")
    replacement_ids = np.array([ESM_ALPHABET.index(residue) for residue in _RESIDUES])

    def __init__(self) -> None:
        table = np.full(256, _NOT_IN_ALPHABET, np.uint8)
        for token_id, token in enumerate(ESM_ALPHABET):
            if len(token) == 1:
                table[[ord(token), ord(token.lower())]] = token_id
        table[[ord("J"), ord("j")]] = ESM_ALPHABET.index("X")
        self._table = table.tobytes()
        self._cls, self._eos = bytes([self.cls_token_id]), bytes([self.eos_token_id])

    @override
    def encode(self, text: bytes) -> NDArray[np.unsignedinteger]:
        residues = text.removesuffix(b"*").translate(self._table)
        if (bad := residues.find(_NOT_IN_ALPHABET)) >= 0:
            symbol = text[bad : bad + 4].decode("utf-8", "replace")[0]
            raise InvalidSymbolError(repr(symbol), bad + 1, "the letters A-Z, '-' and '.'")
        return np.frombuffer(b"".join((self._cls, residues, self._eos)), np.uint8)

    @override
    def serialize(self) -> str:
        return json.dumps({"name": self.name, "tokens": self.tokens})


class TextTokenizer(Tokenizer):
    """A Hugging Face `tokenizers` tokenizer, as `train_tokenizer` makes it or as any ``tokenizer.json`` describes it.

    Args:
        serialized: The content of a ``tokenizer.json``.
        source: Where it came from, for messages.
    """

    name = "text"

    def __init__(self, serialized: str, source: str) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            backend: tokenizers.Tokenizer = Backend.from_str(serialized)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{source}: not a tokenizer.json that `tokenizers` reads ({error})") from error
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # "<mask>" written out in a document is text, not a mask
        self.backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.tokens = tuple(sorted(vocabulary, key=lambda token: vocabulary[token]))
        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise UserError(f"{source}: its ids have gaps; a tokenizer with ids 0 to n-1 is needed")

        def find(role: str, *names: str) -> int:
            for name in names:
                if name in vocabulary:
                    return vocabulary[name]
            raise UserError(f"{source}: has no {role} token; one of {', '.join(names)} is needed in its vocabulary")

        self.cls_token_id = find("begin", "<cls>", "[CLS]", "<s>")
        self.pad_token_id = find("padding", "<pad>", "[PAD]")
        self.eos_token_id = find("end", "<eos>", "[SEP]", "</s>")
        self.unk_token_id = find("unknown", "<unk>", "[UNK]")
        self.mask_token_id = find("mask", "<mask>", "[MASK]")
        special = {i for i, added in backend.get_added_tokens_decoder().items() if added.special}
        special |= {self.cls_token_id, self.pad_token_id, self.eos_token_id, self.unk_token_id, self.mask_token_id}
        self.replacement_ids = np.array(sorted(set(range(len(vocabulary))) - special))

    @override
    def encode(self, text: bytes) -> NDArray[np.unsignedinteger]:
        return self.encode_words(text)[0]

    @override
    def encode_words(self, text: bytes) -> tuple[NDArray[np.unsignedinteger], NDArray[np.bool_]]:
        try:
            document = text.decode()
        except UnicodeDecodeError as error:
            raise InvalidSymbolError(repr(text[error.start : error.end]), error.start + 1, "UTF-8 text") from error
        encoding = self.backend.encode(document, add_special_tokens=False)
        ids = np.array([self.cls_token_id, *encoding.ids, self.eos_token_id], self.dtype)
        word_starts = np.ones(len(ids), np.bool_)
        words = np.array(encoding.word_ids, np.int64)
        word_starts[2:-1] = words[1:] != words[:-1]
        return ids, word_starts

    @override
    def serialize(self) -> str:
        return self.backend.to_str()


def encode_or_refuse(tokenizer: Tokenizer, text: bytes, what: str) -> NDArray[np.unsignedinteger]:
    """As `Tokenizer.encode`, for a sequence that must have ids; ``what`` is what errors call it.

    Raises:
        UserError: If a symbol has no id, or nothing is left between ``<cls>`` and ``<eos>``, as of a lone stop.
    """
    try:
        ids = tokenizer.encode(text)
    except InvalidSymbolError as error:
        raise UserError(
            f"{what} has {error.symbol} at position {error.position}; allowed: {error.allowed}; correct or remove it"
        ) from error
    if len(ids) < 3:
        raise UserError(f"{what} has nothing that becomes a token; correct or remove it")
    return ids


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """``esm``, a ``tokenizer.json``, or the directory of a tokenizer that transformers saved, in whichever form.

    Raises:
        UserError: If there is no such tokenizer, or it lacks a token that masked language models need.
    """
    if str(name_or_path) == ProteinTokenizer.name:
        return ProteinTokenizer()
    path = Path(name_or_path)
    if not path.exists():
        path = shipped(str(name_or_path)) or path
    if path.is_dir() and not (path / "tokenizer.json").is_file() and any(path.glob("*vocab*")):
        return _from_transformers(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"tokenizer '{name_or_path}' not found; give 'esm' for proteins, a tokenizer.json, or a directory with one "
            "(`pretrain tokenizer SOURCE --out tokenizer.json` trains one)"
        )
    try:
        serialized = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text ({error}); a tokenizer.json is expected") from error
    return tokenizer_from_string(serialized, str(path))


def _from_transformers(path: Path) -> Tokenizer:
    """A tokenizer that transformers saved as its vocabulary, before there was a tokenizer.json."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds
        raise UserError(f"{path}: not a tokenizer that transformers reads ({one_line(error, 200)})") from error
    if tuple(loaded.convert_ids_to_tokens(list(range(len(loaded))))) == ESM_ALPHABET:
        return ProteinTokenizer()
    if not getattr(loaded, "backend_tokenizer", None):
        raise UserError(f"{path}: {type(loaded).__name__} has no tokenizer.json; save its fast version to use it")
    return TextTokenizer(loaded.backend_tokenizer.to_str(), str(path))


def tokenizer_from_string(serialized: str, source: str) -> Tokenizer:
    """What `Tokenizer.serialize` wrote, back to a tokenizer. ``source`` is named in errors."""
    try:
        content = json.loads(serialized)
    except ValueError as error:
        raise UserError(f"{source}: not JSON ({error}); a tokenizer.json is expected") from error
    if isinstance(content, dict) and content.get("name") == ProteinTokenizer.name:
        return ProteinTokenizer()
    return TextTokenizer(serialized, source)


def train_tokenizer(documents: Iterable[str], vocab_size: int, algorithm: TokenizerAlgorithm = "bpe") -> TextTokenizer:
    """Train a tokenizer on the bytes of text: any input can be encoded, nothing is unknown, and decoding gives it back.

    Text is first cut into words with the space before them, as GPT-2 does (Radford et al. 2019, section 2.2), and each
    of their bytes is a symbol; all 256 are in the vocabulary. Special tokens take the same first ids as in ESM's
    alphabet. ``algorithm="bpe"`` with ``vocab_size=261`` gives a plain byte tokenizer.

    Args:
        documents: The training text.
        vocab_size: Number of ids in all, at most; at least 261 (256 bytes and 5 special tokens), for WordPiece 516.
        algorithm: ``bpe`` (Sennrich et al. 2016), ``wordpiece`` (Schuster and Nakajima 2012; the longest piece that
            fits, ``##`` before those that continue a word) or ``unigram`` (Kudo 2018).

    Raises:
        UserError: If ``vocab_size`` is too small, or ``algorithm`` is none of these.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    if algorithm not in get_args(TokenizerAlgorithm):
        raise UserError(f"algorithm is '{algorithm}'; give one of {', '.join(get_args(TokenizerAlgorithm))}")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # A mask in a text takes the place of a word together with the space before it, as in training.
    special = [*map(AddedToken, SPECIAL_TOKENS), AddedToken("<mask>", lstrip=True)]
    # A "#" is a word of its own, so it never continues one.
    inner = [f"##{symbol}" for symbol in alphabet if symbol != "#"] if algorithm == "wordpiece" else []
    smallest = len(alphabet) + len(inner) + len(special)
    if vocab_size < smallest:
        parts = f"{len(alphabet)} bytes{', again within words' if inner else ''} and {len(special)} special"
        raise UserError(f"vocab size is {vocab_size}; at least {smallest} ids are needed ({parts})")
    settings: dict[str, Any] = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer: Any
    if algorithm == "bpe":
        backend = Backend(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, **settings)
    elif algorithm == "unigram":
        backend = Backend(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=vocab_size, unk_token="<unk>", **settings)
    else:
        backend = Backend(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=_WORDPIECE_WORD))
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size - len(inner), **settings)
    backend.pre_tokenizer, backend.decoder = byte_level, decoders.ByteLevel()
    if algorithm == "wordpiece":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("#", "isolated"), byte_level, pre_tokenizers.FixedLength(_WORDPIECE_WORD)]
        )
        backend.decoder = decoders.Sequence([decoders.Replace(Regex("^##"), ""), decoders.ByteLevel()])
    backend.train_from_iterator(documents, trainer)
    if algorithm == "wordpiece":  # the trainer knows only the symbols that it saw within words
        vocabulary = backend.get_vocab()
        vocabulary |= {piece: len(vocabulary) + n for n, piece in enumerate(p for p in inner if p not in vocabulary)}
        backend.model = models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=_WORDPIECE_WORD)
    return TextTokenizer(backend.to_str(), "the trained tokenizer")
