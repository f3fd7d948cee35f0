"""What a run tells people: what will run, before it starts; how it went, once it is finished."""

import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from pretrain.corpus.baselines import Baselines
from pretrain.corpus.datamodule import MLMDataModule
from pretrain.corpus.mixture import JoinedCorpus, MixtureOrder, shares
from pretrain.model.cpu_kernels import by_llvm
from pretrain.model.linear import MIN_MULTIPLICATIONS
from pretrain.train.module import MLMModule
from pretrain.train.run import Run
from pretrain.train.step import StepModule
from pretrain.train.throughput import peak_flops
from pretrain.train.validation import prefixes


def header(run: Run, trainer: pl.Trainer, module: MLMModule, data: MLMDataModule) -> str:
    """Model, data, hardware and where the run begins, in a few lines."""
    config = module.encoder.config
    parameters = sum(p.numel() for p in module.parameters())
    corpus = data.train_corpus
    sets = [
        f"{len(held):,} sequences of {', '.join(map(str, data.validation_sets[name]))}{f' ({name})' * bool(name)}"
        for name, held in data.validation_corpora.items()
    ]
    shape = f"{config.num_hidden_layers} layers, {config.hidden_size} wide, {config.num_attention_heads} heads"
    rate, source = peak_flops(trainer.strategy.root_device)
    hardware = described(execution(trainer, module))
    begin = f"continues after step {run.step} of {trainer.max_steps}" if run.step else f"{trainer.max_steps} steps"
    start = [f"  branch    of {origin}"] if (origin := run.origin) else []
    start += [f"  weights   from {module.initialized_from}"] if module.initialized_from else []
    start += [f"  copies    to {run.mirror.url}"] if run.mirror else []
    return "\n".join(
        [
            f"{run.directory}: {begin}",
            f"  model     {parameters:,} parameters: {shape}",
            *start,
            f"  data      {corpus.num_sequences:,} sequences, {corpus.num_tokens:,} tokens",
            *_visits(data, trainer.max_steps),
            f"  validated on {' and '.join(sets) or 'nothing: give --data.validation'}",
            *_also_trained_on(data),
            f"  step      {_growth(data)}{data.global_batch_tokens:,} tokens, crops of at most {data.max_length}",
            f"  hardware  {hardware}; MFU against {rate / 1e12:.3g} TFLOP/s ({source})",
        ]
    )


def _also_trained_on(data: MLMDataModule) -> list[str]:
    """A line about validation sources that are sources of training."""
    trained = set(map(str, data.train))
    both = [source for sources in data.validation_sets.values() for source in map(str, sources) if source in trained]
    return [f"  warning   {', '.join(both)}: trained on, too; what validation says of it flatters"] if both else []


def _growth(data: MLMDataModule) -> str:
    warmup = data.batch_warmup
    return f"{warmup.first:,} tokens, growing over {warmup.tokens:,} to " if warmup else ""


def _visits(data: MLMDataModule, max_steps: int) -> list[str]:
    """How the training data is visited, where that is not simply every sequence once an epoch."""
    planner, corpus = data.train_planner(), data.train_corpus
    if not isinstance(planner.order, MixtureOrder):
        return [f"            in {corpus.num_clusters:,} clusters"] if corpus.num_clusters else []
    assert isinstance(corpus, JoinedCorpus)
    size, warmup = data.global_batch_tokens, data.batch_warmup
    draws = (warmup.consumed(max_steps, size) if warmup else max_steps * size) / planner.mean_length
    lines = []
    of_each = shares(corpus, planner.order, data.max_length)
    for source, component, share in zip(data.train, corpus.corpora, of_each, strict=True):
        kind = "clusters" if component.num_clusters else "sequences"
        epochs = draws * share.sequences / share.epoch_size
        lines.append(
            f"    {share.sequences:6.1%}  {source}: {share.epoch_size:,} {kind}; about {share.tokens:.1%} of the "
            f"tokens, {epochs:.2g} epochs in {max_steps} steps"
        )
    return lines


def execution(trainer: pl.Trainer, module: StepModule) -> dict[str, Any]:
    """What the run is computed with: processes and their accelerator, strategy, precision, kernels, compilation."""
    accelerator, config = trainer.strategy.root_device.type, module.encoder.config
    float32_on_cpu = accelerator == "cpu" and trainer.precision == "32-true"
    own = float32_on_cpu and not module.compile_blocks  # which torch compiles in its own way
    llvm = by_llvm(module.cpu_kernels if own else "torch", config.head_dim)
    products = "LLVM kernels where large" if MIN_MULTIPLICATIONS else "LLVM kernels"
    on_cpu = "LLVM kernels" if llvm.attention and not config.attention_probs_dropout_prob else "SDPA by sequence"
    return {
        "processes": trainer.world_size,
        "accelerator": accelerator,
        "strategy": type(trainer.strategy).__name__,
        "precision": trainer.precision,
        "attention": f"varlen_attn ({module.flash_attention})" if accelerator == "cuda" else on_cpu,
        "products": products if llvm.products else "torch",
        "compiled": module.compile_blocks,
        "activation_checkpointing": module.encoder.activation_checkpointing,
    }


