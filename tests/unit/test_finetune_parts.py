"""The parts of fine-tuning: heads, low-rank parts, learning rates, targets of packs, metrics."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pretrain.corpus.packing import Pack, Position
from pretrain.downstream.finetune.data import FineTuneDataModule
from pretrain.downstream.finetune.head import SequenceHead, build_head, head_outputs
from pretrain.downstream.finetune.labels import LabelSpec
from pretrain.downstream.finetune.lora import add_lora, merge_lora
from pretrain.downstream.finetune.metrics import Answers, bootstrap, metrics
from pretrain.downstream.finetune.module import FineTuneModule
from pretrain.downstream.finetune.packs import LabelledBatch
from pretrain.downstream.finetune.predict import _columns
from pretrain.downstream.finetune.report import _bars
from pretrain.errors import UserError
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder

CONFIG = EncoderConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)


def batch_of(lengths: list[int], tokens: torch.Tensor | None = None) -> LabelledBatch:
    """Sequences end to end, with one target each, at the place of ``<cls>``."""
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    if tokens is None:
        tokens = torch.randint(4, 24, (int(bounds[-1]),), generator=torch.Generator().manual_seed(0))
    ones = np.ones(len(lengths), np.int64)
    size = np.array(lengths)
    pack = Pack(np.arange(len(lengths)), 0 * ones, 0 * ones, size, size - 2, ones, len(lengths), Position())
    cu_seqlens = torch.from_numpy(bounds.astype(np.int32))
    return LabelledBatch(
        tokens, cu_seqlens, torch.from_numpy(bounds[:-1]), torch.zeros(len(lengths)), int(size.max()), pack
    )


@pytest.mark.parametrize("pooling", ["cls", "mean", "attention"])
def test_packing_is_invisible_to_a_head(pooling: str) -> None:
    torch.manual_seed(0)
    encoder, head = Encoder(CONFIG), SequenceHead(CONFIG, 3, pooling)  # type: ignore[arg-type]
    head.requires_grad_(False)
    lengths = [9, 3, 17, 4]
    packed = batch_of(lengths)
    together = head_outputs(encoder, head, packed)
    alone = [head_outputs(encoder, head, batch_of([len(tokens)], tokens)) for tokens in packed.input_ids.split(lengths)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_mean_and_attention_pooling_are_their_formulas_over_residues() -> None:
    torch.manual_seed(0)
    hidden, bounds = torch.randn(12, 16), torch.tensor([0, 5, 12], dtype=torch.int32)
    for pooling in ("mean", "attention"):
        head = SequenceHead(CONFIG, 3, pooling)  # type: ignore[arg-type]
        expected = []
        for part in (hidden[1:4], hidden[6:11]):  # <cls> and <eos> are no residues
            weight = torch.ones(len(part)) if head.score is None else head.score(part)[:, 0].exp()
            expected.append((weight[:, None] * part).sum(0) / weight.sum())
        outputs = head.out_proj(torch.tanh(head.dense(torch.stack(expected))))
        torch.testing.assert_close(head(hidden, bounds), outputs)


def test_attention_is_over_residues_whatever_the_other_tokens_score() -> None:
    torch.manual_seed(0)
    hidden, bounds = torch.randn(9, 16), torch.tensor([0, 2, 9], dtype=torch.int32)  # the first has no residue
    head = SequenceHead(CONFIG, 3, "attention")
    hidden[2] = 100 * head.score.weight[0] / head.score.weight.square().sum()  # <cls> scores 100
    weight = head.score(hidden[3:8])[:, 0].softmax(0)
    expected = torch.stack([torch.zeros(16), weight @ hidden[3:8]])
    torch.testing.assert_close(head(hidden, bounds), head.out_proj(torch.tanh(head.dense(expected))))


def test_low_rank_parts_begin_as_nothing_are_seen_at_rows_too_and_merge_into_the_same_function() -> None:
    torch.manual_seed(0)
    encoder = Encoder(CONFIG)
    plain = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    batch = batch_of([9, 5])
    given = batch.input_ids, batch.cu_seqlens, 9
    before = encoder.hidden_states(*given)
    add_lora(encoder, rank=2, alpha=6.0)
    assert torch.equal(encoder.hidden_states(*given), before)
    trainable = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert trainable
    assert all(name.rsplit(".", 1)[1] in ("A", "B") for name in trainable)
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    tuned = encoder.hidden_states(*given)
    assert not torch.allclose(tuned, before, atol=1e-2)
    positions = torch.tensor([0, 9])
    torch.testing.assert_close(encoder.hidden_states(*given, positions), tuned[positions])  # the last block's short way
    merged = Encoder(CONFIG)
    merged.load_state_dict(merge_lora(encoder.state_dict(), 6.0 / 2))
    torch.testing.assert_close(merged.hidden_states(*given), tuned)
    weight, block = plain["blocks.1.qkv.weight"], encoder.blocks[1]
    low = block.qkv.parametrizations.weight[0]  # type: ignore[union-attr]
    torch.testing.assert_close(merged.blocks[1].qkv.weight, weight + 3.0 * low.B @ low.A)  # type: ignore[union-attr]


def test_learning_rates_fall_from_block_to_block_and_every_parameter_has_one() -> None:
    module = FineTuneModule(encoder=CONFIG, learning_rate=0.1, layer_decay=0.5)
    module.head = build_head(CONFIG, LabelSpec("multiclass", ("a", "b")), "cls")
    rates = {id(p): group["lr"] for group in module._groups() for p in group["params"]}
    net = module.encoder
    expected = {module.head: 0.1, net.norm: 0.1, net.blocks[1]: 0.1, net.blocks[0]: 0.05, net.embedding: 0.025}
    for part, rate in expected.items():
        assert [rates[id(p)] for p in part.parameters()] == pytest.approx([rate] * len(list(part.parameters())))
    assert len(rates) == sum(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(
    ("task", "labels", "targets", "loss"),
    [
        # Four, one and one of six, where two of each would be balanced; outputs of zero cost log(3) each.
        ("multiclass", ["a", "a", "a", "a", "b", "c"], torch.tensor([0, 2]), math.log(3) * (2 / 4 + 2 / 1)),
        # Two do not have "a" for four that do, five not "b" for one that does; log(2) each, the mean over the classes.
        (
            "multilabel",
            ["a", "a", "a", "a;b", "", ""],
            torch.tensor([[1.0, 1.0], [0.0, 1.0]]),
            math.log(2) * (2 / 4 + 5 / 1 + 1 + 5 / 1) / 2,
        ),
    ],
)
def test_balanced_classes_count_the_same_however_rare_they_are(
    task: Any, labels: list[str], targets: torch.Tensor, loss: float, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text("sequence,label\n" + "".join(f"MKV,{label}\n" for label in labels))
    data = FineTuneDataModule(str(tmp_path / "t.csv"), task=task)
    data.setup("fit")
    module = FineTuneModule(encoder=CONFIG, class_weights="balanced")
    module.prepare(data)
    assert float(module._compare(torch.zeros(2, len(data.spec.classes)), targets)) == pytest.approx(loss)


def test_a_class_that_every_row_has_cannot_be_balanced(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("sequence,label\nMKV,one;two\nMKL,two\n")
    data = FineTuneDataModule(str(tmp_path / "t.csv"), task="multilabel")
    data.setup("fit")
    with pytest.raises(UserError, match="is balanced but all training rows have the class 'two'"):
        FineTuneModule(encoder=CONFIG, class_weights="balanced").prepare(data)


def test_targets_of_residues_are_at_their_places_in_every_crop(tmp_path: Path) -> None:
    """Labels are the residues themselves, so a target must be the token it stands at; unlabelled ones are left out."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(40):
        sequence = "".join(generator.choice(list("ACDE"), generator.integers(1, 40)))
        rows.append(f"{sequence},{sequence.replace('D', '?')}\n")
    (tmp_path / "t.csv").write_text("sequence,label\n" + "".join(rows))
    data = FineTuneDataModule(str(tmp_path / "t.csv"), task="token", mask_label="?", max_length=12)
    data.setup("fit")
    planner = data.train_planner()
    dataset = data.dataset(planner, 0.0)
    start, seen = Position(), 0
    for _ in range(6):
        pack = planner.step(start, 200)
        batch = dataset[pack]
        start = pack.after
        names = [data.tokenizer.tokens[i] for i in batch.input_ids[batch.target_positions].tolist()]
        assert names == [data.spec.classes[i] for i in batch.targets.tolist()]
        labelled = [data.tokenizer.tokens[i] in "ACE" for i in batch.input_ids.tolist()]
        assert pack.step_targets == pack.targets.sum() == len(names) == sum(labelled)
        seen += len(names)
    assert seen > 100


