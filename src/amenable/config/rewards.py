"""One section of `[[policy.rewards]]`, the mix of rewards that the policy is tuned against."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from amenable.masking import shown_name

if TYPE_CHECKING:
    from amenable.config.policy import PolicyConfig

OWN = "own"
RULES = ("length", "format", "regex", "json")

Kind = Literal["own", "rule", "http", "function", "model"]

_SETTINGS: dict[str, tuple[str, ...]] = {
    "rule:length": ("min_words", "max_words"),
    "rule:format": ("pattern",),
    "rule:regex": ("pattern",),
    "rule:json": ("keys",),
    "http": ("timeout_s", "retries", "token_env"),
}
"""Keys that only one kind of source reads."""


@dataclass(frozen=True, kw_only=True)
class RewardPart:
    """One reward of the mix. A completion's score is the weighted sum over all of them."""

    source: str = ""
    """`own` (the run's own reward model), a reward-model folder, a hub id, `module:function`,
    `file.py:function`, an `http(s)://` service, or a rule: `rule:length`, `rule:format`,
    `rule:regex`, `rule:json`."""

    name: str = ""
    """Names its figures, `policy/reward_NAME`; empty: after the source."""

    weight: float = 1.0
    """Factor in the sum; 0: logged, but neither added nor able to fail a completion."""

    normalise: Literal["none", "running"] = "none"
    """`running`: less the mean and divided by the standard deviation of all its scores so far in
    the run, this roll-out batch included."""

    min_words: int = 0
    """`rule:length`: fewer words cost."""

    max_words: int = 0
    """`rule:length`: more words cost; 0: no limit."""

    pattern: str = ""
    """`rule:format`: regular expression that the whole text must match (a dot matches line ends);
    `rule:regex`: one that must be found in it."""

    keys: tuple[str, ...] = ()
    """`rule:json`: keys that the object must have; each that is missing costs."""

    timeout_s: float = 30.0
    """HTTP: seconds to wait for the service before a try counts as failed."""

    retries: int = 2
    """HTTP: further tries after a failed one, with growing pauses."""

    token_env: str = ""
    """HTTP: environment variable whose value is sent as bearer token; empty: none is sent."""

    @property
    def kind(self) -> Kind:
        """What `source` names."""
        return kind_of(self.source)

    @property
    def label(self) -> str:
        """`name`, or one made from the source."""
        return self.name or _name_of(self.source)


def kind_of(source: str) -> Kind:
    """What a source names; text with a colon that is no path is a function."""
    if source == OWN:
        return "own"
    if source.startswith("rule:"):
        return "rule"
    if "://" in source:
        return "http"
    local = Path(source).expanduser().exists()
    return "function" if ":" in source and not local else "model"


def is_folder(source: str) -> bool:
    """Whether a source is a model folder on this machine."""
    return Path(source).expanduser().is_dir()


def reward_parts(policy: PolicyConfig) -> tuple[RewardPart, ...]:
    """The mix; without one, `policy.reward`, or else the run's own model, alone with weight 1."""
    return policy.rewards or (RewardPart(source=policy.reward or OWN),)


def uses_own_reward(policy: PolicyConfig) -> bool:
    """Whether the run's own reward model takes part, so that it has to be trained."""
    return any(part.kind == "own" for part in reward_parts(policy))


def outside_sources(policy: PolicyConfig) -> Iterator[tuple[str, str]]:
    """(recipe key, source) of each reward model and function: files outside the run folder."""
    for number, part in enumerate(reward_parts(policy)):
        if part.kind in ("model", "function"):
            key = f"policy.rewards[{number}].source" if policy.rewards else "policy.reward"
            yield key, part.source


def broken_rewards(policy: PolicyConfig) -> str:
    """What is wrong with the rewards, starting with the key; empty if nothing is."""
    if policy.reward and policy.rewards:
        return (
            "policy.reward: policy.rewards is given as well; move the source into a section"
            " [[policy.rewards]] of its own, and remove policy.reward"
        )
    for number, part in enumerate(reward_parts(policy)):
        if broken := _broken_source(part) or _broken_part(part):
            if not policy.rewards:
                return f"policy.reward: {broken.partition(': ')[2]}"
            return f"policy.rewards[{number}].{broken}"
    return _broken_mix(policy.rewards)


