"""`Encoder` against transformers' ``EsmForMaskedLM`` with the same weights: the same function, however it is packed."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import EsmConfig, EsmForMaskedLM

from pretrain.corpus.batch import PackDataset
from pretrain.corpus.datamodule import MLMDataModule
from pretrain.corpus.order import Order
from pretrain.corpus.packing import Planner, Position
from pretrain.corpus.tokenizer import ProteinTokenizer
from pretrain.downstream.pretrained_encoder import PretrainedEncoder
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.model.hf import from_hf, to_hf, to_hf_config
from pretrain.model.rotary import rotate
from pretrain.train.optim import build_optimizer

TOLERANCE = 1e-5
PAD, MASK = 1, 32
SHAPES = {"heads of 2": (8, 4), "heads of 16": (48, 3), "heads of 64": (128, 2), "one head": (32, 1)}
"""Width and number of heads."""
LENGTHS = (1, 2, 3, 31, 255, 256, 257, 400)
"""Around 256 the CPU backend changes its kernel."""


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal to 1e-5 of the largest value."""
    assert ours.shape == theirs.shape
    difference, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    assert difference <= TOLERANCE * max(1.0, scale), f"differ by {difference} at a scale of {scale}"


def pair(
    token_dropout: bool = True, shape: str = "heads of 16", layers: int = 3, seed: int = 0
) -> tuple[Encoder, EsmForMaskedLM]:
    """Both implementations with the same weights, all of them random and large: biases and layer norms, too."""
    torch.manual_seed(seed)
    width, heads = SHAPES[shape]
    config = EncoderConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=3 * width,
        token_dropout=token_dropout,
    )
    encoder = Encoder(config)
    for name, parameter in encoder.named_parameters():
        parameter.data.normal_(1.0 if "norm.weight" in name else 0.0, 0.15)
    return encoder.eval(), same_weights(encoder)


def same_weights(encoder: Encoder) -> EsmForMaskedLM:
    """transformers' implementation with the encoder's weights."""
    reference = EsmForMaskedLM(EsmConfig(**to_hf_config(encoder.config), attn_implementation="eager"))
    missing, unexpected = reference.load_state_dict(to_hf(encoder.state_dict()), strict=False)
    assert not unexpected
    assert all("contact_head" in name for name in missing)
    return reference.eval()


def sequences(lengths: list[int] | tuple[int, ...], masked: float = 0.2, seed: int = 0) -> list[Tensor]:
    """Random sequences; the first token of each is never the mask token."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for length in lengths:
        tokens = torch.randint(2, MASK, (length,), generator=generator)
        mask = torch.rand(length, generator=generator) < masked
        mask[0] = False
        drawn.append(tokens.where(~mask, MASK))
    return drawn


def pack(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences laid end to end, and where they begin."""
    lengths = torch.tensor([0, *map(len, parts)], dtype=torch.int32)
    return torch.cat(parts), lengths.cumsum(0, dtype=torch.int32)


