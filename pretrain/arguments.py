"""The arguments of each command, in the order in which `pretrain --help` lists them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain import __version__
from pretrain.errors import UserError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["_Parser"]

_WHOLE = """Pre-train ESM-style masked language models on proteins or text. Start: pretrain fit -c quickstart"""

_PREPARE = """Sources: FASTA (.fasta .fa .faa .fas), .txt, .jsonl, .ndjson, .csv, .tsv, .tab, .parquet and .arrow, each
also .gz, .bz2 or .zst (Parquet compresses itself); directories of these, or of a dataset's save_to_disk; patterns; s3://,
gs://, http:// and other fsspec URLs; Hub datasets as hf://org/name[:config][@split]; and - for standard input (with
--kind). If it was stopped, give the same command again: it continues."""

_EMBED = """Sequences are packed without padding, whatever their lengths, and come in the order of the sources. If it
was stopped, give the same command again: it continues, to the same file, byte for byte. Sequences longer than the model
was trained on are taken whole; --max_length N reads only the first N tokens (<cls> counts) of those longer than N, and
--long_sequences refuse makes them an error."""

_MAX_LENGTH = "crop sequences longer than N tokens (with --long_sequences refuse: stop at them)"

_SCORE = """Higher scores are what the model finds more natural. masked-marginals: log p(new) - log p(old) with that
place masked, summed over a variant's substitutions; wildtype-marginals: the same with nothing masked, much quicker;
pseudo-perplexity: the mean log p of all residues of the variant, each masked in turn, slow, for insertions and
deletions, too. The wild type is --sequence or --fasta, or each row's own column, or what `mutated_sequence` is without
the substitutions in `mutant`; every row is checked against it."""

_FIRST_RESIDUE = "number that the table gives to the wild type's first residue (default 1)"
_VARIANTS = "the variants: a column mutant (A42G, A42G:K50R), a column mutated_sequence, or both"

_CONTACTS = """Contacts are pairs of residues whose Cβ are closer than 8 Å. A logistic regression over the attention
maps predicts them: the model's own, as published ESM-2 models bring one, or one that --fit makes of some structures
(the paper takes twenty). Of structures (--structures) the precision of the most probable pairs is printed. Sequences
are taken whole; memory grows with the square of their length."""


_VALIDATE = """Asks about 15 % of the tokens, each replaced by the mask: the same ones as the validation of every
training run, so that the figures of different models on the same sequences can be compared. Without SOURCE, a run's own
validation sets are taken, and its last figures come out again. Of longer sequences a run's models see what they saw in
training."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        options["allow_abbrev"] = False  # which may be a mistake, and stand for another option in another version
        super().__init__(**options)

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see `{self.prog} --help`")


def parser() -> argparse.ArgumentParser:
    """What reads them; the options of fit, finetune and plan are those of their configs, and read there.

    A mistake is a `UserError`; ``command`` in the result is the command's name.
    """
    whole = _Parser(prog="pretrain", description=_WHOLE)
    whole.add_argument("--version", action="version", version=f"pretrain {__version__}")
    whole.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = whole.add_subparsers(dest="command", title="commands", metavar="COMMAND", required=True)
    commands.add_parser("fit", help="train, or continue a run: -c CONFIG [--run DIR]", add_help=False)
    commands.add_parser("finetune", help="train on labels: -c CONFIG --from RUN_OR_DIR", add_help=False)
    commands.add_parser("plan", help="estimate memory, hours and cost of a run: -c CONFIG", add_help=False)
    _recipes(commands)
    _prepare(commands)
    _tokenizer(commands)
    _import(commands)
    _inspect(commands)
    _validate(commands)
    _export(commands)
    _embed(commands)
    _predict(commands)
    _fill(commands)
    _score(commands)
    _contacts(commands)
    return whole


def _recipes(commands: "Commands") -> None:
    commands.add_parser("recipes", help="list the recipes and overlays that -c takes by name")