def test_a_sequence_that_is_too_long_shows_its_beginning_and_an_end(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"sequence,label\nMKV{'A' * 30},1\nML,0\n")
    data = FineTuneDataModule(str(tmp_path / "t.csv"), task="binary", max_length=8)
    data.setup("fit")
    batch = data.batches("train")[0]
    tokens = [data.tokenizer.tokens[i] for i in batch.input_ids.tolist()]
    assert "".join(tokens) == "<cls>MKVAAA<eos><cls>ML<eos>"
    assert batch.targets.tolist() == [1, 0]


def answers_of(outputs: torch.Tensor, targets: torch.Tensor, counts: list[int] | None = None) -> Answers:
    sizes = np.array(counts or [1] * len(targets))
    return Answers(np.arange(len(sizes)), sizes, outputs, targets)


def test_metrics_are_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randn(50, generator=generator)
    outputs = labels[:, None] + torch.randn(50, 1, generator=generator)
    spec = LabelSpec("regression", mean=2.0, std=3.0)
    found = metrics(spec, answers_of(outputs, labels * 3 + 2))
    x, y = outputs[:, 0].double().numpy(), labels.double().numpy()
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    assert found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-5)
    assert found["rmse"] == pytest.approx(3 * np.sqrt(np.mean((x - y) ** 2)), rel=1e-5)
    assert found["r2"] == pytest.approx(1 - ((x - y) ** 2).sum() / ((y - y.mean()) ** 2).sum(), abs=1e-5)

    truth = torch.randint(2, (60,), generator=generator)
    logits = F.one_hot(truth, 2) + torch.randn(60, 2, generator=generator)
    found = metrics(LabelSpec("binary", ("no", "yes")), answers_of(logits, truth))
    said, true = logits.argmax(-1).numpy(), truth.numpy()
    assert found["accuracy"] == pytest.approx(np.mean(said == true))
    assert found["mcc"] == pytest.approx(np.corrcoef(said, true)[0, 1], abs=1e-5)
    score = (logits[:, 1] - logits[:, 0]).numpy()
    above = score[true == 1][:, None] > score[true == 0][None]
    assert found["auroc"] == pytest.approx(above.mean(), abs=1e-5)


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("classes", [2, 3])
def test_matthews_correlation_is_scikit_learns_also_where_all_is_one_class(classes: int) -> None:
    from sklearn.metrics import matthews_corrcoef

    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(classes, (60,), generator=generator)
    random = torch.randint(classes, (60,), generator=generator)
    spec = LabelSpec("binary" if classes == 2 else "multiclass", ("a", "b", "c")[:classes])
    ones = torch.ones_like(truth)
    for said, true in ((random, truth), (ones, truth), (0 * ones, truth), (random, ones), (ones, ones), (truth, truth)):
        found = metrics(spec, answers_of(F.one_hot(said, classes).float(), true))["mcc"]
        assert found == pytest.approx(matthews_corrcoef(true, said), abs=1e-6)
    labels = F.one_hot(truth, classes)
    for said in (random, ones):
        logits = 2.0 * F.one_hot(said, classes) - 1
        found = metrics(LabelSpec("multilabel", spec.classes), answers_of(logits, labels.float()))["mcc"]
        assert found == pytest.approx(matthews_corrcoef(labels.flatten(), (logits > 0).flatten()), abs=1e-6)


