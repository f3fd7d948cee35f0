"""The data path beside its rivals: one function a row, ours and the rival's rounds alternating in one process.

    python benchmarks/data.py            all rows
    python benchmarks/data.py masking    one of them
    python benchmarks/data.py --processor-time ...    where other work runs: time of this process, without its waiting

Prints Markdown; needs no GPU. Sources are the samples that ship with the project.
"""

import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core against one core
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, EsmTokenizer

from pretrain.corpus.batch import PackDataset
from pretrain.corpus.masking import Masking
from pretrain.corpus.order import Order
from pretrain.corpus.packing import Pack, Planner, Position, share_out
from pretrain.corpus.padding import PaddedDataset, static_shapes
from pretrain.corpus.prepare import Settings, prepare
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizer import ESM_ALPHABET, ProteinTokenizer, TextTokenizer, load_tokenizer
from pretrain.shipped import shipped

ROUNDS = 5
TOKENS = 2_000_000  # a step of ESM-2's
PACKS = 32


def rates(work: float, *contenders: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """Median units of work a second of each, in turns."""
    clock = time.process_time if "--processor-time" in sys.argv else time.perf_counter
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for contender, times in zip(contenders, seconds, strict=True):
            begin = clock()
            contender()
            times.append(clock() - begin)
    return [work / statistics.median(times) for times in seconds]


def masking(folder: Path) -> Iterator[str]:
    """Gather, crop and mask, in one process, beside transformers' collator."""
    corpus = prepare([str(shipped("data/proteins/train.fasta.gz"))], folder / "proteins", Settings(ProteinTokenizer()))

    def packs_of(masking: Masking, corpus: Corpus) -> list[Pack]:
        plan = Planner(corpus, Order(len(corpus), 0), masking, 1024).step(Position(), TOKENS)
        return share_out(plan, PACKS)

    def ours(given: Corpus, masking: Masking) -> Callable[[], None]:
        dataset, packs = PackDataset(given, masking), packs_of(masking, given)

        def run() -> None:
            for pack in packs:
                dataset[pack]

        return run

    def build(given: Corpus, share: float | tuple[float, float] = 0.15, **options: object) -> Masking:
        tokenizer = given.tokenizer
        vocabulary = (tokenizer.mask_token_id, tokenizer.replacement_ids)
        return Masking(share, 0.8, 0.1, *vocabulary, 0, **options)  # type: ignore[arg-type]

    first = build(corpus)
    packs = packs_of(first, corpus)
    tokens = sum(int(pack.lengths.sum()) for pack in packs)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(ESM_ALPHABET))
    collator = DataCollatorForLanguageModeling(EsmTokenizer(str(vocabulary)), mlm_probability=0.15)
    # What datasets hands to the collator: lists of ids, tokenised and cut beforehand.
    batches = [[{"input_ids": corpus.tokens(i)[:1024].tolist()} for i in pack.indices.tolist()] for pack in packs]

    def rival() -> None:
        for batch in batches:
            collator(batch)

    rate, theirs = rates(tokens, ours(corpus, first), rival)
    yield f"gather + crop + mask, packs of {TOKENS // PACKS:,} tokens of proteins, M tokens/s in one process"
    yield ""
    yield "| | M tokens/s | |"
    yield "| --- | --- | --- |"
    yield f"| pretrain, a fixed count of tokens | {rate / 1e6:.1f} | {rate / theirs:.0f} × |"
    yield f"| transformers' `DataCollatorForLanguageModeling`, the same sequences a batch | {theirs / 1e6:.2f} | 1 |"
    text = prepare_text(folder)
    modes = [
        ("independent draws", build(corpus, draws="independent"), corpus),
        ("a share from 10 to 40 %", build(corpus, (0.1, 0.4)), corpus),
        ("30 %", build(corpus, 0.3), corpus),
        ("spans", build(corpus, unit="span"), corpus),
        ("whole words, of the text that ships", build(text, unit="word"), text),
    ]
    found = rates(tokens, *(ours(given, masking) for _, masking, given in modes))
    for (name, _, _), rate in zip(modes, found, strict=True):
        yield f"| pretrain, {name} | {rate / 1e6:.1f} | |"


def prepare_text(folder: Path, name: str = "text") -> Corpus:
    tokenizer = load_tokenizer("data/text/tokenizer.json")
    return prepare([str(shipped("data/text/train.jsonl.gz"))], folder / name, Settings(tokenizer), workers=1)


