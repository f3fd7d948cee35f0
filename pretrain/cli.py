"""The command line: subcommands and their arguments. Everything else is imported when it is needed."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain import __version__
from pretrain.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 2 a mistake that the user can mend (told in one line; ``--debug`` adds the traceback),
        128 + n ended by signal n.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
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
        options = _parser().parse_args(given)
        code: int = options.command(options)
        return code
    except UserError as error:
        message = str(error)
        if debug:
            raise
    except BrokenPipeError:  # whoever read the output has enough of it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EMFILE):
            raise
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{os.strerror(error.errno)}; make room, or choose a place that can be written to"
    except KeyboardInterrupt:
        message = "interrupted"
    print(f"pretrain: error: {message}", file=sys.stderr)
    return 130 if message == "interrupted" else 2


_PREPARE = """Sources: FASTA (.fasta .fa .faa .fas), .txt, .jsonl, .csv, .tsv, .parquet and .arrow, each also .gz, .bz2
or .zst (Parquet compresses itself); directories of these, or of a dataset's save_to_disk; patterns; s3://, gs://, http://
and other fsspec URLs; Hub datasets as hf://org/name[:config][@split]; and - for standard input (with --kind). A call
that was ended goes on where it stopped when it is given again."""


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
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="the corpus to write")
    command.add_argument("--tokenizer", default="esm", help="'esm' (default), a tokenizer.json or a directory with one")
    command.add_argument("--workers", type=int, help="processes (default: one a core); the corpus is the same")
    group = command.add_argument_group("how sources are read")
    group.add_argument("--kind", help="fasta, txt, jsonl, csv, tsv, parquet or arrow, whatever the names end in")
    group.add_argument("--document", default="line", help="in .txt, a document is a line (default), paragraph or file")
    group.add_argument("--text_column", metavar="NAME", help="column with the sequences (default: text, sequence, ...)")
    group.add_argument("--id_column", metavar="NAME", help="column with their names (default: id, if there is one)")
    group = command.add_argument_group("which sequences are kept")
    group.add_argument(
        "--min_length", type=int, metavar="N", help="leave out shorter ones (tokens, <cls>, <eos> count)"
    )
    group.add_argument("--max_length", type=int, metavar="N", help="leave out longer ones")
    group.add_argument("--deduplicate", action="store_true", help="keep the first of equal ones (50 bytes of RAM each)")
    group.add_argument("--skip_bad", action="store_true", help="skip and list bad records instead of stopping")
    command.set_defaults(command=_prepare)

    command = commands.add_parser("tokenizer", help="train a byte-level BPE tokenizer on text")
    command.add_argument("sources", nargs="+", metavar="SOURCE", help="the text, as for prepare")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="the tokenizer.json to write")
    command.add_argument("--vocab_size", type=int, default=8192, help="number of ids (default 8192)")
    command.set_defaults(command=_tokenizer)

    commands.add_parser("plan", help="what a run needs: memory, hours, cost: pretrain plan -c CONFIG", add_help=False)
    commands.add_parser("fit", help="train, or continue a run: pretrain fit -c CONFIG [--run DIR]", add_help=False)
    commands.add_parser(
        "finetune", help="train on labels: pretrain finetune -c CONFIG --from RUN_OR_DIR", add_help=False
    )

    command = commands.add_parser("inspect", help="look at a corpus or a run: counts, figures, a picture of the curves")
    command.add_argument("path", type=Path, metavar="RUN_OR_CORPUS")
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
        "--text_column", metavar="NAME", help="column with the sequences (default: text, sequence, ...)"
    )
    command.add_argument("--id_column", metavar="NAME", help="column with their names (default: id, if there is one)")
    command.add_argument("--pack_tokens", type=int, default=16_384, metavar="N", help="tokens in a forward pass")
    command.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU, where there is one")
    command.set_defaults(command=_predict)

    command = commands.add_parser("export", help="write a directory that transformers loads")
    command.add_argument("run", type=Path, metavar="RUN", help="a run, or one of its checkpoints")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="the directory to write")
    command.set_defaults(command=_export)
    return parser


def _prepare(options: argparse.Namespace) -> int:
    from pretrain.corpus.prepare import prepare
    from pretrain.corpus.shards import Filters
    from pretrain.corpus.sources import SourceOptions
    from pretrain.corpus.store import REPORT
    from pretrain.corpus.tokenizer import load_tokenizer

    corpus = prepare(
        options.sources,
        options.out,
        load_tokenizer(options.tokenizer),
        SourceOptions(options.kind, options.document, options.text_column, options.id_column),
        Filters(options.min_length, options.max_length, options.deduplicate, options.skip_bad),
        options.workers,
    )
    print(f"{options.out}: {corpus.num_sequences:,} sequences, {corpus.num_tokens:,} tokens")
    if skipped := corpus.skipped:
        report = f"; the bad ones are listed in {options.out / REPORT}" if "bad" in skipped else ""
        print(f"  left out     {'  '.join(f'{reason} {count:,}' for reason, count in sorted(skipped.items()))}{report}")
    return 0


def _tokenizer(options: argparse.Namespace) -> int:
    from pretrain.corpus.prepare import train_tokenizer_file

    tokenizer = train_tokenizer_file(options.sources, options.out, options.vocab_size)
    print(f"{options.out}: {tokenizer.vocab_size:,} ids")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from pretrain.downstream.inspect import inspect

    if options.audit:
        from pretrain.downstream.inspect import audit

        print(audit(options.path))
        if not options.picture:
            return 0
    print(inspect(options.path, options.picture, options.verify))
    return 0


def _import(options: argparse.Namespace) -> int:
    from pretrain.downstream.import_model import import_model

    print(import_model(options.source, options.out, options.seed))
    return 0


def _export(options: argparse.Namespace) -> int:
    from pretrain.downstream.export import export

    print(export(options.run, options.out))
    return 0


def _predict(options: argparse.Namespace) -> int:
    from pretrain.corpus.sources import SourceOptions
    from pretrain.downstream.finetune.predict import predict

    columns = SourceOptions(text_column=options.text_column, id_column=options.id_column)
    print(predict(options.run, options.source, options.out, columns, options.pack_tokens, options.device))
    return 0
