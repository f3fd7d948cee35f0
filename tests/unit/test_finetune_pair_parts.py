"""Pairs of sequences: how they are joined, cut, ordered and pooled."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import EsmTokenizer

from pretrain.corpus.packing import Pack, Position
from pretrain.corpus.tokenizer import ESM_ALPHABET, ProteinTokenizer
from pretrain.downstream.finetune.data import FineTuneDataModule
from pretrain.downstream.finetune.head import SequenceHead, head_outputs
from pretrain.downstream.finetune.pairs import cut_pair, encode, swaps
from pretrain.downstream.finetune.table import Row
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder

CONFIG = EncoderConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
TOKENIZER = ProteinTokenizer()


def row(first: str, second: str | None) -> Row:
    return Row("t.csv:2", "x", first.encode(), second=second and second.encode())


def text(tokens: object) -> str:
    return "".join(TOKENIZER.tokens[i] for i in np.asarray(tokens).tolist())


def test_a_pair_is_cut_as_transformers_cuts_it(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(ESM_ALPHABET))
    theirs = EsmTokenizer(str(tmp_path / "vocab.txt"))
    for one, two, length in product((1, 2, 5, 9), (1, 2, 5, 9), range(5, 22)):
        pair = "MKTAYIAKQ"[:one], "LLVAPSTWG"[:two]
        whole = encode(row(*pair), TOKENIZER, "given")
        ours = cut_pair(whole, min(length, len(whole)), swap=False)
        expected = theirs(*pair, truncation="longest_first", max_length=length)["input_ids"]
        assert ours.tolist() == expected, (pair, length)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(5, 70))
def test_of_a_pair_that_is_too_long_the_longer_loses_first(one: int, two: int, length: int) -> None:
    whole = encode(row("A" * one, "C" * two), TOKENIZER, "given")
    length = min(length, len(whole))
    shown = text(cut_pair(whole, length, swap=False))
    first, second = shown.count("A"), shown.count("C")
    assert shown == f"<cls>{'A' * first}<eos>{'C' * second}<eos>"
    assert first + second + 3 == length
    assert first >= 1
    assert second >= 1
    if first < one and second < two:
        assert abs(first - second) <= 1
    elif first < one:
        assert first >= second
    elif second < two:
        assert second >= first


def test_a_swapped_pair_is_the_pair_the_other_way_round() -> None:
    whole = encode(row("MKV", "LLAG"), TOKENIZER, "given")
    assert text(cut_pair(whole, len(whole), swap=True)) == "<cls>LLAG<eos>MKV<eos>"
    assert text(cut_pair(whole, 8, swap=True)) == "<cls>LLA<eos>MK<eos>"


def test_a_pair_without_an_order_is_the_same_both_ways() -> None:
    pair, mirrored = row("MKV", "LLAG"), row("LLAG", "MKV")
    assert text(encode(pair, TOKENIZER, "any")) == text(encode(mirrored, TOKENIZER, "any"))
    assert text(encode(pair, TOKENIZER, "given")) != text(encode(mirrored, TOKENIZER, "given"))


def pack_of(indices: np.ndarray, epoch: int) -> Pack:
    ones = np.ones_like(indices)
    return Pack(indices, ones * epoch, 0 * ones, ones, ones, ones, len(ones), Position())


def test_half_of_the_pairs_are_swapped_others_in_each_epoch_whoever_asks() -> None:
    indices = np.arange(10_000)
    first, second = swaps(pack_of(indices, 0), 5), swaps(pack_of(indices, 1), 5)
    for drawn in (first, second, first == second, first == swaps(pack_of(indices, 0), 6)):
        assert abs(drawn.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(indices))
    some = np.array([77, 3, 9_999])
    assert (swaps(pack_of(some, 0), 5) == first[some]).all()


def table(path: Path, columns: str, rows: list[str]) -> str:
    path.write_text("\n".join([columns, *rows]) + "\n")
    return str(path)


@pytest.mark.parametrize(
    "columns", ["sequence_a,sequence_b", "seq1,seq2", "protein_A,protein_B", "sentence1,sentence2"]
)
def test_columns_with_the_usual_names_are_a_pair(columns: str, tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", f"{columns},label", ["MKV,LLAG,1", "MKK,A,0"])
    data = FineTuneDataModule(path, task="binary")
    data.setup("fit")
    assert data.pair_order == "given"
    (batch,) = data.batches("train")
    assert sorted(map(text, batch.input_ids.split(batch.pack.lengths.tolist()))) == sorted(
        ["<cls>MKV<eos>LLAG<eos>", "<cls>MKK<eos>A<eos>"]
    )
    assert [TOKENIZER.tokens[i] for i in batch.input_ids[batch.between].tolist()] == ["<eos>"] * 2


def test_a_column_for_a_single_sequence_stays_one_until_the_other_is_named(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "sequence,sequence_a,sequence_b,label", ["MKV,A,C,1", "MKK,D,E,0"])
    data = FineTuneDataModule(path, task="binary")
    data.setup("fit")
    assert data.pair_order is None
    named = FineTuneDataModule(path, task="binary", pair_column="sequence_b")
    named.setup("fit")
    assert text(named.batches("train")[0].input_ids).startswith("<cls>MKV<eos>C<eos>")


def test_training_shows_a_pair_without_an_order_both_ways_and_evaluation_one_way(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "sequence_a,sequence_b,label", ["C,AA,1", "D,EE,0"])
    data = FineTuneDataModule(path, task="binary", pair_order="any")
    data.setup("fit")
    planner = data.train_planner()
    dataset, at, seen = data.dataset(planner, 0.0), Position(), set()
    for _ in range(20):
        pack = planner.step(at, 12)
        at = pack.after
        seen |= set(map(text, dataset[pack].input_ids.split(pack.lengths.tolist())))
    assert seen == {"<cls>C<eos>AA<eos>", "<cls>AA<eos>C<eos>", "<cls>D<eos>EE<eos>", "<cls>EE<eos>D<eos>"}
    (batch,) = data.batches("train")
    assert text(batch.input_ids) == "<cls>AA<eos>C<eos><cls>D<eos>EE<eos>"


@pytest.mark.parametrize("pooling", ["cls", "mean", "attention"])
def test_packing_is_invisible_to_pairs_and_no_special_token_is_pooled(pooling: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder, head = Encoder(CONFIG).eval(), SequenceHead(CONFIG, 3, pooling)  # type: ignore[arg-type]
    head.requires_grad_(False)
    rows = ["MKVAAAK,LLAG,1", "M,LV,0", "CDEFG,HIKLMNPQRS,1"]
    data = FineTuneDataModule(table(tmp_path / "t.csv", "seq1,seq2,label", rows), task="binary")
    data.setup("fit")
    (batch,) = data.batches("train")
    with torch.no_grad():
        together = head_outputs(encoder, head, batch)
        for tokens, output in zip(batch.input_ids.split(batch.pack.lengths.tolist()), together, strict=True):
            hidden = encoder.hidden_states(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32))
            residues = hidden[tokens > TOKENIZER.unk_token_id]
            if head.pooling == "cls":
                pooled = hidden[0]
            elif head.score is None:
                pooled = residues.mean(0)
            else:
                pooled = (head.score(residues).softmax(0) * residues).sum(0)
            expected = head.out_proj(torch.tanh(head.dense(pooled)))
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
