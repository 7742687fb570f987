"""What a check found, and what the user reads when it fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One figure against its bound.

    Args:
        check: name, as in `policy.gate_skip`.
        quantity: what was measured, in words; with its unit.
        figure: the number found; NaN fails.
        bound: the largest number allowed.
        detail: where, if the figure is a count.
    """

    check: str
    quantity: str
    figure: float
    bound: float = 0.0
    detail: str = ""

    @property
    def holds(self) -> bool:
        """Whether the figure is within its bound."""
        return self.figure <= self.bound

    def __str__(self) -> str:
        where = f" ({self.detail})" if self.detail else ""
        return f"{self.quantity}: {self.figure:.3g}, allowed {self.bound:.3g}{where}"


def count(check: str, quantity: str, faults: list[str]) -> Finding:
    """A finding that allows no fault and names the first three."""
    named = ", ".join(faults[:3]) + (", …" if len(faults) > 3 else "")
    return Finding(check, quantity, float(len(faults)), detail=named)


@dataclass(frozen=True)
class Advice:
    """Why a check usually fails and what to do."""

    cause: str
    remedy: str


CHECKS = {
    "finite": Advice(
        "a weight is NaN or infinite, or overflows in this precision",
        "copy or train the model again, or set model.dtype = 'fp32'",
    ),
    "pad": Advice(
        "the padding token ends sequences, or has no row in the embedding",
        "give the tokenizer a pad token of its own",
    ),
    "eos": Advice(
        "the ids that end a completion do not fit the model, or stopping is not seen or trained",
        "set eos_token_id in generation_config.json and the tokenizer's eos_token",
    ),
    "dropout": Advice(
        "dropout is on: the policy that is trained is not the one that sampled",
        "set every dropout of the model's configuration to 0 and put the model in eval mode",
    ),
    "ratio": Advice(
        "the forward pass does not repeat: dropout, or kernels that are not deterministic",
        "switch dropout off; choose another attention implementation or model.dtype = 'fp32'",
    ),
    "reference": Advice(
        "policy and reference do not start from the same weights, or share what is trained",
        "run the sft stage again; do not change models/sft by hand",
    ),
    "temperature": Advice(
        "log-probabilities are not those of logits / policy.temperature in plain transformers, or "
        "samples are not drawn from them: temperature, position ids or the output layer differ",
        "leave policy.temperature to one place; report the model's architecture",
    ),
    "padding": Advice(
        "padding changes real tokens: it is attended to, or shifts position ids",
        "check that the model takes attention_mask and position_ids",
    ),
    "neighbours": Advice(
        "rows of a batch change each other: padding is attended to, or rows are mixed up",
        "check that the model takes attention_mask; report its architecture",
    ),
    "group": Advice(
        "completions that share a prompt's row see each other, or have wrong position ids",
        "the model's attention must take a 4-dimensional mask: set another attention "
        "implementation, or policy.samples_per_prompt = 1",
    ),
    "roll-out": Advice(
        "the sampler is not the policy: its weights are stale or wrongly merged, its precision "
        "is another, or its cache, mask or position ids are wrong",
        "refresh the roll-out copy before sampling; report the model's architecture",
    ),
    "gradient": Advice(
        "the loss does not reach exactly what the optimizer updates",
        "check model.lora, and that nothing outside the adapter requires gradients",
    ),
    "reward": Advice(
        "the reward model's score depends on padding or neighbours, is not read at the last real "
        "token, or moves with the policy",
        "train the reward model again; report its architecture",
    ),
    "critic": Advice(
        "the critic's values depend on padding or neighbours, or are read at other tokens",
        "report the model's architecture",
    ),
}
"""Every check with its advice, in the order in which failures are listed."""


def refusal(failed: list[Finding]) -> str:
    """The message of the error: every failing figure, its cause, the remedy and the override."""
    names = [name for name in CHECKS if any(finding.check == name for finding in failed)]
    lines = [
        f"the numerics gate stops before training: {len(names)} of {len(CHECKS)} checks failed."
    ]
    for name in names:
        figures = "; ".join(str(finding) for finding in failed if finding.check == name)
        advice = CHECKS[name]
        lines.append(f"  {name}: {figures}. Likely: {advice.cause}. Remedy: {advice.remedy}.")
    lines.append(f"To train in spite of it: policy.gate_skip = {names!r}".replace("'", '"'))
    return "\n".join(lines)


def report(
    findings: list[Finding], skipped: frozenset[str], more: dict[str, Any]
) -> dict[str, Any]:
    """What `gate.json` holds: figures by check, and whether each holds."""
    checks: dict[str, Any] = {}
    for name in CHECKS:
        own = [finding for finding in findings if finding.check == name]
        if own:
            checks[name] = {
                "holds": all(finding.holds for finding in own),
                "skipped": name in skipped,
                "figures": [
                    {
                        "quantity": finding.quantity,
                        "figure": finding.figure,
                        "bound": finding.bound,
                        **({"detail": finding.detail} if finding.detail else {}),
                    }
                    for finding in own
                ],
            }
    return {"checks": checks, **more}
