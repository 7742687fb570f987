"""Problems small enough to enumerate: alphabet, prompts, reference policy, reward, KL weight.

Text and ids map to each other one to one: every letter is a token, a text shorter than the limit
ends with the end-of-sequence token, one at the limit was cut off.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from amenable.models.quiet import without_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Floats = npt.NDArray[np.float64]

PAD_ID, EOS_ID = 0, 1
REWARD = "amenable.lab.problems:present_scores"
"""What `policy.reward` names in the lab: the rewards of the problem that `present` put up."""

_LLAMA_LAYERS, _LLAMA_SIZE = 2, 32
_HELD_COORDINATE = 4.0  # of every embedding: it keeps the pad token's logit far below the others
_PAD_WEIGHT = -40.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One cell of the lab before an algorithm is chosen.

    Args:
        name: in the table.
        letters: the alphabet.
        prompts: of equal length. A Llama needs two different letters: without a token that tells
            the start, it takes "a" and "aaa" for the same.
        max_tokens: longest completion, its end-of-sequence token included.
        model: "table" (free logits for every prefix) or "llama" (a tiny transformer).
        reward: "random" (normal, one a sequence), "levels" (three levels), "structured".
        beta: weight of the KL term, in reward a nat.
        kl: KL(reference || optimum) that the reward is scaled to, nats, mean over prompts.
        seed: of reference and reward.
    """

    name: str
    letters: str
    prompts: tuple[str, ...]
    max_tokens: int
    model: Literal["table", "llama"]
    reward: Literal["random", "levels", "structured"]
    beta: float
    kl: float
    seed: int

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Every completion, shorter ones first: S = sum over 0..max_tokens of letters^length."""
        return tuple(
            "".join(word)
            for length in range(self.max_tokens + 1)
            for word in itertools.product(self.letters, repeat=length)
        )

    @property
    def vocab_size(self) -> int:
        """Letters, pad and end of sequence."""
        return len(self.letters) + 2

    def completion_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text, end of sequence included where it fits."""
        ids = tuple(self.letters.index(letter) + 2 for letter in text)
        return ids if len(ids) == self.max_tokens else (*ids, EOS_ID)

    def prompt_ids(self, prompt: str) -> tuple[int, ...]:
        """Token ids of a prompt."""
        return tuple(self.letters.index(letter) + 2 for letter in prompt)

    def raw_rewards(self) -> Floats:
        """[P, S] rewards before they are scaled."""
        shape = (len(self.prompts), len(self.texts))
        generator = np.random.default_rng(self.seed)
        if self.reward == "random":
            return generator.standard_normal(shape)
        if self.reward == "levels":
            return generator.choice([0.0, 0.5, 1.0], size=shape, p=[0.4, 0.35, 0.25])
        return np.array(
            [[_structured(prompt, text) for text in self.texts] for prompt in self.prompts]
        )


def _structured(prompt: str, text: str) -> float:
    """Letters that repeat the prompt's first, less the distance from two letters."""
    return text.count(prompt[0]) - 0.7 * abs(len(text) - 2)


PROBLEMS = (
    Problem(
        name="random table",
        letters="abc",
        prompts=("a", "b"),
        max_tokens=3,
        model="table",
        reward="random",
        beta=0.05,
        kl=0.8,
        seed=1,
    ),
    Problem(
        name="levels table",
        letters="ab",
        prompts=("a", "b"),
        max_tokens=5,
        model="table",
        reward="levels",
        beta=0.3,
        kl=0.7,
        seed=2,
    ),
    Problem(
        name="structured llama",
        letters="abc",
        prompts=("ab", "ba"),
        max_tokens=3,
        model="llama",
        reward="structured",
        beta=1.0,
        kl=0.8,
        seed=3,
    ),
)
"""The table: KL weights 0.05 to 1, at most 500 completions a prompt."""


def write_model(problem: Problem, folder: Path) -> Path:
    """Writes reference model and tokenizer as a Hugging Face folder; the same bytes each time."""
    import torch

    from amenable.lab.prefix_table import register

    register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        model = _table(problem) if problem.model == "table" else _llama(problem)
    with without_bars():
        model.save_pretrained(folder)
    tokenizer(problem).save_pretrained(folder)
    return folder


def _table(problem: Problem) -> PreTrainedModel:
    import torch

    from amenable.lab.prefix_table import PrefixTableConfig, PrefixTableForCausalLM

    tokens = len(problem.prompts[0]) + problem.max_tokens
    config = PrefixTableConfig(problem.vocab_size, tokens, eos_token_id=EOS_ID)
    model = PrefixTableForCausalLM(config)
    with torch.no_grad():
        model.model.table.weight.mul_(0.7)
        model.model.table.weight[:, EOS_ID - 1] -= 0.5
    return model


def _llama(problem: Problem) -> PreTrainedModel:
    """A random Llama whose predictions differ by prefix and never fall on the pad token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=problem.vocab_size,
        hidden_size=_LLAMA_SIZE,
        intermediate_size=2 * _LLAMA_SIZE,
        num_hidden_layers=_LLAMA_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, weight.shape[1] ** -0.5)
            if name == "lm_head.weight":
                weight.mul_(0.8)
                weight[:, 0] = 0.0
                weight[PAD_ID] = 0.0
                weight[PAD_ID, 0] = _PAD_WEIGHT
            if name == "model.embed_tokens.weight":
                weight.normal_(0.0, 1.0)
                weight[:, 0] = _HELD_COORDINATE
    return model


def tokenizer(problem: Problem) -> PreTrainedTokenizerBase:
    """One token a letter; its chat template is the text itself."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD_ID, "<eos>": EOS_ID}
    words |= {letter: index + 2 for index, letter in enumerate(problem.letters)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


_present: dict[tuple[str, str], float] = {}


def present(problem: Problem, rewards: Floats) -> None:
    """Put up the rewards [P, S] that `present_scores` answers with, in this process."""
    _present.clear()
    for prompt, row in zip(problem.prompts, rewards.tolist(), strict=True):
        _present.update({(prompt, text): r for text, r in zip(problem.texts, row, strict=True)})


def present_scores(
    prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[float]:
    """Exact rewards of the present problem."""
    return [_present[pair] for pair in zip(prompts, completions, strict=True)]
