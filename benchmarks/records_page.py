"""What came out of the records: a page of the documentation, with a table and a picture of each."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scaling
from record_list import Record
from scipy.stats import t

from pretrain.train.picture import drawing

Results = dict[str, list[dict[str, Any]]]
"""For each arm, what its seeds left."""

ROOT = Path(__file__).resolve().parents[1]
README, PAGE, PICTURES = ROOT / "README.md", ROOT / "docs/records.md", ROOT / "docs/images/records"
SHOWN = {
    "schedules": "Five schedules on the same tokens: the validation loss (left), and the final loss less that of the "
    "inverse square root, with 95 % intervals over three seeds (right):",
    "transformers_larger": "One model here and in transformers' Trainer: sooner (left), to the same loss (right):",
}
"""In the README, where they have been run, and what each picture shows."""

_BEGIN, _END = "<!-- records -->", "<!-- end of records -->"

COLOURS = ("#1f6fb4", "#e0752d", "#3a9a5b", "#b5458e", "#7a6a58", "#c9a227")

_HEAD = """# Records

Questions about recipes, each answered by runs that are compared: the same data, the same validation (all targets
`<mask>`), equal tokens. Most have three seeds; those with a single one say so. This page and its pictures are written
by `python benchmarks/records.py`, which first runs what is missing; the questions are in `benchmarks/record_list.py`.
`benchmarks/records/log` has a file for each run: command, commit, machine, versions, seed, final figures and curve.

How to read it: loss is in nats on the masked validation positions, the mean over the seeds. The difference is to the
first row, seed by seed (the same first weights, data and crops), with a 95 % t-interval. If the interval excludes zero,
the row is called better or worse; otherwise no difference was seen. These are small models and short runs on a CPU:
what pays here need not pay at another size."""


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % t-interval; infinite for a single value."""
    if len(values) < 2:
        return float(np.mean(values)), math.inf
    return float(np.mean(values)), float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def differences(results: Results) -> dict[str, tuple[float, float]]:
    """Of each arm but the first: by how much its final loss differs, and the half-width of the interval."""
    first, *others = results
    base = [one["figures"]["val/loss"] for one in results[first]]
    return {
        arm: interval([one["figures"]["val/loss"] - zero for one, zero in zip(results[arm], base, strict=True)])
        for arm in others
    }


def times(results: Results) -> str:
    """How much sooner the second arm is done than the first, and has come to its final loss."""
    (rival, rivals), (name, runs) = list(results.items())[:2]
    whole, reached = [], []
    for theirs, ours in zip(rivals, runs, strict=True):
        seconds = theirs["seconds_of_training"][-1][1]
        clock = [moment for _, moment in ours["seconds_of_training"]]
        whole.append(seconds / clock[-1])
        losses = np.minimum.accumulate([loss for _, loss in ours["val/loss"]])
        wanted = theirs["val/loss"][-1][1]
        if losses[-1] <= wanted:
            reached.append(seconds / float(np.interp(-wanted, -losses, clock)))
    mean, half = interval(whole)
    said = f"{name} does the same steps {mean:.2f} ± {half:.2f} times as fast"
    theirs = f"{rival}' final loss" if rival.endswith("s") else f"{rival}'s final loss"
    if len(reached) < len(whole):
        reach = "reaches" if len(reached) == 1 else "reach"
        return f"{said}; {len(reached)} of {len(whole)} seeds {reach} {theirs} within them."
    mean, half = interval(reached)
    return f"{said}; it reaches {theirs} {mean:.2f} ± {half:.2f} times as fast."


