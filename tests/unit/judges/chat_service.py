"""A chat service on this machine that fails as real ones do."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("429", "500", "silence", "junk")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # the default of 5 drops some of eight calls that arrive at once


class ChatService:
    """Answers "Verdict: A" where the first text holds more a's than the second, else B.

    Args:
        faults: share of calls that fail, each in one of four ways in turn.
        silence_s: how long a silent call lasts.
        delay_s: of a good one.
    """

    def __init__(self, faults: float = 0.0, silence_s: float = 1.0, delay_s: float = 0.0) -> None:
        self.asked: Counter[str] = Counter()
        """Calls by the hash of their question."""
        self.answered: Counter[str] = Counter()
        """Good replies that were written, likewise."""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.texts: list[str] = []
        """Replies to give instead, the first to the first call."""
        self.status = 200
        """Of every call; 200: as the faults say."""
        self.broken = 0
        self._faults, self._silence_s, self._delay_s = faults, silence_s, delay_s
        self._random, self._lock = random.Random(0), threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> ChatService:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _take(self, body: dict[str, Any], headers: dict[str, str]) -> tuple[str, str, str]:
        """Hash of the question, the fault if there is one, and the reply's text."""
        with self._lock:
            key = hashlib.sha256(body["messages"][-1]["content"].encode()).hexdigest()
            self.asked[key] += 1
            self.bodies.append(body)
            self.headers.append(headers)
            fault = ""
            if self._random.random() < self._faults:
                fault = FAULTS[self.broken % len(FAULTS)]
                self.broken += 1
            return key, fault, self.texts.pop(0) if self.texts else _judge(body)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                key, fault, text = service._take(body, dict(self.headers))
                if service.status != 200:
                    self._send(service.status, b"{}")
                elif fault in ("429", "500"):
                    self._send(int(fault), b"{}")
                elif fault == "junk":
                    self._send(200, b"<html>Bad gateway</html>")
                elif fault == "silence":
                    time.sleep(service._silence_s)
                else:
                    time.sleep(service._delay_s)
                    answer = {
                        "choices": [{"message": {"role": "assistant", "content": text}}],
                        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
                    }
                    self._send(200, json.dumps(answer).encode())
                    with service._lock:
                        service.answered[key] += 1

            def _send(self, status: int, content: bytes) -> None:
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # the asker was killed
                    pass

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def _judge(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    first = content.partition("<a>")[2].partition("</a>")[0].count("a")
    second = content.partition("<b>")[2].partition("</b>")[0].count("a")
    return f"The first has {first}, the second {second}.\nVerdict: {'A' if first > second else 'B'}"
