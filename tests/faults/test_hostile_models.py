"""Loading never executes code, nor asks for more memory than a file is large, whatever the file claims.

Each attack is planted for every command that would read it, which must refuse it in one line, with exit code 2. To show
that the attacks are real, those that run code do so where a careless reader loads them.
"""

import io
import json
import multiprocessing
import os
import pickle
import resource
import struct
import sys
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain
from pretrain.cli import main
from pretrain.downstream.export import export
from pretrain.errors import UserError
from pretrain.train.checkpoint import AtomicCheckpointIO

PROCESSES = multiprocessing.get_context("forkserver")
MEMORY = 200 * 2**20  # what a refusal may take at most; each bomb asks for gigabytes


class Evil:
    """Creates a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


class Call:
    """Is a call with arguments, once unpickled."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


# Checkpoints: content of a sound one, where to write, and what must not come into being.


def pickled_by_torch(content: dict[str, Any], path: Path, trap: Path) -> None:
    torch.save({**content, "extra": Evil(trap)}, path)


def pickled_in_the_old_format(content: dict[str, Any], path: Path, trap: Path) -> None:
    torch.save({**content, "extra": Evil(trap)}, path, _use_new_zipfile_serialization=False)


def pickled_plainly(content: dict[str, Any], path: Path, trap: Path) -> None:
    path.write_bytes(pickle.dumps({**content, "extra": Evil(trap)}))


