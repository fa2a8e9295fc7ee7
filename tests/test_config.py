"""Settings: defaults, files, overrides, and errors that name the setting."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_fast.config import Config, apply_overrides, describe_settings, load_config
from realm_fast.errors import ConfigError


def test_defaults_are_the_published_ones():
    config = load_config()
    assert config.corpus.max_block_tokens == 288
    assert config.pretrain.num_candidates == 8
    assert config.masking.max_masks == 10
    assert config.pretrain.reader_lr == 3e-5
    assert config.refresh.every_steps == 500
    assert config.reader.max_joint_tokens == config.masking.max_query_tokens + config.corpus.max_block_tokens


def test_file_then_overrides(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('seed = 3\n[pretrain]\nsteps = 7\nreader_lr = 1\n[refresh]\nmode = "inline"\n')
    config = load_config(path, ["pretrain.steps=9", "embedder.shared=false", "seed=4"])
    assert (config.seed, config.pretrain.steps, config.pretrain.reader_lr) == (4, 9, 1.0)
    assert isinstance(config.pretrain.reader_lr, float)
    assert (config.refresh.mode, config.embedder.shared) == ("inline", False)


def test_a_file_over_a_base_changes_only_what_it_names(tmp_path):
    base = load_config(None, ["pretrain.steps=5", "seed=9"])
    path = tmp_path / "more.toml"
    path.write_text("[pretrain]\nbatch_queries = 2\n")
    config = load_config(path, base=base)
    assert (config.pretrain.steps, config.pretrain.batch_queries, config.seed) == (5, 2, 9)


def test_round_trip_through_a_dictionary():
    config = load_config(None, ["pretrain.steps=5", "finetune.precision=bfloat16"])
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrain.stepz=5", r"unknown setting 'pretrain.stepz'; did you mean 'pretrain.steps'"),
        ("pretrain.steps=0", r"pretrain.steps: expected a value >= 1, got 0"),
        ("pretrain.steps=many", r"pretrain.steps: expected int, got 'many'"),
        ("pretrain.reader_lr=nan", r"pretrain.reader_lr: expected a value >= 0.0, got nan"),
        ("embedder.dropout=2", r"embedder.dropout: expected a value >= 0.0 and <= 0.99, got 2.0"),
        (
            "refresh.mode=later",
            r"refresh.mode: expected one of inline, thread, process, follow, off, got 'later'",
        ),
        ("embedder.shared=maybe", r"embedder.shared: expected true\|false, got 'maybe'"),
        ("pretrain=1", r"pretrain is a section"),
        ("pretrain.steps", r"expected section.name=value"),
    ],
)
def test_wrong_overrides_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[pretrain]\nsteps = true\n", r"pretrain.steps: expected int, got True"),
        ("[pretrain]\nstep = 1\n", r"run.toml: unknown setting 'pretrain.step'"),
        ("pretrain = 3\n", r"pretrain: expected a table, got 3"),
        ("[pretrain\n", r"run.toml: not a readable TOML file"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)
    with pytest.raises(ConfigError, match=r"absent.toml: the configuration file does not exist"):
        load_config(tmp_path / "absent.toml")


def test_every_setting_is_described_and_its_default_is_allowed():
    rows = describe_settings()
    assert len({name for name, *_ in rows}) == len(rows) > 50
    assert all(text for *_, text in rows)
    for name, _, default, _ in rows:
        text = str(default).lower() if isinstance(default, bool) else str(default)
        assert apply_overrides(Config(), [f"{name}={text}"]) == Config(), name


@given(steps=st.integers(1, 10**9), lr=st.floats(0, 1, allow_nan=False))
def test_numbers_survive_the_command_line(steps, lr):
    config = apply_overrides(Config(), [f"pretrain.steps={steps}", f"pretrain.reader_lr={lr!r}"])
    assert (config.pretrain.steps, config.pretrain.reader_lr) == (steps, lr)


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().pretrain.steps = 3
