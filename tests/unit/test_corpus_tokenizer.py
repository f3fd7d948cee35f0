"""Tokenizers: strings to ids."""

import json
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import EsmTokenizer

from pretrain.corpus.tokenizer import (
    ESM_ALPHABET,
    InvalidSymbolError,
    ProteinTokenizer,
    TextTokenizer,
    TokenizerAlgorithm,
    load_tokenizer,
    tokenizer_from_string,
    train_tokenizer,
)
from pretrain.errors import UserError

PROTEIN = ProteinTokenizer()
SYMBOLS = "".join(symbol for symbol in ESM_ALPHABET if len(symbol) == 1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> EsmTokenizer:
    vocabulary = tmp_path_factory.mktemp("esm") / "vocab.txt"
    vocabulary.write_text("\n".join(ESM_ALPHABET))
    return EsmTokenizer(str(vocabulary))


@pytest.fixture(scope="module")
def byte_level() -> TextTokenizer:
    return train_tokenizer([], 261)


@pytest.fixture(scope="module")
def bpe() -> TextTokenizer:
    return train_tokenizer(["the cat sat on the mat; the hat of the cat"] * 3, 290)


@pytest.fixture(scope="module")
def wordpiece() -> TextTokenizer:
    return train_tokenizer(["the cats sat on the mats; the hats of the cats #1 ##2"] * 3, 560, "wordpiece")


@pytest.fixture(scope="module")
def unigram() -> TextTokenizer:
    return train_tokenizer(["the cats sat on the mats; the hats of the cats"] * 3, 290, "unigram")


# --- proteins ---------------------------------------------------------------------------------------------------------


def test_the_alphabet_is_that_of_esm2() -> None:
    """The ids written out in the vocab.txt of facebook/esm2_t6_8M_UR50D."""
    published = "<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z O . - <null_1> <mask>"
    assert " ".join(ESM_ALPHABET) == published
    assert (PROTEIN.cls_token_id, PROTEIN.pad_token_id, PROTEIN.eos_token_id, PROTEIN.unk_token_id) == (0, 1, 2, 3)
    assert (PROTEIN.mask_token_id, PROTEIN.vocab_size, PROTEIN.dtype) == (32, 33, np.uint8)


def test_special_tokens_have_the_ids_that_transformers_gives_them(reference: EsmTokenizer) -> None:
    for role in ("cls", "pad", "eos", "unk", "mask"):
        assert getattr(PROTEIN, f"{role}_token_id") == getattr(reference, f"{role}_token_id")


@given(residues=st.text(SYMBOLS, max_size=60))
def test_a_protein_has_the_ids_that_transformers_gives_it(reference: EsmTokenizer, residues: str) -> None:
    assert PROTEIN.encode(residues.encode()).tolist() == reference(residues)["input_ids"]


@given(st.text(SYMBOLS, max_size=60))
def test_lower_case_and_a_stop_at_the_end_change_nothing(residues: str) -> None:
    expected = PROTEIN.encode(residues.encode()).tolist()
    assert PROTEIN.encode(residues.lower().encode()).tolist() == expected
    assert PROTEIN.encode(residues.encode() + b"*").tolist() == expected


def test_only_one_stop_is_dropped() -> None:
    with pytest.raises(InvalidSymbolError, match=r"^'\*' at position 3$"):
        PROTEIN.encode(b"MK**")


def test_j_is_read_as_x() -> None:
    assert PROTEIN.encode(b"MJj").tolist() == PROTEIN.encode(b"MXX").tolist()


@given(before=st.text(SYMBOLS, max_size=20), after=st.text(SYMBOLS, max_size=20), symbol=st.characters(codec="utf-8"))
def test_a_symbol_without_a_token_is_refused_with_its_position(before: str, symbol: str, after: str) -> None:
    if symbol in string.ascii_letters + "-." or (symbol == "*" and not after):
        symbol = "1"
    with pytest.raises(InvalidSymbolError) as caught:
        PROTEIN.encode((before + symbol + after).encode())
    assert (caught.value.symbol, caught.value.position) == (repr(symbol), len(before) + 1)
    assert str(caught.value) == f"{symbol!r} at position {len(before) + 1}"


def test_special_tokens_cannot_be_written_into_a_protein() -> None:
    for token in ("<mask>", "<cls>", "<null_1>"):
        with pytest.raises(InvalidSymbolError, match="'<' at position 3"):
            PROTEIN.encode(f"MK{token}A".encode())


def test_random_replacements_are_the_twenty_amino_acids() -> None:
    assert sorted(PROTEIN.tokens[i] for i in PROTEIN.replacement_ids) == sorted("ACDEFGHIKLMNPQRSTVWY")


# --- text -------------------------------------------------------------------------------------------------------------


@given(text=st.text(max_size=60) | st.text("a# \n", max_size=300))
def test_any_text_survives_encoding_and_decoding(
    byte_level: TextTokenizer, bpe: TextTokenizer, wordpiece: TextTokenizer, unigram: TextTokenizer, text: str
) -> None:
    for tokenizer in (byte_level, bpe, wordpiece, unigram):
        ids = tokenizer.encode(text.encode()).tolist()
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.eos_token_id)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.backend.decode(ids[1:-1], skip_special_tokens=False) == text


