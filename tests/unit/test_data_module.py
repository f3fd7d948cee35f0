"""MLMDataModule: from configured sources to the batches of a run, in anyone's Trainer."""

import gzip
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from pretrain.corpus import baselines
from pretrain.corpus.batch import Batch
from pretrain.corpus.command import train_tokenizer_file
from pretrain.corpus.datamodule import MLMDataModule
from pretrain.corpus.order import ORDER_VERSION, Order
from pretrain.corpus.packed import MAX_TOKENS_PER_SEQUENCE
from pretrain.corpus.packing import BatchWarmup
from pretrain.corpus.prepare import Settings, prepare
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizer import ESM_ALPHABET, load_tokenizer
from pretrain.errors import UserError

TEXT = Path(__file__).parents[2] / "data" / "text"
MASK = ESM_ALPHABET.index("<mask>")


def make(train: Path | list[Path], **options: Any) -> MLMDataModule:
    given = {"max_length": 64, "global_batch_tokens": 512, "validation_pack_tokens": 1000, "seed": 7, **options}
    paths = [str(path) for path in train] if isinstance(train, list) else str(train)
    return MLMDataModule(paths, **given)


def attach(
    data: MLMDataModule, *, rank: int = 0, world: int = 1, accumulate: int = 1, steps: int = 4, taken: int = 0
) -> MLMDataModule:
    """As a Trainer would: with all that the data module asks of one."""
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=world,
        accumulate_grad_batches=accumulate,
        max_steps=steps,
        global_step=taken,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    data.prepare_data()
    data.setup("fit")
    return data


def content(batch: Batch) -> list[list[int]]:
    return [tensor.tolist() for tensor in (batch.input_ids, batch.cu_seqlens, batch.target_positions, batch.targets)]


def questions(batches: Iterable[Batch]) -> set[tuple[int, tuple[int, ...]]]:
    """Which sequences the batches show, and how, regardless of how they are packed."""
    shown = set()
    for batch in batches:
        for index, tokens in zip(
            batch.pack.indices.tolist(), batch.input_ids.split(batch.cu_seqlens.diff().tolist()), strict=True
        ):
            shown.add((index, tuple(tokens.tolist())))
    return shown


def assert_batch_is_right(batch: Batch, corpus: Corpus, max_length: int) -> None:
    pack, lengths = batch.pack, batch.cu_seqlens.diff()
    assert (batch.input_ids.dtype, batch.targets.dtype, batch.target_positions.dtype) == (torch.int64,) * 3
    assert batch.cu_seqlens.dtype == torch.int32
    assert (int(batch.cu_seqlens[0]), int(batch.cu_seqlens[-1])) == (0, len(batch.input_ids))
    assert lengths.tolist() == pack.lengths.tolist()
    assert batch.max_seqlen == int(lengths.max()) <= max_length
    restored = batch.input_ids.clone()
    restored[batch.target_positions] = batch.targets
    for row, tokens in enumerate(restored.split(lengths.tolist())):
        whole = corpus.tokens(int(pack.indices[row]))
        assert len(tokens) == min(len(whole), max_length)
        assert tokens.tolist() == whole[pack.starts[row] :][: len(tokens)].tolist()
    special = torch.tensor([corpus.tokenizer.cls_token_id, corpus.tokenizer.eos_token_id])
    assert not torch.isin(batch.targets, special).any()
    assert torch.isin(restored, special).equal(torch.isin(batch.input_ids, special))
    assert (batch.target_positions.diff() > 0).all()


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 2), (1, 8)])
def test_training_batches_show_the_corpus_in_its_order(proteins: Path, world: int, accumulate: int) -> None:
    steps = 30  # well into the second epoch
    ranks = [
        attach(make(proteins), rank=rank, world=world, accumulate=accumulate, steps=steps) for rank in range(world)
    ]
    batches = [list(data.train_dataloader()) for data in ranks]
    assert [len(rank) for rank in batches] == [steps * accumulate] * world
    corpus, cursor = ranks[0].train_corpus, 0
    for step in range(steps):
        window = [batch for rank in batches for batch in rank[step * accumulate : (step + 1) * accumulate]]
        for batch in window:
            assert_batch_is_right(batch, corpus, 64)
        visits = sorted(
            (e, i) for b in window for e, i in zip(b.pack.epochs.tolist(), b.pack.indices.tolist(), strict=True)
        )
        epochs, indices = Order(len(corpus), 7)(np.arange(cursor, cursor + len(visits)))
        assert visits == sorted(zip(epochs.tolist(), indices.tolist(), strict=True))
        assert {batch.pack.step_targets for batch in window} == {sum(len(batch.targets) for batch in window)}
        assert sum(len(batch.input_ids) for batch in window) <= 512
        cursor += len(visits)
    assert cursor > len(corpus)


