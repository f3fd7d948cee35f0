"""`EncoderConfig`: the published sizes, errors that name the remedy, and the arithmetic of a step."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import EsmConfig, EsmForMaskedLM

from pretrain.errors import UserError
from pretrain.model.config import BERT_SIZES, ESM2_SIZES, EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.model.hf import to_hf_config

PARAMETERS = {
    "8M": 7_512_353,
    "35M": 33_501_153,
    "150M": 148_139_553,
    "650M": 651_042_593,
    "3B": 2_839_004_193,
    "15B": 15_129_098_273,
    "BERT-base": 109_119_546,
    "BERT-large": 334_648_122,
}
PUBLISHED = {"8M": 8e6, "35M": 35e6, "150M": 150e6, "650M": 650e6, "3B": 3e9, "15B": 15e9}
PUBLISHED |= {"BERT-base": 110e6, "BERT-large": 340e6}


@pytest.mark.parametrize("size", PARAMETERS)
def test_a_named_size_has_the_published_number_of_parameters(size: str) -> None:
    """Also those of transformers' model of that shape, but for its contact head."""
    config = EncoderConfig.named(size)
    with torch.device("meta"):
        encoder, reference = Encoder(config), EsmForMaskedLM(EsmConfig(**to_hf_config(config)))
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    assert parameters == PARAMETERS[size]
    contact_head = sum(parameter.numel() for parameter in reference.esm.contact_head.parameters())
    assert parameters == reference.num_parameters() - contact_head
    assert parameters == pytest.approx(PUBLISHED[size], rel=0.07)


def test_every_named_size_is_listed_above() -> None:
    assert [*ESM2_SIZES, *BERT_SIZES] == [*PARAMETERS]


def test_an_unknown_size_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UserError, match="no size '8m'; there are 8M, 35M, 150M, 650M, 3B, 15B, BERT-base, BERT-large"):
        EncoderConfig.named("8m")


@pytest.mark.parametrize(("width", "heads", "multiple"), [(320, 3, 6), (100, 20, 40), (6, 2, 4), (32, 32, 64)])
def test_heads_of_uneven_size_are_refused_with_what_would_do(width: int, heads: int, multiple: int) -> None:
    with pytest.raises(UserError, match=f"hidden_size {width} .* {heads} heads .* give a multiple of {multiple}"):
        EncoderConfig(hidden_size=width, num_attention_heads=heads)
    assert EncoderConfig(hidden_size=multiple, num_attention_heads=heads).head_dim == 2


@pytest.mark.parametrize(
    "setting", ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]
)
@pytest.mark.parametrize("value", [0, -4])
def test_a_size_below_one_is_refused(setting: str, value: int) -> None:
    with pytest.raises(UserError, match="at least 1"):
        EncoderConfig(**{setting: value})


def test_the_feed_forward_layer_is_four_times_as_wide_unless_said_otherwise() -> None:
    assert EncoderConfig(hidden_size=64, num_attention_heads=4).ffn_size == 256
    assert EncoderConfig(hidden_size=64, num_attention_heads=4, intermediate_size=100).ffn_size == 100


def test_a_cast_encoder_still_knows_its_positions() -> None:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(64, num_hidden_layers=2, num_attention_heads=2)).eval()
    for parameter in encoder.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)  # so that attention looks at positions
    input_ids, bounds = torch.randint(4, 24, (1024,)), torch.tensor([0, 1024], dtype=torch.int32)
    with torch.no_grad():
        exact = encoder(input_ids, bounds)
        cast = encoder.bfloat16()(input_ids, bounds)
    assert encoder.inv_freq.dtype == torch.float32
    assert (cast.float() - exact).norm() < 0.05 * exact.norm()
    assert encoder.to("meta").inv_freq.is_meta


@pytest.mark.parametrize(
    ("lengths", "targets"),
    [([50], [8]), ([7, 40, 40, 100], [1, 6, 6, 15]), ([30, 20, 20], [4, 0, 3]), ([12, 12], [12, 12])],
    ids=str,
)
@pytest.mark.parametrize("layers", [1, 3])
def test_training_flops_are_those_that_torch_counts(layers: int, lengths: list[int], targets: list[int]) -> None:
    """Exactly, since both count matrix products alone.

    Attention is made to run through plain products, since the counter does not know the CPU's flash kernel. Every
    product's input needs a gradient (the first block's, too: the embedding is trained), so the backward
    pass costs exactly twice the forward.
    """
    config = EncoderConfig(hidden_size=24, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=56)
    encoder = Encoder(config)
    encoder.use_cpu_kernels("torch")
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    input_ids = torch.randint(4, 24, (sum(lengths),))
    positions = torch.cat(
        [start + torch.arange(count) for start, count in zip(cu_seqlens.tolist(), targets, strict=False)]
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        F.cross_entropy(encoder(input_ids, cu_seqlens, positions=positions), input_ids[positions]).backward()
    assert config.training_flops(lengths, targets) == counter.get_total_flops()