@given(text=st.text(max_size=60))
def test_a_byte_level_tokenizer_has_one_token_a_byte(byte_level: TextTokenizer, text: str) -> None:
    assert len(byte_level.encode(text.encode())) == len(text.encode()) + 2


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "unigram"])
def test_every_algorithm_learns_frequent_words_and_has_any_byte(algorithm: TokenizerAlgorithm) -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    tokenizer = train_tokenizer([text] * 2, 700, algorithm)
    assert 600 < tokenizer.vocab_size <= 700
    assert tokenizer.tokens[:5] == ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>")
    assert len(tokenizer.encode(b" tokenizer")) <= 4, "a frequent word is one token, or that and a space"
    everything = "".join(map(chr, range(1, 256))) + "x" * 500 + "日本"
    ids = tokenizer.encode(everything.encode())[1:-1].tolist()
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.backend.decode(ids, skip_special_tokens=False) == everything


def test_a_mask_stands_for_a_word_with_the_space_before_it(bpe: TextTokenizer) -> None:
    """As in training, where the word of which it takes the place begins with that space."""
    loaded = tokenizer_from_string(bpe.serialize(), "copy").backend
    loaded.encode_special_tokens = False
    the, cat, sat = (bpe.backend.encode(word).ids for word in ("the", " cat", " sat"))
    assert loaded.encode("the <mask> sat").ids == [*the, bpe.mask_token_id, *sat]
    assert loaded.encode("the cat sat").ids == [*the, *cat, *sat]


@given(text=st.text(max_size=60) | st.text("ab ,.'", max_size=60))
def test_words_begin_where_the_tokenizer_says_so(
    bpe: TextTokenizer, wordpiece: TextTokenizer, unigram: TextTokenizer, text: str
) -> None:
    for tokenizer in (bpe, wordpiece, unigram):
        ids, starts = tokenizer.encode_words(text.encode())
        assert ids.tolist() == tokenizer.encode(text.encode()).tolist()
        words = tokenizer.backend.encode(text, add_special_tokens=False).word_ids
        expected = [n == 0 or word != words[n - 1] for n, word in enumerate(words)]
        assert starts.tolist() == [True, *expected, True]


def test_proteins_have_no_words() -> None:
    ids, starts = PROTEIN.encode_words(b"MKV")
    assert ids.tolist() == PROTEIN.encode(b"MKV").tolist()
    assert starts is None