def padded(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences under each other, and which places are not padding."""
    input_ids = pad_sequence(parts, batch_first=True, padding_value=PAD)
    attention_mask = pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    return input_ids, attention_mask


@pytest.mark.parametrize("masked", [0.0, 0.2])
@pytest.mark.parametrize("token_dropout", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_of_a_sequence_alone_equal_transformers(shape: str, token_dropout: bool, masked: float) -> None:
    encoder, reference = pair(token_dropout, shape)
    for sequence in sequences(LENGTHS, masked):
        close(
            encoder(*pack([sequence])),
            reference(sequence[None], attention_mask=torch.ones_like(sequence)[None]).logits[0],
        )


@pytest.mark.parametrize("attention", [0.0, 0.2])
@pytest.mark.parametrize("hidden", [0.0, 0.3])
@torch.no_grad()
def test_training_drops_in_the_places_where_transformers_drops(hidden: float, attention: float) -> None:
    """On one sequence both draw the same random numbers, so what is computed must be the same."""
    encoder = pair()[0]
    config = replace(encoder.config, hidden_dropout_prob=hidden, attention_probs_dropout_prob=attention)
    dropping = Encoder(config).train()
    dropping.load_state_dict(encoder.state_dict())
    reference = same_weights(dropping).train()
    reference.set_attn_implementation("sdpa" if attention else "eager")
    (sequence,) = sequences([90])
    torch.manual_seed(5)
    ours = dropping(*pack([sequence]))
    torch.manual_seed(5)
    close(ours, reference(sequence[None], attention_mask=torch.ones_like(sequence)[None]).logits[0])
    assert torch.equal(ours, encoder(*pack([sequence]))) == (hidden == attention == 0)
    assert torch.equal(dropping.eval()(*pack([sequence])), encoder(*pack([sequence])))


@pytest.mark.parametrize("token_dropout", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_of_a_pack_in_any_order_equal_those_of_a_padded_batch(shape: str, token_dropout: bool) -> None:
    encoder, reference = pair(token_dropout, shape)
    parts = sequences([*LENGTHS, 31, 31, 257], seed=1)
    input_ids, attention_mask = padded(parts)
    theirs = reference(input_ids, attention_mask=attention_mask).logits
    ascending = sorted(range(len(parts)), key=lambda i: len(parts[i]))
    for order in (list(range(len(parts))), ascending, ascending[::-1], torch.randperm(len(parts)).tolist()):
        ours = encoder(*pack([parts[i] for i in order]))
        close(ours, torch.cat([theirs[i, : len(parts[i])] for i in order]))


@given(
    lengths=st.lists(st.integers(1, 12) | st.integers(253, 259), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    data=st.data(),
)
@settings(max_examples=25)
@torch.no_grad()
def test_packing_is_invisible(lengths: list[int], seed: int, data: st.DataObject) -> None:
    """A sequence's logits do not depend on what lies beside it in the pack, nor on which positions are asked for."""
    encoder, _ = pair(seed=seed, layers=2)
    parts = sequences(lengths, masked=0.3, seed=seed)
    input_ids, cu_seqlens = pack(parts)
    together = encoder(input_ids, cu_seqlens)
    alone = torch.cat([encoder(*pack([part])) for part in parts])
    close(together, alone)
    asked = sorted(data.draw(st.sets(st.integers(0, len(input_ids) - 1), max_size=20), label="positions"))
    positions = torch.tensor(asked, dtype=torch.int64)
    some = encoder(input_ids, cu_seqlens, positions=positions)
    assert some.shape == (len(asked), 33)
    if asked:
        close(some, alone[positions])


@pytest.mark.parametrize("bound", [None, 300, 1024])
@pytest.mark.parametrize(
    "choose",
    [
        pytest.param(lambda place, sequence: place >= 0, id="all"),
        pytest.param(lambda place, sequence: place % 5 == 2, id="some of each"),
        pytest.param(lambda place, sequence: (sequence % 2 == 0) & (place % 3 == 0), id="none in every other sequence"),
        pytest.param(
            lambda place, sequence: (sequence == 2) | ((sequence == 4) & (place > 400)), id="all of one, a part"
        ),
        pytest.param(lambda place, sequence: (place == 0) & (sequence == 0), id="the first token only"),
        pytest.param(lambda place, sequence: place == place.max(), id="the last token only"),
        pytest.param(lambda place, sequence: place < 0, id="none"),
    ],
)
@torch.no_grad()
def test_logits_at_positions_are_those_rows_of_the_full_logits(choose, bound: int | None) -> None:  # type: ignore[no-untyped-def]
    encoder, _ = pair()
    parts = sequences([7, 7, 5, 260, 300, 1])
    input_ids, cu_seqlens = pack(parts)
    place = torch.arange(len(input_ids))
    sequence = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])
    positions = choose(place, sequence).nonzero().flatten()
    ours = encoder(input_ids, cu_seqlens, bound, positions)
    if len(positions):
        close(ours, encoder(input_ids, cu_seqlens)[positions])
    else:
        assert ours.shape == (0, 33)


