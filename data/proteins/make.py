#!/usr/bin/env python3
"""Make train.fasta.gz and validation.fasta.gz, beside this file.

    apt-get install mmseqs2 mmseqs2-examples     # Debian 12: version 14-7e284
    python3 make.py                              # about 8 minutes on two cores
    python3 make.py --check                      # only the leak check of the files there

Needs mmseqs on PATH and Python's standard library. Every choice is made by a
seeded hash, so a second run writes the same bytes. Steps:

 1. read the UniProt sequences of mmseqs2-examples, filter, drop exact duplicates
 2. cluster them at 30 % identity into families
 3. choose families by hash for validation, one member each; of those that resemble
    each other (>= 30 % identity, E <= 0.01) only the first stays
 4. leave every member of those families out of train, then align every validation
    sequence with every remaining one (Smith-Waterman, no prefilter) and drop from
    train whatever is >= 30 % identical at E <= 0.01, whatever the coverage; the same
    with a search that neither masks nor corrects for low-complexity stretches
 5. thin train to one sequence per 95 % cluster, drop by hash down to the size limit
 6. write the files and check them: no hit at >= 30 % identity and E <= 0.001 may be
    left, neither in an all-pairs alignment nor in searches (mmseqs easy-search)
"""

import argparse
import gzip
import hashlib
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib

HERE = pathlib.Path(__file__).resolve().parent
EXAMPLES = pathlib.Path("/usr/share/doc/mmseqs2/example-data")
SOURCES = {  # file name -> sha256
    "DB.fasta.gz": "92a65aa435f5d3e0f33eb47d87910fe7fc6033a28bf4ed1367094377d791d567",
    "QUERY.fasta.gz": "a754e5ba84348d8c3a98c11c468c8c63a3a7a8d3557ac0be42f439d01d78334d",
}
MMSEQS = "14-7e284"  # the version the published files were made with
SEED = "pretrain proteins 1"
MIN_LEN, MAX_LEN, MAX_X = 40, 1022, 0.03
N_VALIDATION = 640
BYTES = 3_000_000  # both files together
IDENTITY, E_DROP, E_CHECK = 0.3, 0.01, 1e-3
UNMASKED = "--mask", 0, "--comp-bias-corr", 0


def order(name):
    return hashlib.sha256(f"{SEED}:{name}".encode()).hexdigest()


