"""Passwords, signed queries and tokens: none is shown, whatever stands in it or round it."""

from __future__ import annotations

import pytest

from amenable.masking import shown_name, shown_value, without_secrets

SHOWN = {
    "https://user:pa:ss@host/a.jsonl": "https://host/a.jsonl",
    "https://user:pa/ss@host/a.jsonl": "https://host/a.jsonl",
    "https://user:pa ss@host/a.jsonl": "https://host/a.jsonl",
    "https://user:pa\"s's@host/a.jsonl": "https://host/a.jsonl",
    "https://user:pa?s#s@host/a.jsonl": "https://host/a.jsonl",
    "https://me@corp.com:p/w@host/x": "https://host/x",
    "https://host/a.jsonl?X-Amz-Signature=1&x=y": "https://host/a.jsonl?…",
    "https://host/a?sig=1)x'y": "https://host/a?…",
    "https://host/a#access_token=x": "https://host/a#…",
    "https:/user:PW@host/x": "https:/host/x",
    "https:user:PW@host/x": "https:host/x",
    "https//user:PW@host/x": "https//host/x",
    "s3://key:secret@bucket/a@b.jsonl": "s3://bucket/a@b.jsonl",
    "zip://a.jsonl::https://u:p@host/b.zip?sig=1": "zip://a.jsonl::https://host/b.zip?…",
    "http://localhost:8000/a@b.jsonl": "http://localhost:8000/a@b.jsonl",
    "hf://datasets/o/n@rev/a.jsonl": "hf://datasets/o/n@rev/a.jsonl",
    "s3://bucket/a#b.jsonl": "s3://bucket/a#b.jsonl",
    "hub:o/n:test": "hub:o/n:test",
    "data/what?.jsonl": "data/what?.jsonl",
    "a@b:c/d.jsonl": "a@b:c/d.jsonl",
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_name_is_shown_without_its_secrets(name: str) -> None:
    assert shown_name(name) == SHOWN[name]
    assert shown_name(shown_name(name)) == SHOWN[name]


@pytest.mark.parametrize("name", SHOWN)
def test_secrets_are_found_in_a_text(name: str) -> None:
    said = without_secrets(f"r.toml: data.x: must be a number, not '{name}'")
    assert said.endswith(f"not '{SHOWN[name].replace('https//host', 'https//host')}'")
    assert without_secrets(said) == said


@pytest.mark.parametrize(
    "text",
    [
        "https://h/a?…: the server answers 403, access denied; give credentials",
        "did you read https://h/a? yes, and mail x@y.z",
        "http://host: bad; mail x@y.z",
        "https://h/a: cannot be reached (no host a@b); check it",
        "rows.jsonl:7: field 'a': is missing; pip install \"amenable[remote]\"",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert without_secrets(text) == text


def test_a_token_is_hidden_wherever_it_stands() -> None:
    assert without_secrets("at https://h/a b?sig=SECRET or") == "at https://h/a b?sig=… or"
    assert without_secrets("403, url='https://h/a?sig=1'") == "403, url='https://h/a?…'"


def test_values_of_a_recipe_are_masked_inside() -> None:
    value = {"files": ["https://u:p@h/x", 3], "https://u:p@h": None}
    assert shown_value(value) == {"files": ["https://h/x", 3], "https://h": None}
