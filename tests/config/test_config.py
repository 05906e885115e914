import json

import pytest

from nanogpt_jax.config import (
    PRESETS,
    ComputeConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    field_types,
    parse_args,
    parse_train_config,
    to_flat_dict,
)
from nanogpt_jax.config.cli import NANOGPT_FLAGS, read_settings
from nanogpt_jax.errors import InputError
from nanogpt_jax.run import folder as run_folder

# Every flag of nanoGPT's train.py and sample.py.
TRAIN_FLAGS_OF_NANOGPT = """
out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log
wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer
n_head n_embd dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr
warmup_iters lr_decay_iters min_lr backend device dtype compile
"""
SAMPLE_FLAGS_OF_NANOGPT = """
init_from out_dir start num_samples max_new_tokens temperature top_k seed device dtype compile
"""


def parse_sample_config(argv: list[str]) -> SampleConfig:
    return parse_args(SampleConfig, argv, "")


@pytest.mark.parametrize(
    "argv",
    [
        ["--n_layer", "6", "--weight_decay", "1e-1", "--bias", "True"],
        ["--n_layer=6", "--weight_decay=1e-1", "--bias=True"],
        ["--n-layer", "6", "--weight-decay=1e-1", "--bias"],
        ["--bias", "--n_layer=6", "--weight-decay", "0.1"],
        ["--n_layer", "2", "--n-layer", "6", "--weight_decay=0.1", "--bias=true"],
    ],
)
def test_all_forms_of_a_flag_are_understood(argv):
    config = parse_train_config(argv)
    assert (config.model.n_layer, config.optim.weight_decay, config.model.bias) == (6, 0.1, True)


@pytest.mark.parametrize(
    "argv", [["--bias=False"], ["--bias", "False"], ["--bias=false"], ["--bias", "--bias=False"]]
)
def test_a_boolean_can_be_switched_off(argv):
    assert parse_train_config(argv).model.bias is False
    assert parse_train_config(["--decay_lr=False"]).optim.decay_lr is False


def test_a_tilde_that_the_shell_left_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = parse_train_config(["--out_dir=~/run", "--dataset", "~/x.txt"], "")
    assert (config.out_dir, config.dataset) == ("/home/me/run", "/home/me/x.txt")


def test_a_json_file_of_notepad_begins_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"config": "tiny", "max_iters": 3}', encoding="utf-8-sig")
    assert parse_train_config([f"--config={path}"]).max_iters == 3


def test_a_rate_that_would_rise_above_learning_rate_is_refused():
    """As of someone who finetunes with a preset's min_lr."""
    argv = ["--config=tiny", "--learning_rate=1e-4"]
    with pytest.raises(
        InputError, match=r"at most learning_rate = 0\.0001, .*: add --min_lr 1e-05"
    ):
        parse_train_config(argv)
    assert parse_train_config([*argv, "--min_lr=1e-5"]).optim.min_lr == 1e-5
    assert parse_train_config([*argv, "--decay_lr=False"]).optim.learning_rate == 1e-4


def test_values_keep_dashes_equals_signs_and_spaces():
    config = parse_sample_config(["--start", "a-b = c_d", "--stop=x=--y", "--max_new_tokens", "7"])
    assert (config.start, config.stop, config.max_new_tokens) == ("a-b = c_d", "x=--y", 7)
    assert parse_sample_config(["--start", "-"]).start == "-"
    assert parse_sample_config(["--start="]).start == ""


def test_minus_one_is_a_value():
    config = parse_sample_config(["--max_new_tokens", "-1", "--stream"])
    assert (config.max_new_tokens, config.stream) == (-1, True)


def test_a_value_of_none_leaves_the_choice_to_the_program():
    assert parse_train_config(["--vocab_size=None"]).model.vocab_size is None
    assert parse_train_config(["--vocab_size=70"]).model.vocab_size == 70


@pytest.mark.parametrize("flag", TRAIN_FLAGS_OF_NANOGPT.split())
def test_each_training_flag_of_nanogpt_works_or_says_what_to_do(flag):
    if flag in field_types(TrainConfig):
        return
    with pytest.raises(InputError, match=f"no flag --{flag}. nanoGPT's flag: .{{20,}}"):
        parse_train_config([f"--{flag}=1"])


