"""What would not fit, and which settings of the recipe would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from amenable.config.load import build_section, recipe_to_dict
from amenable.config.recipe import Recipe
from amenable.errors import AmenableError, UsageError
from amenable.models.check import TRANSPOSED
from amenable.plan.forecast import LEAST_TOKENS, Forecast, forecast

CERTAIN = 0.6
"""A run is refused when this share of its forecast is already more than the machine has."""

_WORTH_IT = 0.99  # of the peak before; a setting that saves less is left as it is


def remedies(found: Forecast) -> tuple[list[str], Forecast]:
    """Settings that take less memory, each on top of those before, until the run fits.

    Returns:
        The settings as `--set` takes them, and the forecast with all of them, which may still not
        fit.
    """
    best, settings = found, list[str]()
    for key, value in _candidates(found):
        if best.fits:
            break
        try:
            recipe = _changed(best.recipe, key, value)
        except AmenableError:
            continue  # the recipe's algorithm cannot have it
        tried = forecast(recipe, found.shape, found.rows, found.machine)
        if tried.peak_bytes < _WORTH_IT * best.peak_bytes:
            best = tried
            settings.append(f"{key}={str(value).lower()}")
    return settings, best


def refusal(found: Forecast) -> str:
    """What does not fit and what would, in a line."""
    worst = max(found.stages, key=lambda stage: stage.memory.total)
    largest = sorted(worst.memory.parts.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in largest)
    settings, then = remedies(found)
    least = gigabytes(then.peak_bytes)
    words = " ".join(f"--set {setting}" for setting in settings)
    if then.fits:
        remedy = f"it would fit with {words}: {least}"
    else:
        with_them = f" with {words}" if words else ""
        remedy = f"{least}{with_them} is the least that settings reach; take a smaller model.base"
    return (
        f"{found.shape.name} does not fit: stage {worst.name} would take "
        f"{gigabytes(worst.memory.total)} ({parts}), and {found.machine.name} has "
        f"{gigabytes(found.machine.memory_bytes)}; {remedy}"
    )


def refuse(found: Forecast) -> None:
    """Returns when the run may fit.

    Raises:
        UsageError: it cannot, even if the forecast is two thirds too high.
    """
    if CERTAIN * found.peak_bytes > found.machine.memory_bytes:
        raise UsageError(refusal(found))


def gigabytes(size: float) -> str:
    """Bytes in GB of 1e9, or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 0.95e8 else f"{size / 1e6:.0f} MB"


def _candidates(found: Forecast) -> Iterator[tuple[str, Any]]:
    """What to try, the least harmful first."""
    recipe = found.recipe
    if not recipe.model.lora.enabled:
        yield "model.lora.enabled", True
    for batch in found.micro_batches:
        if batch.chosen > batch.longest_row:
            yield batch.key, max(LEAST_TOKENS, batch.longest_row)
    yield "policy.merged_rollouts", False
    yield "policy.ppo.critic", "head"
    yield "evaluate.batch_size", min(8, recipe.evaluate.batch_size)
    if found.machine.dtype(recipe.model.dtype).itemsize > 2:
        yield "model.dtype", "bf16"
    if found.shape.config.model_type not in TRANSPOSED:
        yield "model.quantise", "nf4"


def _changed(recipe: Recipe, key: str, value: Any) -> Recipe:
    """The recipe with one key set.

    Raises:
        RecipeError: it does not go with the others.
    """
    values = recipe_to_dict(recipe)
    section = values
    *outer, name = key.split(".")
    for part in outer:
        section = section[part]
    section[name] = value
    return build_section(Recipe, values, key)