def test_batches_do_not_depend_on_loader_workers(proteins: Path) -> None:
    alone, helped = (attach(make(proteins, num_workers=workers)) for workers in (0, 2))
    for one, other in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert content(one) == content(other)


def test_targets_are_masked_randomised_and_kept_in_the_shares_configured(proteins: Path) -> None:
    data = attach(
        make(proteins, mlm_probability=0.4, mask_replace_prob=0.5, random_replace_prob=0.0, global_batch_tokens=20_000)
    )
    batch = next(iter(data.train_dataloader()))
    shown = batch.input_ids[batch.target_positions]
    assert abs(len(batch.targets) / len(batch.input_ids) - 0.4) < 0.02
    assert abs((shown == MASK).float().mean() - 0.5) < 0.03
    assert (shown[shown != MASK] == batch.targets[shown != MASK]).all()


def test_several_sources_make_one_corpus(proteins: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.fasta"
    more.write_text(">extra\nMKLAAV\n")
    data = attach(make([proteins, more]))
    assert len(data.train_corpus) == 151
    assert data.train_corpus.id(150) == "extra"


def test_a_prepared_corpus_trains_as_its_sources_do(proteins: Path, tmp_path: Path) -> None:
    corpus = prepare([proteins], tmp_path / "corpus", Settings(load_tokenizer("esm"))).path
    for one, other in zip(*(attach(make(source)).train_dataloader() for source in (proteins, corpus)), strict=True):
        assert content(one) == content(other)


def test_a_batch_moves_with_all_its_tensors(proteins: Path) -> None:
    batch = next(iter(attach(make(proteins)).train_dataloader()))
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert [tensor.device.type for tensor in tensors] == ["meta"] * 4
    assert (moved.max_seqlen, moved.pack) == (batch.max_seqlen, batch.pack)


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_batches_show_every_sequence_once_with_every_target_masked(proteins: Path, world: int) -> None:
    ranks = [attach(make(proteins, validation=str(proteins)), rank=rank, world=world) for rank in range(world)]
    batches = [list(data.val_dataloader()) for data in ranks]
    assert len({len(rank) for rank in batches}) == 1
    everything = list(itertools.chain(*batches))
    for batch in everything:
        assert_batch_is_right(batch, ranks[0].validation_corpus, 64)
        assert (batch.input_ids[batch.target_positions] == MASK).all()
        assert int((batch.input_ids == MASK).sum()) == len(batch.targets)
    assert sorted(index for batch in everything for index in batch.pack.indices.tolist()) == list(range(150))
    tokens, targets = (sum(len(getattr(batch, name)) for batch in everything) for name in ("input_ids", "targets"))
    assert abs(targets / tokens - 0.15) < 0.01


def test_validation_asks_the_same_question_in_every_run(proteins: Path) -> None:
    """Whatever the seed, the masking, the size of a step, the ranks and the size of a validation pack."""
    base = attach(make(proteins, validation=str(proteins)))
    asked = questions(base.val_dataloader())
    assert asked == questions(base.val_dataloader())
    other = {
        "seed": 8,
        "mlm_probability": 0.4,
        "mask_replace_prob": 0.5,
        "mask_draws": "independent",
        "global_batch_tokens": 4096,
        "validation_pack_tokens": 99,
    }
    ranks = [attach(make(proteins, validation=str(proteins), **other), rank=rank, world=2) for rank in range(2)]
    assert asked == questions(batch for data in ranks for batch in data.val_dataloader())


def test_without_a_validation_source_there_is_no_validation(proteins: Path) -> None:
    data = attach(make(proteins))
    assert data.val_dataloader() == []
    assert data.baselines() == {}


def test_baselines_that_count_a_part_of_the_corpus_count_all_sorts_of_its_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half L, half A, sorted: the perplexity of each is 2, not what one half says of the other."""
    monkeypatch.setattr(baselines, "_CHUNK", 8)
    source = tmp_path / "sorted.txt"
    source.write_text(f"{'L' * 40}\n" * 1000 + f"{'A' * 40}\n" * 1000)
    data = attach(make(source, validation=[str(source)]))
    monkeypatch.setattr(baselines, "_SAMPLE_TOKENS", 20_000)
    assert data.baselines()[""].unigram == pytest.approx(2, rel=0.02)


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three documents of the text that ships with the project."""
    path = tmp_path_factory.mktemp("text") / "some.jsonl.gz"
    with gzip.open(TEXT / "validation.jsonl.gz", "rt", encoding="utf-8") as source:
        rows = [json.loads(line) for line in itertools.islice(source, 3)]
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps({**row, "text": row["text"][:20_000]}) + "\n" for row in rows)
    return path


