#!/usr/bin/env python3
"""Make localisation.csv.gz, beside this file: proteins, the one place in the cell that each is annotated with, a split.

    apt-get install mmseqs2 metastudent-data     # Debian 12: mmseqs 14-7e284, metastudent-data 2.0.1-8
    python3 make.py                              # a few minutes on two cores
    python3 make.py --check                      # only the leak check of the file there

Needs mmseqs on PATH and Python's standard library. Every choice is made by a seeded hash. Steps:

 1. read the Swiss-Prot sequences of 2014 and their GO terms (cellular component) from metastudent's BLAST database
 2. a term stands for the compartments above it in the GO graph; proteins of exactly one of the classes, and of no
    other compartment, are candidates
 3. as many candidates of each class, by hash; cluster all of them at 30 % identity, keep one of each cluster
 4. as many of each class, by hash, in train, validation and test
 5. drop from train and validation whatever a sensitive search finds at >= 30 % identity to a later split, and check
    the file: no such pair may be left
"""

import argparse
import csv
import gzip
import hashlib
import io
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib

HERE = pathlib.Path(__file__).resolve().parent
SOURCE = pathlib.Path("/usr/share/metastudent-data/dataset_201401")
FILE = "localisation.csv.gz"
SEED = "pretrain localisation 1"
CLASSES = {
    "cytoplasm": ("GO:0005829",),  # cytosol; and the term cytoplasm itself, below
    "nucleus": ("GO:0005634",),
    "extracellular": ("GO:0005576", "GO:0005615"),
    "mitochondrion": ("GO:0005739",),
    "cell membrane": ("GO:0005886",),
    "plastid": ("GO:0009536",),
}
CYTOPLASM = "GO:0005737"  # mitochondria, plastids, ... are parts of it: it counts only where it stands itself
OTHERS = (  # endoplasmic reticulum, Golgi, vacuole, endosome, peroxisome, periplasm, outer membranes, virion, host
    "GO:0005783", "GO:0005794", "GO:0005773", "GO:0005768", "GO:0005777", "GO:0042597", "GO:0019867", "GO:0019012",
    "GO:0018995", "GO:0005856", "GO:0009288", "GO:0005694",
)  # fmt: skip
MIN_LEN, MAX_LEN = 60, 510
CANDIDATES = 3500  # of each class, clustered
SPLITS = {"test": 130, "validation": 70, "train": 420}  # of each class, at most
IDENTITY, E_DROP, E_CHECK = 0.3, 0.01, 1e-3
STDAA = b"-ABCDEFGHIKLMNPQRSTVWXYZU*OJ"


def order(name):
    return hashlib.sha256(f"{SEED}:{name}".encode()).hexdigest()