def _prepare(commands: "Commands") -> None:
    command = commands.add_parser("prepare", help="tokenise sources into a corpus", description=_PREPARE)
    command.add_argument("sources", nargs="+", metavar="SOURCE", help="file, 'pattern', directory, URL, hf://, or -")
    command.add_argument("--out", required=True, metavar="DIR", help="the corpus to write: a directory, or a URL")
    command.add_argument("--tokenizer", default="esm", help="'esm' (default), a tokenizer.json or a directory with one")
    command.add_argument("--workers", type=int, help="processes (default: one a core); the corpus is the same")
    command.add_argument("--engine", default="local", help="local (default), or ray: on a Ray cluster (RAY_ADDRESS)")
    command.add_argument(
        "--shard", metavar="I/N", help="prepare the I-th of N parts (1 to N), to be joined with --merge"
    )
    command.add_argument("--merge", action="store_true", help="the sources are the parts: join them into a corpus")
    group = command.add_argument_group("two corpora, DIR/train and DIR/validation, instead of one")
    group.add_argument("--validation_share", type=float, metavar="SHARE", help="by a hash of the ids, such as 0.01")
    group.add_argument("--split_clusters", metavar="TABLE", help="cluster<TAB>member: whole clusters go to one side")
    group.add_argument("--validation_ids", metavar="FILE", help="the ids that go to validation, one a line")
    _add_reading(command)
    group = command.add_argument_group("which sequences are kept")
    group.add_argument(
        "--min_length", type=int, metavar="N", help="leave out shorter ones (tokens, <cls>, <eos> count)"
    )
    group.add_argument("--max_length", type=int, metavar="N", help="leave out longer ones")
    group.add_argument("--deduplicate", action="store_true", help="keep the first of equal ones (50 bytes of RAM each)")
    group.add_argument("--windows", type=int, metavar="N", help="cut longer ones into windows of at most N tokens")
    group.add_argument("--skip_bad", action="store_true", help="skip and list bad records instead of stopping")
    group = command.add_argument_group("how they are visited")
    group.add_argument(
        "--clusters", metavar="TABLE", help="lines CLUSTER<TAB>ID: an epoch visits each cluster once, by one member"
    )


def _tokenizer(commands: "Commands") -> None:
    command = commands.add_parser("tokenizer", help="train a tokenizer on text: BPE, WordPiece or Unigram")
    command.add_argument("sources", nargs="+", metavar="SOURCE", help="the text: see pretrain prepare --help")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="the tokenizer.json to write")
    command.add_argument("--vocab_size", type=int, default=8192, help="number of ids (default 8192)")
    command.add_argument("--algorithm", default="bpe", help="bpe (default), wordpiece or unigram, all on bytes")
    _add_reading(command)


def _import(commands: "Commands") -> None:
    command = commands.add_parser("import", help="make a transformers ESM-2 model the start of a run")
    command.add_argument("source", metavar="DIR_OR_HUB_NAME", help="what save_pretrained wrote, or a name on the Hub")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="the directory to write")
    command.add_argument("--seed", type=int, default=0, help="of the masked-LM head, if it has none (default 0)")


def _inspect(commands: "Commands") -> None:
    command = commands.add_parser("inspect", help="show what corpora or runs hold, and draw them")
    command.add_argument("paths", type=Path, nargs="+", metavar="RUN_OR_CORPUS", help="run or corpus directories")
    command.add_argument("--html", type=Path, metavar="FILE", help="write one page about the runs, side by side")
    command.add_argument(
        "--picture", type=Path, metavar="PNG", help="draw the run's curves, or the corpus, into a file"
    )
    command.add_argument("--verify", action="store_true", help="compare a corpus's shards with their checksums")
    command.add_argument("--audit", action="store_true", help="compare what the run consumed with corpus and order")


def _validate(commands: "Commands") -> None:
    command = commands.add_parser("validate", help="compute loss and perplexity of a model", description=_VALIDATE)
    _add_model(command)
    command.add_argument("sources", nargs="*", metavar="SOURCE", help="files, 'pattern', directory or corpus")
    command.add_argument("--max_length", type=int, metavar="N", help="tokens of a sequence that are seen")
    command.add_argument("--long_sequences", metavar="HOW", help="longer ones are cropped (crop) or divided (split)")
    command.add_argument("--out", type=Path, metavar="JSON", help="write the figures, also by length and by token")
    _add_device(command)


def _export(commands: "Commands") -> None:
    command = commands.add_parser("export", help="write a directory that transformers loads")
    command.add_argument("run", type=Path, metavar="RUN", help="a run, or one of its checkpoints")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="the directory to write")
    command.add_argument("--regression", type=Path, metavar="FILE", help="contact head, from `pretrain contacts`")


def _embed(commands: "Commands") -> None:
    command = commands.add_parser("embed", help="write vectors of sequences into a file", description=_EMBED)
    _add_model(command)
    command.add_argument("sources", nargs="+", metavar="SOURCE", help="see pretrain prepare --help")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help=".parquet, .safetensors or .npz")
    command.add_argument("--per", default="sequence", help="one vector per sequence (default) or per residue")
    command.add_argument("--pooling", default="mean", help="of a sequence: mean over its residues (default), or cls")
    command.add_argument(
        "--layers", type=int, nargs="+", default=[-1], metavar="N", help="0 the embedding, 1 ..., -1 the last (default)"
    )
    command.add_argument("--dtype", default="float32", help="of the file: float32 (default) or float16")
    command.add_argument("--max_length", type=int, metavar="N", help=_MAX_LENGTH)
    command.add_argument(
        "--long_sequences", metavar="HOW", help="whole (default), crop (default with --max_length) or refuse"
    )
    _add_device(command)
    _add_reading(command)


