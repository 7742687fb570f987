"""A random two-layer Llama and a tokenizer trained on the text below: seconds to use, no download.

Same seed and versions, same bytes. It serves tests and `examples/tiny.toml`; it knows nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from amenable.artifacts import atomic_dir
from amenable.models.quiet import without_bars

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCAB_SIZE = 512
SEED = 20240607
SPECIAL_TOKENS = ("<pad>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tiny(path: Path) -> Path:
    """Writes the tiny model as a Hugging Face folder, atomically, and returns `path`.

    Hidden size 64, 4 heads, 2 key/value heads, tied embeddings, 512 tokens, float32.

    Raises:
        StorageError: the folder cannot be written.
    """
    with atomic_dir(path) as out:
        write_tiny(out)
    return path


def write_tiny(out: Path) -> None:
    """Writes model and tokenizer into an existing folder."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    ids = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    with without_bars():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of 512 tokens with pad, start and end marks and a ChatML template.

    It reads any text back exactly; ids 0, 1, 2 are `SPECIAL_TOKENS`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


TEXT = '''\
A person reads two answers to the same question and says which of the two is better.
Many such choices together tell a machine what people want from it, although nobody wrote it down.
First the model learns from good examples. Then a second model learns to predict the choices.
At last the first model tries many answers, and the second model tells it which were good.
It must not wander too far from where it started, or it will find words that please the judge only.
user
Summarize the following text in one sentence.
assistant
Return the sum of the values in the list.
The function opens the file, reads every line, and returns a list of the words in it.
Raise an error if the name is not known, and say what to do about it.
Return True if the given object is a string, and False otherwise.
Write the table to a file. If the file exists already, it is replaced.
Convert the number to text with the given number of digits after the point.
This class holds the state of a parser. It is made once and used for all the files of a project.
Compute the mean and the variance of each column; empty columns give zero.
Create a new socket, connect it to the address, and wait until the other side has answered.
def mean(values):
    """Return the mean of the values."""
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

class Stack:
    """A list of items of which only the last can be taken."""

    def __init__(self, items=()):
        self.items = list(items)

    def push(self, item):
        """Put an item on the top of the stack."""
        self.items.append(item)

    def pop(self):
        """Take the item from the top of the stack and return it."""
        if not self.items:
            raise IndexError("the stack is empty")
        return self.items.pop()

The rain came in the morning and stayed until the evening. The children looked out of the window.
In the kitchen there was bread, and milk, and the last of the summer's apples in a wooden bowl.
When the sun came back they went down to the river, where the water was brown and very quick.
"Can we cross it?" asked the younger one. "Not today," said the other, "but perhaps on Sunday."
They built a small boat of bark and let it go. It turned around three times and was gone.
Long trains leave the city at 6:15, 7:40 and 12:30; the slow one stops at every village.
There are 365 days in most years, 24 hours in each day, and never quite enough of them.
Water boils at 100 degrees, freezes at 0, and is heaviest at about 4.
The first library had no catalogue: one asked the keeper, and the keeper remembered.
What is the name of the longest river? What is the largest lake? Which mountain is the highest?
A short answer is often better than a long one, if it says the thing that was asked for.
Check the input before you use it. Close what you have opened. Name things for what they are.
'''
