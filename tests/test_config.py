"""Configs: JSON there and back, one sentence for every wrong value, and what a resumed run may change."""

import dataclasses
import json
import math

import pytest

from dmd.config import PRESETS, RESUMABLE, Config, check, preset, read, with_run
from dmd.errors import InputError
from dmd.settings import from_json, require_same, to_json


def change(config, group, **values):
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **values)})


def options():
    """(group, option) of everything that a user can set."""
    config = Config()
    groups = [f.name for f in dataclasses.fields(config) if f.name != "preset"]
    return [(g, f.name) for g in groups for f in dataclasses.fields(getattr(config, g))]


def other_value(value):
    """A value of the same kind that is not `value`."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return (*value, value[-1]) if isinstance(value, tuple) else f"{value}x"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name):
    config = preset(name)
    check(config)
    assert config.preset == name
    assert from_json(Config, json.loads(json.dumps(to_json(config))), "here") == config


@pytest.mark.parametrize(("group", "option"), options())
def test_every_option_survives_json(group, option):
    config = change(Config(), group, **{option: other_value(getattr(getattr(Config(), group), option))})
    assert config != Config()
    assert from_json(Config, to_json(config), "here") == config


def test_a_run_directorys_config_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(preset("cifar10"))))
    assert read(path) == preset("cifar10")


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"colour": 3}, "config.json has the unknown key 'colour': Config knows preset, data"),
        ({"distill": {"rate": 3}}, "config.json has the unknown key 'rate': DistillOptions knows objective"),
        ({"distill": 3}, "config.json has 3 where an object is due"),
    ],
)
def test_a_config_of_another_form_is_one_sentence(raw, sentence, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match=sentence):
        read(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [(None, "does not exist"), ("{", "not valid JSON"), ("", "not valid JSON"), ("[]", "not a JSON object")],
)
def test_an_unreadable_config_is_one_sentence(tmp_path, text, sentence):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=sentence):
        read(tmp_path / "config.json")


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(InputError, match="no preset 'digit': choose one of digits, "):
        preset("digit")


@pytest.mark.parametrize(("group", "option"), options())
def test_a_resumed_run_may_change_nothing_but_how_long_and_where(group, option):
    """Every option is either resumable or refused by name with both values."""
    before = getattr(getattr(Config(), group), option)
    other = change(Config(), group, **{option: other_value(before)})
    if option in RESUMABLE:
        require_same(Config(), other, RESUMABLE, "runs/x")
    else:
        with pytest.raises(InputError, match=f"runs/x holds another run .{option} was "):
            require_same(Config(), other, RESUMABLE, "runs/x")


def test_resumable_options_exist():
    assert {option for _, option in options()} >= RESUMABLE


def test_options_have_names_of_their_own():
    """Flags have no group in front, so two groups must not share a name."""
    names = [option for _, option in options()]
    assert sorted(names) == sorted(set(names))


NAN = math.nan
WRONG = [
    ("data", "size", 0), ("data", "size", 2), ("data", "size", 9), ("data", "channels", 2),
    ("teacher", "width", 0), ("teacher", "width", 30), ("teacher", "blocks", 0), ("teacher", "multipliers", (0, 1)),
    ("teacher", "multipliers", (1,)), ("teacher", "multipliers", ()), ("teacher", "sigma_data", 0.0),
    ("teacher", "teach_steps", -1), ("teacher", "teach_batch_size", 0), ("teacher", "teach_lr", NAN),
    ("teacher", "teach_ema", 1.0), ("teacher", "label_dropout", 1.5), ("teacher", "p_std", 0.0),
    ("teacher", "p_mean", NAN),
    ("pairs", "pairs", 0), ("pairs", "teacher_steps", 0), ("pairs", "pair_shard_size", 0), ("pairs", "guidance", NAN),
    ("distill", "max_train_steps", 0), ("distill", "batch_size", 0), ("distill", "pair_batch_size", 0),
    ("distill", "learning_rate", 0.0), ("distill", "learning_rate", NAN), ("distill", "learning_rate", math.inf),
    ("distill", "fake_learning_rate", -1.0), ("distill", "fake_learning_rate", 0.0),
    ("distill", "adam_beta1", 1.0), ("distill", "adam_beta2", -0.1), ("distill", "weight_decay", -0.1),
    ("distill", "lr_warmup_steps", -1), ("distill", "lr_cooldown_steps", -1), ("distill", "max_grad_norm", 0.0),
    ("distill", "ema", 1.0), ("distill", "ema", -0.1), ("distill", "ema", NAN), ("distill", "lambda_reg", -1.0),
    ("distill", "lambda_reg", NAN), ("distill", "lpips_size", 0), ("distill", "critic_steps_per_generator_step", 0),
    ("distill", "t_min", -0.1), ("distill", "t_min", 0.98), ("distill", "t_min", NAN), ("distill", "t_max", 1.1),
    ("distill", "gradient_accumulation_steps", 0),
    ("evaluation", "eval_samples", 15), ("evaluation", "final_samples", 1), ("evaluation", "eval_every", -1),
    ("run", "seed", -1), ("run", "seed", 2**64), ("run", "checkpointing_steps", -1),
    ("run", "checkpoints_total_limit", 0), ("run", "log_every", 0),
]  # fmt: skip


@pytest.mark.parametrize(("group", "option", "value"), WRONG, ids=lambda v: str(v))
def test_a_value_out_of_range_is_refused_by_its_flag(group, option, value):
    with pytest.raises(InputError, match=f"--{option.replace('_', '-')}\\b") as caught:
        check(change(Config(), group, **{option: value}))
    assert "\n" not in str(caught.value)
    shown = value[0] if isinstance(value, tuple) and value else value
    assert isinstance(value, tuple) or str(shown) in str(caught.value)


@pytest.mark.parametrize(
    ("group", "option", "value"),
    [
        ("run", "seed", 2**64 - 1), ("distill", "ema", 0.0), ("distill", "t_min", 0.0), ("distill", "t_max", 1.0),
        ("teacher", "teach_steps", 0), ("distill", "lambda_reg", 0.0), ("teacher", "label_dropout", 0.0),
        ("distill", "fake_learning_rate", 1e-6), ("pairs", "guidance", 0.0), ("evaluation", "eval_every", 0),
    ],
)  # fmt: skip
def test_the_ends_of_the_ranges_are_allowed(group, option, value):
    check(change(Config(), group, **{option: value}))


def test_what_an_objective_does_not_use_is_not_asked_for():
    check(change(change(Config(), "distill", objective="matching", pair_batch_size=0), "pairs", pairs=0))
    check(change(Config(), "distill", objective="regression", batch_size=0))
    check(change(Config(), "evaluation", eval_every=0, eval_samples=0))


def test_run_options_can_be_replaced():
    assert with_run(Config(), seed=3) == change(Config(), "run", seed=3)