def test_residues_of_three_classes_have_a_q3() -> None:
    truth = torch.tensor([0, 1, 2, 2])
    logits = F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    assert metrics(LabelSpec("token", ("C", "E", "H")), answers_of(logits, truth, [1, 3]))["q3"] == 0.75


def test_the_bootstrap_draws_whole_sequences_and_its_interval_holds_the_value() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [3] * 40
    truth = torch.randint(3, (40,), generator=generator).repeat_interleave(3)
    wrong = (torch.rand(40, generator=generator) < 0.3).repeat_interleave(3)  # a sequence is right or wrong as a whole
    said = torch.where(wrong, (truth + 1) % 3, truth)
    spec = LabelSpec("token", ("C", "E", "H"))
    answers = answers_of(F.one_hot(said, 3).float(), truth, counts)
    low, high = bootstrap(spec, answers, samples=300)["q3"]
    value = metrics(spec, answers)["q3"]
    assert low < value < high
    # The standard error over 40 sequences, not over 120 residues, which would make it narrower by the root of three.
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(value * (1 - value) / 40), rel=0.25)
    taken = answers.take(np.array([2, 2, 0]))
    places = [6, 7, 8, 6, 7, 8, 0, 1, 2]
    assert torch.equal(taken.targets, truth[places])
    assert torch.equal(taken.outputs, answers.outputs[places])


