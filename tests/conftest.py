"""Shared fixtures: a small protein file, a tiny config, and `fit` in a process of its own that may be killed."""

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import settings
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from pretrain.corpus.tokenizer import Tokenizer

pytest_plugins = ("labelled", "exported")  # fixtures of fine-tuning, and of what becomes of a run

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tests run side by side on few cores

# The same examples in every run, and no limit on time: a slow machine breaks no property.
settings.register_profile("pretrain", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("pretrain")

install_import_hook("pretrain.model", "beartype.beartype")  # the shapes in the signatures are checked

_PROCESSES = multiprocessing.get_context("forkserver")
# Imports once what every run imports; each is then a quick fork.
_PROCESSES.set_forkserver_preload(["pretrain.train.fit", "pandas", "torch.utils.tensorboard"])


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """An S3 endpoint on the loopback, as fsspec's file system; each test makes a bucket of its own."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield fsspec.filesystem("s3", skip_instance_cache=True)
    server.stop()


@pytest.fixture(scope="session")
def proteins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FASTA file of 150 sequences, 5 to 180 residues long."""
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("proteins") / "proteins.fasta"
    with path.open("w") as file:
        for number in range(150):
            residues = "".join(generator.choices("LAGVSERTIDPKQNFYMHWC", k=generator.randint(5, 180)))
            file.write(f">sequence{number}\n{residues}\n")
    return path


@pytest.fixture(scope="session")
def protein_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers directory of a random encoder of proteins, with sharp enough weights for differences to show."""
    from pretrain.corpus.tokenizer import ProteinTokenizer

    return _write_model(tmp_path_factory.mktemp("protein_model"), ProteinTokenizer())


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of text, with a byte-level BPE tokenizer."""
    from pretrain.corpus.tokenizer import train_tokenizer

    documents = ["The state of the union is strong.", "Two  spaces, a\ttab and café — naïve?"] * 3
    return _write_model(tmp_path_factory.mktemp("text_model"), train_tokenizer(documents, 300))


def _write_model(directory: Path, tokenizer: "Tokenizer") -> Path:
    import torch

    from pretrain import Encoder, EncoderConfig
    from pretrain.downstream.export import write_model
    from pretrain.downstream.tokenizer_files import write_tokenizer

    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "initializer_range": 0.2}
    ids = {name: getattr(tokenizer, name) for name in ("vocab_size", "pad_token_id", "mask_token_id")}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoder = Encoder(EncoderConfig(**shape, **ids))
    write_model(encoder, tokenizer, 100, directory)
    write_tokenizer(tokenizer, 100, directory)
    return directory


@pytest.fixture
def tiny(write_tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes a config of a tiny run; keyword arguments override, with ``__`` for the dots."""
    return partial(write_tiny, tmp_path)


@pytest.fixture(scope="session")
def write_tiny(proteins: Path) -> Callable[..., Path]:
    """As `tiny`, into a given directory."""

    def write(directory: Path, **overrides: object) -> Path:
        config: dict[str, object] = {
            "seed_everything": 7,
            "model": {
                "encoder": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
                "learning_rate": 1e-2,
                "warmup_steps": 3,
            },
            "data": {
                "train": str(proteins),
                "validation": str(proteins),
                "max_length": 64,
                "global_batch_tokens": 512,
                "validation_pack_tokens": 4096,
            },
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 10,
                "accumulate_grad_batches": 2,
                "gradient_clip_val": 1.0,
                "enable_progress_bar": False,
            },
            "validate_every_n_steps": 4,
            "checkpoint": {"every_n_steps": 3},
        }
        for name, value in overrides.items():
            *parents, last = name.split("__")
            place = config
            for parent in parents:
                place = place.setdefault(parent, {})  # type: ignore[assignment]
            place[last] = value
        path = directory / "tiny.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


def _run(arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # how loader workers start, where nobody says otherwise
    sys.path.insert(0, str(Path(__file__).parent / "e2e"))  # callbacks that configs name
    from pretrain.cli import main

    raise SystemExit(main(arguments))


@pytest.fixture(scope="session")
def fit() -> Callable[..., int]:
    """``pretrain fit`` (or another ``command``) in a process of its own; returns its exit code, -9 if it was killed.

    With ``processes``, in several, as torchrun starts them; they talk over the loopback only. When one is killed, the
    others are, too, as a launcher does it.
    """

    def run(*arguments: object, processes: int = 1, command: str = "fit") -> int:
        environments = [{"PRETRAIN_CACHE": os.environ["PRETRAIN_CACHE"]} for _ in range(processes)]
        if processes > 1:
            group = torchrun_environment(processes)
            environments = [{**e, **group, "RANK": str(i), "LOCAL_RANK": str(i)} for i, e in enumerate(environments)]
        given = [command, *(str(argument) for argument in arguments)]
        started = [_PROCESSES.Process(target=_run, args=(given, environment)) for environment in environments]
        for process in started:
            process.start()
        end = time.monotonic() + 120
        while alive := [process for process in started if process.is_alive()]:
            late = not wait([process.sentinel for process in alive], max(0.0, end - time.monotonic()))
            if late or any(process.exitcode == -signal.SIGKILL for process in started):
                for process in alive:
                    process.kill()
                    process.join()
            assert not late, f"fit {arguments} did not end within 120 s"
        codes = {process.exitcode for process in started}
        if -signal.SIGKILL in codes:  # another may have noticed, and ended by itself
            return -signal.SIGKILL
        assert len(codes) == 1, f"fit {arguments} ended with {codes}"
        return codes.pop()  # type: ignore[return-value]

    return run


def torchrun_environment(processes: int) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }
