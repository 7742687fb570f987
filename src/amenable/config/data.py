"""Where the rows come from and how a prompt is put to the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class PromptColumns:
    """The file's own names of what a row holds; empty: the native name."""

    input_text: str = ""
    """Column of the input text, or of a conversation; `turns.0` goes into lists and objects."""

    id: str = ""
    """Column that names the row."""

    group: str = ""
    """Column that names what must stay on one side of a split: a document, a customer."""


@dataclass(frozen=True, kw_only=True)
class DemonstrationColumns(PromptColumns):
    """The same, of demonstrations."""

    output_text: str = ""
    """Column of the answer."""


@dataclass(frozen=True, kw_only=True)
class PreferenceColumns(PromptColumns):
    """The same, of preferences."""

    candidate_0: str = ""
    """Column of one answer."""

    candidate_1: str = ""
    """Column of the other."""

    choice: str = ""
    """Column of the verdict."""

    choice_values: tuple[str, ...] = ()
    """What the verdict says for candidate_0, for candidate_1 and, if it can, for a tie."""

    annotator: str = ""
    """Column that names who chose."""

    weight: str = ""
    """Column of the row's weight in the loss."""

    margin: str = ""
    """Column of the wanted score difference, in logits."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Files of one kind of row, and how they are read."""

    shorthand: ClassVar[str] = "files"

    files: tuple[str, ...] = ()
    """Paths, globs, URLs (`s3://`, `gs://`, `https://`) or data sets of the hub
    (`hub:OWNER/NAME:SPLIT`)."""

    format: str = "auto"
    """Name of a format (`amenable data formats`); `auto` finds it, file by file."""

    reader: str = ""
    """`path/to/file.py:function` or `module:function` that makes native rows of the records of a
    file, for any other shape."""

    def __bool__(self) -> bool:
        """Whether any file is named."""
        return bool(self.files)


@dataclass(frozen=True, kw_only=True)
class PromptSource(SourceConfig):
    """Files of prompts."""

    columns: PromptColumns = PromptColumns()


@dataclass(frozen=True, kw_only=True)
class DemonstrationSource(SourceConfig):
    """Files of demonstrations."""

    columns: DemonstrationColumns = DemonstrationColumns()


@dataclass(frozen=True, kw_only=True)
class PreferenceSource(SourceConfig):
    """Files of preferences."""

    pairs: Literal["all", "best_worst"] = "all"
    """Pairs of a ranking of n answers: every two of them, or the best and the worst."""

    columns: PreferenceColumns = PreferenceColumns()


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Input files (or the built-in task), prompt rendering and split sizes."""

    task: Literal["files", "docstrings"] = "files"
    """`files` reads the paths below; `docstrings` harvests the built-in task from packages."""

    demonstrations: DemonstrationSource = DemonstrationSource()
    """An input text and its answer, for supervised fine-tuning; a list names files."""

    preferences: PreferenceSource = PreferenceSource()
    """An input text, two candidates and a choice, for the reward model; a list names files."""

    prompts: PromptSource = PromptSource()
    """Input texts that the policy is trained on; a list names files."""

    evaluation_prompts: PromptSource = PromptSource()
    """Held-out input texts; no file: the `test_share` of `prompts` is held out."""

    on_error: Literal["fail", "drop"] = "fail"
    """`fail` ends at the first faulty row; `drop` leaves faulty rows out, counted by reason."""

    content_checks: bool = True
    """Look for duplicates, leaks, biased or contradictory labels; told, and no row is dropped."""

    token_checks: bool = True
    """Render a sample with the base model's tokenizer before a weight is loaded: cuts, EOS, BOS."""

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

    test_share: float = 0.1
    """Share of the prompts, by the hash of their group, that is held out for testing."""

    validation_share: float = 0.05
    """The next share: its demonstrations and preferences choose the best checkpoint."""

    validation_rows: int = 64
    """Use at most this many demonstrations and preferences to choose the best checkpoint."""

    evaluation_rows: int = 400
    """At most this many held-out prompts (Side-by-Side) and preferences (the reward's report)."""

    max_words: int = 60
    """Built-in task only: longest explanation, in words."""
