"""An export in the tools that people use: transformers and its Trainer, PEFT, sentence-transformers, ONNX."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

import pretrain
from pretrain.downstream.export import export

PROTEINS = ["MKTAYIAKQRQISFVKSHFSRQ", "LAGV", "ACDEFGHIKLMNPQRSTVWY" * 3]


@pytest.fixture(scope="module")
def run(write_tiny: Callable[..., Path], fit: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("clients")
    config = write_tiny(home, trainer__max_steps=4, model__encoder__initializer_range=0.2)
    assert fit("-c", config, "--run", home / "run") == 0
    return home / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    export(run, run.parent / "exported")
    return run.parent / "exported"


@pytest.fixture(scope="module")
def batch(exported: Path) -> dict[str, Tensor]:
    return dict(AutoTokenizer.from_pretrained(exported)(PROTEINS, padding=True, return_tensors="pt"))


@pytest.fixture(scope="module")
def hidden(run: Path) -> list[Tensor]:
    """What this project computes, residue by residue."""
    return pretrain.load(run).embed(PROTEINS, per="residue")  # type: ignore[return-value]


@torch.no_grad()
def test_automodel_computes_our_hidden_states(exported: Path, batch: dict[str, Tensor], hidden: list[Tensor]) -> None:
    states = AutoModel.from_pretrained(exported).eval()(**batch).last_hidden_state
    for row, ours in zip(states, hidden, strict=True):
        torch.testing.assert_close(row[1 : len(ours) + 1], ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_classifier_starts_from_the_trained_trunk_and_learns(
    kind: type, exported: Path, batch: dict[str, Tensor], hidden: list[Tensor]
) -> None:
    torch.manual_seed(0)
    model = kind.from_pretrained(exported, num_labels=3)
    with torch.no_grad():
        states = model.eval().esm(**batch).last_hidden_state
    torch.testing.assert_close(states[1, 1:5], hidden[1], rtol=0, atol=1e-5)
    by_token = kind is AutoModelForTokenClassification
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"] % 3, -100)
    labels = labels if by_token else torch.tensor([0, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        output = model(**batch, labels=labels)
        assert output.logits.shape == ((3, batch["input_ids"].shape[1], 3) if by_token else (3, 3))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0]


@torch.no_grad()
def test_the_fill_mask_pipeline_gives_our_probabilities(run: Path, exported: Path) -> None:
    model = pretrain.load(run)
    entries = pipeline("fill-mask", str(exported), top_k=33)("MKT<mask>LV")
    input_ids = torch.tensor([0, 20, 15, 11, 32, 4, 7, 2])
    ours = model(input_ids, torch.tensor([0, 8], dtype=torch.int32))[4].softmax(-1)
    assert len(entries) == 33
    for entry in entries:
        assert entry["score"] == pytest.approx(float(ours[entry["token"]]), abs=1e-5)


def test_transformers_trainer_fine_tunes_it_for_three_steps(exported: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    generator = random.Random(0)
    dataset = []
    for _ in range(12):
        label = generator.randrange(2)
        residues = "".join(generator.choices("KR" if label else "DE", k=20))
        dataset.append({**tokenizer(residues), "labels": label})
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(exported, num_labels=2)
    before = model.esm.embeddings.word_embeddings.weight.detach().clone()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        report_to="none", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    assert not torch.equal(model.esm.embeddings.word_embeddings.weight, before)
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.classifier.dense.weight, model.classifier.dense.weight)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_peft_trains_lora_on_it_and_merges(exported: Path, batch: dict[str, Tensor]) -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForMaskedLM.from_pretrained(exported)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"])
    model = peft.get_peft_model(base, config)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 2  # two matrices for two modules of two layers
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-2)
    losses = []
    for _ in range(6):
        output = model(**batch, labels=batch["input_ids"])
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        adapted = model.eval()(**batch).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, adapted, rtol=0, atol=1e-4)


def test_sentence_transformers_gives_our_mean_vectors(text_model: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    words = Transformer(str(text_model), max_seq_length=100)
    pooling = Pooling(words.get_embedding_dimension(), pooling_mode="mean")
    theirs = sentence_transformers.SentenceTransformer(modules=[words, pooling], device="cpu")
    texts = ["The state of the union is strong.", "x"]
    vectors = theirs.encode(texts)
    # sentence-transformers' mean counts <cls> and <eos>, too.
    model = pretrain.load(text_model)
    for text, vector in zip(texts, vectors, strict=True):
        ids = torch.tensor(model.tokenizer.encode(text.encode()).astype(np.int64))
        with torch.no_grad():
            ours = model.hidden_states(ids, torch.tensor([0, len(ids)], dtype=torch.int32)).mean(0)
        np.testing.assert_allclose(vector, ours.numpy(), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's exporter warns of what it uses itself
def test_onnxruntime_gives_the_same_logits_at_any_length(exported: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForMaskedLM.from_pretrained(exported).eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    example = tokenizer(PROTEINS, padding=True, return_tensors="pt")
    inputs = (example.input_ids, example.attention_mask)
    batch_size, length = torch.export.Dim("batch"), torch.export.Dim("length", max=100)
    shapes = {0: batch_size, 1: length}
    program = torch.onnx.export(Logits().eval(), inputs, dynamo=True, dynamic_shapes=(shapes, shapes), verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [entry.name for entry in session.get_inputs()]
    for texts in (PROTEINS, ["MK<mask>LV"], ["ACDEFGHIKLMNPQRSTVWY" * 4, "M<mask>"]):
        other = tokenizer(texts, padding=True, return_tensors="pt")
        given = dict(zip(names, (other.input_ids.numpy(), other.attention_mask.numpy()), strict=True))
        (logits,) = session.run(None, given)
        with torch.no_grad():
            expected = model(**other).logits
        real = other.attention_mask.bool()
        torch.testing.assert_close(torch.from_numpy(logits)[real], expected[real], rtol=0, atol=1e-4)
