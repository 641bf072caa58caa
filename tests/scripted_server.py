"""A server that speaks OpenAI's chat completions and answers each question from a script."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "scripted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer: a text, or what makes one from the question's prompt."""

    text: str | Callable[[str], str]
    finish: str = "stop"
    tokens: int = 10


class ScriptedServer(ThreadingHTTPServer):
    """Answers the n-th request for a question with its n-th reply, and 400 once there is none left.

    Args:
        script: a text that only the question's prompt holds -> its replies.
        hold_after: requests that are answered; all later ones wait until ``release`` is set.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, script: Mapping[str, Sequence[Reply]], hold_after: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.hold_after = hold_after
        self.release = threading.Event()
        self.held = threading.Event()
        """Set when a request waits."""
        self.broken = False
        """Whether connections end without an answer."""
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []

    def stop(self) -> None:
        """Close the address; requests that wait are never answered."""
        self.shutdown()
        self.server_close()
        self.broken = True
        self.release.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def reply(self, body: dict[str, Any]) -> tuple[Reply, str] | None:
        prompt = body["messages"][-1]["content"]
        with self.lock:
            self.requests.append(body)
            number = len(self.requests)
            found = [marker for marker in self.script if marker in prompt]
            assert len(found) == 1, f"{found} of the script are in {prompt!r}"
            replies, count = self.script[found[0]], self.asked[found[0]]
            self.asked[found[0]] += 1
        if self.hold_after is not None and number > self.hold_after:
            self.held.set()
            self.release.wait()
        return (replies[count], prompt) if count < len(replies) else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        found = self.server.reply(body)
        if self.server.broken:
            self.close_connection = True
            return
        if found is None:
            self._send(400, {"error": {"message": "the script has no further reply", "code": 400}})
            return
        reply, prompt = found
        text = reply.text if isinstance(reply.text, str) else reply.text(prompt)
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 7, "completion_tokens": reply.tokens, "total_tokens": 7 + reply.tokens}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish}
        self._send(
            200,
            {"id": "1", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice], "usage": usage},
        )

    def log_message(self, *_arguments: object) -> None:
        """Say nothing."""

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a killed client does not wait
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)


@contextlib.contextmanager
def serving(script: Mapping[str, Sequence[Reply]], **options: Any) -> Iterator[ScriptedServer]:
    """A scripted server that answers until the block ends."""
    server = ScriptedServer(script, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
