"""The records: questions about recipes, and the runs that answer them."""

from dataclasses import dataclass

SEEDS = (0, 1, 2)

_STEPS = 400
_EPOCH = 593
"""Steps in which the quickstart sees its corpus once."""

_SHORT = ("-c", "quickstart", "--checkpoint.every_n_steps", "1000")
QUICKSTART = (
    *("-c", "quickstart", "--trainer.max_steps", str(_STEPS)),
    *("--validate_every_n_steps", "80", "--checkpoint.every_n_steps", str(_STEPS)),
)
"""The quickstart's model and data, and fewer steps: 107,000 parameters, 1.6 M tokens, two thirds of an epoch."""

Options = tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """One question.

    Attributes:
        name: Its file name.
        title: What is compared.
        arms: What is tried, by name: options of `pretrain fit` beyond ``common``. Differences are to the first.
        common: Options of all arms.
        said: What else there is to say of the result.
        seeds: Each arm is run with each.
        alone: Times are told, so it is run only when it is named, with nothing beside it.
        fitted: A law is fitted to its arms; see `scaling.py`.
    """

    name: str
    title: str
    arms: dict[str, Options]
    common: Options = QUICKSTART
    said: str = ""
    seeds: tuple[int, ...] = SEEDS
    alone: bool = False
    fitted: bool = False

    def __hash__(self) -> int:
        return hash(self.name)


def _schedule(name: str, **settings: object) -> Options:
    return ("--model.schedule", name, *(f"--model.schedule.{key}={value}" for key, value in settings.items()))


def _size(width: int, layers: int, rate: float) -> Options:
    heads = max(2, width // 32)
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    options = (part for name, value in shape.items() for part in (f"--model.encoder.{name}", str(value)))
    return (*options, "--model.learning_rate", str(rate))


RECORDS = (
    Record(
        "schedules",
        "What the learning rate does after the warmup",
        {
            "inverse square root": (),
            "linear to 10 %": _schedule("LinearDecay"),
            "cosine": _schedule("CosineDecay"),
            "WSD, 1 − √": _schedule("WarmupStableDecay"),
            "constant": _schedule("Constant"),
        },
    ),
    Record(
        "interval",
        "A schedule stepped at every optimizer step, and once an epoch as is Lightning's default",
        {"every step": (), "every epoch": _schedule("interval.EveryEpoch", warmup_steps=50, steps_in_epoch=_EPOCH)},
    ),
    Record("optimizer", "AdamW and Muon", {"AdamW": (), "Muon": ("--model.optimizer", "muon")}),
    Record(
        "masking",
        "How much is masked, and how it is drawn",
        {
            "30 %, a fixed count": (),
            "15 %, a fixed count": ("--data.mlm_probability", "0.15"),
            "30 %, independent draws": ("--data.mask_draws", "independent"),
        },
    ),
    Record(
        "crops",
        "What is shown of sequences longer than 256 tokens",
        {
            "a random window, another in each epoch": (),
            "always their beginning": ("--data.train", "runs/records/truncated.fasta"),
        },
    ),
    Record(
        "token_dropout",
        "ESM's token dropout: masked embeddings zeroed, the others scaled",
        {"on": (), "off": ("--model.encoder.token_dropout", "false")},
    ),
    Record(
        "batch_warmup",
        "Large steps (8,192 tokens) from the beginning, or growing to that from 1,024 over half of the run's tokens",
        {
            "8,192 tokens": ("--trainer.max_steps", "198", "--validate_every_n_steps", "22"),
            "1,024 to 8,192 tokens": (
                *("--data.batch_warmup.first", "1024", "--data.batch_warmup.tokens", "800000"),
                *("--trainer.max_steps", "342", "--validate_every_n_steps", "38"),
            ),
        },
        common=(*_SHORT, "--data.global_batch_tokens", "8192"),
    ),
    Record(
        "text",
        "English: the quickstart's masking, and BERT's",
        {
            "30 %, all <mask>": (),
            "15 %, 80/10/10": (
                *("--data.mlm_probability", "0.15"),
                *("--data.mask_replace_prob", "0.8", "--data.random_replace_prob", "0.1"),
            ),
        },
        common=("-c", "text_quickstart", "--trainer.max_steps", "900", "--validate_every_n_steps", "150"),
    ),
    Record(
        "sizes",
        "Larger models on the proteins of the quickstart",
        {
            "32 x 2": _size(32, 2, 4e-3),
            "64 x 2": _size(64, 2, 3e-3),
            "96 x 3": _size(96, 3, 2e-3),
            "128 x 4": _size(128, 4, 2e-3),
        },
        common=(*_SHORT, "--validate_every_n_steps", "60", "--trainer.max_steps", "480"),
        said="Width x layers; a single seed. 28,000 or 814,000 parameters: two million tokens leave all of them on the "
        "plateau just below the bigram, so nothing of this predicts what a protein model of a useful size learns.",
        seeds=(0,),
    ),
    Record(
        "ladder",
        "Larger models and more tokens, of English",
        {
            "64 x 2": _size(64, 2, 3e-3),
            "128 x 2": _size(128, 2, 2e-3),
            "192 x 3": _size(192, 3, 1.5e-3),
            "256 x 4": _size(256, 4, 1e-3),
        },
        common=(
            *("-c", "text_quickstart", "--checkpoint.every_n_steps", "1500"),
            *("--validate_every_n_steps", "150", "--trainer.max_steps", "1500"),
        ),
        said="Width x layers, the largest of BERT-mini's shape; a single seed. The inverse square root does not know "
        "where a run ends, so each point of a curve is also the end of a shorter run. In three million tokens the "
        "largest rung gets no further than the one before it: these runs tell how loss falls with tokens, and little "
        "of how it falls with parameters.",
        seeds=(0,),
        fitted=True,
    ),
    Record(
        "transformers",
        "The same loss for the same tokens as transformers' Trainer",
        {
            who: ("records_rival.py", "--who", who, "--steps", "300", "--every", "30")
            for who in ("transformers", "pretrain")
        },
        common=(),
        said="Padded there, packed here. Two layers of 64, 0.1 M parameters, sequences of up to 256 tokens: much of a "
        "step is not arithmetic.",
        alone=True,
    ),
    Record(
        "transformers_larger",
        "The same loss for the same tokens as transformers' Trainer: a larger model, proteins of all lengths",
        {
            who: (
                *("records_rival.py", "--who", who, "--shape", "128x4", "--max_length", "1024"),
                *("--steps", "120", "--every", "12"),
            )
            for who in ("transformers", "pretrain")
        },
        common=(),
        said="Padded there, packed here. Four layers of 128, 0.8 M parameters.",
        alone=True,
    ),
)