@pytest.mark.parametrize("vocab_size", [261, 400])
def test_text_trains_with_a_byte_level_and_a_bpe_tokenizer(vocab_size: int, documents: Path, tmp_path: Path) -> None:
    train_tokenizer_file([documents], tmp_path / "tokenizer.json", vocab_size)
    options = {"tokenizer": str(tmp_path / "tokenizer.json"), "validation": str(documents)}
    data = attach(make(documents, **options), accumulate=2, steps=3)
    assert data.tokenizer.vocab_size == vocab_size
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        assert_batch_is_right(batch, data.train_corpus, 64)
        assert int(batch.input_ids.max()) < vocab_size
    with gzip.open(documents, "rt", encoding="utf-8") as source:
        texts = [json.loads(line)["text"] for line in source]
    decode = data.tokenizer.backend.decode  # type: ignore[attr-defined]
    for index, text in enumerate(texts):
        assert decode(data.train_corpus.tokens(index)[1:-1].tolist()) == text


def test_the_text_that_ships_with_the_project_is_readable() -> None:
    for name in ("train", "validation"):
        with gzip.open(TEXT / f"{name}.jsonl.gz", "rt", encoding="utf-8") as source:
            assert all(json.loads(line)["text"] for line in source)


# --- where the data stands --------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_position_and_what_identifies_the_order(proteins: Path) -> None:
    data = attach(make(proteins), steps=10)
    batches = list(data.train_dataloader())  # planned to the end, as a loader that prefetches does
    data.trainer.global_step = 3  # type: ignore[union-attr]
    seen = batches[:3]
    assert data.state_dict() == {
        "step": 3,
        "cursor": sum(len(batch.pack.indices) for batch in seen),
        "tokens": sum(len(batch.input_ids) for batch in seen),
        "order_version": ORDER_VERSION,
        "seed": 7,
        "corpus": data.train_corpus.fingerprint,
        "max_length": 64,
        "global_batch_tokens": 512,
        "group_shards": None,
        "batch_warmup": None,
        "proportions": None,
        "clusters": None,
        "skips": 0,
        "tokenizer": data.tokenizer.serialize(),  # so that an export needs nothing but the checkpoint
    }


@pytest.mark.parametrize("taken", [0, 3, 9])
def test_a_run_continues_where_its_checkpoint_stands_on_any_number_of_ranks(proteins: Path, taken: int) -> None:
    whole = attach(make(proteins), steps=10)
    batches = list(whole.train_dataloader())
    whole.trainer.global_step = taken  # type: ignore[union-attr]
    state = json.loads(json.dumps(whole.state_dict()))  # plain values
    ranks = [attach(make(proteins), rank=rank, world=2, accumulate=2, steps=10, taken=taken) for rank in range(2)]
    for data in ranks:
        data.load_state_dict(state)
        assert data.state_dict() == state  # also before the first batch
    rest = [list(data.train_dataloader()) for data in ranks]
    for number, expected in enumerate(batches[taken:]):
        window = [batch for rank in rest for batch in rank[2 * number : 2 * number + 2]]
        assert questions(window) == questions([expected])
        assert {batch.pack.after for batch in window} == {expected.pack.after}


@pytest.mark.parametrize(
    ("field", "theirs"),
    [
        ("order_version", 0),
        ("seed", 8),
        ("corpus", "0123456789abcdef"),
        ("max_length", 128),
        ("global_batch_tokens", 1024),
        ("batch_warmup", [256, 10_000]),
        ("proportions", [7, 3]),
        ("clusters", "0123456789abcdef"),
        ("group_shards", 2),
    ],
)
def test_a_checkpoint_of_another_order_is_refused(proteins: Path, field: str, theirs: object) -> None:
    data = attach(make(proteins))
    ours = data.state_dict()[field]
    with pytest.raises(UserError) as caught:
        data.load_state_dict({**data.state_dict(), field: theirs})
    there, remedy = f"this run has {ours!r}", "restore that setting, or start another run"
    if field == "corpus":
        there, remedy = f"data.train is {ours!r} now", "give the same sequences as data.train, or another --run"
    told = f"the checkpoint was made with {field} {theirs!r}, {{}}: the data would not continue where it stopped; {{}}"
    assert str(caught.value) == told.format(there, remedy)