def mmseqs(*args):
    done = subprocess.run(["mmseqs", *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"mmseqs {args[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def read_database(stem):
    """(header, sequence) of each entry of a BLAST protein database, format 4."""
    index = stem.with_suffix(".fasta.pin").read_bytes()
    place, sizes = 8, []
    for _ in range(2):  # title and date
        (size,) = struct.unpack_from(">i", index, place)
        place += 4 + size
    (number,) = struct.unpack_from(">i", index, place)
    place += 4 + 8 + 4
    for _ in range(2):  # where headers and sequences begin
        sizes.append(struct.unpack_from(f">{number + 1}i", index, place))
        place += 4 * (number + 1)
    headers = stem.with_suffix(".fasta.phr").read_bytes()
    sequences = stem.with_suffix(".fasta.psq").read_bytes()
    letters = bytes.maketrans(bytes(range(len(STDAA))), STDAA)
    for i in range(number):
        header = headers[sizes[0][i] : sizes[0][i + 1]]
        title = re.search(rb"\x1a(?:\x81.|\x82..|.)([A-Z0-9]+)\|", header, re.DOTALL)  # BER: a string and its length
        sequence = sequences[sizes[1][i] : sizes[1][i + 1] - 1].translate(letters).decode()
        yield title[1].decode(), sequence


def find_terms(source, roots):
    """The roots and everything below them by is_a and part_of, in the direction that the graph's file has."""
    children = {}
    for line in (source / "goGraph.txt").read_text().splitlines():
        parent, child, _, relation = line.split("\t")
        if relation in ("is_a", "part_of"):
            children.setdefault(parent, set()).add(child)
    found, ahead = set(), list(roots)
    while ahead:
        term = ahead.pop()
        if term not in found:
            found.add(term)
            ahead += children.get(term, ())
    return found


def candidates(source):
    """accession -> (class, sequence), of proteins of one class and of no other compartment."""
    class_of = {term: name for name, roots in CLASSES.items() for term in find_terms(source, roots)}
    class_of[CYTOPLASM] = "cytoplasm"
    others = find_terms(source, OTHERS)
    labels = {}
    for line in (source / "CCO/goasp_annot.dat").read_text().splitlines():
        accession, *terms = line.split()
        classes = {class_of[term] for term in terms if term in class_of}
        if len(classes) == 1 and not others.intersection(terms):
            labels[accession] = classes.pop()
    found, seen = {}, set()
    for accession, sequence in read_database(source / "CCO/goasp"):
        usual = set(sequence) <= set("ACDEFGHIKLMNPQRSTVWY")
        if accession in labels and usual and MIN_LEN <= len(sequence) <= MAX_LEN and sequence not in seen:
            seen.add(sequence)
            found[accession] = labels[accession], sequence
    for name in CLASSES:
        print(f"{name}: {sum(label == name for label, _ in found.values())} candidates", flush=True)
    return found


def write_fasta(path, records, names):
    path.write_text("".join(f">{name}\n{records[name][-1]}\n" for name in names))


def relatives(records, queries, targets, work, e):
    """(query, target) pairs of at least IDENTITY that a sensitive search finds, whatever the coverage."""
    write_fasta(work / "q.fasta", records, queries)
    write_fasta(work / "t.fasta", records, targets)
    pairs = set()
    for extra in ((), ("--mask", 0, "--comp-bias-corr", 0)):  # low-complexity stretches count, too
        mmseqs("easy-search", work / "q.fasta", work / "t.fasta", work / "hits.tsv", work / "tmp", "-s", 7.5,
               "--min-seq-id", IDENTITY, "-e", e, "--max-seqs", 100000, "--threads", 2,
               "--format-output", "query,target", *extra)  # fmt: skip
        pairs |= {tuple(line.split("\t")) for line in (work / "hits.tsv").read_text().splitlines()}
    return pairs


def make(source, out, work):
    records = candidates(source)
    chosen = []
    for name in CLASSES:
        ranked = sorted((a for a, (label, _) in records.items() if label == name), key=order)
        chosen += ranked[:CANDIDATES]
    write_fasta(work / "in.fasta", records, sorted(chosen))
    mmseqs("easy-cluster", work / "in.fasta", work / "clusters", work / "tmp", "--min-seq-id", IDENTITY, "-s", 7,
           "-c", 0.5, "--cov-mode", 1, "-e", 1e-3, "--threads", 2)  # fmt: skip
    members = {}
    for line in (work / "clusters_cluster.tsv").read_text().splitlines():
        representative, member = line.split("\t")
        members.setdefault(representative, []).append(member)
    kept = [min(cluster, key=order) for cluster in members.values()]
    print(f"{len(chosen)} candidates in {len(members)} clusters", flush=True)

    split_of = {}
    for name in CLASSES:
        ranked = iter(sorted((a for a in kept if records[a][0] == name), key=order))
        for split, most in SPLITS.items():
            split_of |= {accession: split for accession, _ in zip(ranked, range(most), strict=False)}
    for later, earlier in (("test", ("train", "validation")), ("validation", ("train",))):
        queries = sorted(a for a, split in split_of.items() if split == later)
        targets = sorted(a for a, split in split_of.items() if split in earlier)
        close = {target for _, target in relatives(records, queries, targets, work, E_DROP)}
        print(f"{len(close)} relatives of {later} dropped from {' and '.join(earlier)}", flush=True)
        for accession in close:
            del split_of[accession]

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "sequence", "label", "split"])
    for accession in sorted(split_of, key=order):
        label, sequence = records[accession]
        writer.writerow([accession, sequence, label, split_of[accession]])
    pack = zlib.compressobj(9, zlib.DEFLATED, 31, 9, zlib.Z_FILTERED)  # no name, time 0
    data = pack.compress(text.getvalue().encode("ascii")) + pack.flush()
    (out / FILE).write_bytes(data)
    digest = hashlib.sha256(text.getvalue().encode()).hexdigest()
    print(f"{FILE}: {len(data)} bytes, uncompressed sha256 {digest}", flush=True)


def check(out, work):
    """True if no sequence has a relative in an earlier split."""
    with gzip.open(out / FILE, "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    records = {row["id"]: (row["split"], row["sequence"]) for row in rows}
    assert len(records) == len(rows) == len({row["sequence"] for row in rows}), "duplicates"
    for name in CLASSES:
        counts = {split: sum((r["label"], r["split"]) == (name, split) for r in rows) for split in SPLITS}
        print(f"{name:14} {counts}")
    left = 0
    for later, earlier in (("test", ("train", "validation")), ("validation", ("train",))):
        queries = [a for a, (split, _) in records.items() if split == later]
        targets = [a for a, (split, _) in records.items() if split in earlier]
        found = relatives(records, queries, targets, work, E_CHECK)
        print(f"{later} against {' and '.join(earlier)}: {len(found)} pairs at >= {IDENTITY:.0%}, E <= {E_CHECK:g}")
        left += len(found)
    return not left


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="check the file, make nothing")
    parser.add_argument("--source", type=pathlib.Path, default=SOURCE)
    parser.add_argument("--out", type=pathlib.Path, default=HERE)
    args = parser.parse_args()
    if not shutil.which("mmseqs"):
        sys.exit("mmseqs is not on PATH: apt-get install mmseqs2 metastudent-data")
    with tempfile.TemporaryDirectory() as work:
        if not args.check:
            make(args.source, args.out, pathlib.Path(work))
        if not check(args.out, pathlib.Path(work)):
            sys.exit("FAILED: sequences have relatives in an earlier split")
    print("ok: no sequence has a relative in an earlier split")


if __name__ == "__main__":
    main()
