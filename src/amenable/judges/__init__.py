"""Who says which of two answers is better: chat models behind HTTP, local models, scores."""

from amenable.judges.types import Judge, Question, Reply, Verdict

__all__ = ["Judge", "Question", "Reply", "Verdict"]
