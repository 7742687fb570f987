"""From a recipe and a run folder to the roles that a stage works with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from amenable.data.render import Renderer
from amenable.models.adapters import add_adapter
from amenable.models.export import HEAD_FILE
from amenable.models.load import (
    eos_ids,
    load_causal_lm,
    load_reward_trunk,
    load_tokenizer,
    master_dtype,
    resolve_dtype,
)
from amenable.models.packed_layers import shorten
from amenable.models.pull import resolve_base
from amenable.models.quantised import load_quantised
from amenable.models.roles import Role
from amenable.ranks.group import size
from amenable.ranks.sharding import shard

if TYPE_CHECKING:
    from amenable.config.recipe import Recipe
    from amenable.models.heads import ScalarHead


def best_device() -> torch.device:
    """A CUDA device where there is one, that of this rank where there are several; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device()) if size() > 1 else torch.device("cuda")


def freeze(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Stop training a model; its linear layers keep their weights as autocast would cast them.

    Results stay the same to the last bit. The output head stays as it is, since it may be the
    embedding, which is not cast.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            module.weight.data = module.weight.data.to(dtype)


@dataclass
class Foundation:
    """What all roles of a run stand on: tokenizer, renderer, precision, and the shared base.

    The base is loaded when the first role asks for it. With LoRA it is loaded once, in the
    compute precision or quantised, and frozen; with full fine-tuning every role loads float32
    weights (float64 in fp64) of its own, whose products are cast once where they are not trained.
    """

    recipe: Recipe
    source: str
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    dtype: torch.dtype
    device: torch.device
    _shared: PreTrainedModel | PeftModel | None = field(default=None, repr=False)
    _bare: list[Role] = field(default_factory=list, repr=False)

    @classmethod
    def open(cls, recipe: Recipe) -> Foundation:
        """Resolve the base model and read its tokenizer; weights stay on disk."""
        source = str(resolve_base(recipe.model.base))
        tokenizer = load_tokenizer(source)
        device = best_device()
        return cls(
            recipe=recipe,
            source=source,
            tokenizer=tokenizer,
            renderer=Renderer.from_recipe(recipe, tokenizer, eos_ids(source, tokenizer)),
            dtype=resolve_dtype(recipe.model.dtype, device),
            device=device,
        )

    def role(
        self,
        name: str,
        start: Path | None = None,
        *,
        head: ScalarHead | None = None,
        train: bool = True,
    ) -> Role:
        """A role that starts from a model folder of this run, or from the base.

        Args:
            name: of the role's adapter.
            start: `models/sft` or `models/reward`, if the role does not start from the base.
            head: scalar head of a reward model or critic.
            train: the role learns; with LoRA one that starts from the base gets an adapter.
        """
        wide = master_dtype(self.dtype)
        if head is not None:
            head.to(self.device, wide)
        if not self.recipe.model.lora.enabled:
            if start is not None and (start / HEAD_FILE).is_file():
                model = load_reward_trunk(start, wide, device=self.device)
            else:
                model = load_causal_lm(start or self.source, wide, device=self.device)
            shorten(model)
            if not train:
                freeze(model, self.dtype)
            if self.recipe.model.shard == "fsdp2" and size() > 1:
                shard(model)
            return Role(model, head=head, dtype=self.dtype)
        if self._shared is None:
            self._shared = self._frozen_base()
        if start is None and not train:
            self._bare.append(Role(self._shared, head=head, dtype=self.dtype))
            return self._bare[-1]
        self._shared = add_adapter(
            self._shared,
            name,
            self.recipe.model.lora,
            seed=self.recipe.seed,
            folder=start / "adapter" if start is not None else None,
            dtype=wide,
        )
        for role in self._bare:  # it must switch off the adapter that has just been put on
            role.model = self._shared
        return Role(self._shared, adapter=name, head=head, dtype=self.dtype)

    def _frozen_base(self) -> PreTrainedModel:
        kind = self.recipe.model.quantise
        if kind == "none":
            base = load_causal_lm(self.source, self.dtype, device=self.device)
            base.requires_grad_(False)
        else:
            base = load_quantised(self.source, kind, self.dtype, self.device)
        shorten(base)
        return base