def text(folder: Path) -> Iterator[str]:
    """``prepare`` of text in one process, beside `tokenizers` itself."""
    tokenizer = load_tokenizer("data/text/tokenizer.json")
    assert isinstance(tokenizer, TextTokenizer)
    with gzip.open(str(shipped("data/text/train.jsonl.gz")), "rt", encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in file]
    size = sum(len(document.encode()) for document in documents)
    names = iter(range(100))

    def rival() -> None:
        for document in documents:
            tokenizer.backend.encode(document, add_special_tokens=False)

    rate, theirs = rates(size, lambda: prepare_text(folder, f"text-{next(names)}"), rival, rounds=3)
    yield "prepare of text (read, tokenise, write), MB/s in one process"
    yield ""
    yield "| | MB/s | |"
    yield "| --- | --- | --- |"
    yield f"| `pretrain prepare` | {rate / 1e6:.2f} | {rate / theirs:.2f} × |"
    yield f"| `tokenizers`' `encode` alone, texts in memory | {theirs / 1e6:.2f} | 1 |"


def proteins(folder: Path) -> Iterator[str]:
    """``prepare`` of FASTA in one process, beside `EsmTokenizer` in `datasets.map`."""
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    sample = gzip.decompress(Path(str(shipped("data/proteins/train.fasta.gz"))).read_bytes())
    records = sample.decode().removeprefix(">").split("\n>")
    fasta, packed = folder / "proteins.fasta", folder / "proteins.fasta.gz"
    fasta.write_text("".join(f">{copy}_{record}\n" for copy in range(10) for record in records))
    packed.write_bytes(gzip.compress(fasta.read_bytes(), 6))
    names = iter(range(100))

    def ours(source: Path) -> Callable[[], None]:
        return lambda: prepare([source], folder / f"made-{next(names)}", Settings(ProteinTokenizer()), workers=1)  # type: ignore

    some = records[:: len(records) // 1000]  # the rival's share of the work, since it takes so much longer
    share = sum(map(len, some)) / (10 * len(sample))
    table = datasets.Dataset.from_dict({"sequence": ["".join(record.split("\n")[1:]) for record in some]})
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(ESM_ALPHABET))
    tokenizer = EsmTokenizer(str(vocabulary))

    def rival() -> None:
        table.map(lambda rows: tokenizer(rows["sequence"]), batched=True, remove_columns=["sequence"])

    size = fasta.stat().st_size
    rate, from_gzip, theirs = rates(size, ours(fasta), ours(packed), rival)
    yield f"prepare of {size / 1e6:.0f} MB of FASTA (read, tokenise, write), MB/s of FASTA in one process"
    yield ""
    yield "| | MB/s | |"
    yield "| --- | --- | --- |"
    yield f"| `pretrain prepare` | {rate / 1e6:.1f} | {rate / (theirs * share):.0f} × |"
    yield f"| `pretrain prepare`, from .gz | {from_gzip / 1e6:.1f} | {from_gzip / (theirs * share):.0f} × |"
    yield f"| `EsmTokenizer` in `datasets.map`, sequences in memory | {theirs * share / 1e6:.2f} | 1 |"


def static(folder: Path) -> Iterator[str]:
    """How much of packs of a static size is filled."""
    corpus = prepare([str(shipped("data/proteins/train.fasta.gz"))], folder / "proteins", Settings(ProteinTokenizer()))
    tokenizer, size, per_step = corpus.tokenizer, 2**14, 16
    masking = Masking(0.15, 0.8, 0.1, tokenizer.mask_token_id, tokenizer.replacement_ids, 0)
    planner = Planner(corpus, Order(len(corpus), 0), masking, 1024)
    shapes = static_shapes(size, planner.mean_length, 1024, 0.15, masking.deviation(size, planner.mean_length))
    dataset = PaddedDataset(PackDataset(corpus, masking), shapes)
    position, real, slots, shapes_used = Position(), 0, 0, set[int]()
    for _ in range(30):
        step = planner.step(position, size * per_step)
        for pack in share_out(step, per_step, 0.0):
            batch = dataset[pack]
            real, slots = real + int(pack.lengths.sum()), slots + len(batch.input_ids)
            shapes_used.add(len(batch.input_ids))
        position = step.after
    yield f"packs of {size:,} tokens on average, padded to {', '.join(f'{n:,}' for n in sorted(shapes_used))} slots: "
    yield f"{real / slots:.2%} filled ({30 * per_step} packs)"


ROWS = {"masking": masking, "proteins": proteins, "text": text, "static": static}


def main() -> None:
    torch.set_num_threads(1)
    np.seterr(all="raise")
    for name in [name for name in sys.argv[1:] if name in ROWS] or ROWS:
        with tempfile.TemporaryDirectory() as folder:
            for line in ROWS[name](Path(folder)):
                print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
