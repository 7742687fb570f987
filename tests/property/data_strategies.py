"""Rows as people might have them, for the properties of reading and splitting."""

from __future__ import annotations

from hypothesis import strategies as st

from amenable.data.schemas import Choice, Demonstration, Message, Preference, Prompt, Speaker

texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(
    lambda text: bool(text.strip())
)
names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8)

RESERVED = frozenset(
    [
        *("id", "group", "input_text", "messages", "context", "output_text", "candidate_0"),
        *("candidate_1", "choice", "weight", "margin", "annotator", "strength"),
    ]
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | names | st.floats(-1e9, 1e9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
metas = st.dictionaries(names.filter(lambda name: name not in RESERVED), json_values, max_size=3)


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """A text, or a conversation that ends with the user."""
    speakers = draw(st.lists(st.sampled_from(Speaker), max_size=3))
    messages = [Message(speaker, draw(texts)) for speaker in speakers]
    messages.append(Message(Speaker.USER, draw(texts)))
    return Prompt(messages=tuple(messages), id=draw(names), group=draw(names), meta=draw(metas))


demonstrations = st.builds(Demonstration, prompt=prompts(), output_text=texts)

preferences = st.builds(
    Preference,
    prompt=prompts(),
    candidate_0=texts,
    candidate_1=texts,
    choice=st.sampled_from(Choice),
    weight=st.floats(1e-6, 1e6),
    margin=st.none() | st.floats(0, 100),
    annotator=st.none() | names,
).filter(lambda row: row.candidate_0 != row.candidate_1)

near_rows = st.dictionaries(
    st.sampled_from(sorted(RESERVED)) | names,
    json_values | texts | st.sampled_from([0, 1, "tie", [{"role": "user", "content": "x"}]]),
    max_size=8,
)
"""Objects that are nearly rows: right keys, often wrong values."""