def _broken_mix(parts: tuple[RewardPart, ...]) -> str:
    labels = [part.label for part in parts]
    for number, label in enumerate(labels):
        if label in labels[:number]:
            return (
                f"policy.rewards[{number}].name: {label!r} is the name of another reward;"
                " give each a name of its own"
            )
        if parts[number].kind == "own" and "own" in [part.kind for part in parts[:number]]:
            return f"policy.rewards[{number}].source: {OWN!r} is named twice; remove one"
    if parts and not any(part.weight for part in parts):
        return "policy.rewards: every weight is 0, so that nothing is rewarded; raise one"
    return ""


def _broken_source(part: RewardPart) -> str:
    source = part.source
    if not source.strip():
        return (
            "source: is empty; give a model folder, hub id, module:function, file.py:function,"
            " http(s)://…, rule:… or own"
        )
    if part.kind == "rule" and source.removeprefix("rule:") not in RULES:
        rules = ", ".join(f"rule:{name}" for name in RULES)
        return f"source: {source!r} is no rule; the rules are {rules}"
    if part.kind == "http":
        return broken_url(source)
    return ""


def broken_url(source: str) -> str:
    """What is wrong with a service's address, starting with `source: `; empty if nothing is."""
    shown = shown_name(source)
    try:
        url = urlsplit(source)
        host = url.hostname
    except ValueError:
        return f"source: {shown!r} is no URL; write for example http://127.0.0.1:8000/score"
    if url.scheme not in ("http", "https") or not host:
        return f"source: {shown!r} is no http or https URL; write http://HOST:PORT/PATH"
    if "@" in url.netloc:
        return (
            f"source: {shown!r} holds a user or password, which every copy of the recipe would"
            " show; put a token into an environment variable and name that in token_env"
        )
    return ""


def _broken_part(part: RewardPart) -> str:
    if not re.fullmatch(r"[A-Za-z]\w*", part.label, re.ASCII):
        return f"name: {part.label!r} cannot name a figure; use letters, digits and _"
    own = _SETTINGS.get(part.source if part.kind == "rule" else part.kind, ())
    defaults = {field.name: field.default for field in fields(part)}
    for source, names in _SETTINGS.items():
        for name in names:
            if name not in own and getattr(part, name) != defaults[name]:
                where = "an http(s):// source" if source == "http" else source
                return f"{name}: {part.source!r} does not read it ({where} does); remove it"
    return _broken_rule(part) if part.kind == "rule" else _broken_service(part)


def _broken_rule(part: RewardPart) -> str:
    if part.source == "rule:length":
        if part.min_words < 0 or part.max_words < 0:
            name = "min_words" if part.min_words < 0 else "max_words"
            return f"{name}: must be at least 0, not {getattr(part, name)}"
        if not part.min_words and not part.max_words:
            return "max_words: rule:length needs min_words, max_words or both"
        if part.max_words and part.min_words > part.max_words:
            return f"min_words: {part.min_words} is more than max_words = {part.max_words}"
    if part.source in ("rule:format", "rule:regex"):
        if not part.pattern:
            return f"pattern: {part.source} needs a regular expression"
        try:
            re.compile(part.pattern)
        except re.error as error:
            return f"pattern: {part.pattern!r} is no regular expression: {error}"
    return ""


def _broken_service(part: RewardPart) -> str:
    if part.timeout_s <= 0:
        return f"timeout_s: must be above 0, not {part.timeout_s!r}"
    if part.retries < 0:
        return f"retries: must be at least 0, not {part.retries}"
    return ""


def _name_of(source: str) -> str:
    """`reward_model` of the own one, a rule's or function's name, a folder's last part, `http`."""
    kind = kind_of(source)
    if kind == "own":
        return "reward_model"
    if kind == "http":
        return "http"
    last = source.rpartition(":")[2] if kind in ("rule", "function") else Path(source).name
    name = re.sub(r"\W+", "_", last, flags=re.ASCII).strip("_")
    return name if name[:1].isalpha() else f"reward_{name}"