@pytest.mark.parametrize("flag", SAMPLE_FLAGS_OF_NANOGPT.split())
def test_each_sampling_flag_of_nanogpt_works_or_says_what_to_do(flag):
    if flag in field_types(SampleConfig):
        return
    with pytest.raises(InputError, match=f"no flag --{flag}. nanoGPT's flag: .{{20,}}"):
        parse_sample_config([f"--{flag}=1"])


def test_only_flags_that_do_not_exist_here_are_explained():
    assert not NANOGPT_FLAGS.keys() & {*field_types(TrainConfig), *field_types(SampleConfig)}


def test_nanogpts_cpu_command_gives_the_small_preset():
    argv = (
        "--eval_interval=250 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
        "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
    )
    config = parse_train_config(["--config=shakespeare", *argv.split()])
    flat, small = to_flat_dict(config), to_flat_dict(PRESETS["small"])
    differing = {name for name in flat if flat[name] != small[name]}
    assert differing == {"config", "lr_decay_iters"}


@pytest.mark.parametrize(
    ("argv", "near"),
    [
        (["--n_layers=3"], "n_layer"),
        (["--dropuot=0.1"], "dropout"),
        (["--learning-rat", "1"], "learning_rate"),
        (["--batchsize", "3"], "batch_size"),
        (["--overwrit"], "overwrite"),
        (["--no-bias"], "bias"),
    ],
)
def test_a_misspelt_flag_is_refused_with_the_near_match(argv, near):
    with pytest.raises(InputError, match=f"no flag --.*Did you mean (.* or )?{near}\\b"):
        parse_train_config(argv)


