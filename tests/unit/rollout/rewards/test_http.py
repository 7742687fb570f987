"""Against a real server on this machine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from amenable.config.rewards import RewardPart
from amenable.errors import RecipeError, StageError
from amenable.rollout.rewards import Failed, HttpReward
from amenable.rollout.rewards import http as http_module

from .samples import PROMPTS, TEXTS

Answer = tuple[int, bytes] | dict[str, Any]


class Service:
    """Answers one request after the other from a list; remembers what it was sent."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.delay_s = 0.0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                service.bodies.append(json.loads(self.rfile.read(length)))
                service.headers.append(dict(self.headers))
                time.sleep(service.delay_s)
                answer = service.answers.pop(0)
                whole = answer if isinstance(answer, tuple) else (200, json.dumps(answer).encode())
                self.send_response(whole[0])
                if whole[0] == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(whole[1])))
                self.end_headers()
                self.wfile.write(whole[1])

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(http_module, "_FIRST_PAUSE_S", 0.01)
    service = Service()
    thread = threading.Thread(target=service.server.serve_forever, args=(0.02,))
    thread.start()
    yield service
    service.server.shutdown()
    thread.join()
    service.server.server_close()


Ask = Callable[..., list[Any]]


def ask(service: Service, **settings: Any) -> list[Any]:
    return HttpReward(RewardPart(source=service.url, **settings)).judge(PROMPTS, TEXTS)


def test_one_request_holds_the_batch_and_rows_its_extra_keys(service: Service) -> None:
    service.answers = [{"scores": [0.5, 1, -2, 3]}]
    assert ask(service) == [0.5, 1.0, -2.0, 3.0]
    assert service.bodies == [
        {
            "prompts": ["Is it?", "Is it?", "What of the rain?", "Open the file."],
            "completions": TEXTS,
            "rows": [{"length": 6}, {"length": 6}, {"length": 17}, {"length": 14}],
        }
    ]
    assert service.headers[0]["Content-Type"] == "application/json"
    assert "Authorization" not in service.headers[0]


def test_rows_with_null_failed_and_steps_are_kept(service: Service) -> None:
    reasons = ["unused", "the judge\nwas away", "", None]
    service.answers = [{"scores": [1, None, None, [[1, 0.5], [2, 1]]], "reasons": reasons}]
    assert ask(service) == [
        1.0,
        Failed("the judge was away"),
        Failed("gave no score"),
        ((1, 0.5), (2, 1.0)),
    ]


def test_a_passing_fault_is_tried_again(service: Service) -> None:
    service.answers = [(503, b""), (500, b"x"), {"scores": [1, 2, 3, 4]}]
    assert ask(service, retries=2) == [1.0, 2.0, 3.0, 4.0]
    assert len(service.bodies) == 3


def test_a_fault_that_stays_fails_the_batch_with_its_reason(service: Service) -> None:
    service.answers = [(503, b"")] * 3
    assert ask(service, retries=2) == [Failed("HTTP 503 Service Unavailable")] * 4
    assert len(service.bodies) == 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((404, b""), "HTTP 404 Not Found"),
        ((302, b""), "HTTP 302 Found"),
        ((200, b"<html>"), "the answer is no JSON"),
    ],
)
def test_a_fault_of_the_request_is_not_tried_again(
    service: Service, answer: Answer, reason: str
) -> None:
    service.answers = [answer, {"scores": [1, 2, 3, 4]}]
    found = ask(service, retries=5)
    assert len(service.bodies) == 1
    assert all(isinstance(verdict, Failed) and reason in verdict.reason for verdict in found)


def test_a_service_that_is_too_slow(service: Service) -> None:
    service.answers, service.delay_s = [{"scores": [1, 2, 3, 4]}], 0.6
    start = time.monotonic()
    (verdict, *_) = ask(service, timeout_s=0.1, retries=0)
    assert time.monotonic() - start < 0.5
    assert verdict == Failed("no answer in 0.1 s")
    time.sleep(0.6)  # until the server has noticed


def test_a_service_that_is_not_there(service: Service) -> None:
    part = RewardPart(source="http://127.0.0.1:9/score", retries=1)
    (verdict, *_) = HttpReward(part).judge(PROMPTS, TEXTS)
    assert isinstance(verdict, Failed)
    assert "refused" in verdict.reason


@pytest.mark.parametrize("answer", [{"scores": [1, 2]}, {"score": [1, 2, 3, 4]}, {"scores": 7}])
def test_an_answer_of_another_shape_names_the_service_without_its_query(
    service: Service, answer: dict[str, Any]
) -> None:
    service.answers = [answer]
    part = RewardPart(source=f"{service.url}?token=secret")
    with pytest.raises(
        StageError, match=r"policy.rewards\[0\].source = 'http://.*/score\?…' must"
    ) as caught:
        HttpReward(part, "policy.rewards[0].source").judge(PROMPTS, TEXTS)
    assert "secret" not in str(caught.value)


def test_token_comes_from_the_environment(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "abc")
    service.answers = [{"scores": [1, 2, 3, 4]}]
    ask(service, token_env="MY_TOKEN")
    assert service.headers[0]["Authorization"] == "Bearer abc"
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(RecipeError, match=r"variable MY_TOKEN \(token_env\) is not set; export"):
        ask(service, token_env="MY_TOKEN")
