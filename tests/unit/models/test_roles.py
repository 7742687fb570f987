from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amenable.config.model import LoraConfig
from amenable.data.collate import PromptGroup, collate
from amenable.models.adapters import add_adapter
from amenable.models.heads import ScalarHead
from amenable.models.roles import Role

from .conftest import build

LORA = LoraConfig(rank=4, alpha=8.0)
BATCH = collate([PromptGroup([5, 9, 300], [[41, 17, 2], [8, 260, 77, 12, 2]])], pad_id=0)


def shared_roles() -> dict[str, Role]:
    model = build("Llama").requires_grad_(False)
    wrapped = add_adapter(model, "policy", LORA, seed=0)
    for name in ("reference", "critic"):
        wrapped = add_adapter(wrapped, name, LORA, seed=0)
    return {
        "base": Role(wrapped),
        "policy": Role(wrapped, adapter="policy"),
        "reference": Role(wrapped, adapter="reference"),
        "critic": Role(wrapped, adapter="critic", head=ScalarHead(32)),
    }


def logprobs(role: Role) -> Tensor:
    with torch.no_grad():
        return role.logprobs(BATCH).logprobs


def train(role: Role, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(role.trainable_parameters(), lr=0.5)
    for _ in range(steps):
        (-role.logprobs(BATCH).logprobs[BATCH.mask].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_one_role_leaves_base_and_reference_as_they_were() -> None:
    roles = shared_roles()
    before = {name: logprobs(role) for name, role in roles.items()}
    weights = {key: t.clone() for key, t in roles["policy"].model.state_dict().items()}
    assert torch.equal(before["policy"], before["base"]), "a fresh adapter changes nothing"
    train(roles["policy"])
    after = {name: logprobs(role) for name, role in roles.items()}
    assert (after["policy"] - before["policy"]).abs().max() > 0.1, "the policy must have learnt"
    for name in ("base", "reference", "critic"):
        assert torch.equal(after[name], before[name]), name
    changed = {
        key
        for key, tensor in roles["policy"].model.state_dict().items()
        if not torch.equal(tensor, weights[key])
    }
    assert changed
    assert all(".policy." in key for key in changed)


def test_all_roles_stand_on_one_base() -> None:
    roles = shared_roles()
    assert len({id(role.plain) for role in roles.values()}) == 1
    names = dict(roles["base"].plain.named_parameters())
    assert sum("embed_tokens" in key for key in names) == 1


def test_roles_may_be_used_in_any_order_within_one_step() -> None:
    """The gradient of the policy does not depend on other roles' forward passes in between."""

    def gradients(interleave: bool) -> list[Tensor]:
        roles = shared_roles()
        roles["policy"].logprobs(BATCH).logprobs[0].sum().backward()
        if interleave:
            logprobs(roles["reference"])
            roles["critic"].values(BATCH).sum().backward()
            logprobs(roles["base"])
        roles["policy"].logprobs(BATCH).logprobs[1].sum().backward()
        found = [p.grad for p in roles["policy"].trainable_parameters()]
        assert all(grad is not None for grad in found)
        return [grad for grad in found if grad is not None]

    for one, two in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(one, two)
    assert any(grad.abs().max() > 0 for grad in gradients(False))


def test_what_an_optimizer_gets() -> None:
    roles = shared_roles()
    assert roles["base"].trainable_parameters() == []
    policy = {id(p) for p in roles["policy"].trainable_parameters()}
    critic = {id(p) for p in roles["critic"].trainable_parameters()}
    assert len(policy) == 28
    assert len(critic) == 29, "28 matrices and the head"
    assert not policy & critic
    owned = Role(build("Llama"), head=ScalarHead(32))
    assert len(owned.trainable_parameters()) == len(list(owned.plain.parameters())) + 1


def test_a_role_without_head_has_no_scores() -> None:
    with pytest.raises(ValueError, match="this role has no scalar head"):
        shared_roles()["policy"].scores(BATCH)


@pytest.mark.parametrize("kind", ["adapter", "owned"])
def test_state_brings_a_role_back(kind: str) -> None:
    role = (
        shared_roles()["critic"] if kind == "adapter" else Role(build("Llama"), head=ScalarHead(32))
    )
    saved = role.state()

    def figures() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            return role.logprobs(BATCH).logprobs, role.scores(BATCH), role.values(BATCH)

    before = figures()
    train(role)
    role.scalar_head.weight.data.add_(1.0)
    assert not any(torch.equal(a, b) for a, b in zip(before, figures(), strict=True))
    role.load_state(saved)
    assert all(torch.equal(a, b) for a, b in zip(before, figures(), strict=True))


def test_owned_models_are_apart() -> None:
    policy, reference = Role(build("Llama")), Role(build("Llama"))
    before = logprobs(reference)
    train(policy)
    assert torch.equal(logprobs(reference), before)
    assert not torch.equal(logprobs(policy), before)


def test_half_precision_gives_float32_numbers_near_the_exact_ones() -> None:
    exact, half = Role(build("Llama")), Role(build("Llama"), dtype=torch.bfloat16)
    found = logprobs(half)
    assert found.dtype is torch.float32
    assert not torch.equal(found, logprobs(exact)), "autocast must be on"
    torch.testing.assert_close(found, logprobs(exact), rtol=0.1, atol=0.3)


SPLIT = [PromptGroup([1] * size, [[2] * 2, [3]]) for size in (3, 6, 1)]
"""6, 9 and 4 tokens, prompt and all completions counted."""


def test_packed_groups_are_split_by_their_tokens() -> None:
    """Longest first, each where there is room: 9 alone, 6 and 4 together."""
    assert Role(build("Llama")).split(SPLIT, 10) == [[1], [0, 2]]


def test_other_groups_are_split_by_padded_rows() -> None:
    """Gemma 2 slides: 6 and 4 side by side would be 12 columns, a third of 6 beside 9 padding."""
    role = Role(build("Gemma2"))
    assert role.split(SPLIT, 10) == [[1], [0], [2]]
    assert role.split(SPLIT[:2], 18) == [[1], [0]]
    assert role.split(SPLIT[:2], 40) == [[1, 0]], "too few tokens to leave it out"