def test_a_flag_unlike_any_other_is_refused_without_a_guess():
    with pytest.raises(InputError, match="no flag --zzzzzz") as error:
        parse_train_config(["--zzzzzz=1"])
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["n_layer=6"], "'n_layer=6' is not a flag; flags look like --n_layer 6"),
        (["-n_layer", "6"], "'-n_layer' is not a flag"),
        (["--n_layer", "6", "7"], "'7' is not a flag"),
        (["--"], "'--' is not a flag"),
        (["config/train_shakespeare_char.py"], "--config shakespeare"),
        (["--n_layer"], "--n_layer needs a value"),
        (["--n_layer", "--n_head", "4"], "--n_layer needs a value"),
    ],
)
def test_what_is_not_a_flag_with_a_value_is_refused(argv, message):
    with pytest.raises(InputError, match=message):
        parse_train_config(argv)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("n_layer", "four"),
        ("n_layer", "2.5"),
        ("n_layer", ""),
        ("learning_rate", "fast"),
        ("bias", "maybe"),
        ("activation", "relu"),
        ("vocab_size", "many"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_flag_and_value(flag, value):
    with pytest.raises(InputError, match=f"^{flag} must be ") as error:
        parse_train_config([f"--{flag}={value}"])
    assert repr(value) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_message_is_complete_in_a_narrow_terminal_and_for_a_long_value(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    long = "word " * 30 + "end"
    with pytest.raises(InputError, match="one of gelu, gelu_tanh, ") as error:
        parse_train_config([f"--activation={long}"])
    assert repr(long) in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--n_embd=10", "--n_head=3"], "n_embd must be a multiple of n_head=3, got 10"),
        (["--init_from=resume"], "init_from=resume: not needed"),
        (["--init_from="], "init_from must be a text of at least one character, got ''"),
        (["--out_dir="], "out_dir must be a text of at least one character, got ''"),
        (["--data_dir="], "data_dir must be a text of at least one character, got ''"),
        (["--tokenizer="], "tokenizer must be a text of at least one character, got ''"),
        (["--known_tokens=0"], "known_tokens must be at least 1"),
        (["--known_tokens=66", "--vocab_size=65"], "known_tokens must be from 1 to vocab_size=65"),
        (["--n_head=5"], "n_embd must be a multiple of n_head=5, got 128"),
        (["--n_embd=-128"], "n_embd must be at least 1, got -128"),
        (["--n_layer=0"], "n_layer must be at least 1, got 0"),
        (["--n_head=-4"], "n_head must be at least 1, got -4"),
        (["--block_size=0"], "block_size must be at least 1, got 0"),
        (["--vocab_size=0"], "vocab_size must be at least 1, got 0"),
        (["--dropout=1"], "dropout must be at least 0 and below 1, got 1.0"),
        (["--dropout=-0.1"], "dropout must be finite and at least 0, got -0.1"),
        (["--dropout=nan"], "dropout must be finite and at least 0, got nan"),
        (["--batch_size=-1"], "batch_size must be at least 1, got -1"),
        (["--max_iters=0"], "max_iters must be at least 1, got 0"),
        (["--eval_interval=0"], "eval_interval must be at least 1, got 0"),
        (["--log_interval=0"], "log_interval must be at least 1, got 0"),
        (["--eval_iters=-1"], "eval_iters must be at least 0, got -1"),
        (["--gradient_accumulation_steps=0"], "gradient_accumulation_steps must be at least 1"),
        (["--learning_rate=nan"], "learning_rate must be finite and at least 0, got nan"),
        (["--learning_rate=-1"], "learning_rate must be finite and at least 0, got -1.0"),
        (["--weight_decay=inf"], "weight_decay must be finite and at least 0, got inf"),
        (["--warmup_iters=-1"], "warmup_iters must be at least 0, got -1"),
        (["--grad_clip=-1"], "grad_clip must be finite and at least 0, got -1.0"),
        (["--lr_decay_iters=0"], "lr_decay_iters must be at least 1, got 0"),
        (
            ["--attention_window=5"],
            "attention_window must be 0 or a divisor of block_size=64, got 5",
        ),
        (["--positions=rotary", "--n_embd=12"], "n_embd must be a multiple of 2 n_head=8, got 12"),
        (["--cooldown=0"], "cooldown must be above 0 and at most 1, got 0.0"),
        (["--cooldown=1.1"], "cooldown must be above 0 and at most 1, got 1.1"),
        (["--muon_momentum=1"], "muon_momentum must be at least 0 and below 1, got 1.0"),
        (
            ["--config=lecture-layernorm", "--optimizer=muon"],
            "optimizer must be adamw for a model of the lecture, got 'muon'",
        ),
        (["--beta2=1"], "beta2 must be at least 0 and below 1, got 1.0"),
        (["--seed=-1"], "seed must be at least 0, got -1"),
        (["--seed=4294967296"], "seed must be at most 4294967295, got 4294967296"),
    ],
)
def test_an_impossible_training_value_is_refused_with_field_requirement_and_value(argv, message):
    with pytest.raises(InputError) as error:
        parse_train_config(argv)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--top_p=0"], "top_p must be above 0 and at most 1, got 0.0"),
        (["--top_p=1.1"], "top_p must be above 0 and at most 1, got 1.1"),
        (["--top_p=nan"], "top_p must be finite and at least 0, got nan"),
        (["--top_k=-1"], "top_k must be at least 0, got -1"),
        (["--temperature=-1"], "temperature must be finite and at least 0, got -1.0"),
        (["--temperature=inf"], "temperature must be finite and at least 0, got inf"),
        (["--num_samples=0"], "num_samples must be at least 1, got 0"),
        (["--max_new_tokens=0"], "max_new_tokens must be at least 1, or -1 together with --stream"),
        (["--max_new_tokens=-1"], "max_new_tokens must be at least 1, or -1 together"),
        (["--max_new_tokens=-2", "--stream"], "max_new_tokens must be at least -1, got -2"),
        (["--out_dir="], "out_dir must be a text of at least one character, got ''"),
        (["--stop="], "stop must be a text of at least one character, got ''"),
        (["--checkpoint=oldest"], "checkpoint must be one of best, latest, got 'oldest'"),
        (["--seed=-1"], "seed must be at least 0, got -1"),
        (["--port=65536"], "port must be at most 65535, got 65536"),
        (["--host="], "host must be a text of at least one character, got ''"),
        (["--web", "--stop=x"], "stop must be left out with --web"),
        (["--web", "--max_new_tokens=5001"], "max_new_tokens must be from 1 to 5000 with --web"),
        (["--web", "--stream", "--max_new_tokens=-1"], "max_new_tokens must be from 1 to 5000"),
    ],
)
def test_an_impossible_sampling_value_is_refused_with_field_requirement_and_value(argv, message):
    with pytest.raises(InputError) as error:
        parse_sample_config(argv)
    assert str(error.value).startswith(message)