def write_page(found: dict[Record, Results]) -> None:
    """Write docs/records.md, a picture for each record, and what the README shows of them."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    parts = [_HEAD]
    for record, results in found.items():
        parts.append("\n".join(section(record, results)))
        if len(results) > 1 and len(record.seeds) > 1:
            draw(record, results, PICTURES / f"{record.name}.png")
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    shown = [record for name in SHOWN for record, of_it in found.items() if record.name == name and len(of_it) > 1]
    if shown:
        pictures = [f"{SHOWN[one.name]}\n\n![{one.title}](docs/images/records/{one.name}.png)" for one in shown]
        lines = [
            "",
            "Recipes beside each other, with three seeds and what did not help: [records](docs/records.md).",
            "",
        ]
        text = README.read_text(encoding="utf-8")
        before, begin, rest = text.partition(_BEGIN)
        _, end, after = rest.partition(_END)
        block = "\n".join([*lines, "\n\n".join(pictures), "", ""])
        README.write_text(f"{before}{begin}{block}{end}{after}", encoding="utf-8")


def section(record: Record, results: Results) -> Iterator[str]:
    """One record in Markdown; an arm that was not run with all its seeds is named as such."""
    yield f"## {record.title}\n"
    if not results:
        yield f"Not run: `python benchmarks/records.py {record.name}`."
        return
    one = next(iter(results.values()))[0]
    complete = len(results) == len(record.arms)
    if len(results) > 1 if len(record.seeds) > 1 else complete and record.fitted:
        yield f"![{record.title}](images/records/{record.name}.png)\n"
    yield "| | loss | perplexity | perplexity by seed | tokens | difference of loss | a difference? |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    comparable = len(record.seeds) > 1 and next(iter(record.arms)) in results
    found = differences(results) if comparable else {}
    for arm in record.arms:
        if arm not in results:
            yield f"| {arm} | not run | | | | | |"
            continue
        losses = [result["figures"]["val/loss"] for result in results[arm]]
        seeds = ", ".join(f"{math.exp(loss):.2f}" for loss in losses)
        tokens = np.mean([result["figures"]["tokens_seen"] for result in results[arm]]) / 1e6
        cells = [
            arm.replace("<mask>", "`<mask>`"),
            f"{np.mean(losses):.4f}",
            f"{math.exp(np.mean(losses)):.2f}",
            seeds,
            f"{tokens:.2f} M",
        ]
        cells += [f"{found[arm][0]:+.4f} ± {found[arm][1]:.4f}", verdict(*found[arm])] if arm in found else ["", ""]
        yield f"| {' | '.join(cells)} |"
    yield ""
    if "unigram_perplexity" in one["figures"]:
        unigram, bigram = (one["figures"][f"{name}_perplexity"] for name in ("unigram", "bigram"))
        yield f"Unigram {unigram:.2f}, bigram {bigram:.2f}. {record.said}".strip()
    elif record.said:
        yield record.said
    if record.fitted and complete:
        yield ""
        yield law({arm: runs[0] for arm, runs in results.items()}, PICTURES / f"{record.name}.png")
    if record.alone and complete:
        yield f"\n{times(results)}"
    machines = sorted({result["machine"] for arm in results.values() for result in arm})
    commits = sorted({result["commit"][:10] for arm in results.values() for result in arm})
    yield f"\n{one['date']}, {'; '.join(machines)}, torch {one['versions']['torch']}, commit {', '.join(commits)}."


def law(runs: dict[str, dict[str, Any]], picture: Path) -> str:
    """The law fitted to the runs of a ladder, and what it does not say, as Markdown; and a picture of it."""
    rungs = [scaling.points_of(run) for run in runs.values()]
    points = np.concatenate(rungs)
    fitted = scaling.fit(points)
    log_a, log_b, log_e, a, b = fitted
    error = np.abs(scaling.predict(fitted, *points.T[:2]) - points[:, 2]).max()
    scaling.draw(list(runs), rungs, fitted, scaling.other_laws(rungs), picture)
    return (
        f"A law fitted to these runs, with N parameters and D tokens: {math.exp(log_e):.3f} + {math.exp(log_a):.3g} / "
        f"N^{a:.2f} + {math.exp(log_b):.3g} / D^{b:.2f} nats, at most {error:.3f} from what was measured. It holds for "
        "this text, tokenizer and validation set. The right side draws it beyond the runs, where it is a guess: the "
        "bands show how far laws disagree there that were fitted to parts of the points."
    )


def verdict(mean: float, half: float) -> str:
    """What an interval says."""
    return "not seen" if abs(mean) <= half else "**better**" if mean < 0 else "worse"


def draw(record: Record, results: Results, path: Path) -> None:
    """Curves of validation, thin for each seed, and the final differences with their intervals."""
    by_time = all("seconds_of_training" in one for arm in results.values() for one in arm)
    with drawing(path, (10.5, 3.9), columns=2) as (curves, final):
        shown = []
        for colour, (arm, runs) in zip(COLOURS, results.items(), strict=False):
            lines = [_line(run, by_time) for run in runs]
            for x, y in lines:
                curves.plot(x, y, color=colour, alpha=0.25, linewidth=1)
            mean = np.mean([y for _, y in lines], 0)
            curves.plot(np.mean([x for x, _ in lines], 0), mean, color=colour, label=arm, linewidth=2)
            shown.append(mean)
        low, high = min(map(min, shown)), float(np.median([mean[len(mean) // 3] for mean in shown]))
        curves.set_ylim(low - 0.06 * (high - low), high + 0.5 * (high - low))
        curves.set_xlabel("seconds of training" if by_time else "million tokens seen")
        curves.set_ylabel("validation loss, nats")
        curves.legend(frameon=False, fontsize=9)
        found = differences(results)
        final.axvline(0, color="#888", linewidth=1)
        for row, (arm, (mean, half)) in enumerate(found.items()):
            colour = COLOURS[list(results).index(arm)]
            final.errorbar(mean, -row, xerr=half, fmt="o", color=colour, capsize=4, markersize=7, linewidth=2)
            final.annotate(
                f"{arm}  {mean:+.4f}", (mean, -row), (0, 10), textcoords="offset points", ha="center", fontsize=9
            )
        final.set_yticks([])
        final.set_ylim(-len(found) + 0.4, 0.8)
        final.set_xlabel(f"final loss, less that of: {next(iter(results))}\n95 % interval; left is better")
        final.margins(x=0.25)


def _line(run: dict[str, Any], by_time: bool) -> tuple[list[float], list[float]]:
    losses = [loss for _, loss in run["val/loss"]]
    if by_time:
        return [seconds for _, seconds in run["seconds_of_training"]], losses
    if "data/tokens_seen" in run:
        return [tokens / 1e6 for _, tokens in run["data/tokens_seen"]], losses
    figures = run["figures"]
    return [step / figures["steps"] * figures["tokens_seen"] / 1e6 for step, _ in run["val/loss"]], losses
