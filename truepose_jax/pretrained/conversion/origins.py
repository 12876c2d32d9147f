"""The small files beside weights: configs, the noise schedule, the model card's licence."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from input_pipeline import files
from truepose_jax.config import Schedule
from truepose_jax.pretrained.conversion.safetensors_io import ConversionError

T = TypeVar("T")

_BETAS = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULE_FIELDS = ("betas", "beta_start", "beta_end", "steps", "prediction")

UNKNOWN_LICENCE = "unknown: see where the weights come from"


def read_text(path: Path) -> str:
    """Raises ConversionError where it is missing, huge or no text."""
    return files.read_text(path, "a short text file", limit=files.MAX_SETTINGS, error=ConversionError)


def read_json(path: Path, form: files.Form = dict) -> dict[str, Any]:
    """A JSON object. Raises ConversionError."""
    return files.read_json(path, form, error=ConversionError)


def parsed(path: Path, config: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], T]) -> T:
    """parse(config), with errors that name the file the config is from. Raises ConversionError."""
    try:
        return parse(config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConversionError(f"{path}: {error}") from error


def schedule_of(config: Mapping[str, Any], place: Path | str) -> dict[str, Any]:
    """{betas, beta_start, beta_end, steps, prediction} and zero_snr where it is on, as diffusion.Schedule has them, of a
    scheduler_config.json.

    Raises ConversionError for a schedule that is not fully said or that we do not have.
    """
    kind = config.get("_class_name", "scheduler")
    missing = [k for k in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps") if k not in config]
    if missing:
        raise ConversionError(f"{place}: this {kind} does not say its {', '.join(missing)}; the schedule is unknown")
    if config["beta_schedule"] not in _BETAS:
        raise ConversionError(f"{place}: beta_schedule is {config['beta_schedule']!r}; known: {tuple(_BETAS)}")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise ConversionError(f"{place}: prediction_type is {prediction!r}; known: {tuple(_PREDICTIONS)}")
    if betas := config.get("trained_betas"):
        raise ConversionError(f"{place}: trained_betas is {str(betas)[:40]}; such betas are not supported")
    found = {
        "betas": _BETAS[config["beta_schedule"]],
        "beta_start": config["beta_start"],
        "beta_end": config["beta_end"],
        "steps": config["num_train_timesteps"],
        "prediction": _PREDICTIONS[prediction],
    } | ({"zero_snr": True} if config.get("rescale_betas_zero_snr") else {})
    check_schedule(found, place)
    return found


def check_schedule(schedule: Mapping[str, Any], place: Path | str) -> None:
    """Raises ConversionError where these are not the fields of a Schedule, with sensible numbers."""
    if schedule.keys() - {"zero_snr"} != set(SCHEDULE_FIELDS):
        raise ConversionError(f"{place}: schedule has {sorted(schedule)}; expected {sorted(SCHEDULE_FIELDS)}")
    start, end, steps = schedule["beta_start"], schedule["beta_end"], schedule["steps"]
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (start, end, steps))
    if not numbers or not 0 < start <= end < 1 or not isinstance(steps, int) or not 0 < steps <= 100_000:
        raise ConversionError(f"{place}: betas from {start} to {end} in {steps} steps make no noise schedule")
    try:
        Schedule(**schedule)
    except ValueError as error:
        raise ConversionError(f"{place}: {error}") from error


def licence_of(folder: Path) -> str:
    """What the model card's front matter says, or that it is unknown."""
    card = folder / "README.md"
    if card.is_file():
        data = files.read_bytes(card, "a model card", limit=files.MAX_SETTINGS, error=ConversionError)
        front = re.match(r"---\r?\n(.*?)\n---", data.decode(errors="replace"), re.DOTALL)
        lines = re.findall(r"^license(?:_name)?:[ \t]*['\"]?([^\s'\"#]+)", front[1], re.MULTILINE) if front else []
        if lines:
            # "other" comes with a license_name that says which.
            return lines[-1] if lines[0] == "other" else lines[0]
    return UNKNOWN_LICENCE
