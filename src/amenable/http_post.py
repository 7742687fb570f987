"""JSON to an HTTP service and JSON back; what goes wrong says whether another try may help."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError

LARGEST_ANSWER = 64 * 2**20
TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
LONGEST_PAUSE_S = 60.0


class NoAnswer(Exception):
    """A call without a usable answer."""

    def __init__(self, reason: str, passing: bool, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.passing = passing
        """Another try may help."""
        self.wait_s = wait_s
        """What the service asks to wait for before it."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET, and take the token elsewhere."""

    def redirect_request(self, *given: Any) -> None:
        """Follows none."""


_OPENER = urllib.request.build_opener(_NoRedirect)


def post_json(
    url: str,
    value: Any,
    headers: Mapping[str, str],
    *,
    timeout_s: float,
    retries: int,
    pause_s: float = 0.5,
    junk_passes: bool = False,
) -> Any:
    """The decoded answer.

    Args:
        url: of the service.
        value: JSON-able; anything else in it is sent as its text.
        headers: besides those of JSON.
        timeout_s: of a try.
        retries: further tries where another may help.
        pause_s: before the second try; doubled for each later one.
        junk_passes: an answer that is no JSON may be another one next time.

    Raises:
        NoAnswer: after the last try.
    """
    body = json.dumps(value, default=str).encode()
    for attempt in range(retries + 1):
        try:
            return _ask_once(url, body, headers, timeout_s, junk_passes)
        except NoAnswer as error:
            last = error
            if not error.passing or attempt == retries:
                break
            time.sleep(min(LONGEST_PAUSE_S, max(error.wait_s, pause_s * 2**attempt)))
    raise last


def _ask_once(
    url: str, body: bytes, headers: Mapping[str, str], timeout_s: float, junk_passes: bool
) -> Any:
    kinds = {"Content-Type": "application/json", "Accept": "application/json"}
    request = urllib.request.Request(url, data=body, headers={**kinds, **headers})
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            content = response.read(LARGEST_ANSWER + 1)
    except HTTPError as error:
        wait_s = _seconds(error.headers.get("Retry-After"))
        error.close()
        raise NoAnswer(f"HTTP {error.code} {error.reason}", error.code in TRY_AGAIN, wait_s) from (
            error
        )
    except URLError as error:
        raise NoAnswer(str(error.reason), True) from error
    except TimeoutError as error:
        raise NoAnswer(f"no answer in {timeout_s:g} s", True) from error
    except (OSError, HTTPException) as error:
        raise NoAnswer(f"{type(error).__name__}: {error}", True) from error
    if len(content) > LARGEST_ANSWER:
        raise NoAnswer(f"the answer has more than {LARGEST_ANSWER} bytes", False)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = f"the answer is no JSON ({type(error).__name__}: {error})"
        raise NoAnswer(reason, junk_passes) from error


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0