def sealed_with_a_pickle(content: dict[str, Any], path: Path, trap: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({**content, "extra": Evil(trap)}, path)


def instantiator(content: dict[str, Any], path: Path, trap: Path) -> None:
    names = {"_instantiator": "os.mkdir", "_class_path": "os.mkdir", "path": str(trap)}
    AtomicCheckpointIO().save_checkpoint(
        {**content, "hyper_parameters": {**content["hyper_parameters"], **names}}, path
    )


def target(content: dict[str, Any], path: Path, trap: Path) -> None:
    encoder = {**content["hyper_parameters"]["encoder"], "_target_": "os.mkdir", "path": str(trap)}
    AtomicCheckpointIO().save_checkpoint({**content, "hyper_parameters": {"encoder": encoder}}, path)


def class_path(content: dict[str, Any], path: Path, trap: Path) -> None:
    encoder = {"class_path": "os.mkdir", "init_args": {"path": str(trap)}}
    AtomicCheckpointIO().save_checkpoint({**content, "hyper_parameters": {"encoder": encoder}}, path)


def zip_bomb(content: dict[str, Any], path: Path, trap: Path) -> None:
    """A gigabyte of zeros, deflated to a megabyte."""
    torch.save({**content, "extra": torch.zeros(8)}, whole := io.BytesIO())
    with zipfile.ZipFile(whole) as sound, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:
        for entry in sound.infolist():
            with bomb.open(entry.filename, "w") as file:
                file.write(sound.read(entry))
                for _ in range(32 if entry.filename.endswith("data.pkl") else 0):
                    file.write(bytes(2**25))


def overlapping_zip_bomb(content: dict[str, Any], path: Path, trap: Path) -> None:
    """Entries that share one stretch of the file, as Fifield's bomb has (USENIX WOOT 2019)."""
    torch.save({**content, "extra": torch.zeros(2**18)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        large = max(archive.infolist(), key=lambda entry: entry.file_size)
        for number in range(3000):
            copy = zipfile.ZipInfo(f"{large.filename}{number}")
            copy.file_size = copy.compress_size = large.file_size
            copy.CRC, copy.header_offset = large.CRC, large.header_offset
            archive.filelist.append(copy)
        archive._didModify = True


def repeated_number(content: dict[str, Any], path: Path, trap: Path) -> None:
    """One number as a tensor of four tera-elements; every name and shape is right for the claimed encoder."""
    encoder = {**content["hyper_parameters"]["encoder"], "vocab_size": 2**40}
    width = encoder["hidden_size"]
    state = dict(content["state_dict"])
    state["encoder.embedding.weight"] = torch.zeros(1).expand(2**40, width)
    torch.save({**content, "state_dict": state, "hyper_parameters": {"encoder": encoder}}, path)


def giant_encoder(content: dict[str, Any], path: Path, trap: Path) -> None:
    encoder = {**content["hyper_parameters"]["encoder"], "hidden_size": 2**16, "intermediate_size": None}
    AtomicCheckpointIO().save_checkpoint({**content, "hyper_parameters": {"encoder": encoder}}, path)


def endless_encoder(content: dict[str, Any], path: Path, trap: Path) -> None:
    encoder = {**content["hyper_parameters"]["encoder"], "num_hidden_layers": 2**40}
    AtomicCheckpointIO().save_checkpoint({**content, "hyper_parameters": {"encoder": encoder}}, path)


def reserved_bytes(content: dict[str, Any], path: Path, trap: Path) -> None:
    torch.save({**content, "state_dict": [Call(bytearray, 2**36)]}, path)


def lying_storage(content: dict[str, Any], path: Path, trap: Path) -> None:
    """A tensor whose pickle claims more numbers than its record holds: memory beyond it would be shown."""
    torch.save({**content, "extra": torch.zeros(1_234_567, dtype=torch.uint8)}, whole := io.BytesIO())
    with zipfile.ZipFile(whole) as sound, zipfile.ZipFile(path, "w") as lie:
        for entry in sound.infolist():
            data = sound.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert data.count(struct.pack("<i", 1_234_567)) == 2
                data = data.replace(struct.pack("<i", 1_234_567), struct.pack("<i", 2**31 - 1))
            lie.writestr(entry.filename, data[:1000] if len(data) == 1_234_567 else data)


CHECKPOINTS = [
    pickled_by_torch,
    pickled_in_the_old_format,
    pickled_plainly,
    sealed_with_a_pickle,
    instantiator,
    target,
    class_path,
    zip_bomb,
    overlapping_zip_bomb,
    repeated_number,
    giant_encoder,
    endless_encoder,
    reserved_bytes,
    lying_storage,
]


# Transformers directories: the sound one, changed in place.


def header_beyond_any_file(model: Path, trap: Path) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")


def header_of_a_gigabyte(model: Path, trap: Path) -> None:
    with (model / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**30 + 8)


def tensor_beyond_the_file(model: Path, trap: Path) -> None:
    entry = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    header = json.dumps({"esm.embeddings.word_embeddings.weight": entry}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


def shape_that_overflows(model: Path, trap: Path) -> None:
    entry = {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}
    header = json.dumps({"esm.embeddings.word_embeddings.weight": entry}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def pickle_in_place_of_safetensors(model: Path, trap: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"weight": Evil(trap)}, model / "pytorch_model.bin")


def pickle_named_safetensors(model: Path, trap: Path) -> None:
    torch.save({"weight": Evil(trap)}, model / "model.safetensors")


def index_that_points_to_a_pickle(model: Path, trap: Path) -> None:
    pickle_in_place_of_safetensors(model, trap)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": "pytorch_model.bin"}}))


def index_that_points_elsewhere(model: Path, trap: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "elsewhere.safetensors")
    index = {"weight_map": {"weight": "../elsewhere.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def nested_config(model: Path, trap: Path) -> None:
    (model / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def changed_config(**changes: object) -> Callable[[Path, Path], None]:
    def change(model: Path, trap: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    return change


MODELS = {
    plant.__name__: plant
    for plant in (
        header_beyond_any_file,
        header_of_a_gigabyte,
        tensor_beyond_the_file,
        shape_that_overflows,
        pickle_in_place_of_safetensors,
        pickle_named_safetensors,
        index_that_points_to_a_pickle,
        index_that_points_elsewhere,
        nested_config,
    )
} | {
    "wide_config": changed_config(hidden_size=2**16, intermediate_size=2**18),
    "deep_config": changed_config(num_hidden_layers=2**40),
    "worded_config": changed_config(hidden_size="os.mkdir"),
}


def act(arguments: list[str], report: str) -> None:
    with Path(report).with_suffix(".err").open("w") as errors:
        os.dup2(errors.fileno(), 2)
        sys.stderr = errors
        resource.setrlimit(resource.RLIMIT_AS, (32 * 2**30, 32 * 2**30))  # for the machine's sake
        Path("/proc/self/clear_refs").write_text("5")
        before = resident()
        try:
            code = load(arguments[1]) if arguments[0] == "load" else main(arguments)
        except Exception:
            code = 1
            traceback.print_exc()
        grown = resident("VmHWM") - before
        Path(report).write_text(json.dumps({"code": code, "grown": grown}))
        errors.flush()
        os._exit(0)


def load(path: str) -> int:
    try:
        pretrain.load(path)
    except UserError as error:
        print(f"pretrain: error: {error}", file=sys.stderr)
        return 2
    return 0


def resident(field: str = "VmRSS") -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def refusal(tmp_path: Path, *arguments: object) -> str:
    """The one line that a command says when it refuses, in a process of its own whose memory is watched."""
    report = tmp_path / "report.json"
    report.unlink(missing_ok=True)
    process = PROCESSES.Process(target=act, args=([str(argument) for argument in arguments], str(report)))
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{arguments} hangs")
    said = report.with_suffix(".err").read_text()
    assert report.exists(), said
    outcome = json.loads(report.read_text())
    assert outcome["code"] == 2, said
    assert outcome["grown"] < MEMORY, f"grew by {outcome['grown'] >> 20} MiB"
    (line,) = said.strip().splitlines()
    assert line.startswith("pretrain: error: ")
    return line


@pytest.fixture(scope="module")
def sound(
    write_tiny: Callable[..., Path], fit: Callable[..., int], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run of four steps and its export."""
    directory = tmp_path_factory.mktemp("sound")
    config = write_tiny(directory, trainer__max_steps=4)
    assert fit("-c", config, "--run", directory / "run") == 0
    export(directory / "run", directory / "export")
    return directory / "run", directory / "export"


@pytest.mark.parametrize("plant", CHECKPOINTS, ids=lambda plant: plant.__name__)
def test_a_hostile_checkpoint_is_refused_by_whatever_reads_it(
    plant: Callable[..., None], sound: tuple[Path, Path], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    content = torch.load(sound[0] / "checkpoints" / "last.ckpt", weights_only=True)
    run, trap = tmp_path / "run", tmp_path / "trap"
    planted = run / "checkpoints" / "step-000000004.ckpt"
    planted.parent.mkdir(parents=True)
    (run / "config.yaml").write_bytes((sound[0] / "config.yaml").read_bytes())
    plant(content, planted, trap)
    refusal(tmp_path, "export", run, "--out", tmp_path / "out")
    refusal(tmp_path, "fit", "-c", tiny(trainer__max_steps=6), "--run", run, "--allow_change", "true")
    with pytest.raises(UserError):
        pretrain.load(planted)
    assert not trap.exists()
    assert not (tmp_path / "out").exists()
    if plant.__name__.startswith("pickled"):  # the attack works where somebody is careless
        torch.load(planted, weights_only=False) if plant is not pickled_plainly else pickle.loads(planted.read_bytes())
        assert trap.exists()


@pytest.mark.parametrize("plant", MODELS.values(), ids=MODELS)
def test_a_hostile_model_directory_is_refused_by_whatever_reads_it(
    plant: Callable[..., None], sound: tuple[Path, Path], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model, trap = tmp_path / "model", tmp_path / "trap"
    model.mkdir()
    for file in sound[1].iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    plant(model, trap)
    refusal(tmp_path, "load", model)
    refusal(tmp_path, "import", model, "--out", tmp_path / "out")
    refusal(tmp_path, "fit", "-c", tiny(model__initialize_from=str(model)), "--run", tmp_path / "run")
    assert not trap.exists()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "run").exists()
