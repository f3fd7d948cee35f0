"""The command line: subcommands and their arguments. Everything else is imported when it is needed."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain import __version__
from pretrain.errors import CrashError, UserError

if TYPE_CHECKING:
    from pretrain.corpus.sources import SourceOptions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 1 ended from outside, 2 a mistake that the user can mend (each told in one line;
        ``--debug`` adds the traceback), 128 + n ended by signal n.
    """
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported, so before that
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    code = 2
    try:
        if given[:1] == ["fit"]:  # its options are the config's, known only to LightningCLI
            from pretrain.train.fit import fit

            return fit(given[1:])
        if given[:1] == ["finetune"]:
            from pretrain.downstream.finetune.command import finetune

            return finetune(given[1:])
        if given[:1] == ["plan"]:
            from pretrain.train.plan import plan

            return plan(given[1:])
        options, unknown = _parser().parse_known_args(given)
        if unknown:
            raise UserError(f"unrecognized arguments: {' '.join(unknown)}; see `pretrain {given[0]} --help`")
        return int(options.command(options))
    except (UserError, CrashError) as error:
        code = 1 if isinstance(error, CrashError) else 2
        message = str(error)
        if debug:
            raise
    except BrokenPipeError:  # whoever read the output has enough of it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug or error.errno not in (*_UNWRITABLE, *_FILES):
            raise
        where = f"{error.filename}: " if error.filename else ""
        remedy = "allow more, as `ulimit -n` does" if error.errno in _FILES else _PLACE
        message = f"{where}{os.strerror(error.errno)}; {remedy}"
    except KeyboardInterrupt as interruption:
        code, message = 130, str(interruption) or "interrupted"
    print(f"pretrain: error: {message}", file=sys.stderr)
    return code


_SPINS = "10000"
"""How often a thread of torch's on the CPU (GNU OpenMP) looks whether it has work before it sleeps.

The default, 300,000, holds a core for a millisecond or more, and on a machine that does something else, too, it is
often the core on which the awaited thread would run (`benchmarks/README.md` has the figures).
"""

_FILES = (errno.EMFILE, errno.ENFILE)
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
_PLACE = "make room, or choose a place that can be written to"


_PREPARE = """Sources: FASTA (.fasta .fa .faa .fas), .txt, .jsonl, .csv, .tsv, .parquet and .arrow, each also .gz, .bz2
or .zst (Parquet compresses itself); directories of these, or of a dataset's save_to_disk; patterns; s3://, gs://, http://
and other fsspec URLs; Hub datasets as hf://org/name[:config][@split]; and - for standard input (with --kind). A call
that was ended goes on where it stopped when it is given again."""

_EMBED = """Sequences are packed without padding, whatever their lengths, and come in the order of the sources. A call
that was ended goes on where it stopped when it is given again, to the same file, byte for byte. Sequences longer than
the model was trained on are taken whole; --max_length N reads only the first N tokens (<cls> counts) of those longer
than N, and --long_sequences refuse makes them an error."""

_SCORE = """Higher scores are what the model finds more natural. masked-marginals: log p(new) - log p(old) with that
place masked, summed over a variant's substitutions; wildtype-marginals: the same with nothing masked, much quicker;
pseudo-perplexity: the mean log p of all residues of the variant, each masked in turn, slow, for insertions and
deletions, too. The wild type is --sequence or --fasta, or each row's own column, or what `mutated_sequence` is without
the substitutions in `mutant`; every row is checked against it."""


