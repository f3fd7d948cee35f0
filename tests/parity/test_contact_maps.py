"""Contacts equal those of transformers' `predict_contacts`, with the same random weights."""

import weakref

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import EsmConfig, EsmForMaskedLM

from pretrain.model.config import EncoderConfig
from pretrain.model.contacts import ContactRegression, corrected_maps
from pretrain.model.encoder import Encoder
from pretrain.model.hf import contacts_from_hf, contacts_to_hf, to_hf, to_hf_config

PAD, CLS, EOS = 1, 0, 2
CONFIG = EncoderConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96)


def both(seed: int = 0) -> tuple[Encoder, ContactRegression, EsmForMaskedLM]:
    """Random weights, large enough for the attention to be uneven and the probabilities to spread."""
    torch.manual_seed(seed)
    encoder = Encoder(CONFIG)
    for name, parameter in encoder.named_parameters():
        parameter.data.normal_(1.0 if "norm.weight" in name else 0.0, 0.15)
    regression = ContactRegression(torch.randn(9) * 20, torch.tensor(-0.5))
    reference = EsmForMaskedLM(EsmConfig(**to_hf_config(CONFIG), attn_implementation="eager"))
    reference.load_state_dict({**to_hf(encoder.state_dict()), **contacts_to_hf(regression)})
    return encoder.eval(), regression, reference.eval()


def proteins(lengths: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    ends = torch.tensor([CLS]), torch.tensor([EOS])
    return [torch.cat([ends[0], torch.randint(4, 24, (n,), generator=generator), ends[1]]) for n in lengths]


@torch.no_grad()
def test_contacts_of_a_sequence_alone_and_in_a_padded_batch_equal_transformers() -> None:
    encoder, regression, reference = both()
    sequences = proteins((3, 40, 170))
    input_ids = pad_sequence(sequences, batch_first=True, padding_value=PAD)
    batch = reference.predict_contacts(input_ids, (input_ids != PAD).long())
    for sequence, padded in zip(sequences, batch, strict=True):
        ours = regression.predict(encoder, sequence)
        alone = reference.predict_contacts(sequence[None], torch.ones_like(sequence)[None])[0]
        length = len(sequence) - 2
        assert ours.shape == (length, length)
        assert float(ours.std()) > 0.05 or length == 3
        torch.testing.assert_close(ours, alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours, padded[:length, :length], rtol=0, atol=1e-5)
        assert torch.equal(ours, ours.T) or float((ours - ours.T).abs().max()) < 1e-6


def test_a_contact_head_comes_back_bit_for_bit_and_one_of_zeros_is_none() -> None:
    _, regression, reference = both()
    found = contacts_from_hf(reference.state_dict())
    assert found is not None
    assert torch.equal(found.weight, regression.weight)
    assert torch.equal(found.bias, regression.bias)
    reference.esm.contact_head.regression.weight.data.zero_()
    assert contacts_from_hf(reference.state_dict()) is None
    without = {name: tensor for name, tensor in reference.state_dict().items() if "contact_head" not in name}
    assert contacts_from_hf(without) is None


def test_one_blocks_maps_are_in_memory_at_a_time() -> None:
    encoder, _, _ = both()
    (sequence,) = proteins((50,))
    seen: list[weakref.ref[Tensor]] = []
    with torch.no_grad():
        for maps in corrected_maps(encoder, sequence):
            seen.append(weakref.ref(maps))
            del maps
            assert sum(each() is not None for each in seen) <= 1
    assert len(seen) == CONFIG.num_hidden_layers


@pytest.mark.parametrize("maps", [8, 10])
def test_a_regression_over_another_number_of_maps_is_refused(maps: int) -> None:
    regression = ContactRegression(torch.ones(maps), torch.zeros(()))
    with pytest.raises(ValueError, match=rf"over {maps} attention maps, the model has 9 \(3 layers of 3 heads\)"):
        regression.check(CONFIG, "it")
