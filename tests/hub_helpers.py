"""A Hugging Face Hub of this machine: its cache on disk as huggingface_hub lays it out, and a server that plays it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"


def fill_cache(
    home: Path, repo_id: str, directory: Path, *, commit: str = COMMIT, ref: str = "main", repo_type: str = "model"
) -> Path:
    """Put the files of ``directory`` into the cache of HF_HOME ``home``, as a download would; return the snapshot."""
    storage = home / "hub" / f"{repo_type}s--{repo_id.replace('/', '--')}"
    snapshot = storage / "snapshots" / commit
    (storage / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    for path in (path for path in directory.rglob("*") if path.is_file()):
        blob = storage / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(directory)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (storage / "refs").mkdir(exist_ok=True)
    (storage / "refs" / ref).write_text(commit)
    return snapshot


class _Handler(BaseHTTPRequestHandler):
    """The requests that huggingface_hub makes for a download: a revision, a tree of files, and each file."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_arguments: object) -> None:
        """Say nothing."""

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        hub = self.server
        for repo_type, repo_id in hub.repositories:
            prefix = "" if repo_type == "model" else f"{repo_type}s/"
            commits, files = hub.repositories[repo_type, repo_id]
            api, resolve = f"api/{repo_type}s/{repo_id}/", f"{prefix}{repo_id}/resolve/"
            if path.startswith(f"{api}revision/"):
                commit = commits.get(path.removeprefix(f"{api}revision/"))
                if commit is None:
                    return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body=body)
                return self._send(200, json.dumps({"id": repo_id, "sha": commit}).encode(), {}, body=body)
            if path.startswith(f"{api}tree/"):
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                return self._send(200, json.dumps(tree).encode(), {}, body=body)
            if path.startswith(resolve):
                commit, _, name = path.removeprefix(resolve).partition("/")
                if body:
                    hub.downloads[name] += 1
                headers = {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"', "X-Repo-Commit": commit}
                return self._send(200, files[name], headers, body=body)
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


class HubServer(ThreadingHTTPServer):
    """A server with some repositories; ``downloads`` counts how often each file was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[tuple[str, str], tuple[dict[str, str], dict[str, bytes]]] = {}
        self.downloads: Counter[str] = Counter()

    @property
    def endpoint(self) -> str:
        """Value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(
        self, repo_id: str, directory: Path, *, repo_type: str = "model", commits: dict[str, str] | None = None
    ) -> None:
        """Serve the files of ``directory``, as each of ``commits`` (revision -> commit)."""
        files = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
        self.repositories[repo_type, repo_id] = (commits or {"main": COMMIT}, files)


@contextlib.contextmanager
def serving() -> Iterator[HubServer]:
    """A hub that answers until the block ends."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hub_environment(home: Path, *, endpoint: str = "", offline: bool = False, **more: str) -> dict[str, str]:
    """This process's environment with a cache of its own; the variables are read when huggingface_hub is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    chosen = {"HF_HOME": str(home), **({"HF_ENDPOINT": endpoint} if endpoint else {}), **more}
    return {**kept, **chosen, **({"HF_HUB_OFFLINE": "1"} if offline else {}), "NO_PROXY": "127.0.0.1"}