def test_an_auroc_is_over_the_classes_for_which_it_is_defined() -> None:
    spec, rare = LabelSpec("binary", ("no", "yes")), torch.tensor([1, 0, 0, 0])
    logits = torch.tensor([[0.0, 2.0], [0.0, 1.0], [0.0, 0.0], [0.0, -1.0]])
    assert metrics(spec, answers_of(logits, rare))["auroc"] == 1
    # A third of the samples have no positive: they are left out, rather than taken for the worst.
    assert bootstrap(spec, answers_of(logits, rare), samples=200)["auroc"] == (1, 1)
    only = answers_of(logits, torch.zeros(4, dtype=torch.int64))
    assert np.isnan(metrics(spec, only)["auroc"])
    assert np.isnan(bootstrap(spec, only, samples=20)["auroc"]).all()

    several = LabelSpec("multiclass", ("a", "b", "c"))
    logits, truth = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    found = metrics(several, answers_of(logits, truth))["auroc"]
    shares = logits.softmax(-1).numpy()
    expected = []
    for k in (0, 1):  # there is no c
        score, is_k = shares[:, k], truth.numpy() == k
        expected.append((score[is_k][:, None] > score[~is_k][None]).mean())
    assert found == pytest.approx(np.mean(expected), abs=1e-5)


SPECS = [
    LabelSpec("regression", mean=2.0, std=3.0),
    LabelSpec("binary", ("no", "yes")),
    LabelSpec("multiclass", ("a", "b", "c")),
    LabelSpec("multilabel", ("a", "b", "c")),
    LabelSpec("token", ("C", "E", "H")),
]