def mmseqs(*args):
    done = subprocess.run(["mmseqs", *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"mmseqs {args[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def read_fasta(path):
    header, parts = None, []
    with gzip.open(path, "rt", encoding="ascii") as lines:
        for line in lines:
            if line.startswith(">"):
                if header is not None:
                    yield header, "".join(parts)
                header, parts = line[1:].rstrip(), []
            else:
                parts.append(line.strip())
    if header is not None:
        yield header, "".join(parts)


def read_sources(folder):
    """accession -> (entry name, sequence), filtered, without exact duplicates."""
    records, seen, counts = {}, set(), dict.fromkeys(("read", "length", "X", "duplicate", "kept"), 0)
    for name, want in SOURCES.items():
        path = folder / name
        got = hashlib.sha256(path.read_bytes()).hexdigest()
        if got != want:
            print(f"warning: {path} is not the file used for the published data", file=sys.stderr)
        for header, seq in read_fasta(path):
            counts["read"] += 1
            _, accession, entry = header.split()[0].split("|")
            if not MIN_LEN <= len(seq) <= MAX_LEN:
                counts["length"] += 1
            elif seq.count("X") > MAX_X * len(seq):
                counts["X"] += 1
            elif seq in seen or accession in records:
                counts["duplicate"] += 1
            else:
                counts["kept"] += 1
                seen.add(seq)
                records[accession] = entry, seq
    print("source:", ", ".join(f"{v} {k}" for k, v in counts.items()), flush=True)
    return records


def write_plain(path, records, names):
    path.write_text("".join(f">{n}\n{records[n][1]}\n" for n in names))


def clusters(records, names, work, *options):
    """Lists of members, one per cluster; the representative first."""
    fasta, out = work / "in.fasta", work / "clu"
    write_plain(fasta, records, names)
    mmseqs("easy-cluster", fasta, out, work / "tmp", *options)
    found = {}
    for line in pathlib.Path(f"{out}_cluster.tsv").read_text().splitlines():
        representative, member = line.split("\t")
        members = found.setdefault(representative, [representative])
        if member != representative:
            members.append(member)
    return list(found.values())


def align_all(records, queries, targets, work, e, threads):
    """Smith-Waterman of every query with every target: (query, target, identity,
    alignment length, E). No prefilter: a hand-made result lists all targets."""
    for label, names in (("q", queries), ("t", targets)):
        write_plain(work / f"{label}.fasta", records, names)
        mmseqs("createdb", work / f"{label}.fasta", work / f"{label}DB", "--shuffle", 0)
    block = b"".join(b"%d\t0\t0\n" % i for i in range(len(targets))) + b"\0"
    with open(work / "pre", "wb") as data, open(work / "pre.index", "w") as index:
        for i in range(len(queries)):
            index.write(f"{i}\t{i * len(block)}\t{len(block)}\n")
            data.write(block)
    (work / "pre.dbtype").write_bytes(struct.pack("<i", 7))  # 7: prefilter result
    mmseqs(
        "align",
        work / "qDB",
        work / "tDB",
        work / "pre",
        work / "aln",
        "-e",
        e,
        "--alignment-mode",
        3,
        "--threads",
        threads,
    )
    mmseqs(
        "convertalis",
        work / "qDB",
        work / "tDB",
        work / "aln",
        work / "aln.tsv",
        "--format-output",
        "query,target,fident,alnlen,evalue",
        "--threads",
        threads,
    )
    hits = read_hits(work / "aln.tsv")
    for path in [*work.glob("pre*"), *work.glob("aln*"), *work.glob("?DB*")]:
        path.unlink()
    return hits


def search(records, queries, targets, work, e, threads, *extra):
    """The hits of mmseqs easy-search at IDENTITY or more, in the form of align_all."""
    write_plain(work / "q.fasta", records, queries)
    write_plain(work / "t.fasta", records, targets)
    mmseqs(
        "easy-search",
        work / "q.fasta",
        work / "t.fasta",
        work / "hits.tsv",
        work / "tmp",
        "-s",
        7.5,
        "--min-seq-id",
        IDENTITY,
        "-e",
        e,
        "--max-seqs",
        100000,
        "--threads",
        threads,
        "--format-output",
        "query,target,fident,alnlen,evalue",
        *extra,
    )
    return read_hits(work / "hits.tsv")


def read_hits(path):
    rows = (line.split("\t") for line in path.read_text().splitlines())
    return [(q, t, float(i), int(n), float(e)) for q, t, i, n, e in rows]


def choose_validation(records, families, work, threads):
    """[(chosen member, its family)], in hash order."""
    ranked = sorted(families, key=lambda members: order("family:" + min(members)))
    ranked = ranked[: N_VALIDATION * 5 // 4]
    family_of = {min(m, key=lambda a: order("member:" + a)): m for m in ranked}
    names = list(family_of)
    rank = {n: i for i, n in enumerate(names)}
    related = {}
    for q, t, identity, _, _e in align_all(records, names, names, work, E_DROP, threads):
        if q != t and identity >= IDENTITY:
            related.setdefault(q, set()).add(t)
            related.setdefault(t, set()).add(q)
    chosen = []
    for name in names:
        if not any(rank[o] < rank[name] and o in chosen for o in related.get(name, ())):
            chosen.append(name)
    chosen = chosen[:N_VALIDATION]
    return [(name, family_of[name]) for name in chosen]


def packed(records, names):
    """The gzip file: no name, time 0, level 9; Z_FILTERED suits sequences better
    than the default strategy."""
    text = "".join(f">{n} {records[n][0]}\n{records[n][1]}\n" for n in names)
    pack = zlib.compressobj(9, zlib.DEFLATED, 31, 9, zlib.Z_FILTERED)
    return pack.compress(text.encode("ascii")) + pack.flush()


def check(folder, work, threads):
    """True if no validation sequence has a relative in train."""
    records, names = {}, {}
    for split in ("train", "validation"):
        names[split] = []
        for header, seq in read_fasta(folder / f"{split}.fasta.gz"):
            accession, entry = header.split()
            assert accession not in records, accession
            assert MIN_LEN <= len(seq) <= MAX_LEN, accession
            records[accession] = entry, seq
            names[split].append(accession)
        lengths = sorted(len(records[n][1]) for n in names[split])
        quantiles = [lengths[round(p * (len(lengths) - 1))] for p in (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)]
        print(
            f"{split}: {len(lengths)} sequences, {sum(lengths)} residues, "
            f"length quantiles 0/5/25/50/75/95/100 %: {quantiles}"
        )
    assert len({s for _, s in records.values()}) == len(records), "duplicate sequences"

    hits = align_all(records, names["validation"], names["train"], work, 10, threads)
    print(f"check by alignment of all {len(names['validation'])} x {len(names['train'])} pairs:")
    for identity, length, e in (
        (IDENTITY, 0, E_CHECK),
        (IDENTITY, 0, 0.1),
        (IDENTITY, 0, 1),
        (IDENTITY, 0, 10),
        (IDENTITY, 30, 10),
        (IDENTITY, 80, 10),
        (0.5, 0, 10),
        (0.5, 30, 10),
        (0.25, 0, E_CHECK),
        (0, 0, E_CHECK),
    ):
        some = [h for h in hits if h[2] >= identity and h[3] >= length and h[4] <= e]
        print(
            f"  identity >= {identity:4.0%}, alignment >= {length:2d} columns, E <= {e:g}: "
            f"{len(some)} pairs, {len({h[0] for h in some})} validation sequences"
        )
    left = sum(h[2] >= IDENTITY and h[4] <= E_CHECK for h in hits)

    for e, extra in ((10, ()), (E_CHECK, UNMASKED), (E_CHECK, ())):
        found = search(records, names["validation"], names["train"], work, e, threads, *extra)
        left += len(found) if e == E_CHECK else 0
        print(
            f"search -s 7.5 --min-seq-id {IDENTITY} -e {e:g} {' '.join(map(str, extra))}: "
            f"{len(found)} pairs, {len({h[0] for h in found})} validation sequences"
        )
    return not left


def make(args, work):
    records = read_sources(args.source)
    families = clusters(
        records,
        sorted(records),
        work,
        "--min-seq-id",
        IDENTITY,
        "-s",
        7.5,
        "-c",
        0.5,
        "--cov-mode",
        1,
        "-e",
        1e-3,
        "--threads",
        args.threads,
    )
    print(
        f"families at 30 %: {len(families)}, of one sequence: "
        f"{sum(len(f) == 1 for f in families)}, largest: {max(map(len, families))}",
        flush=True,
    )

    chosen = choose_validation(records, families, work, args.threads)
    validation = sorted(name for name, _ in chosen)
    held = {member for _, family in chosen for member in family}
    train = sorted(set(records) - held)
    hits = align_all(records, validation, train, work, E_DROP, args.threads)
    close = {t for _, t, identity, _, e in hits if identity >= IDENTITY}
    hits = search(records, validation, train, work, E_DROP, args.threads, *UNMASKED)
    close |= {t for _, t, *_ in hits}
    train = sorted(set(train) - close)
    print(
        f"validation: {len(validation)} families with {len(held)} members; "
        f"{len(close)} more relatives left out; {len(train)} remain",
        flush=True,
    )

    thin = clusters(records, train, work, "--min-seq-id", 0.95, "-c", 0.8, "--cov-mode", 1, "--threads", args.threads)
    train = sorted((members[0] for members in thin), key=lambda n: order("train:" + n))
    kept = len(train)
    limit = BYTES - len(packed(records, sorted(validation, key=order)))
    while len(packed(records, train)) > limit:
        train = train[:-25]
    print(f"one per 95 % cluster: {kept}; dropped for size: {kept - len(train)}")

    for split, names in (("train", train), ("validation", sorted(validation, key=order))):
        data = packed(records, names)
        (args.out / f"{split}.fasta.gz").write_bytes(data)
        print(
            f"{split}.fasta.gz: {len(data)} bytes, uncompressed sha256 "
            f"{hashlib.sha256(gzip.decompress(data)).hexdigest()}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="check the files, make nothing")
    parser.add_argument("--source", type=pathlib.Path, default=EXAMPLES)
    parser.add_argument("--out", type=pathlib.Path, default=HERE)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if not shutil.which("mmseqs"):
        sys.exit("mmseqs is not on PATH: apt-get install mmseqs2 mmseqs2-examples")
    version = mmseqs("version").strip()
    if not version.startswith(MMSEQS):
        print(f"warning: mmseqs {version}; the published files come from {MMSEQS}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        if not args.check:
            make(args, work)
        if not check(args.out, work, args.threads):
            sys.exit("FAILED: validation sequences have relatives in train")
    print("ok: no validation sequence has a relative in train")


if __name__ == "__main__":
    main()