# --- settings that cannot work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "accumulate", "remedy"),
    [
        (3, 3, "(3 processes x 3 micro-batches) of up to 64 tokens; give at least 576, or at most 8 packs"),
        (1, 9, "(1 processes x 9 micro-batches) of up to 64 tokens; give at least 576, or at most 8 packs"),
    ],
)
def test_a_step_too_small_for_its_packs_is_refused_with_values_that_work(
    proteins: Path, world: int, accumulate: int, remedy: str
) -> None:
    data = attach(make(proteins), world=world, accumulate=accumulate)
    with pytest.raises(UserError) as caught:
        data.train_dataloader()
    assert str(caught.value) == (
        f"data.global_batch_tokens is 512, too small for 9 packs a step {remedy}: fewer processes or a smaller "
        "trainer.accumulate_grad_batches"
    )
    # The values that it names do work, and the next ones do not.
    data.check_packs(2, 4)
    make(proteins, global_batch_tokens=576).check_packs(3, 3)
    with pytest.raises(UserError):
        make(proteins, global_batch_tokens=575).check_packs(3, 3)


def test_a_step_smaller_than_a_sequence_is_refused(proteins: Path) -> None:
    with pytest.raises(UserError) as caught:
        make(proteins, global_batch_tokens=63).check_packs(1, 1)
    assert str(caught.value) == (
        "data.global_batch_tokens is 63, too small for 1 packs a step (1 processes x 1 micro-batches) of up to 64 "
        "tokens; give at least 64"
    )


def test_a_warmup_must_leave_every_pack_a_sequence(proteins: Path) -> None:
    data = make(proteins, batch_warmup=BatchWarmup(first=200, tokens=10_000))
    data.check_packs(1, 3)
    with pytest.raises(UserError) as caught:
        data.check_packs(1, 4)
    assert str(caught.value) == (
        "data.batch_warmup.first is 200, too small for 4 packs a step (1 processes x 4 micro-batches) of up to 64 "
        "tokens; give at least 256, or at most 3 packs: fewer processes or a smaller trainer.accumulate_grad_batches"
    )


def test_a_warmup_that_cannot_be_is_refused(proteins: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.batch_warmup has first 0 and tokens 5; give positive numbers"):
        BatchWarmup(0, 5)
    with pytest.raises(UserError, match=r"^data\.batch_warmup makes small steps, which data\.static_shapes pads"):
        make(proteins, batch_warmup=BatchWarmup(256, 1000), static_shapes=True)
    with pytest.raises(UserError, match=r"^data\.batch_warmup begins with 512 tokens, which is not less than"):
        make(proteins, batch_warmup=BatchWarmup(512, 1000))


@pytest.mark.parametrize("max_length", [2, MAX_TOKENS_PER_SEQUENCE + 1])
def test_a_crop_too_short_or_too_long_is_refused(max_length: int) -> None:
    with pytest.raises(UserError) as caught:
        make(Path("x.fasta"), max_length=max_length)
    assert str(caught.value) == f"data.max_length is {max_length}; give 3 to 262144 tokens"


def test_a_run_without_an_end_is_refused(proteins: Path) -> None:
    data = attach(make(proteins), steps=-1)
    per_step = 512 / min(64, data.train_corpus.num_tokens / 150)
    with pytest.raises(
        UserError, match=r"^MLMDataModule needs Trainer\(max_steps=...\): .* is about \d+ steps$"
    ) as caught:
        data.train_dataloader()
    told = int(str(caught.value).rsplit(" ", 2)[1])
    assert 0.5 < told / (150 / per_step) < 2


def test_a_source_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; give a source file, or a corpus made by `pretrain prepare`"):
        make(tmp_path / "nowhere.fasta").prepare_data()


def test_without_a_trainer_it_says_how_to_use_it(proteins: Path) -> None:
    data = make(proteins)
    data.setup("fit")
    with pytest.raises(RuntimeError, match=r"pass it as Trainer.fit\(module, datamodule\)"):
        data.train_dataloader()


# --- in a Trainer -----------------------------------------------------------------------------------------------------


class Recorder(pl.LightningModule):
    """Knows nothing of the project: a parameter, and a note of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trained: list[list[list[int]]] = []
        self.validated: list[list[list[int]]] = []

    def training_step(self, batch: Batch) -> torch.Tensor:
        self.trained.append(content(batch))
        return self.weight.sum() * batch.max_seqlen

    def validation_step(self, batch: Batch) -> None:
        self.validated.append(content(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_any_trainer_gets_every_planned_batch(proteins: Path) -> None:
    module, data = Recorder(), make(proteins, validation=str(proteins))
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=3,
        accumulate_grad_batches=2,
        val_check_interval=6,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(module, data)
    assert trainer.global_step == 3
    planned = attach(make(proteins, validation=str(proteins)), accumulate=2, steps=3)
    assert module.trained == [content(batch) for batch in planned.train_dataloader()]
    assert module.validated == [content(batch) for batch in planned.val_dataloader()]
    assert data.state_dict()["step"] == 3
