"""The typed settings that the code runs on, and the strict reader that makes them."""

from truepose_jax.config.model import (
    MODELS,
    ClipConfig,
    DenoiserModel,
    DinoConfig,
    EncoderConfig,
    FirstStageConfig,
    FirstStageModel,
    FPDMModel,
    IMAGPoseModel,
    ModelConfig,
    TruePoseModel,
)
from truepose_jax.config.reader import (
    ConfigError,
    Count,
    Positive,
    PositiveFloat,
    checked,
    from_config_dict,
    to_dict,
    with_defaults,
)
from truepose_jax.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    OptimConfig,
    Schedule,
    SyntheticConfig,
)
from truepose_jax.models.unet import UNetConfig