_CONTACTS = """Contacts are pairs of residues whose Cβ are closer than 8 Å. A logistic regression over the attention
maps tells them: the model's own, as published ESM-2 models bring one, or one that --fit makes of some structures (the
paper takes twenty). Of structures (--structures) the precision of the most probable pairs is printed. Sequences are
taken whole; memory grows with the square of their length."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pretrain", description="Pre-train ESM-style masked language models.")
    parser.add_argument("--version", action="version", version=f"pretrain {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

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
    command.set_defaults(command=_prepare)

    command = commands.add_parser("tokenizer", help="train a tokenizer on text: BPE, WordPiece or Unigram")
    command.add_argument("sources", nargs="+", metavar="SOURCE", help="the text, as for prepare")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="the tokenizer.json to write")
    command.add_argument("--vocab_size", type=int, default=8192, help="number of ids (default 8192)")
    command.add_argument("--algorithm", default="bpe", help="bpe (default), wordpiece or unigram, all on bytes")
    _add_reading(command)
    command.set_defaults(command=_tokenizer)

    command = commands.add_parser("recipes", help="list the recipes and overlays that ship, for -c")
    command.set_defaults(command=_recipes)

    commands.add_parser("plan", help="what a run needs: memory, hours, cost: pretrain plan -c CONFIG", add_help=False)
    commands.add_parser("fit", help="train, or continue a run: pretrain fit -c CONFIG [--run DIR]", add_help=False)
    commands.add_parser(
        "finetune", help="train on labels: pretrain finetune -c CONFIG --from RUN_OR_DIR", add_help=False
    )

    command = commands.add_parser("inspect", help="look at a corpus or a run: counts, figures, a picture of the curves")
    command.add_argument("paths", type=Path, nargs="+", metavar="RUN_OR_CORPUS")
    command.add_argument("--html", type=Path, metavar="FILE", help="write one page about the runs, side by side")
    command.add_argument(
        "--picture", type=Path, metavar="PNG", help="draw the run's curves, or the corpus, into a file"
    )
    command.add_argument("--verify", action="store_true", help="compare a corpus's shards with their checksums")
    command.add_argument("--audit", action="store_true", help="compare what the run consumed with corpus and order")
    command.set_defaults(command=_inspect)

    command = commands.add_parser("import", help="bring a transformers ESM-2 model, to train it further")
    command.add_argument("source", metavar="DIR_OR_HUB_NAME", help="what save_pretrained wrote, or a name on the Hub")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="the directory to write")
    command.add_argument("--seed", type=int, default=0, help="of the masked-LM head, if it has none (default 0)")
    command.set_defaults(command=_import)

    command = commands.add_parser("predict", help="a fine-tuned model's predictions for new sequences")
    command.add_argument(
        "run", type=Path, metavar="RUN", help="a fine-tuning run (its best checkpoint), or a checkpoint"
    )
    command.add_argument("source", metavar="FILE", help="sequences: FASTA, CSV, Parquet, ..., as for prepare")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="the .csv or .parquet to write")
    command.add_argument(
        "--pair_column", metavar="NAME", help="of a model of pairs: column with the other sequence (sequence_b, ...)"
    )
    command.add_argument("--pack_tokens", type=int, default=16_384, metavar="N", help="tokens in a forward pass")
    _add_device(command)
    _add_reading(command)
    command.set_defaults(command=_predict)

    command = commands.add_parser("export", help="write a directory that transformers loads")
    command.add_argument("run", type=Path, metavar="RUN", help="a run, or one of its checkpoints")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="the directory to write")
    command.add_argument("--regression", type=Path, metavar="FILE", help="contact head, from `pretrain contacts`")
    command.set_defaults(command=_export)

    command = commands.add_parser("embed", help="vectors of sequences, into a file", description=_EMBED)
    command.add_argument("model", type=Path, metavar="MODEL", help="a run, a checkpoint or a transformers directory")
    command.add_argument("sources", nargs="+", metavar="SOURCE", help="as for prepare")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help=".parquet, .safetensors or .npz")
    command.add_argument("--per", default="sequence", help="one vector per sequence (default) or per residue")
    command.add_argument("--pooling", default="mean", help="of a sequence: mean over its residues (default), or cls")
    command.add_argument(
        "--layers", type=int, nargs="+", default=[-1], metavar="N", help="0 the embedding, 1 ..., -1 the last (default)"
    )
    command.add_argument("--dtype", default="float32", help="of the file: float32 (default) or float16")
    command.add_argument("--max_length", type=int, metavar="N", help="which sequences are long, in tokens")
    command.add_argument(
        "--long_sequences", metavar="HOW", help="whole (default), crop (default with --max_length) or refuse"
    )
    _add_device(command)
    _add_reading(command)
    command.set_defaults(command=_embed)

    command = commands.add_parser("fill", help="the most probable residues or words in the place of <mask>")
    command.add_argument("model", type=Path, metavar="MODEL", help="a run, a checkpoint or a transformers directory")
    command.add_argument("texts", nargs="*", metavar="TEXT", help="such as 'MKT<mask>LV'")
    command.add_argument("--file", metavar="SOURCE", help="further ones, as for prepare")
    command.add_argument("--top", type=int, default=5, metavar="N", help="how many for each mask (default 5)")
    command.add_argument("--out", type=Path, metavar="CSV", help="write a table rather than print")
    _add_device(command)
    _add_reading(command)
    command.set_defaults(command=_fill)

    command = commands.add_parser("contacts", help="which residues touch, read from attention", description=_CONTACTS)
    command.add_argument("model", type=Path, metavar="MODEL", help="a run, a checkpoint or a transformers directory")
    command.add_argument("sources", nargs="*", metavar="SOURCE", help="sequences, as for prepare")
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
    command.set_defaults(command=_contacts)

    command = commands.add_parser("score", help="effects of protein variants, without training", description=_SCORE)
    command.add_argument("model", type=Path, metavar="MODEL", help="a run, a checkpoint or a transformers directory")
    command.add_argument("table", type=Path, metavar="CSV", help="with a column mutant (A42G:K50R), mutated_sequence")
    command.add_argument("--out", required=True, type=Path, metavar="CSV", help="the copy with scores to write")
    command.add_argument(
        "--method",
        nargs="+",
        default=["masked-marginals"],
        metavar="METHOD",
        help="masked-marginals (default), wildtype-marginals, pseudo-perplexity",
    )
    group = command.add_mutually_exclusive_group()
    group.add_argument("--sequence", help="the wild type (default: what the table says)")
    group.add_argument("--fasta", type=Path, help="a file with it")
    command.add_argument(
        "--first_residue", type=int, default=1, metavar="N", help="the number of its first (default 1)"
    )
    group = command.add_argument_group("what the columns are called")
    group.add_argument("--mutant_column", default="mutant", metavar="NAME", help="(default mutant)")
    group.add_argument("--sequence_column", default="mutated_sequence", metavar="NAME", help="(mutated_sequence)")
    group.add_argument("--wild_type_column", metavar="NAME", help="(target_seq, wildtype_sequence, ...)")
    group.add_argument("--score_column", default="DMS_score", metavar="NAME", help="the measured effect (DMS_score)")
    _add_device(command)
    command.set_defaults(command=_score)
    return parser


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")


def _add_reading(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("how sources are read")
    group.add_argument("--kind", help="fasta, txt, jsonl, csv, tsv, parquet or arrow, whatever the names end in")
    group.add_argument("--document", default="line", help="in .txt, a document is a line (default), paragraph or file")
    group.add_argument("--text_column", metavar="NAME", help="column with the sequences (default: text, sequence, ...)")
    group.add_argument("--id_column", metavar="NAME", help="column with their names (default: id, if there is one)")


def _reading(options: argparse.Namespace) -> "SourceOptions":
    from pretrain.corpus.sources import SourceOptions

    return SourceOptions(options.kind, options.document, options.text_column, options.id_column)


def _prepare(options: argparse.Namespace) -> int:
    from pretrain.corpus.command import run_prepare
    from pretrain.corpus.prepare import Settings
    from pretrain.corpus.shards import Filters
    from pretrain.corpus.split import Split
    from pretrain.corpus.tokenizer import load_tokenizer

    filters = Filters(options.min_length, options.max_length, options.deduplicate, options.skip_bad, options.windows)
    split = Split.of(options.validation_share, options.split_clusters, options.validation_ids)
    settings = Settings(load_tokenizer(options.tokenizer), _reading(options), filters, split, options.clusters)
    given = options.shard, options.merge, options.workers, options.engine
    print(run_prepare(options.sources, options.out, settings, *given))
    return 0


def _tokenizer(options: argparse.Namespace) -> int:
    from pretrain.corpus.command import train_tokenizer_file

    given = options.vocab_size, options.algorithm, _reading(options)
    tokenizer = train_tokenizer_file(options.sources, options.out, *given)
    print(f"{options.out}: {tokenizer.vocab_size:,} ids")
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from pretrain.shipped import recipes

    known = list(recipes())
    width = max(len(name) for name, _ in known)
    print("\n".join(f"{name:{width}}  {about}" for name, about in known))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    others = [f"--{name}" for name in ("picture", "verify", "audit") if getattr(options, name)]
    if options.html and others:
        raise UserError(f"--html writes a page and nothing else; leave out {', '.join(others)}")
    if options.audit and options.verify:
        raise UserError("--audit checks runs, --verify corpora; give one of the two")
    if options.html:
        from pretrain.downstream.html_report import write_report

        write_report(options.paths, options.html)
        print(options.html)
        return 0
    if options.picture and len(options.paths) > 1:
        raise UserError("--picture draws one run or corpus; give one, or several runs with --html FILE")
    from pretrain.downstream.inspect import audit, inspect

    for path in options.paths:
        if options.audit:
            print(audit(path))
        if options.picture or not options.audit:
            print(inspect(path, options.picture, options.verify))
    return 0


def _import(options: argparse.Namespace) -> int:
    from pretrain.downstream.import_model import import_model

    print(import_model(options.source, options.out, options.seed))
    return 0


def _export(options: argparse.Namespace) -> int:
    from pretrain.downstream.export import export

    print(export(options.run, options.out, options.regression))
    return 0


def _predict(options: argparse.Namespace) -> int:
    from pretrain.downstream.finetune.predict import predict

    given = options.pack_tokens, options.device, options.pair_column
    print(predict(options.run, options.source, options.out, _reading(options), *given))
    return 0


def _embed(options: argparse.Namespace) -> int:
    from pretrain.downstream.embed import EmbedOptions, embed

    what = EmbedOptions(
        options.per, options.pooling, tuple(options.layers), options.max_length, options.long_sequences, options.dtype
    )
    print(embed(options.model, options.sources, options.out, what, _reading(options), options.device))
    return 0


def _fill(options: argparse.Namespace) -> int:
    from pretrain.downstream.fill import fill

    given = options.texts, options.file, options.top, options.out, _reading(options), options.device
    for line in fill(options.model, *given):
        print(line)
    return 0


def _contacts(options: argparse.Namespace) -> int:
    from pretrain.downstream.contacts import contacts

    regression = options.fit, options.regression, options.save_regression
    given = options.out, options.structures, *regression, options.picture, _reading(options), options.device
    print(contacts(options.model, options.sources, *given))
    return 0


def _score(options: argparse.Namespace) -> int:
    from pretrain.downstream.score import score
    from pretrain.downstream.variants import VariantColumns, read_wild_type

    columns = VariantColumns(
        options.mutant_column, options.sequence_column, options.wild_type_column, options.score_column
    )
    wild_type = read_wild_type(options.fasta) if options.fasta else options.sequence
    given = options.method, wild_type, columns, options.first_residue, options.device
    print(score(options.model, options.table, options.out, *given))
    return 0
