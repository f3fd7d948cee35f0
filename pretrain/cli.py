"""The command line: which function does a command, and how it ends. These are imported when they are needed."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pretrain.arguments import parser
from pretrain.errors import CrashError, UserError

if TYPE_CHECKING:
    from pretrain.corpus.sources import SourceOptions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 1 ended from outside, 2 a mistake that the user can mend (each reported in one
        line; ``--debug`` adds the traceback), 128 + n ended by signal n.
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
        options, unknown = parser().parse_known_args(given)
        if unknown:
            raise UserError(f"unrecognized arguments: {' '.join(unknown)}; see `pretrain {options.command} --help`")
        _run(options)
        return 0
    except (UserError, CrashError) as error:
        code = 1 if isinstance(error, CrashError) else 2
        message = str(error)
        if debug:
            raise
    except BrokenPipeError:  # whoever read the output has enough of it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug or error.errno not in _REMEDIES:
            raise
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        message = f"{where}{os.strerror(error.errno)}; {_REMEDIES[error.errno]}"
    except KeyboardInterrupt as interruption:
        code, message = 130, str(interruption) or "interrupted"
    print(f"pretrain: error: {message}", file=sys.stderr)
    return code


def _run(options: argparse.Namespace) -> None:
    try:
        _COMMANDS[options.command](options)
    except (MemoryError, RuntimeError) as error:
        if "device" not in options:  # which all those that apply a model have
            raise
        from pretrain.train.hardware import is_out_of_host_memory, is_out_of_memory

        of_gpu = is_out_of_memory(error)
        if not (of_gpu or is_out_of_host_memory(error)):
            raise
        cropped = " (--max_length N takes N tokens of each)" if "max_length" in options else ""
        raise UserError(
            f"{'the GPU' if of_gpu else 'this machine'} has too little memory for the model and the longest sequence; "
            f"give shorter ones{cropped} or leave it out{', or give --device cpu' if of_gpu else ''}"
        ) from error


_SPINS = "10000"
"""How often a thread of torch's on the CPU (GNU OpenMP) looks whether it has work before it sleeps.

