"""Dividing the encoder changes where its parameters are, not what it computes: here in a group of one process."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_leaves

from pretrain import Encoder, EncoderConfig
from pretrain.errors import UserError
from pretrain.train.divided import OwnRows
from pretrain.train.sharding import own_rows, shard

CONFIG = EncoderConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    store = tmp_path_factory.mktemp("group") / "store"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    dist.destroy_process_group()


def train(encoder: Encoder, precision: str) -> list[float]:
    """Losses and gradient norms of two steps of two micro-batches, and a validation between them."""
    generator = torch.Generator().manual_seed(0)
    packs = [torch.randint(4, 24, (40,), generator=generator) for _ in range(4)]
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2, fused=True)
    figures: list[torch.Tensor] = []

    def loss(input_ids: torch.Tensor) -> torch.Tensor:
        places = torch.tensor([3, 18, 30])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False):
            value = encoder.loss(input_ids, torch.tensor([0, 20, 40]).int(), 20, places, input_ids[places])
        figures.append(value.detach())
        return value

    for first in (0, 2):
        for pack in packs[first : first + 2]:
            loss(pack).backward()
        norm = get_total_norm([p.grad for p in encoder.parameters() if p.grad is not None])
        figures.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            loss(packs[0])
    return [float(figure) for figure in figures]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_divided_encoder_computes_the_same_bits(mesh: DeviceMesh, precision: str, checkpointing: bool) -> None:
    plain, divided = pair(checkpointing)
    for _ in range(2):  # Lightning may ask repeatedly
        shard(divided, mesh, precision)
    assert train(divided, precision) == train(plain, precision)
    assert {name for name, tensor in divided.state_dict().items() if not isinstance(tensor, DTensor)} == {"inv_freq"}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler looks there
def test_compiled_blocks_can_be_divided(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the compiler cannot see through its checks
    plain, divided = pair(checkpointing=True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in divided.blocks:
        block.compile(backend=counter, dynamic=False)
    shard(divided, mesh, "32-true")
    assert train(divided, "32-true") == pytest.approx(train(plain, "32-true"), rel=1e-5)
    assert counter.frame_count > 0


def pair(checkpointing: bool) -> tuple[Encoder, Encoder]:
    torch.manual_seed(0)
    encoder = Encoder(CONFIG)
    encoder.activation_checkpointing = checkpointing
    return encoder, copy.deepcopy(encoder)


def test_under_bf16_the_matrices_are_gathered_as_bfloat16_and_what_is_sensitive_as_float32(mesh: DeviceMesh) -> None:
    encoder = Encoder(CONFIG)
    shard(encoder, mesh, "bf16-mixed")
    seen: dict[str, set[torch.dtype]] = {"matrix": set(), "norm": set(), "input": set(), "rotation": set()}

    def look(block: torch.nn.Module, inputs: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]) -> None:
        seen["matrix"].add(block.qkv.weight.dtype)
        seen["input"].add(inputs[0].dtype)
        seen["rotation"].add(inputs[1][0].dtype)

    for block in encoder.blocks:
        block.register_forward_pre_hook(look)
        block.ffn_norm.register_forward_pre_hook(lambda norm, _: seen["norm"].add(norm.weight.dtype))
    train(encoder, "bf16-mixed")
    assert seen.pop("matrix") == {torch.bfloat16}
    assert set.union(*seen.values()) == {torch.float32}
    assert {tensor.dtype for tensor in encoder.state_dict().values()} == {torch.float32}, "the master weights"


def test_tensor_parallelism_is_refused() -> None:
    mesh = {"data_parallel": None, "tensor_parallel": SimpleNamespace(size=lambda: 2)}
    with pytest.raises(UserError, match=r"tensor_parallel_size is 2.*FullyShardedStrategy"):
        shard(Encoder(CONFIG), mesh, "32-true")


def test_what_is_saved_is_a_copy_that_later_steps_do_not_change(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    encoder = Encoder(CONFIG)
    shard(encoder, mesh, "32-true")
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)

    def step() -> None:
        encoder(torch.arange(4, 24), torch.tensor([0, 20]).int()).sum().backward()
        optimizer.step()

    step()
    live = {"weights": encoder.state_dict(), "optimizer": optimizer.state_dict()}

    def take() -> list[torch.Tensor]:
        leaves = [leaf.rows if isinstance(leaf, OwnRows) else leaf for leaf in tree_leaves(own_rows(live))]
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    taken = take()
    before = [tensor.clone() for tensor in taken]
    step()
    tensors = list(zip(before, taken, take(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in tensors)
    assert sum(not torch.equal(b, c) for _, b, c in tensors) > 0.9 * len(tensors)
