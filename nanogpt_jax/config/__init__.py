"""What a user can ask for: configurations, presets, the command line. Needs no JAX or NumPy."""

# ruff: noqa: F401 (what other packages import)

from nanogpt_jax.config.cli import parse_args, split_flags, split_words, without_removed
from nanogpt_jax.config.fields import (
    MAX_FLOAT,
    MAX_INT,
    RANGES,
    Checked,
    check_value,
    field_types,
    replace_fields,
    to_flat_dict,
)
from nanogpt_jax.config.presets import (
    GPT2_REVISIONS,
    GPT2_SHAPES,
    LECTURE,
    MODERN,
    PRESETS,
    parse_train_config,
    with_vocab_size,
)
from nanogpt_jax.config.schema import (
    GPT2_PARTS,
    LECTURE_MODELS,
    MAX_PAGE_TOKENS,
    MESH_AXES,
    REGULARIZATION,
    ROW_AXES,
    SCRATCH,
    SPLITS,
    ComputeConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    mesh_sizes,
)
