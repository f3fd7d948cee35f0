"""Names of sequences: one rule for lists and tables, whichever option they are given to."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.cli import main
from pretrain.corpus.names import NameTable, accession, hash_names, whole_name, window_name
from pretrain.corpus.prepare import open_split
from pretrain.corpus.store import Corpus

KNOWN = {
    "sp|P12345|NAME_HUMAN": "P12345",
    "tr|A0A1|A0A1_ECOLI": "A0A1",
    "gb|AAA1": "AAA1",
    "ref|NP_1.2|": "NP_1.2",
    "gi|1|ref|NP_1|": "NP_1",
    "pir||S16356": "S16356",
    "gnl|database|X1": "X1",
    "UniRef50_P1": "UniRef50_P1",
    "cath|4_3_0|12asA00": "cath|4_3_0|12asA00",  # its second field is the release: the same for all
    "sp|": "sp|",
    "gi|1": "gi|1",
}


@pytest.mark.parametrize("name", KNOWN)
def test_an_accession_is_what_mmseqs_writes(name: str) -> None:
    assert accession(name) == KNOWN[name]


@given(name=st.text(), number=st.integers(1, 10**6))
def test_a_window_knows_its_sequence(name: str, number: int) -> None:
    assert whole_name(window_name(name, number)) == name


def table_of(names: dict[str, int]) -> NameTable:
    hashes = hash_names(map(str.encode, names))
    order = np.argsort(hashes)
    return NameTable(hashes[order], np.array(list(names.values()))[order])


@pytest.mark.parametrize("windows", [False, True])
def test_a_name_is_found_as_it_stands_before_its_other_forms(windows: bool) -> None:
    table = table_of({"P1": 1, "sp|P1|A": 2, "P1#1": 3, "P2": 4, "b": 5})
    wanted = {"P1": 1, "sp|P1|A": 2, "tr|P1|B": 1, "P1#1": 3, "sp|P2|C": 4, "sp|P2|C#2": 4, "d": None}
    wanted |= {name: number if windows else None for name, number in {"P1#2": 1, "pir||b#2": 5, "b#9": 5}.items()}
    found, place = table.find(list(wanted), windows)
    assert [int(table.values[at]) if there else None for there, at in zip(found, place, strict=True)] == list(
        wanted.values()
    )


def test_a_table_holds_the_same_members_for_the_order_and_for_the_split(tmp_path: Path) -> None:
    (tmp_path / "x.fasta").write_text("".join(f">{name}\nMKV\n" for name in KNOWN))
    clusters = itertools.cycle("ABCDEFGH")
    table = tmp_path / "clusters.tsv"
    table.write_text("".join(f"{cluster}\t{name}\n" for cluster, name in zip(clusters, KNOWN.values(), strict=False)))
    given = ["prepare", str(tmp_path / "x.fasta"), "--out"]
    assert main([*given, str(tmp_path / "one"), "--clusters", str(table)]) == 0
    assert Corpus(tmp_path / "one").num_clusters == 8
    split = ["--validation_share", "0.5", "--split_clusters", str(table)]
    assert main([*given, str(tmp_path / "two"), *split]) == 0
    assert sum(map(len, open_split(tmp_path / "two"))) == len(KNOWN)