def _predict(commands: "Commands") -> None:
    command = commands.add_parser("predict", help="predict labels of new sequences by a fine-tuned model")
    command.add_argument(
        "run", type=Path, metavar="RUN", help="a fine-tuning run (its best checkpoint), or one of its checkpoints"
    )
    command.add_argument("source", metavar="FILE", help="sequences: FASTA, CSV, ...: see pretrain prepare --help")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="the .csv or .parquet to write")
    command.add_argument(
        "--pair_column", metavar="NAME", help="of a model of pairs: column with the other sequence (sequence_b, ...)"
    )
    command.add_argument(
        "--pack_tokens", type=int, default=16_384, metavar="N", help="tokens in a forward pass (default 16384)"
    )
    _add_device(command)
    _add_reading(command)


def _fill(commands: "Commands") -> None:
    command = commands.add_parser("fill", help="name the most probable residues or words in the place of <mask>")
    _add_model(command)
    command.add_argument("texts", nargs="*", metavar="TEXT", help="such as 'MKT<mask>LV'")
    command.add_argument("--file", metavar="SOURCE", help="further ones: see pretrain prepare --help")
    command.add_argument("--top", type=int, default=5, metavar="N", help="how many for each mask (default 5)")
    command.add_argument("--out", type=Path, metavar="CSV", help="write a table rather than print")
    _add_device(command)
    _add_reading(command)


def _score(commands: "Commands") -> None:
    command = commands.add_parser("score", help="score variants of a protein, without training", description=_SCORE)
    _add_model(command)
    command.add_argument("table", type=Path, metavar="CSV", help=_VARIANTS)
    command.add_argument("--out", required=True, type=Path, metavar="CSV", help="the copy with scores to write")
    command.add_argument(
        "--method",
        nargs="+",
        default=["masked-marginals"],
        metavar="METHOD",
        help="masked-marginals (default), wildtype-marginals, pseudo-perplexity",
    )
    wild_type = command.add_mutually_exclusive_group()
    wild_type.add_argument("--sequence", help="the wild type (default: what the table says)")
    wild_type.add_argument("--fasta", type=Path, help="a file with it")
    command.add_argument("--first_residue", type=int, default=1, metavar="N", help=_FIRST_RESIDUE)
    group = command.add_argument_group("what the columns are called")
    group.add_argument("--mutant_column", metavar="NAME", help="(default mutant)")
    group.add_argument("--sequence_column", metavar="NAME", help="(mutated_sequence)")
    group.add_argument("--wild_type_column", metavar="NAME", help="(target_seq, wildtype_sequence, ...)")
    group.add_argument("--score_column", metavar="NAME", help="the measured effect (DMS_score)")
    _add_device(command)


def _contacts(commands: "Commands") -> None:
    command = commands.add_parser(
        "contacts", help="predict which residues touch, from attention", description=_CONTACTS
    )
    _add_model(command)
    command.add_argument("sources", nargs="*", metavar="SOURCE", help="sequences: see pretrain prepare --help")
    command.add_argument("--out", type=Path, metavar="FILE", help=".npz, .safetensors or .csv, a map for each sequence")
    command.add_argument("--picture", type=Path, metavar="PNG", help="draw the first maps")
    pdb = "PDB, mmCIF files, or directories of them"
    command.add_argument(
        "--structures", nargs="+", default=[], type=Path, metavar="PATH", help=f"compare with these: {pdb}"
    )
    group = command.add_argument_group("the regression (default: the model's own)")
    group.add_argument("--fit", nargs="+", default=[], type=Path, metavar="PATH", help="fit one on these structures")
    group.add_argument("--regression", type=Path, metavar="FILE", help="take one that was fitted before")
    group.add_argument("--save_regression", type=Path, metavar="FILE", help="keep it: .safetensors")
    _add_device(command)
    _add_reading(command)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=Path, metavar="MODEL", help="a run, a checkpoint or a transformers directory")


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")


def _add_reading(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("how sources are read")
    group.add_argument("--kind", help="fasta, txt, jsonl, csv, tsv, parquet or arrow, whatever the names end in")
    group.add_argument("--document", default="line", help="in .txt, a document is a line (default), paragraph or file")
    group.add_argument("--text_column", metavar="NAME", help="column with the sequences (default: text, sequence, ...)")
    group.add_argument("--id_column", metavar="NAME", help="column with their names (default: id, if there is one)")
