"""Against a real server on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from amenable.data.schemas import Message, Prompt, Speaker
from amenable.errors import StageError, UsageError
from amenable.judges import Question, Reply, Verdict
from amenable.judges.asking import Pair, ask_both_orders
from amenable.judges.chat import ChatJudge
from amenable.judges.store import ReplyStore
from amenable.judges.template import load_template

from .chat_service import ChatService

TEMPLATE = load_template("summary-1")
QUICK = {"timeout_s": 0.3, "pause_s": 0.01}


def prompt(n: int) -> Prompt:
    return Prompt(messages=(Message(Speaker.USER, f"Text {n}."),), id=f"p{n}", group="")


def pairs(count: int) -> list[Pair]:
    """b has more a's in two of three prompts."""
    return [Pair(prompt(n), "a", "aa" if n % 3 else "") for n in range(count)]


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ReplyStore]:
    store = ReplyStore(tmp_path / "replies.sqlite")
    yield store
    store.close()


def test_a_question_goes_out_as_the_template_says_it(
    store: ReplyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    with ChatService() as service:
        judge = ChatJudge(service.url, "m", TEMPLATE, token_env="JUDGE_TOKEN", max_tokens=9)
        found = ask_both_orders(judge, [Pair(prompt(0), "x {{second}}", "y a")], store)
    assert service.headers[0]["Authorization"] == "Bearer secret"
    assert {body["model"] for body in service.bodies} == {"m"}
    assert (service.bodies[0]["max_tokens"], service.bodies[0]["temperature"]) == (9, 0.0)
    asked = sorted(body["messages"][1]["content"] for body in service.bodies)
    assert "<a>\nx {{second}}\n</a>" in asked[0], "a text is never read as a place"
    assert [look.reply.verdict for look in found.looks] == [Verdict.SECOND, Verdict.FIRST]
    assert found.looks[0].reply.text.startswith("The first has 0")
    assert found.looks[0].reply.prompt_tokens == 100


def test_no_call_is_made_for_what_is_known_or_the_same(store: ReplyStore) -> None:
    with ChatService() as service:
        judge = ChatJudge(service.url, "m", TEMPLATE)
        first = ask_both_orders(judge, [*pairs(5), Pair(prompt(9), "same", "same")], store)
        second = ask_both_orders(judge, [*pairs(5), Pair(prompt(9), "same", "same")], store)
        other = ask_both_orders(ChatJudge(service.url, "n", TEMPLATE), pairs(1), store)
    assert (first.calls, second.calls, other.calls) == (10, 0, 2)
    assert first.looks == second.looks
    assert [look.reply.verdict for look in first.looks[-2:]] == [Verdict.TIE, Verdict.TIE]


def test_a_reply_without_a_verdict_is_kept_and_not_asked_for_again(store: ReplyStore) -> None:
    with ChatService() as service:
        service.texts = ["I cannot say."]
        judge = ChatJudge(service.url, "m", TEMPLATE, concurrency=1)
        found = [ask_both_orders(judge, pairs(1), store) for _ in range(2)]
    assert [look.reply.verdict for look in found[1].looks] == [Verdict.INVALID, Verdict.SECOND]
    assert sum(service.asked.values()) == 2


def test_faults_are_tried_again(store: ReplyStore) -> None:
    with ChatService(faults=0.3, silence_s=0.6) as service:
        judge = ChatJudge(service.url, "m", TEMPLATE, retries=8, **QUICK)
        found = ask_both_orders(judge, pairs(30), store)
    assert service.broken > 8
    assert found.unanswered == []
    assert all(
        (look.reply.verdict is Verdict.SECOND) == (look.swapped != bool(n // 2 % 3))
        for n, look in enumerate(found.looks)
        if look.pair.a != look.pair.b
    )


def test_what_stays_without_an_answer_is_told_and_asked_the_next_time(store: ReplyStore) -> None:
    with ChatService(faults=1.0, silence_s=0.6) as service:
        judge = ChatJudge(service.url, "m", TEMPLATE, retries=0, **QUICK)
        failed = ask_both_orders(judge, [*pairs(4), Pair(prompt(9), "same", "same")], store)
        service._faults = 0.0
        then = ask_both_orders(judge, pairs(4), store)
    assert (len(failed.looks), len(failed.unanswered)) == (2, 8)
    assert any("HTTP 429" in reason for reason in failed.unanswered)
    assert (then.calls, len(then.looks), then.unanswered) == (8, 8, [])


def test_a_service_that_refuses_is_not_asked_everything(store: ReplyStore) -> None:
    with ChatService() as service:
        service.status = 401
        judge = ChatJudge(service.url, "m", TEMPLATE, concurrency=2)
        with pytest.raises(StageError, match="any of 20 questions: HTTP 401 Unauthorized"):
            ask_both_orders(judge, pairs(10), store)
    assert sum(service.asked.values()) <= 4


def test_a_token_that_is_not_set_is_refused() -> None:
    with pytest.raises(UsageError, match="NO_SUCH_TOKEN"):
        ChatJudge("http://127.0.0.1:9", "m", TEMPLATE, token_env="NO_SUCH_TOKEN")


JUDGING = """
import sys
from pathlib import Path
from tests.unit.judges.test_chat import TEMPLATE, pairs
from amenable.judges.asking import ask_both_orders
from amenable.judges.chat import ChatJudge
from amenable.judges.store import ReplyStore

judge = ChatJudge(sys.argv[1], "m", TEMPLATE, concurrency=8, timeout_s=0.5, pause_s=0.01, retries=9)
found = ask_both_orders(judge, pairs(1000), ReplyStore(Path(sys.argv[2])))
print(found.calls, len(found.looks), len(found.unanswered))
"""


def test_kill_9_repeats_no_call_whose_reply_had_arrived(tmp_path: Path) -> None:
    """1,000 pairs in both orders, 8 calls in flight, 10 % of the calls fail; killed half-way."""
    file = tmp_path / "replies.sqlite"
    with ChatService(faults=0.1, silence_s=1.0) as service:
        words = [sys.executable, "-c", JUDGING, service.url, str(file)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["src", "."])}
        root = Path(__file__).parents[3]
        process = subprocess.Popen(words, env=environment, cwd=root)
        end = time.monotonic() + 120
        while sum(service.answered.values()) < 900 and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(1.2)  # silent calls end
        arrived = set(service.answered)
        assert 900 <= len(arrived) < 2000
        service.asked.clear()
        done = subprocess.run(words, env=environment, cwd=root, capture_output=True, text=True)
        again = arrived & set(service.asked)
        assert len(again) <= 8, "those in flight"
        calls, looks, unanswered = map(int, done.stdout.split())
        assert (looks, unanswered) == (2000, 0)
        assert calls <= 2000 - len(arrived) + 8
        service.asked.clear()
        done = subprocess.run(words, env=environment, cwd=root, capture_output=True, text=True)
        assert done.stdout.split() == ["0", "2000", "0"]
        assert not service.asked


def test_replies_outlive_a_broken_file(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    path.write_text("not a database, not a database, not a database")
    from amenable.errors import StorageError

    with pytest.raises(StorageError, match=r"replies\.sqlite"):
        ReplyStore(path)


def test_a_question_is_known_by_its_order(store: ReplyStore) -> None:
    from amenable.judges.store import question_key

    keys = [
        question_key({"m": 1}, Question(prompt(1), "a", "b")),
        question_key({"m": 1}, Question(prompt(1), "b", "a")),
        question_key({"m": 2}, Question(prompt(1), "a", "b")),
    ]
    assert len(set(keys)) == 3
    store.keep(keys[0], "m", "p1", Reply(Verdict.TIE, "why", 0.25, 3, 4))
    assert store.find(keys) == {keys[0]: Reply(Verdict.TIE, "why", 0.25, 3, 4)}
