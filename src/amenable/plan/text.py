"""A forecast as aligned text."""

from __future__ import annotations

from amenable.plan.forecast import Forecast
from amenable.plan.remedy import gigabytes, refusal
from amenable.progress import duration


def lines(found: Forecast) -> list[str]:
    """The forecast as aligned text."""
    shape, machine, lora = found.shape, found.machine, found.recipe.model.lora
    how = f"LoRA rank {lora.rank}" if lora.enabled else "every weight"
    if found.recipe.model.quantise != "none":
        how += f" on a base in {found.recipe.model.quantise}"
    tied = ", also the output projection" if shape.tied else f", output projection {shape.head:,}"
    cards = f", of which a process uses one of {machine.cards}" if machine.cards > 1 else ""
    text = [
        f"model     {shape.name}: {shape.parameters:,} weights ({shape.linear:,} in linear layers, "
        f"embedding {shape.embedding:,}{tied})",
        f"trained   {how}: {found.trained:,} weights a role, computed in "
        f"{str(machine.dtype(found.recipe.model.dtype)).removeprefix('torch.')}",
        f"hardware  {machine.name}: {gigabytes(machine.memory_bytes)}{cards}",
        f"rows      {found.rows.origin}",
        f"times     {found.rates.origin}",
        "",
        f"{'stage':<9}{'tokens':>12}{'FLOP':>10}{'time':>14}{'peak memory':>13}  in its phase",
    ]
    text += [
        f"{s.name:<9}{s.work.tokens:>12,.0f}{s.flops:>10.1e}{duration(s.seconds):>14}"
        f"{gigabytes(s.memory.total):>13}  {s.memory.phase}"
        for s in found.stages
    ]
    text += [
        f"{'all':<9}{sum(s.work.tokens for s in found.stages):>12,.0f}"
        f"{sum(s.flops for s in found.stages):>10.1e}{duration(found.seconds):>14}"
        f"{gigabytes(found.peak_bytes):>13}",
        "",
        "memory by part",
    ]
    for s in found.stages:
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in s.memory.parts.items())
        text.append(f"  {s.name:<9}{parts}")
    text += ["", "micro-batches, tokens"]
    for batch in found.micro_batches:
        fits = f"up to {batch.most:,} would fit" if batch.most else "not even one row fits"
        text.append(f"  {batch.key} = {batch.chosen:,}; longest row {batch.longest_row}; {fits}")
    total = sum(found.disk.values())
    disk = ", ".join(f"{name} {gigabytes(size)}" for name, size in found.disk.items())
    text += ["", f"disk      {gigabytes(total)}: {disk}", ""]
    return [*text, "fits" if found.fits else f"does not fit: {refusal(found)}"]