def described(execution: dict[str, Any]) -> str:
    """The same in one line."""
    where = "{processes} x {accelerator}, {strategy}, {precision}"
    parts = [f"{where}, attention by {{attention}}, products by {{products}}".format(**execution)]
    parts += ["compiled" if execution["compiled"] else "not compiled"]
    parts += ["activations computed again"] if execution["activation_checkpointing"] else []
    return ", ".join(parts)


def final_figures(trainer: pl.Trainer, module: MLMModule, data: MLMDataModule) -> dict[str, Any]:
    """What ``result.json`` holds: where the run ended and its validation beside the baselines."""
    state, planner = data.state_dict(), data.train_planner()
    result: dict[str, Any] = {
        "steps": trainer.global_step,
        "parameters": sum(p.numel() for p in module.parameters()),
        "tokens_seen": state["tokens"],
        "epochs": planner.position(state["cursor"], state["tokens"]).epochs,
        "train_sources": [str(source) for source in data.train],
        "train_sequences": len(data.train_corpus),
        "train_corpus": data.train_corpus.fingerprint,
    }
    if isinstance(order := planner.order, MixtureOrder):
        sizes = [sum(own.sizes) for own in order.orders]
        result["train_epochs"] = (order.drawn(state["cursor"]) / sizes).tolist()
    held = data.baselines() if module.findings else {}  # without, where the trainer was told not to validate
    sets = {name: _validation(name, baselines, module, data) for name, baselines in held.items()}
    if sets:
        first = next(iter(sets))
        result["validation_sources"] = [str(source) for source in data.validation_sets[first]]
        result["validation_sequences"] = len(data.validation_corpora[first])
        result |= {name: value for name, value in sets[first].items() if name.endswith("_perplexity")}
        for name, found in sets.items():
            for prefix in prefixes(name, name == first):
                result |= {f"{prefix}/{figure}": found[figure] for figure in ("loss", "perplexity", "accuracy")}
        if "val/pseudo_perplexity" in trainer.callback_metrics:
            result["val/pseudo_perplexity"] = float(trainer.callback_metrics["val/pseudo_perplexity"])
        result["validation"] = sets
    return result


def _validation(name: str, baselines: Baselines, module: MLMModule, data: MLMDataModule) -> dict[str, Any]:
    """What the last validation found on a set, beside the baselines; an alphabet's tokens one by one."""
    found = module.findings[name]
    figures = found.figures(data.tokenizer.tokens)
    known = {name: value for name, value in baselines._asdict().items() if value is not None}
    perplexities = {**known, "model": figures["perplexity"]}
    return {
        "sources": [str(source) for source in data.validation_sets[name]],
        "sequences": len(data.validation_corpora[name]),
        **figures,
        **{f"{name}_perplexity": value for name, value in known.items()},
        "bits_per_token": {model: math.log2(perplexity) for model, perplexity in perplexities.items()},
    }


def summary(run: Path, result: dict[str, Any]) -> str:
    """The end of a run: perplexity beside the numbers to beat, and what to do next."""
    lines = [f"  {result['steps']:,} steps, {result['tokens_seen']:,} tokens, {result['epochs']:.1f} epochs"]
    for source, epochs in zip(result["train_sources"], result.get("train_epochs", ()), strict=False):
        lines.append(f"    {epochs:.3g} epochs of {source}")
    for name, found in result.get("validation", {}).items():
        model, unigram, bigram = (found[k] for k in ("perplexity", "unigram_perplexity", "bigram_perplexity"))
        bits = found["bits_per_token"]
        lines += [
            "",
            f"  perplexity on the masked validation positions{f' of {name}' * bool(name)} (lower is better), and bits",
            f"    unigram    {unigram:8.3f} {bits['unigram']:8.4f}",
            f"    bigram     {bigram:8.3f} {bits['bigram']:8.4f}",
            f"    this run   {model:8.3f} {bits['model']:8.4f}   "
            f"({model / unigram - 1:+.1%} against unigram, {model / bigram - 1:+.1%} against bigram)",
        ]
        if "blosum62_perplexity" in found:
            told = f"    BLOSUM62   {found['blosum62_perplexity']:8.3f} {bits['blosum62']:8.4f}"
            lines.append(f"{told}   (a guess from the residue that an aligned relative has there)")
    if "val/pseudo_perplexity" in result:
        lines.append(f"  pseudo-perplexity, a sample of these masked one by one: {result['val/pseudo_perplexity']:.3f}")
    longer = f"--allow_change --trainer.max_steps {2 * result['steps']}"
    lines += [
        "",
        f"  look at it    {program('tensorboard')} --logdir {run}",
        f"  continue it   {program('pretrain')} fit -c {run}/config.yaml --run {run} {longer}",
        f"  export it     {program('pretrain')} export {run} --out {run.name}-export",
    ]
    return "\n".join(lines)


def program(name: str) -> str:
    """How to call a program of this environment from here: by name, or by path where it is not on the PATH."""
    path = Path(sys.executable).with_name(name)
    if shutil.which(name) or not path.exists():
        return name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
