"""One good record, or a few, of every format, as its publishers write it."""

from __future__ import annotations

from typing import Any

HI, BYE = "Say hello.", "Say goodbye."


def said(speaker: str, text: str, who: str = "role", what: str = "content") -> dict[str, Any]:
    return {who: speaker, what: text}


HUMAN = said("human", HI, "from", "value")
PAIR = {"chosen": "Hello!", "rejected": "Go away."}
CHAT_PAIR = {key: [said("assistant", text)] for key, text in PAIR.items()}

SAMPLES: dict[str, list[dict[str, Any]]] = {
    "native": [
        {"input_text": HI, "candidate_0": "Hello!", "candidate_1": "No.", "choice": 1},
        {"messages": [said("user", HI)], "output_text": "Hello!"},
        {"messages": [said("user", HI)]},
    ],
    "openai-summarize": [
        {
            "info": {"id": "t3_1", "post": "A cat.", "title": "Cats", "subreddit": "aww"},
            "summaries": [
                {"text": " Cat.", "policy": "ref", "note": None},
                {"text": " Dog.", "policy": "sup4", "note": "?"},
            ],
            "choice": 0,
            "worker": "w1",
            "batch": "b",
            "split": "train",
            "extra": {"confidence": 2},
        }
    ],
    "openai-axis": [
        {
            "info": {"id": "a1", "site": "cnn", "title": "Cats", "article": "A cat."},
            "split": "test",
            "summary": {"text": text, "policy": "ref", "axes": {"overall": score}},
            "worker": "w1",
            "batch": "b",
        }
        for text, score in (("Cat.", 6), ("Dog.", 2))
    ],
    "oasst": [
        {
            "message_tree_id": "m0",
            "tree_state": "ready_for_export",
            "prompt": {
                "message_id": "m0",
                "text": HI,
                "role": "prompter",
                "deleted": False,
                "review_result": True,
                "replies": [
                    {"text": "Hello!", "role": "assistant", "rank": 0, "replies": []},
                    {"text": "No.", "role": "assistant", "rank": 1, "replies": []},
                ],
            },
        }
    ],
    "sharegpt": [
        {
            "conversations": [HUMAN],
            "chosen": said("gpt", "Hello!", "from", "value"),
            "rejected": said("gpt", "No.", "from", "value"),
        },
        {"conversations": [HUMAN, said("gpt", "Hello!", "from", "value")]},
        {"conversations": [HUMAN]},
    ],
    "openai-messages": [
        {"messages": [said("system", "Be kind."), said("user", HI), said("assistant", "Hello!")]},
        {
            "context": "Be kind.",
            "messages": [said("user", HI, "author"), said("assistant", "Hello!", "author")],
        },
        {"prompt": HI, "prompt_id": "p", "messages": [said("user", HI), said("assistant", "Hi")]},
    ],
    "openai-preference": [
        {
            "input": {"messages": [said("user", HI)], "tools": []},
            "preferred_output": [said("assistant", "Hello!")],
            "non_preferred_output": [said("assistant", "No.")],
        }
    ],
    "ultrafeedback": [
        {
            "source": "x",
            "instruction": HI,
            "models": ["a", "b"],
            "completions": [
                {"model": "a", "response": "Hello!", "overall_score": 8.5},
                {"model": "b", "response": "No.", "overall_score": 2.0},
            ],
        }
    ],
    "ultrafeedback-binarized": [
        {
            "prompt": HI,
            "prompt_id": "p",
            "chosen": [said("user", HI), said("assistant", "Hello!")],
            "rejected": [said("user", HI), said("assistant", "No.")],
            "messages": [said("user", HI), said("assistant", "Hello!")],
            "score_chosen": 8.5,
            "score_rejected": 2.0,
        }
    ],
    "helpsteer-preference": [
        {
            "split": "train",
            "prompt": HI,
            "response_1": "Hello!",
            "response_2": "No.",
            "preference_strength": -2,
        }
    ],
    "helpsteer": [
        {"prompt": HI, "response": text, "helpfulness": score, "verbosity": 1}
        for text, score in (("Hello!", 4), ("No.", 0))
    ],
    "alpaca": [
        {"instruction": HI, "input": "", "output": "Hello!"},
        {"instruction": HI, "input": "To Ann.", "chosen": "Hello, Ann!", "rejected": "No."},
    ],
    "hh": [
        {
            "chosen": f"\n\nHuman: {HI}\n\nAssistant: Hello!",
            "rejected": f"\n\nHuman: {HI}\n\nAssistant: No.",
        }
    ],
    "kto": [
        {"prompt": HI, "completion": text, "label": label}
        for text, label in (("Hello!", True), ("No.", False))
    ],
    "trl-chat": [
        {"prompt": [said("user", HI)], **CHAT_PAIR},
        {"prompt": [said("user", HI)], "completion": [said("assistant", "Hello!")]},
        {key: [said("user", HI), *CHAT_PAIR[key]] for key in PAIR},
    ],
    "trl": [
        {"prompt": HI, **PAIR},
        {"prompt": HI, "completion": "Hello!"},
        {"prompt": HI},
        {"chosen": f"{HI} Hello!", "rejected": f"{HI} No."},
    ],
}
