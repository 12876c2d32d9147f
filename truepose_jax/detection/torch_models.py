"""Loading of transformers' models: behind the [torch] extra, from safetensors only, and every trouble in one line."""

from __future__ import annotations

from typing import Any

from input_pipeline.annotations.photo import one_line
from input_pipeline.schema import InputError
from truepose_jax.runtime.cli import install


def load_model(flag: str, name: str, automatic: str, device: str) -> tuple[Any, Any]:
    """(model in evaluation mode on `device`, its image processor) of a checkpoint folder or hub name.

    flag: what named it, for messages. automatic: the class of transformers that reads it. Raises InputError where
    torch or transformers is missing, the device is not there, or the checkpoint is none of this kind.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise InputError(f"--{flag} needs PyTorch and transformers ({error}): {install('torch')}") from error
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device={device}: not usable here ({one_line(error)})") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = getattr(transformers, automatic).from_pretrained(
            name, use_safetensors=True, output_loading_info=True
        )
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        raise InputError(
            f"--{flag}={name}: not a checkpoint that {automatic} of transformers loads ({one_line(error)}); give a folder "
            "with config.json, preprocessor_config.json and safetensors, or a name on the hub"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"--{flag}={name}: its weights lack {len(missing)} tensors, such as {missing[0]}; is it another model?"
        )
    return model.to(place).eval(), processor
