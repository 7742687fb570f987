"""Where the rows come from and how a prompt is put to the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Input files (or the built-in task), prompt rendering and split sizes."""

    task: Literal["files", "docstrings"] = "files"
    """`files` reads the paths below; `docstrings` harvests the built-in task from packages."""

    demonstrations: tuple[str, ...] = ()
    """Files of `{input_text, output_text}` rows, for supervised fine-tuning."""

    preferences: tuple[str, ...] = ()
    """Files of `{input_text, candidate_0, candidate_1, choice}` rows, for the reward model."""

    prompts: tuple[str, ...] = ()
    """Files of `{input_text}` rows that the policy is trained on."""

    evaluation_prompts: tuple[str, ...] = ()
    """Held-out `{input_text}` rows; empty: `evaluation_rows` prompts are held out of `prompts`."""

    instruction: str = ""
    """Put before every input text, with an empty line between."""

    system_message: str = ""
    """System message of the chat template; empty leaves the template's own default."""

    max_prompt_tokens: int = 512
    """Longer prompts lose the end of their last user text, never the template."""

    max_completion_tokens: int = 64
    """Longest completion in training and roll-out, its end-of-sequence token included."""

    max_demonstrations: int = 0
    """Use at most this many demonstrations (a seeded draw); 0 uses all."""

    max_preferences: int = 0
    """Use at most this many preference rows for training; 0 uses all."""

    max_prompts: int = 0
    """Use at most this many training prompts; 0 uses all."""

    validation_rows: int = 64
    """Rows kept from demonstrations and from preferences to choose the best checkpoint."""

    evaluation_rows: int = 400
    """Held-out prompts for Side-by-Side, and held-out preferences for the reward model's report."""

    max_words: int = 60
    """Built-in task only: longest explanation, in words."""