The default, 300,000, holds a core for a millisecond or more, and on a machine that does something else, too, it is
often the core on which the awaited thread would run (`benchmarks/README.md` has the figures).
"""

_PLACE = "make room, or choose a place that can be written to"
_REMEDIES = {
    errno.ENOSPC: _PLACE,
    errno.EDQUOT: _PLACE,
    errno.EACCES: _PLACE,
    errno.EROFS: _PLACE,
    errno.ENOTDIR: _PLACE,
    errno.EISDIR: _PLACE,
    errno.ELOOP: "a link leads to itself; choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EEXIST: "choose another name, or remove it first",
    errno.EFBIG: "allow larger ones, as `ulimit -f` does, or choose another place",
    errno.EIO: "the disk fails, or the way to it: look at it, or choose another place",
    errno.EMFILE: "allow more, as `ulimit -n` does",
    errno.ENFILE: "allow more, as `ulimit -n` does",
}
"""What to do about errors of the operating system that a user can mend."""


def _reading(options: argparse.Namespace) -> "SourceOptions":
    from pretrain.corpus.sources import SourceOptions

    return SourceOptions(
        kind=options.kind,
        document=options.document,
        text_column=options.text_column,
        id_column=options.id_column,
    )


def _prepare(options: argparse.Namespace) -> None:
    from pretrain.corpus.command import run_prepare
    from pretrain.corpus.prepare import Settings
    from pretrain.corpus.shards import Filters
    from pretrain.corpus.split import Split
    from pretrain.corpus.tokenizer import load_tokenizer

    filters = Filters(
        min_length=options.min_length,
        max_length=options.max_length,
        deduplicate=options.deduplicate,
        skip_bad=options.skip_bad,
        windows=options.windows,
    )
    split = Split.of(share=options.validation_share, clusters=options.split_clusters, ids=options.validation_ids)
    settings = Settings(load_tokenizer(options.tokenizer), _reading(options), filters, split, options.clusters)
    made = run_prepare(
        options.sources,
        options.out,
        settings,
        part=options.shard,
        merge=options.merge,
        workers=options.workers,
        engine=options.engine,
    )
    print(made)


def _tokenizer(options: argparse.Namespace) -> None:
    from pretrain.corpus.command import train_tokenizer_file

    tokenizer = train_tokenizer_file(
        options.sources,
        options.out,
        vocab_size=options.vocab_size,
        algorithm=options.algorithm,
        options=_reading(options),
    )
    print(f"{options.out}: {tokenizer.vocab_size:,} ids")


def _recipes(options: argparse.Namespace) -> None:
    from pretrain.shipped import OVERLAY, recipes

    known = list(recipes())
    width = max(len(name) for name, _ in known)
    lines = [f"{name:{width}}  {about}" for name, about in known if not about.startswith(OVERLAY)]
    lines += ["", "overlays, given after a recipe:"]
    lines += [f"{name:{width}}  {about.removeprefix(OVERLAY)}" for name, about in known if about.startswith(OVERLAY)]
    print("\n".join(lines))


def _inspect(options: argparse.Namespace) -> None:
    others = [f"--{name}" for name in ("picture", "verify", "audit") if getattr(options, name)]
    if options.html and others:
        raise UserError(f"--html writes a page and nothing else; leave out {', '.join(others)}")
    if options.audit and options.verify:
        raise UserError("--audit checks runs, --verify corpora; give one of the two")
    if options.html:
        from pretrain.downstream.html_report import write_report

        write_report(options.paths, options.html)
        print(options.html)
        return
    if options.picture and len(options.paths) > 1:
        raise UserError("--picture draws one run or corpus; give one, or several runs with --html FILE")
    from pretrain.downstream.inspect import audit, inspect

    for path in options.paths:
        if options.audit:
            print(audit(path))
        if options.picture or not options.audit:
            print(inspect(path, options.picture, options.verify))


def _import(options: argparse.Namespace) -> None:
    from pretrain.downstream.import_model import import_model

    print(import_model(options.source, options.out, options.seed))


def _export(options: argparse.Namespace) -> None:
    from pretrain.downstream.export import export

    print(export(options.run, options.out, options.regression))


def _predict(options: argparse.Namespace) -> None:
    from pretrain.downstream.finetune.predict import predict

    done = predict(
        options.run,
        options.source,
        options.out,
        options=_reading(options),
        pack_tokens=options.pack_tokens,
        device=options.device,
        pair_column=options.pair_column,
    )
    print(done)


def _embed(options: argparse.Namespace) -> None:
    from pretrain.downstream.embed import EmbedOptions, embed

    what = EmbedOptions(
        per=options.per,
        pooling=options.pooling,
        layers=tuple(options.layers),
        max_length=options.max_length,
        long_sequences=options.long_sequences,
        dtype=options.dtype,
    )
    done = embed(
        options.model,
        options.sources,
        options.out,
        options=what,
        source_options=_reading(options),
        device=options.device,
    )
    print(done)


def _fill(options: argparse.Namespace) -> None:
    from pretrain.downstream.fill import fill

    lines = fill(
        options.model,
        options.texts,
        source=options.file,
        top=options.top,
        out=options.out,
        options=_reading(options),
        device=options.device,
    )
    for line in lines:
        print(line)


def _contacts(options: argparse.Namespace) -> None:
    from pretrain.downstream.contacts import contacts

    done = contacts(
        options.model,
        options.sources,
        out=options.out,
        structures=options.structures,
        fit_on=options.fit,
        regression_file=options.regression,
        save_to=options.save_regression,
        picture=options.picture,
        source_options=_reading(options),
        device=options.device,
    )
    print(done)


def _score(options: argparse.Namespace) -> None:
    from pretrain.downstream.score import score
    from pretrain.downstream.variants import VariantColumns, read_wild_type

    columns = VariantColumns(
        mutant=options.mutant_column,
        mutated_sequence=options.sequence_column,
        wild_type=options.wild_type_column,
        measured=options.score_column,
    )
    wild_type = read_wild_type(options.fasta) if options.fasta else options.sequence
    done = score(
        options.model,
        options.table,
        options.out,
        methods=options.method,
        wild_type=wild_type,
        columns=columns,
        first_residue=options.first_residue,
        device=options.device,
    )
    print(done)


def _validate(options: argparse.Namespace) -> None:
    from pretrain.downstream.validate import validate

    done = validate(
        options.model,
        options.sources,
        max_length=options.max_length,
        long_sequences=options.long_sequences,
        out=options.out,
        device=options.device,
    )
    print(done)


_COMMANDS = {
    "prepare": _prepare,
    "tokenizer": _tokenizer,
    "recipes": _recipes,
    "inspect": _inspect,
    "import": _import,
    "predict": _predict,
    "export": _export,
    "embed": _embed,
    "fill": _fill,
    "contacts": _contacts,
    "score": _score,
    "validate": _validate,
}
