"""Which settings a continued run may change: each is of one class, and a new one has to be given its own."""

from typing import Any

import pytest
from typing_extensions import override

from pretrain.downstream.finetune.command import FineTuneCLI
from pretrain.errors import UserError
from pretrain.train.build import FitCLI
from pretrain.train.changes import changes_of_history
from pretrain.train.settings import parse

IDENTITY = """
seed_everything
model.encoder model.encoder.hidden_size model.encoder.num_hidden_layers model.encoder.num_attention_heads
model.encoder.intermediate_size model.encoder.token_dropout model.encoder.layer_norm_eps model.encoder.rope_theta
model.encoder.initializer_range
model.optimizer model.decay model.initialize_from
model.from_scratch model.pooling model.tune model.last_layers model.lora_rank
data.tokenizer data.max_length data.long_sequences data.global_batch_tokens data.batch_warmup
data.task data.pair_order
"""
HISTORY = """
model.encoder.hidden_dropout_prob model.encoder.attention_probs_dropout_prob
model.learning_rate model.warmup_steps model.warmup_init_lr model.schedule model.betas model.eps model.weight_decay
model.scheduler_name model.layer_decay model.class_weights model.lora_alpha
data.mlm_probability data.mask_replace_prob data.random_replace_prob data.mask_unit data.mask_draws
data.mean_span_length data.validation
trainer.max_steps trainer.gradient_clip_val trainer.gradient_clip_algorithm trainer.precision
"""
# Of these, data.train, the labels and the grouping of shards are compared by content, in the checkpoint's data state.
FREE = """
model.activation_checkpointing model.compile model.flash_attention model.cpu_kernels
data.train data.labels data.test data.label_column data.text_column data.id_column data.split_column data.pair_column
data.label_separator data.mask_label data.positive_class data.group_shards
data.validation_pack_tokens data.attention_cost data.static_shapes data.num_workers data.cache_gb
validate_every_n_steps max_sick_steps_in_a_row hang_timeout_minutes early_stopping
spikes.threshold spikes.window spikes.rewind spikes.margin spikes.max_rewinds
checkpoint.every_n_steps checkpoint.every_minutes checkpoint.keep_last checkpoint.keep_every_n_steps
checkpoint.keep_best checkpoint.remote checkpoint.in_background
trainer.devices trainer.num_nodes trainer.accumulate_grad_batches trainer.strategy trainer.logger
"""
NO_SETTINGS = {"config", "run", "allow_change", "branch_from"}


def nested(name: str, value: object) -> dict[str, Any]:
    first, _, rest = name.partition(".")
    return {first: nested(rest, value) if rest else value}


@pytest.mark.parametrize("name", IDENTITY.split())
def test_what_a_run_is_cannot_be_changed(name: str) -> None:
    with pytest.raises(UserError, match=f"was started with {name} 1, this config has 2: that would be another run"):
        changes_of_history("run", nested(name, 1), nested(name, 2), allowed=True, defaults={})


@pytest.mark.parametrize("name", HISTORY.split())
def test_what_training_does_is_changed_when_that_is_allowed(name: str) -> None:
    was, now = nested(name, "1"), nested(name, "2")
    with pytest.raises(UserError, match="add --allow_change to continue"):
        changes_of_history("run", was, now, allowed=False, defaults={})
    assert changes_of_history("run", was, now, allowed=True, defaults={}) == [(name, "1", "2")]


@pytest.mark.parametrize("name", FREE.split())
def test_how_and_where_it_is_computed_is_free(name: str) -> None:
    assert changes_of_history("run", nested(name, 1), nested(name, 2), allowed=False, defaults={}) == []


@pytest.mark.parametrize("cli", [FitCLI, FineTuneCLI])
def test_every_setting_has_its_class(cli: type[FitCLI]) -> None:
    class Found(Exception):
        pass

    class Settings(cli):  # type: ignore[valid-type,misc]
        @override
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise Found(*parser.get_defaults().keys())

    with pytest.raises(Found) as found:
        parse(Settings, "fit", "", ["-c", "quickstart"])
    settings = {name for name in found.value.args if not name.startswith("trainer.")} - NO_SETTINGS
    assert len(settings) > 40
    assert settings <= {*IDENTITY.split(), *HISTORY.split(), *FREE.split()}