def random_answers(spec: LabelSpec, count: int = 30) -> Answers:
    """Answers with ties, right more often than not; two residues a sequence."""
    generator = torch.Generator().manual_seed(0)
    targets, outputs = spec.num_outputs, count * (2 if spec.task == "token" else 1)
    labels = torch.randint(max(2, targets), (outputs,), generator=generator)
    noise = torch.randn(outputs, targets, generator=generator).round(decimals=1)
    if spec.task == "regression":
        return answers_of(labels[:, None] + noise, labels * 3.0 + 2)
    right = F.one_hot(labels, targets)
    truth = right.float() if spec.task == "multilabel" else labels
    return answers_of(right + noise, truth, [outputs // count] * count)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.task)
def test_an_interval_is_of_the_metrics_of_samples_that_are_drawn_one_by_one(spec: LabelSpec) -> None:
    answers, generator = random_answers(spec), np.random.default_rng(0)
    drawn = [metrics(spec, answers.take(generator.integers(30, size=30))) for _ in range(50)]
    for name, interval in bootstrap(spec, answers, samples=50).items():
        expected = np.nanquantile([one[name] for one in drawn], [0.025, 0.975])
        assert interval == pytest.approx(expected, abs=1e-9), name


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.task)
def test_outputs_that_are_not_finite_have_no_figure(spec: LabelSpec, bad: float) -> None:
    answers = random_answers(spec)
    named = metrics(spec, answers).keys()
    for where in (slice(None), 3):  # all outputs, or those of one target
        answers.outputs[where] = bad
        found, intervals = metrics(spec, answers), bootstrap(spec, answers, samples=3)
        assert found.keys() == intervals.keys() == named
        assert np.isnan([*found.values(), *np.ravel(list(intervals.values()))]).all()


def test_a_macro_f1_is_over_the_classes_that_are_there_or_were_predicted() -> None:
    several = LabelSpec("multilabel", tuple(map(str, range(50))))
    truth = (torch.rand(200, 50, generator=torch.Generator().manual_seed(0)) < 0.01).float()
    truth[:, 7] = 0
    perfect = answers_of(2 * truth - 1, truth)
    assert metrics(several, perfect)["f1"] == 1
    assert bootstrap(several, perfect, samples=100)["f1"] == (1, 1)
    claimed = 2 * truth - 1
    claimed[0, 7] = 1
    with_a_false_one = metrics(several, answers_of(claimed, truth))["f1"]
    present = int((claimed > 0).any(0).sum())
    assert with_a_false_one == pytest.approx((present - 1) / present)
    none = answers_of(torch.zeros(3, 2), torch.zeros(3, 2))
    assert np.isnan(metrics(LabelSpec("multilabel", ("a", "b")), none)["f1"])


def test_an_auroc_ranks_what_a_model_is_very_sure_of() -> None:
    outputs = torch.tensor([[0.0, 20.0], [0.0, 30.0], [0.0, 40.0], [0.0, 50.0]])  # of which softmax in float32 makes 1
    answers = answers_of(outputs, torch.tensor([0, 0, 1, 1]))
    assert metrics(LabelSpec("binary", ("a", "b")), answers)["auroc"] == 1


@pytest.mark.parametrize("spec", SPECS[1:4], ids=lambda spec: spec.task)
def test_f1_and_auroc_are_scikit_learns(spec: LabelSpec) -> None:
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

    answers = random_answers(spec)
    outputs = answers.outputs.double()
    scores = outputs.sigmoid() if spec.task == "multilabel" else outputs.softmax(-1)
    said = scores > 0.5 if spec.task == "multilabel" else scores.argmax(-1)
    average = "binary" if spec.task == "binary" else "macro"
    found = metrics(spec, answers)
    assert found["f1"] == pytest.approx(f1_score(answers.targets, said, average=average))
    scores = scores[:, 1] if spec.task == "binary" else scores
    assert found["auroc"] == pytest.approx(roc_auc_score(answers.targets, scores, multi_class="ovr"))
    if spec.task != "multilabel":  # which scikit-learn counts by sequences
        assert found["accuracy"] == pytest.approx(accuracy_score(answers.targets, said))


def test_the_picture_of_several_labels_leaves_out_those_without_an_f1() -> None:
    from matplotlib.figure import Figure

    plot = Figure().subplots()
    labels = np.array([[1, 0, 0], [1, 0, 1]]) > 0
    _bars(plot, LabelSpec("multilabel", ("a", "b", "c")), labels & [True, True, False], labels)
    assert [text.get_text() for text in plot.get_yticklabels()] == ["a (2)", "c (1)"]


def test_predictions_of_several_labels_are_parted_as_the_labels_were(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("sequence,label\nMKV,a|b;c\nML,a\n")
    data = FineTuneDataModule(str(tmp_path / "t.csv"), task="multilabel", label_separator="|")
    data.open()
    spec = LabelSpec.from_plain(data.spec.plain())
    assert spec == data.spec
    assert _columns(spec, ["s"], answers_of(torch.ones(1, 2), torch.zeros(1, 2)))["prediction"] == ["a|b;c"]
