"""The check of identities: what must hold exactly, in the real code, against brute force.

They run on the problems of the gradient check, whose completions are enumerated by the model's
plain forward pass, and at a policy far from the reference.

P prompts, S completions, N completions of a batch, C tokens of the longest.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from amenable.errors import AmenableError
from amenable.lab import formula_identities as formulas
from amenable.lab.bench import FAR, Bench, Finding, crowded, plain_table
from amenable.lab.expected_gradients import enumerate_tokens
from amenable.lab.gradient_cells import CELLS
from amenable.lab.gradients import LEVEL, recorded_gradients
from amenable.lab.places import POINTS, Place, problem_named
from amenable.lab.problems import EOS_ID, PAD_ID
from amenable.lab.recording import Watched
from amenable.lab.rows import Job, Options, Row
from amenable.models import logprobs as passes
from amenable.rollout.transformers_engine import TransformersEngine
from amenable.rollout.types import Request, Sampling

CHECK = "identity"
FLOAT32 = 3e-5
"""Nats that two ways to one log-probability may differ in float32."""

_TEMPERATURE = 0.7
_GROUP = 5
_DRAWS = 2500
_ACCUMULATED = ("ppo", "reinforce++", "grpo", "dapo", "best-of-n")


def _against_plain(bench: Bench, together: int, temperature: float = 1.0) -> Finding:
    batch, places = crowded(bench, together)
    model = bench.place.policies[FAR]
    with torch.no_grad():
        found = passes.completion_logprobs(model, batch, temperature=temperature).logprobs.double()
        table, _ = enumerate_tokens(bench.problem, model, temperature)
    wanted = torch.stack([table[p, n] for p, n in places])
    return Finding(float((found - wanted).abs().max()), FLOAT32, "nats a token")


def padding(bench: Bench) -> Finding:
    """A completion among longer ones has the log-probabilities that it has alone."""
    return _against_plain(bench, 1)


def neighbours(bench: Bench) -> Finding:
    """Completions that share a row with others have the log-probabilities that they have alone."""
    return _against_plain(bench, _GROUP)


def temperature(bench: Bench) -> Finding:
    """Log-probabilities at a temperature are those of the logits divided by it."""
    return _against_plain(bench, _GROUP, _TEMPERATURE)


def last_states(bench: Bench) -> Finding:
    """The reward model reads the state at a completion's last token."""
    batch, places = crowded(bench, _GROUP)
    model, problem = bench.place.policies[FAR], bench.problem
    trunk, worst = passes.trunk_of(model), 0.0
    with torch.no_grad():
        found = passes.completion_states(model, batch).last
        for (p, n), state in zip(places, found, strict=True):
            ids = [*problem.prompt_ids(problem.prompts[p]), *_ids(bench, n)]
            alone = trunk(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            worst = max(worst, float((alone - state).abs().max()))
    return Finding(worst, FLOAT32, "in a state's coordinate")


def _ids(bench: Bench, number: int) -> tuple[int, ...]:
    return bench.problem.completion_ids(bench.problem.texts[number])


def end_of_sequence(bench: Bench) -> Finding:
    """The end token is under the mask, once, where a completion ended; else there is none."""
    wrong = count = 0
    for update in bench.run[0]:
        for micro in update.micros:
            for row, episode in enumerate(micro.episodes):
                kept = micro.batch.targets[row][micro.batch.mask[row]].tolist()
                ended = len(episode.text) < bench.problem.max_tokens
                ends = [place for place, token in enumerate(kept) if token == EOS_ID]
                wanted = [len(episode.text)] if ended else []
                wrong += ends != wanted or len(kept) != len(episode.text) + ended
                wrong += episode.rollout.ended is not ended
                count += 1
    return Finding(float(wrong), 0.0, f"of {count} sampled completions")


def whole_mass(bench: Bench) -> Finding:
    """The probabilities of all completions, end token included, sum to 1."""
    batch, places = crowded(bench, _GROUP)
    with torch.no_grad():
        found = passes.completion_logprobs(bench.place.policies[FAR], batch).logprobs.double()
    mass = torch.zeros(len(bench.problem.prompts), dtype=torch.float64)
    kept = torch.where(batch.mask, found, 0.0).sum(1).exp()
    mass.index_add_(0, torch.tensor([p for p, _ in places]), kept)
    return Finding(float((mass - 1).abs().max()), FLOAT32, "of probability")


def roll_outs(bench: Bench) -> Finding:
    """Completions come as often as their probability says, at a temperature (chi-square)."""
    problem, model = bench.problem, bench.place.policies[FAR]
    engine = TransformersEngine(model, eos_ids=frozenset([EOS_ID]), pad_id=PAD_ID, batch_size=1000)
    with torch.no_grad():
        table = enumerate_tokens(problem, model, _TEMPERATURE)[0].sum(2).exp().numpy()
    numbers = {problem.completion_ids(text): n for n, text in enumerate(problem.texts)}
    statistic, freedom = 0.0, 0
    for p, prompt in enumerate(problem.prompts):
        ids = problem.prompt_ids(prompt)
        requests = [Request(ids, (0, p, "lab", k)) for k in range(_DRAWS)]
        sampling = Sampling(max_new_tokens=problem.max_tokens, temperature=_TEMPERATURE)
        counts = np.zeros(len(problem.texts))
        for rollout in engine.generate(requests, sampling):
            counts[numbers[rollout.completion_ids]] += 1
        wanted = _DRAWS * table[p]
        often = wanted >= 5
        pairs = [*zip(counts[often], wanted[often], strict=True)]
        pairs.append((counts[~often].sum(), wanted[~often].sum()))
        statistic += sum((c - w) ** 2 / w for c, w in pairs if w > 0)
        freedom += len(pairs) - 1
    test = stats.chi2(freedom)
    value = min(1.0, 2 * float(min(test.cdf(statistic), test.sf(statistic))))
    return Finding(-math.log10(max(value, 1e-300)), -math.log10(LEVEL), "minus log10 of p")


def first_ratio(bench: Bench) -> Finding:
    """Before an update's first step every ratio is 1."""
    return Finding(max(bench.run[1]), 1e-6, f"in {len(bench.run[1])} forward passes")


def old_logprobs(bench: Bench) -> Finding:
    """What an update calls old is the policy that sampled, not an earlier one."""
    worst = 0.0
    for update in bench.run[0]:
        table, _ = plain_table(bench, update.policy)
        worst = max(worst, _apart(bench, [update], table, "logprobs"))
    return Finding(worst, FLOAT32, "nats a token")


def reference_logprobs(bench: Bench) -> Finding:
    """The reference stays what it was at the start."""
    table, _ = plain_table(bench, bench.place.policies[POINTS[0]])
    return Finding(_apart(bench, bench.run[0], table, "ref_logprobs"), FLOAT32, "nats a token")


def _apart(bench: Bench, updates: Sequence[Watched], table: Tensor, name: str) -> float:
    worst = 0.0
    for update in updates:
        for micro in update.micros:
            found = getattr(micro, name).double()
            for row, episode in enumerate(micro.episodes):
                p = bench.problem.prompts.index(episode.prompt.text)
                wanted = table[p, bench.numbers[episode.text]][: found.shape[1]]
                worst = max(worst, float((found[row] - wanted).abs().max()))
    return worst


def token_rewards(bench: Bench) -> Finding:
    """Score minus beta times the sequence KL, the score on the last token."""
    updates, _, penalty = bench.run
    beta, worst = bench.problem.beta, 0.0
    for update in updates:
        for micro in update.micros:
            found = penalty.token_rewards(micro, beta).double()
            for row, episode in enumerate(micro.episodes):
                p = bench.problem.prompts.index(episode.prompt.text)
                difference = (micro.logprobs - micro.ref_logprobs)[row].double()
                wanted = -beta * difference * micro.batch.mask[row]
                last = len(episode.rollout.completion_ids) - 1
                wanted[last] += bench.place.world.rewards[p, bench.numbers[episode.text]]
                worst = max(worst, float((found[row] - wanted).abs().max()))
    return Finding(worst, FLOAT32, "of reward a token")


def accumulation(bench: Bench) -> Finding:
    """A batch in many micro-batches has the gradient that it has in one."""
    worst, note = 0.0, ""
    for name in _ACCUMULATED:
        cell = next(cell for cell in CELLS if cell.algorithm == name)
        axes = _axes(bench.place.policies[FAR])
        one, many = [
            recorded_gradients(
                bench.place,
                cell,
                FAR,
                bench.folder(f"{name} {tokens}"),
                axes,
                batches=2,
                changes={"policy.micro_batch_tokens": tokens},
            )
            for tokens in (10**6, 40)
        ]
        off = float((many - one).norm() / one.norm())
        worst, note = max((worst, note), (off, name))
    return Finding(worst, 1e-5, f"of the gradient's length; worst: {note}")


def _axes(model: PreTrainedModel) -> Tensor:
    """[D, 8] random directions."""
    size = sum(weight.numel() for weight in model.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 8, generator=generator, dtype=torch.float64)


TABLE: dict[str, Callable[[Bench], Finding]] = {
    "padding": padding,
    "neighbours": neighbours,
    "temperature": temperature,
    "state at the last token": last_states,
    "end of sequence": end_of_sequence,
    "whole mass": whole_mass,
    "roll-outs": roll_outs,
    "first ratio": first_ratio,
    "old log-probabilities": old_logprobs,
    "reference log-probabilities": reference_logprobs,
    "rewards of tokens": token_rewards,
    "accumulation": accumulation,
    "GAE": formulas.gae_by_hand,
    "KL estimators": formulas.kl_estimators,
    "k2": formulas.k2_bias,
    "Bradley-Terry strengths": formulas.bradley_terry,
    "DPO's implicit reward": formulas.implicit_reward,
}
"""By name."""

_PROBLEMS = ("gradient table", "gradient llama")
_COST = 6.0


def jobs(options: Options) -> list[Job]:
    """One job for each problem; the identities belong to no algorithm, so `--only` leaves them."""
    if options.algorithms:
        return []
    return [
        Job(f"{__name__}:identity_rows", {"problem": name}, _COST)
        for name in _PROBLEMS
        if not options.problems or name in options.problems
    ]


def identity_rows(problem: str) -> list[Row]:
    """The row of every identity on a problem."""
    with tempfile.TemporaryDirectory(prefix="amenable-lab-") as name:
        place = Place.of(problem_named(problem), Path(name) / "reference", POINTS[:2])
        bench = Bench(place, Path(name))
        return [_row(bench, name, look(name, bench)) for name in TABLE]


def look(name: str, bench: Bench) -> Finding:
    """What an identity finds; what the code refuses or cannot do is a finding too."""
    try:
        return TABLE[name](bench)
    except (AmenableError, ValueError, RuntimeError, IndexError, KeyError) as error:
        said = f"{type(error).__name__}: {error}"
        return Finding(math.inf, 0.0, said, refused=said)


def _row(bench: Bench, name: str, found: Finding) -> Row:
    return Row(
        check=CHECK,
        algorithm=name,
        setting="exact",
        problem=bench.problem.name,
        beta=bench.problem.beta,
        seed=0,
        passed=found.passed,
        note=f"off by {found.worst:.2g}, allowed {found.allowed:.2g}; {found.note}",
    )