def test_a_directory_with_a_vocabulary_only_is_understood(tmp_path: Path) -> None:
    """What transformers saved before there was a tokenizer.json."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\ncat\n##s\n,")
    ids, starts = load_tokenizer(tmp_path).encode_words(b"The cats, the")
    assert ids.tolist() == [2, 5, 6, 7, 8, 5, 3]
    assert starts is not None
    assert starts.tolist() == [True, True, True, False, True, True, True]


def test_a_directory_with_the_esm_alphabet_is_the_protein_tokenizer(reference: EsmTokenizer, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == PROTEIN.fingerprint


def test_bpe_merges_what_is_frequent(bpe: TextTokenizer) -> None:
    assert bpe.vocab_size <= 290
    assert len(bpe.encode(b"the cat")) < len(b"the cat")


@pytest.mark.parametrize("token", ["<mask>", "<cls>", "<eos>", "<pad>", "<unk>"])
def test_a_special_token_written_out_in_a_document_is_text(
    byte_level: TextTokenizer, bpe: TextTokenizer, token: str
) -> None:
    for tokenizer in (byte_level, bpe, tokenizer_from_string(bpe.serialize(), "copy")):
        inner = tokenizer.encode(f"a {token}{token} b".encode())[1:-1]
        assert not set(inner.tolist()) & {
            tokenizer.tokens.index(t) for t in ("<mask>", "<cls>", "<eos>", "<pad>", "<unk>")
        }


def test_trained_special_tokens_have_esms_ids(byte_level: TextTokenizer) -> None:
    assert byte_level.tokens[:5] == ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>")
    assert byte_level.vocab_size == 261


def test_random_replacements_are_never_special(byte_level: TextTokenizer) -> None:
    assert byte_level.replacement_ids.tolist() == list(range(5, 261))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(261, np.uint16), (290, np.uint16)])
def test_text_ids_take_the_smallest_type(vocab_size: int, dtype: type) -> None:
    tokenizer = train_tokenizer(["abcdefghij" * 9, "the cat sat on the mat"], vocab_size)
    assert tokenizer.encode(b"x").dtype == dtype


def test_bytes_that_are_no_text_are_refused_with_their_position(byte_level: TextTokenizer) -> None:
    with pytest.raises(InvalidSymbolError) as caught:
        byte_level.encode(b"ab\xffcd")
    assert str(caught.value) == r"b'\xff' at position 3"


def test_a_tokenizer_reads_back_what_it_wrote(bpe: TextTokenizer, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(bpe.serialize(), encoding="utf-8")
    for copy in (load_tokenizer(file), load_tokenizer(tmp_path)):
        assert copy.fingerprint == bpe.fingerprint
        assert copy.encode(b"the cat").tolist() == bpe.encode(b"the cat").tolist()
    esm = tokenizer_from_string(PROTEIN.serialize(), "copy")
    assert (esm.name, esm.fingerprint) == ("esm", PROTEIN.fingerprint)


def test_tokenizers_that_encode_differently_have_different_fingerprints(
    byte_level: TextTokenizer, bpe: TextTokenizer
) -> None:
    assert len({PROTEIN.fingerprint, byte_level.fingerprint, bpe.fingerprint}) == 3


def test_truncation_and_padding_set_in_a_file_are_ignored(bpe: TextTokenizer) -> None:
    content = json.loads(bpe.serialize())
    content["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    document = b"one two three four five six seven"
    assert tokenizer_from_string(json.dumps(content), "file").encode(document).tolist() == bpe.encode(document).tolist()


def test_a_tokenizer_with_berts_names_is_understood() -> None:
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"])}
    content = json.loads(train_tokenizer([], 261).serialize())
    content["added_tokens"] = []
    content["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    content["pre_tokenizer"] = {"type": "Whitespace"}
    tokenizer = tokenizer_from_string(json.dumps(content), "bert")
    assert tokenizer.encode(b"a b c").tolist() == [2, 5, 6, 1, 3]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.replacement_ids.tolist()) == (0, 4, [5, 6])


# --- mistakes ---------------------------------------------------------------------------------------------------------


def without(*tokens: str) -> str:
    serialized = train_tokenizer([], 261).serialize()
    for token in tokens:
        serialized = serialized.replace(token, token.replace("<", "<no-"))
    return serialized


def with_gap() -> str:
    content = json.loads(train_tokenizer([], 261).serialize())
    content["model"]["vocab"]["ÿ"] = 300
    return json.dumps(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "{file}: not text ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte); a "
                      "tokenizer.json is expected"),
        (b"hello", "{file}: not JSON (Expecting value: line 1 column 1 (char 0)); a tokenizer.json is expected"),
        (b"", "{file}: not JSON (Expecting value: line 1 column 1 (char 0)); a tokenizer.json is expected"),
        (b"{}", "{file}: not a tokenizer.json that `tokenizers` reads (Model missing. at line 1 column 2)"),
        (b"[1]", "{file}: not a tokenizer.json that `tokenizers` reads (invalid type: sequence, expected struct "
                 "Tokenizer at line 1 column 1)"),
        (without("<mask>").encode(), "{file}: has no mask token; one of <mask>, [MASK] is needed in its vocabulary"),
        (without("<cls>").encode(), "{file}: has no begin token; one of <cls>, [CLS], <s> is needed in its vocabulary"),
        (without("<eos>").encode(), "{file}: has no end token; one of <eos>, [SEP], </s> is needed in its vocabulary"),
        (without("<pad>").encode(), "{file}: has no padding token; one of <pad>, [PAD] is needed in its vocabulary"),
        (without("<unk>").encode(), "{file}: has no unknown token; one of <unk>, [UNK] is needed in its vocabulary"),
        (with_gap().encode(), "{file}: its ids have gaps; a tokenizer with ids 0 to n-1 is needed"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_usable_tokenizer_is_a_mistake_that_the_user_can_mend(
    content: bytes, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(file)
    assert str(caught.value) == message.format(file=file)


@pytest.mark.parametrize("name", ["bert", "{tmp}", "{tmp}/tokenizer.json"])
def test_a_tokenizer_that_is_not_there_is_a_mistake_that_the_user_can_mend(name: str, tmp_path: Path) -> None:
    name = name.format(tmp=tmp_path)
    with pytest.raises(UserError) as caught:
        load_tokenizer(name)
    assert str(caught.value) == (
        f"tokenizer '{name}' not found; give 'esm' for proteins, a tokenizer.json, or a directory with one "
        "(`pretrain tokenizer SOURCE --out tokenizer.json` trains one)"
    )


def test_a_broken_vocabulary_is_a_mistake_that_the_user_can_mend(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a\nb")
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: not a tokenizer that transformers reads (")


def test_an_unknown_algorithm_is_a_mistake_that_the_user_can_mend() -> None:
    with pytest.raises(UserError) as caught:
        train_tokenizer([], 300, "bbpe")  # type: ignore[arg-type]
    assert str(caught.value) == "algorithm is 'bbpe'; give one of bpe, wordpiece, unigram"


def test_too_small_a_vocabulary_is_a_mistake_that_the_user_can_mend() -> None:
    with pytest.raises(UserError) as caught:
        train_tokenizer([], 260)
    assert str(caught.value) == "vocab size is 260; at least 261 ids are needed (256 bytes and 5 special)"