def summed_losses(
    encoder: Encoder, reference: EsmForMaskedLM, parts: list[Tensor], target_seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The loss summed over a sixth of the positions, by each implementation."""
    generator = torch.Generator().manual_seed(target_seed)
    input_ids, cu_seqlens = pack(parts)
    positions = (torch.rand(len(input_ids), generator=generator) < 1 / 6).nonzero().flatten()
    targets = torch.randint(4, 24, (len(positions),), generator=generator)
    ours = F.cross_entropy(encoder(input_ids, cu_seqlens, positions=positions), targets, reduction="sum")
    labels = torch.full_like(input_ids, -100).scatter(0, positions, targets)
    their_ids, attention_mask = padded(parts)
    by_sequence = labels.split([len(part) for part in parts])
    their_labels = pad_sequence(by_sequence, batch_first=True, padding_value=-100)
    logits = reference(their_ids, attention_mask=attention_mask).logits
    return ours, F.cross_entropy(logits.flatten(0, 1), their_labels.flatten(), reduction="sum", ignore_index=-100)


@pytest.mark.parametrize("token_dropout", [True, False])
@pytest.mark.parametrize("lengths", [(9, 30, 30, 3), (255, 256, 300, 17)], ids=str)
def test_gradients_of_every_parameter_equal_transformers(token_dropout: bool, lengths: tuple[int, ...]) -> None:
    gradients_agree(*pair(token_dropout), sequences(lengths))


def gradients_agree(encoder: Encoder, reference: EsmForMaskedLM, parts: list[Tensor]) -> None:
    ours, theirs = summed_losses(encoder, reference, parts)
    close(ours.detach(), theirs.detach())
    ours.backward()
    theirs.backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None}
    expected = from_hf(gradients, encoder.config)
    assert expected.keys() == dict(encoder.named_parameters()).keys()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert expected[name].abs().max() > 0, name
        difference = (parameter.grad - expected[name]).abs().max() / expected[name].abs().max()
        assert difference < 5e-5, f"{name}: {difference}"


def test_a_pack_without_targets_gives_every_parameter_a_gradient_of_zero() -> None:
    """None at all would hang DDP, and short sequences can leave a micro-batch without targets."""
    encoder, _ = pair()
    input_ids, cu_seqlens = pack(sequences([5, 300]))
    logits = encoder(input_ids, cu_seqlens, positions=torch.tensor([], dtype=torch.int64))
    F.cross_entropy(logits, torch.tensor([], dtype=torch.int64), reduction="sum").backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_gradients_of_a_pack_are_the_sum_of_those_of_its_sequences() -> None:
    encoder, _ = pair()
    parts = sequences([12, 5, 300, 12])
    input_ids, cu_seqlens = pack(parts)
    encoder(input_ids, cu_seqlens).logsumexp(-1).sum().backward()
    together = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    encoder.zero_grad()
    for part in parts:
        encoder(*pack([part])).logsumexp(-1).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad, together[name], rtol=1e-4, atol=1e-5 * float(parameter.grad.abs().max())
        )


@pytest.mark.parametrize("token_dropout", [True, False])
@pytest.mark.parametrize("size", ["8M", "35M", pytest.param("150M", marks=pytest.mark.slow)])
def test_a_named_size_computes_what_transformers_does_in_every_layer(size: str, token_dropout: bool) -> None:
    """Every hidden state, every attention map, the logits, and the gradient of every parameter."""
    torch.manual_seed(2)
    encoder = Encoder(replace(EncoderConfig.named(size), token_dropout=token_dropout)).eval()
    for parameter in encoder.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)  # biases and layer norms, too
    reference = same_weights(encoder)
    pretrained = PretrainedEncoder(encoder.config, ProteinTokenizer, None).eval()
    pretrained.load_state_dict(encoder.state_dict())
    every_layer = range(encoder.config.num_hidden_layers + 1)
    for masked in (0.0, 0.2):
        parts = sequences((1, 24, 7, 70), masked)
        assert any((part == MASK).any() for part in parts) == bool(masked)
        input_ids, attention_mask = padded(parts)
        with torch.no_grad():
            hidden_states, logits = pretrained.layer_outputs(*pack(parts), every_layer), encoder(*pack(parts))
            attentions = [list(encoder.attention_maps(part)) for part in parts]
            theirs = reference(
                input_ids, attention_mask=attention_mask, output_hidden_states=True, output_attentions=True
            )
        real = attention_mask.bool()
        close(logits, theirs.logits[real])
        for ours, state in zip(hidden_states, theirs.hidden_states, strict=True):
            close(ours, state[real])
        for i, part in enumerate(parts):
            for ours, maps in zip(attentions[i], theirs.attentions, strict=True):
                close(ours, maps[i, :, : len(part), : len(part)])
    gradients_agree(encoder, reference, parts)


def test_fifty_training_steps_follow_the_same_losses_as_transformers(proteins: Path) -> None:
    """Our batches, loss and AdamW; there the same sequences and masks padded, its own loss, and torch's plain AdamW."""
    data = MLMDataModule(str(proteins), max_length=64, global_batch_tokens=512, seed=3)
    data.setup("fit")
    planner = Planner(data.train_corpus, Order(len(data.train_corpus), 3), data.masking, data.max_length)
    batches = PackDataset(data.train_corpus, data.masking)
    encoder, reference = pair(layers=2)
    encoder.train()
    reference.train()
    optimizer = build_optimizer(encoder, "adamw", 2e-3, (0.9, 0.98), 1e-8, 0.01, "all")
    their_optimizer = torch.optim.AdamW(
        reference.parameters(), lr=2e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01, foreach=False
    )
    history, position = [], Position()
    for _ in range(50):
        plan = planner.step(position, data.global_batch_tokens)
        position, batch = plan.after, batches[plan]
        loss = encoder.loss(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, batch.target_positions, batch.targets)
        lengths = batch.cu_seqlens.diff().tolist()
        input_ids, attention_mask = padded(list(batch.input_ids.split(lengths)))
        labels = torch.full_like(batch.input_ids, -100).scatter(0, batch.target_positions, batch.targets)
        their_labels = pad_sequence(labels.split(lengths), batch_first=True, padding_value=-100)
        losses = (
            loss / len(batch.targets),
            reference(input_ids, attention_mask=attention_mask, labels=their_labels).loss,
        )
        for each, update in zip(losses, (optimizer, their_optimizer), strict=True):
            update.zero_grad()
            each.backward()
            update.step()
        history.append([each.item() for each in losses])
    ours, theirs = torch.tensor(history).T
    assert (ours - theirs).abs().max() < 1e-4
    assert ours[-5:].mean() < ours[:5].mean() - 0.2  # it did learn: the losses compared are of weights that moved


@pytest.mark.parametrize("ratio", [0.0, 0.12, 0.5, 0.9])
@torch.no_grad()
def test_token_dropout_scales_by_the_sequences_own_share_of_masks(ratio: float) -> None:
    """(1 - 0.12) / (1 - observed) at every masking rate: 0.12 is a constant of ESM's function."""
    encoder, _ = pair(layers=1)
    unscaled = Encoder(EncoderConfig(**{**vars(encoder.config), "token_dropout": False}))
    unscaled.load_state_dict(encoder.state_dict())
    neighbour = torch.full((50,), 5)  # without masks: would be told apart if the shares were taken over the pack
    tokens = torch.arange(100) % 20 + 4
    tokens[: round(100 * ratio)] = MASK
    unscaled.embedding.weight.mul_((1 - 0.12) / (1 - ratio))
    unscaled.embedding.weight[MASK] = 0
    input_ids, cu_seqlens = pack([neighbour, tokens])
    ours = encoder.hidden_states(input_ids, cu_seqlens)[50:]
    close(ours, unscaled.hidden_states(*pack([tokens])))


@torch.no_grad()
def test_a_sequence_of_masks_only_has_finite_logits_and_leaves_its_neighbours_alone() -> None:
    """Where transformers divides by zero."""
    encoder, _ = pair()
    other = sequences([9])[0]
    logits = encoder(*pack([torch.full((4,), MASK), other]))
    assert logits.isfinite().all()
    close(logits[4:], encoder(*pack([other])))


def test_rotary_pairs_dimension_i_with_i_plus_half() -> None:
    """fairseq's convention; the other (neighbours paired) is a different function with the same weights."""
    angles = torch.rand(5, 3)
    parts = torch.randn(5, 3, 2, 6)
    *turned, untouched = rotate(parts, (angles.cos(), angles.sin()), 2)
    for part, x in enumerate(turned):
        plane = torch.complex(parts[:, part, :, :3], parts[:, part, :, 3:]) * torch.exp(1j * angles[:, None])
        torch.testing.assert_close(x, torch.cat([plane.real, plane.imag], -1))
    assert untouched.equal(parts[:, 2])


@pytest.mark.parametrize("llvm", [False, True])
def test_no_tokens_are_no_rotation(llvm: bool) -> None:
    """Of the last block's queries, where a pack has no targets."""
    parts = torch.empty(0, 1, 2, 8, requires_grad=True)
    (query,) = rotate(parts, (torch.empty(0, 4), torch.empty(0, 4)), 1, llvm)
    assert query.shape == (0, 2, 8)
    query.sum().backward()
    assert parts.grad is not None


def test_the_gradient_of_a_rotation_is_that_of_its_formula() -> None:
    angles = torch.rand(4, 2, dtype=torch.float64)
    parts = torch.randn(4, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: rotate(x, (angles.cos(), angles.sin()), 2), parts)


def test_half_precision_is_rotated_in_single_precision_and_rounded_once() -> None:
    """As autocast has it: the parts are bfloat16, the angles float32; forward and backward."""
    angles = torch.rand(50, 8)
    rotation = (angles.cos(), angles.sin())
    parts = torch.randn(50, 3, 4, 16).bfloat16().requires_grad_()
    exact = parts.detach().float().requires_grad_()
    turned, expected = torch.stack(rotate(parts, rotation, 2)), torch.stack(rotate(exact, rotation, 2))
    assert turned.equal(expected.bfloat16())
    gradient = torch.randn(turned.shape).bfloat16()
    (ours,) = torch.autograd.grad(turned, parts, gradient)
    (theirs,) = torch.autograd.grad(expected, exact, gradient.float())
    assert ours.equal(theirs.bfloat16())


@torch.no_grad()
def test_positions_count_from_each_sequences_start() -> None:
    """Identical sequences in one pack have identical logits, wherever they lie."""
    encoder, _ = pair()
    sequence = sequences([40])[0]
    input_ids, cu_seqlens = pack([sequence] * 5)
    logits = encoder(input_ids, cu_seqlens)
    for start, end in pairwise(cu_seqlens.tolist()):
        close(logits[start:end], logits[:40])