def test_values_at_the_limits_are_allowed():
    ModelConfig(block_size=1, n_layer=1, n_head=1, n_embd=1, vocab_size=1, dropout=0.999)
    OptimConfig(learning_rate=0, min_lr=0, warmup_iters=0, weight_decay=0, grad_clip=0, beta1=0)
    OptimConfig(muon_momentum=0, cooldown=1)
    ModelConfig(n_head=1, n_embd=2, positions="rotary", attention_window=1)
    TrainConfig(max_iters=1, eval_interval=1, log_interval=1, seed=2**32 - 1)
    SampleConfig(temperature=0, top_k=0, top_p=1, max_new_tokens=1, num_samples=1, seed=0)


def test_flat_names_do_not_collide():
    """`config.model`, `config.optim` and `config.compute` are merged into one namespace."""
    flat = to_flat_dict(TrainConfig())
    classes = TrainConfig, ModelConfig, OptimConfig, ComputeConfig
    assert len(flat) == sum(len(vars(cls())) for cls in classes) - 3
    assert flat.keys() == field_types(TrainConfig).keys()


def test_the_config_json_of_a_run_gives_the_same_configuration_again(tmp_path):
    argv = (
        "--config=small --out_dir=somewhere --dataset=book.txt --n_layer=2 --bias --vocab_size=77 "
        "--learning_rate=0.00031 --lr_decay_iters=99 --decay_lr=False --activation=gelu_tanh "
        "--positions=rotary --norm=rmsnorm --qk_norm --tied_head=False --zero_init "
        "--attention_window=4 "
        "--optimizer=muon --muon_momentum=0.9 --schedule=wsd --cooldown=0.3 --token_shift "
        "--token_noise=0.1"
    )
    config = parse_train_config(argv.split())
    run_folder.begin(tmp_path, config, {"jax": "0.1"})
    path = tmp_path / run_folder.CONFIG
    assert json.loads(path.read_text(encoding="utf-8"))["made_with"]["jax"] == "0.1"
    again = to_flat_dict(parse_train_config(["--config", str(path)]))
    assert again.pop("config") == str(path)
    expected = to_flat_dict(config)
    del expected["config"]
    expected["out_dir"] = None  # the run is where the file is
    assert again == expected


def test_flags_override_a_json_file_which_overrides_the_preset_it_names(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"config": "shakespeare", "n_layer": 3, "dropout": 0.5, "dataset": null}')
    config = parse_train_config(["--dropout=0.1", "--config", str(path)])
    assert config.model.n_layer == 3
    assert config.model.dropout == 0.1
    assert config.model.n_embd == 384
    assert config.dataset is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"n_layers": 3}', "there is no field 'n_layers'. Did you mean n_layer"),
        ('{"model": {"n_layer": 3}}', "there is no field 'model'"),
        ("[1, 2]", "must contain one JSON object"),
        ("null", "must contain one JSON object"),
        ('{"n_layer": 3', "must be a JSON file, but"),
        ("", "must be a JSON file, but"),
        ("n_layer = 3", "must be a JSON file, but"),
        (b"\xff\xfe", "must be a JSON file, but"),
    ],
)
def test_a_json_file_that_cannot_be_used_is_named_with_the_reason(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        parse_train_config(["--config", str(path)])
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"n_layer": "four"}', "n_layer must be a whole number, got 'four'"),
        ('{"n_layer": [4]}', r"n_layer must be a single value, got \[4\]"),
        ('{"n_embd": 10, "n_head": 3}', "n_embd must be a multiple of n_head=3, got 10"),
    ],
)
def test_a_value_in_a_json_file_is_checked_like_a_flag(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        parse_train_config(["--config", str(path)])


def test_a_missing_json_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: cannot be read \(No such file"):
        parse_train_config(["--config", str(tmp_path / "none.json")])
    with pytest.raises(InputError, match="cannot be read"):
        read_settings(tmp_path, TrainConfig)


def test_tokens_per_update_count_micro_batches_sequences_and_positions():
    config = parse_train_config(
        ["--batch_size=3", "--gradient_accumulation_steps=5", "--block_size=7"]
    )
    assert config.tokens_per_iter == 105
