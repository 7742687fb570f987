"""The numerics gate: before the first update, does this model behave as the algorithms assume?"""

from amenable.train.gate.run import run_gate

__all__ = ["run_gate"]
