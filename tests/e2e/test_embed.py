"""`model.embed` and `pretrain embed`: transformers' hidden states, in any kind of file, whatever interrupts."""

import hashlib
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

import pretrain
from pretrain.cli import main
from pretrain.corpus.readers import read_records
from pretrain.downstream import embed as command
from pretrain.downstream import pretrained_encoder
from pretrain.downstream.embed import EmbedOptions, embed
from pretrain.downstream.pretrained_encoder import PretrainedEncoder
from pretrain.errors import UserError

PROTEINS = ["MKTAYIAKQRQISFVKSHFSRQ", "L", "ACDEFGHIKLMNPQRSTVWY" * 6, "MXBUZO.-K", "MKTAYIAKQRQISFVKSHFSRQ"]
DOCUMENTS = ["The state of the union is strong.", "  Two  spaces, a\ttab and café — naïve?", "日本語 and 🧬 emoji", "x"]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small file makes many parts of many packs."""
    monkeypatch.setattr(command, "PART_TOKENS", {"cpu": 1500})
    monkeypatch.setattr(pretrained_encoder, "PACK_TOKENS", {"cpu": 400})


def one_line_error(arguments: list[object], capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


# In Python


@pytest.mark.parametrize("kind", ["protein", "text"])
def test_embeddings_are_transformers_hidden_states(kind: str, protein_model: Path, text_model: Path) -> None:
    directory, strings = (protein_model, PROTEINS) if kind == "protein" else (text_model, DOCUMENTS)
    model, layers = pretrain.load(directory), [0, 1, 2, 3]
    means = model.embed(strings, layers=layers)
    first = model.embed(strings, pooling="cls", layers=layers)
    residues = model.embed(strings, per="residue", layers=layers)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    theirs = AutoModelForMaskedLM.from_pretrained(directory).eval()
    for i, text in enumerate(strings):
        with torch.no_grad():
            states = theirs(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        hidden = torch.stack(states, dim=2)[0]
        torch.testing.assert_close(residues[i], hidden[1:-1], rtol=0, atol=1e-4)
        torch.testing.assert_close(means[i], hidden[1:-1].mean(0), rtol=0, atol=1e-4)
        torch.testing.assert_close(first[i], hidden[0], rtol=0, atol=1e-4)


def test_an_embedding_does_not_depend_on_the_list_it_is_in(protein_model: Path) -> None:
    model = pretrain.load(protein_model)
    generator = random.Random(1)
    strings = ["".join(generator.choices("LAGVSERTIDPK", k=generator.randint(1, 300))) for _ in range(60)]
    together = model.embed(strings)
    assert together.shape == (60, 16)
    assert together.dtype == torch.float32
    assert not together.requires_grad
    order = generator.sample(range(60), 60)
    torch.testing.assert_close(model.embed([strings[i] for i in order]), together[order], rtol=0, atol=1e-5)
    alone = torch.cat([model.embed([string]) for string in strings])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


def test_shapes_follow_what_is_asked_for(protein_model: Path) -> None:
    model = pretrain.load(protein_model)
    assert model.embed(PROTEINS, layers=[1, -1]).shape == (5, 2, 16)
    assert [part.shape for part in model.embed(PROTEINS[:2], per="residue")] == [(22, 16), (1, 16)]
    assert [part.shape for part in model.embed(PROTEINS[:2], per="residue", layers=[3])] == [(22, 1, 16), (1, 1, 16)]
    assert model.embed([]).shape == (0, 16)
    assert model.embed([], per="residue") == []
    assert torch.equal(model.embed(PROTEINS, layers=-1), model.embed(PROTEINS, layers=3))
    reversed_order = model.embed(PROTEINS, layers=[2, 1])[:, 0]
    torch.testing.assert_close(reversed_order, model.embed(PROTEINS, layers=2), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_cropped_sequence_is_its_first_tokens(protein_model: Path) -> None:
    model = pretrain.load(protein_model)
    (cropped,) = model.embed([PROTEINS[2]], per="residue", max_length=30)
    input_ids = torch.tensor(model.tokenizer.encode(PROTEINS[2].encode())[:30].astype(int))
    expected = model.hidden_states(input_ids, torch.tensor([0, 30], dtype=torch.int32))[1:]
    torch.testing.assert_close(cropped, expected, rtol=0, atol=1e-5)


def test_a_loaded_model_knows_its_tokenizer_and_length_and_is_an_encoder(
    protein_model: Path, tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    model = pretrain.load(protein_model)
    assert isinstance(model, pretrain.Encoder)
    assert (model.tokenizer.name, model.max_length) == ("esm", 100)
    assert fit("-c", tiny(trainer__max_steps=1), "--run", tmp_path / "run") == 0
    model = pretrain.load(tmp_path / "run")
    assert (model.tokenizer.name, model.max_length) == ("esm", 64)
    assert model.embed(["MKT"]).isfinite().all()


def test_a_model_without_a_tokenizer_is_an_encoder_still(protein_model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((protein_model / name).read_bytes())
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"vocab_list"', '"unused"'))
    model = pretrain.load(tmp_path)
    assert model(torch.tensor([0, 20, 2]), torch.tensor([0, 3], dtype=torch.int32)).shape == (3, 33)
    with pytest.raises(UserError, match="has no tokenizer"):
        model.embed(["MKT"])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"sequences": "MKT"}, "list of strings"),
        ({"sequences": ["MKT", "M1T"]}, "sequence 1 has '1' at position 2; allowed"),
        ({"sequences": ["MKT", ""]}, "sequence 1 has nothing that becomes a token"),
        ({"sequences": ["MKT"], "layers": 4}, "layer 4 does not exist; this model has 0 .* to 3"),
        ({"sequences": ["MKT"], "layers": []}, "no layer"),
        ({"sequences": ["MKT"], "layers": [0, -1, 3]}, "layer 3 is named twice"),
        ({"sequences": ["MKT"], "per": "token"}, "give sequence or residue"),
        ({"sequences": ["MKT"], "pooling": "max"}, "give mean or cls"),
        ({"sequences": ["MKT"], "max_length": 2}, "max_length is 2; give at least 3 tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_mistake_is_told_in_one_line(protein_model: Path, call: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        pretrain.load(protein_model).embed(**call)  # type: ignore[arg-type]


# As a command


@pytest.mark.usefixtures("small_parts")
def test_every_format_holds_what_python_gives_in_the_sources_order(
    protein_model: Path, proteins: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    records = list(read_records(proteins))
    strings, names = [record.text.decode() for record in records], [record.id for record in records]
    model = pretrain.load(protein_model)
    means = model.embed(strings, layers=[0, -1]).numpy()
    residues = torch.cat(model.embed(strings, per="residue")).numpy()
    offsets = np.cumsum([0, *map(len, strings)])
    for suffix in ("parquet", "npz", "safetensors"):
        both, every = tmp_path / f"both.{suffix}", tmp_path / f"every.{suffix}"
        assert main(["embed", str(protein_model), str(proteins), "--out", str(both), "--layers", "0", "-1"]) == 0
        assert main(["embed", str(protein_model), str(proteins), "--out", str(every), "--per", "residue"]) == 0
        if suffix == "parquet":
            table = pq.read_table(both).to_pydict()
            found, layers = table["id"], [np.array(table["embedding_0"]), np.array(table["embedding_3"])]
            table = pq.read_table(every).to_pydict()
            rows, bounds = np.concatenate(table["embedding"]), np.cumsum([0, *map(len, table["embedding"])])
        else:
            arrays = np.load(both) if suffix == "npz" else load_file(both)
            found = arrays["ids"].tolist()
            if suffix == "safetensors":
                found = [bytes(row).rstrip(b"\0").decode() for row in arrays["ids"]]
            layers = [arrays["embedding_0"], arrays["embedding_3"]]
            arrays = np.load(every) if suffix == "npz" else load_file(every)
            rows, bounds = arrays["embedding"], arrays["offsets"]
        assert found == names
        np.testing.assert_allclose(np.stack(layers, 1), means, rtol=0, atol=1e-5)
        np.testing.assert_allclose(rows, residues, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(bounds, offsets)
    assert "150 sequences" in capfd.readouterr().out
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {"both", "every"}  # and nothing hidden


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("per", ["sequence", "residue"])
@pytest.mark.parametrize("suffix", ["parquet", "npz", "safetensors"])
def test_interrupted_and_continued_is_the_same_file_byte_for_byte(
    protein_model: Path,
    proteins: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    per: str,
    suffix: str,
) -> None:
    whole, out, options = tmp_path / f"whole.{suffix}", tmp_path / f"out.{suffix}", EmbedOptions(per=per)
    compute, calls = PretrainedEncoder.embed_tokens, list[int]()

    def counted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return compute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(PretrainedEncoder, "embed_tokens", counted)
    stop_at = 0
    embed(protein_model, [str(proteins)], whole, options)
    parts = len(calls)
    assert parts > 5
    calls.clear()
    for stop_at in (3, 6):  # noqa: B007
        assert main(["embed", str(protein_model), str(proteins), "--out", str(out), "--per", per]) == 130
        assert "the same command continues behind it" in capfd.readouterr().err
        assert not out.exists()
    stop_at = 0
    embed(protein_model, [str(proteins)], out, options)
    assert len(calls) == parts + 2  # each part once, and the two that were interrupted
    assert digest(out) == digest(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([out.name, whole.name])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("change", ["sources", "settings", "a damaged part"])
def test_what_changed_since_the_interruption_is_made_anew(
    protein_model: Path, proteins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source, out, whole = tmp_path / "source.fasta", tmp_path / "out.npz", tmp_path / "whole.npz"
    source.write_text(proteins.read_text())
    compute, calls = PretrainedEncoder.embed_tokens, list[int]()

    def interrupted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compute(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(PretrainedEncoder, "embed_tokens", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embed(protein_model, [str(source)], out)
    options = EmbedOptions()
    if change == "sources":
        source.write_text(">new\nMKTAYIAK\n" + proteins.read_text())
    elif change == "settings":
        options = EmbedOptions(pooling="cls")
    else:
        part = tmp_path / ".out.npz.parts" / "part-000001.arrow"
        part.write_bytes(part.read_bytes()[:-100])
    embed(protein_model, [str(source)], out, options)
    embed(protein_model, [str(source)], whole, options)
    assert digest(out) == digest(whole)


@pytest.mark.usefixtures("small_parts")
def test_memory_does_not_grow_with_the_sources(protein_model: Path, tmp_path: Path) -> None:
    """What Python and numpy allocate at most, of which vectors and texts are nearly all."""

    def peak(sequences: int) -> int:
        generator = random.Random(2)
        source = tmp_path / f"{sequences}.txt"
        source.write_text("".join("".join(generator.choices("LAGVSERT", k=50)) + "\n" for _ in range(sequences)))
        tracemalloc.start()
        embed(protein_model, [str(source)], tmp_path / f"{sequences}.npz", EmbedOptions(per="residue"))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(30)  # imports
    few, many = peak(100), peak(1000)
    vectors = 900 * 50 * 16 * 4
    assert many - few < vectors / 4


def test_long_sequences_are_taken_whole_cropped_or_refused(
    protein_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "two.fasta"
    source.write_text(f">short\nMKTAY\n>long\n{PROTEINS[2]}\n")
    model = pretrain.load(protein_model)
    run = ["embed", protein_model, source, "--out"]

    assert main([*map(str, run), str(tmp_path / "whole.npz")]) == 0
    assert "1 longer than 100 tokens: taken whole" in capfd.readouterr().out
    expected = model.embed(["MKTAY", PROTEINS[2]]).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "whole.npz")["embedding"], expected, rtol=0, atol=1e-5)

    assert main([*map(str, run), str(tmp_path / "crop.npz"), "--max_length", "50"]) == 0
    assert "1 longer than 50 tokens: cropped" in capfd.readouterr().out
    expected = model.embed(["MKTAY", PROTEINS[2]], max_length=50).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "crop.npz")["embedding"], expected, rtol=0, atol=1e-5)

    line = one_line_error([*run, tmp_path / "refuse.npz", "--long_sequences", "refuse"], capfd)
    assert f"{source}:3: record 'long' has 122 tokens, more than 100; give --long_sequences crop or whole" in line
    assert not (tmp_path / "refuse.npz").exists()


def test_half_precision_is_rounded_once(protein_model: Path, proteins: Path, tmp_path: Path) -> None:
    for suffix in ("npz", "safetensors", "parquet"):
        embed(protein_model, [str(proteins)], tmp_path / f"half.{suffix}", EmbedOptions(dtype="float16"))
    embed(protein_model, [str(proteins)], tmp_path / "full.npz")
    half = np.load(tmp_path / "half.npz")["embedding"]
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, np.load(tmp_path / "full.npz")["embedding"].astype(np.float16))
    np.testing.assert_array_equal(half, load_file(tmp_path / "half.safetensors")["embedding"])
    table = pq.read_table(tmp_path / "half.parquet")
    np.testing.assert_array_equal(half, np.array(table["embedding"].to_pylist(), np.float16))
    assert table.schema.metadata[b"layers"] == b"[3]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{model}", "{bad}", "--out", "{out}.npz"], "bad.fasta:3: record 'b' has '1' at position 2; allowed"),
        (["{model}", "{stop}", "--out", "{out}.npz"], "stop.fasta:1: record 'a' has nothing that becomes a token"),
        (["{model}", "{good}", "--out", "{out}.h5"], "must end in one of .parquet, .safetensors, .npz"),
        (["{model}", "{good}", "--out", "{good}.npz"], "exists already"),
        (["{model}", "{good}", "--out", "{out}.npz", "--layers", "7"], "layer 7 does not exist"),
        (["{model}", "{bad}", "--out", "{out}.npz", "--layers", "-1", "3"], "layer 3 is named twice"),
        (["{model}", "{good}", "--out", "{out}.npz", "--per", "token"], "give sequence or residue"),
        (["{model}", "{good}", "--out", "{out}.npz", "--per", "residue", "--pooling", "cls"], "nothing is pooled"),
        (["{model}", "{good}", "--out", "{out}.npz", "--long_sequences", "cut"], "give one of whole, crop, refuse"),
        (["{model}", "{good}", "--out", "{out}.npz", "--max_length", "2"], "at least 3 tokens"),
        (["{model}", "{good}", "--out", "{out}.npz", "--device", "tpu"], "give cpu or cuda"),
        (["{model}", "{good}", "--out", "{out}.npz", "--dtype", "int8"], "float32 or float16"),
        (["{model}", "/nowhere.fasta", "--out", "{out}.npz"], "/nowhere.fasta: no such file"),
        (["/nowhere", "{good}", "--out", "{out}.npz"], "/nowhere: not found"),
        (["{model}", "{good}", "--out", "{good}/out.npz"], "good.fasta/out.npz: Not a directory; "),
        (["{model}", "{good}", "--out", f"{'x' * 300}.npz"], "xxx.npz: File name too long; choose a shorter name"),
        (["{model}", "{good}", "--out", f"{{out}}{'x' * 245}.npz"], "xxx.npz: File name too long; choose a shorter"),
        (["{model}", "{named}", "--out", "{out}.npz"], "has 2,400 bytes, .npz keeps 1,000 of each; choose .parquet"),
        (["{model}", "{named}", "--out", "{out}.safetensors"], "2,400 bytes, .safetensors keeps 1,000 of each; choose"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    protein_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    files = {
        "good": ">a\nMKT\n",
        "bad": ">a\nMKT\n>b\nM1K\n",
        "stop": ">a\n*\n",
        "named": f">{'nämé' * 400}\nMKT\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.fasta").write_text(text)
    (tmp_path / "good.fasta.npz").write_text("")
    before = sorted(tmp_path.iterdir())
    places = {name: tmp_path / f"{name}.fasta" for name in files} | {"model": protein_model, "out": tmp_path / "out"}
    assert said in one_line_error(["embed", *(argument.format(**places) for argument in arguments)], capfd)
    assert sorted(tmp_path.iterdir()) == before


def test_what_another_command_left_half_written_is_not_in_the_way(
    protein_model: Path, proteins: Path, tmp_path: Path
) -> None:
    """As a killed `pretrain contacts` leaves it."""
    (tmp_path / ".out.npz.partial").write_bytes(b"half")
    (tmp_path / ".out.npz.lock").write_text("process 1 on another machine")
    assert main(["embed", str(protein_model), str(proteins), "--out", str(tmp_path / "out.npz")]) == 0
    assert not list(tmp_path.glob(".out*"))


def test_long_names_are_kept_in_parquet(protein_model: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "named.fasta", tmp_path / "out.parquet"
    source.write_text(f">{'x' * 20_000}\nMKT\n")
    embed(protein_model, [str(source)], out)
    assert pq.read_table(out)["id"].to_pylist() == ["x" * 20_000]
