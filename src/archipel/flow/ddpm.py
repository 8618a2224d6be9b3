"""Discrete DDPM schedules, as diffusers' configuration files describe them: what released weights were trained on.

Source: Ho et al., DDPM (arXiv 2006.11239), section 2; CogVideoX (arXiv 2408.06072) for the shift and the zero terminal SNR
(Lin et al., arXiv 2305.08891, algorithm 1). tests hold the numbers to diffusers' ``CogVideoXDDIMScheduler``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from archipel.errors import ConfigError

CLASSES = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "rescale_betas_zero_snr": False,
    "snr_shift_scale": 3.0,
    "prediction_type": "epsilon",
}


def recipe(scheduler: Mapping[str, Any], where: str = "scheduler_config.json") -> dict[str, Any]:
    """What of a ``scheduler_config.json`` says the schedule and the prediction, with diffusers' defaults filled in.

    Raises ConfigError for a class, a prediction or a schedule that is not known here, naming ``where``.
    """
    kind = scheduler.get("_class_name")
    if kind not in CLASSES:
        raise ConfigError(f"{where}: _class_name is {kind!r}, expected {' or '.join(CLASSES)}")
    if scheduler.get("trained_betas") is not None:
        raise ConfigError(f"{where}: trained_betas are not supported: CogVideoX's own schedules have none")
    found = {key: scheduler.get(key, default) for key, default in _DEFAULTS.items()}
    if found["prediction_type"] != "v_prediction":
        raise ConfigError(
            f"{where}: prediction_type is {found['prediction_type']!r}; weights on this schedule are read as v_prediction only"
        )
    try:
        table = alphas_cumprod(found)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} does not describe a schedule ({error})") from error
    if len(table) < 2 or not np.isfinite(table).all() or (np.diff(table) >= 0).any() or table[0] >= 1 or table[-1] < 0:
        raise ConfigError(f"{where} does not describe a schedule: alphas_cumprod must fall within [0, 1)")
    return found


def alphas_cumprod(schedule: Mapping[str, Any]) -> np.ndarray:
    """alpha'^2 of every step, (S,) float64, falling. Raises ValueError for an unknown ``beta_schedule``."""
    steps, start, end = (schedule[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
    if not isinstance(steps, int) or not 2 <= steps <= 100_000:
        raise ValueError(f"num_train_timesteps is {steps!r}, expected 2 to 100000")
    kind = schedule["beta_schedule"]
    if kind == "linear":
        betas = np.linspace(start, end, steps)
    elif kind == "scaled_linear":
        betas = np.linspace(math.sqrt(start), math.sqrt(end), steps) ** 2
    elif kind == "squaredcos_cap_v2":  # arXiv 2102.09672, eq. 17
        bars = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - bars[1:] / bars[:-1], 0.999)
    else:
        raise ValueError(f"beta_schedule {kind!r} is not known")
    table = np.cumprod(1 - betas)
    shift = float(schedule["snr_shift_scale"])
    table = table / (shift + (1 - shift) * table)  # the log-SNR falls by log(shift)
    if schedule["rescale_betas_zero_snr"]:
        root = np.sqrt(table)
        table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return np.asarray(table, dtype=np.float64)
