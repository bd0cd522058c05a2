"""A Hugging Face Hub on loopback, as far as its clients need one: repositories in memory, downloads and commits.

`HUB` is started by `conftest.py` before anything imports huggingface_hub, which reads its address only then. So no
test can reach the real one.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_loopback"  # may read and write everything
STRANGER = "hf_stranger"  # a valid token without any rights


@dataclass
class Repository:
    """Commits, each with all of its files, and the branches that name them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    disabled: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Adds files to a branch; returns the commit."""
        whole = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        described = json.dumps([len(self.commits), sorted((path, sha(content)) for path, content in whole.items())])
        self.branches[branch] = sha(described.encode())
        self.commits[self.branches[branch]] = whole
        return self.branches[branch]


class Hub:
    """The server, what it holds, and what it was asked.

    Attributes:
        repositories: by ORG/NAME.
        requests: "METHOD /path" of every request, in order.
        failing: an HTTP status with which every request is answered, or None.
        num_sent: bytes of all answers' bodies so far.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.failing: int | None = None
        self.num_sent = 0
        self.port = 0
        self.start()
        if hasattr(os, "register_at_fork"):  # what a test forks would listen on when this is to be down
            os.register_at_fork(after_in_child=self.close_socket)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts listening, always on the same port."""
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close_socket(self) -> None:
        """Closes this process's copy of the socket; the server may have another one by then than at the start."""
        self.server.socket.close()

    def stop(self) -> None:
        """Stops listening: connections are refused."""
        self.server.shutdown()
        self.server.server_close()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuses connections inside of the `with` block."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def clear(self) -> None:
        """Forgets all repositories and requests."""
        self.repositories, self.requests, self.failing = {}, [], None

    def publish(self, repo: str, files: dict[str, bytes], branch: str = "main", **rights: bool) -> str:
        """Commits files to a repository, created if it does not exist; returns the commit."""
        repository = self.repositories.setdefault(repo, Repository(**rights))
        return repository.commit(files, branch)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch."""
        repository = self.repositories[repo]
        return repository.commits[repository.branches[branch]]


def sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class RefusalError(Exception):
    """An answer that ends a request: a status, the Hub's headers for it, and a body for those who read it."""

    def __init__(self, status: int, code: str | None = None, message: str = "", body: object = None, **headers: str):
        self.status, self.body = status, json.dumps(body or {"error": message}).encode()
        self.headers = {"X-Error-Message": message, **({} if code is None else {"X-Error-Code": code}), **headers}


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hub does: status, X-Error-Code, X-Repo-Commit, ETag."""

    hub: Hub

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def do_POST(self) -> None:
        self.respond()

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""

    def respond(self) -> None:
        """Answers a request."""
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self.check_token()
            status, content, headers = 200, *self.route(path, body)
        except RefusalError as refusal:
            status, content, headers = refusal.status, refusal.body, refusal.headers
        if status == 200 and (span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")):
            first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
            status, content = 206, content[first : last + 1]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
            self.hub.num_sent += len(content)

    def route(self, path: str, body: bytes) -> tuple[bytes, dict[str, str]]:
        """The content and headers of the endpoint that a request is for."""
        if self.hub.failing:
            raise RefusalError(self.hub.failing)
        if self.command == "POST":
            return json.dumps(self.post(path, body)).encode(), {"Content-Type": "application/json"}
        # here a slash of the revision is quoted, and one of the file's name is not
        if match := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", urlsplit(self.path).path):
            return self.resolve(*map(unquote, match.groups()))
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/auth-check", path):
            self.check_access(match[1])
            return b"OK", {}
        if match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            repo, revision = match.groups()
            commit = self.find_commit(repo, revision or "main")
            info = {"id": repo, "modelId": repo, "sha": commit, "tags": [], "siblings": []}
            return json.dumps(info).encode(), {"Content-Type": "application/json"}
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", path):
            return json.dumps(self.list_tree(*match.groups())).encode(), {"Content-Type": "application/json"}
        raise RefusalError(404, message=f"no endpoint {path}")

    @property
    def token(self) -> str | None:
        """The token that came with the request."""
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def check_token(self) -> None:
        if self.token not in (None, TOKEN, STRANGER):
            raise RefusalError(401, message="Invalid credentials in Authorization header")

    # Reading

    def find_repository(self, repo: str) -> Repository:
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and self.token != TOKEN):
            raise RefusalError(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return repository

    def check_access(self, repo: str) -> Repository:
        repository = self.find_repository(repo)
        if repository.disabled:
            raise RefusalError(403, message="Access to this resource is disabled.")
        if repository.gated and self.token != TOKEN:
            raise RefusalError(403 if self.token else 401, "GatedRepo", f"Access to {repo} is restricted")
        return repository

    def find_commit(self, repo: str, revision: str) -> str:
        repository = self.find_repository(repo)
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def resolve(self, repo: str, revision: str, name: str) -> tuple[bytes, dict[str, str]]:
        """A file at a revision."""
        commit = self.find_commit(repo, revision)
        repository = self.check_access(repo)
        if name not in repository.commits[commit]:
            raise RefusalError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        content = repository.commits[commit][name]
        return content, {"ETag": f'"{sha(content)}"', "X-Repo-Commit": commit}

    def list_tree(self, repo: str, revision: str, folder: str) -> list[dict]:
        """What lies in a folder, and, where that is asked for, below it."""
        files = self.hub.repositories[repo].commits[self.find_commit(repo, revision)]
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for name, content in sorted(files.items()):
            below = name.removeprefix(prefix)
            if name.startswith(prefix) and "/" in below:
                path = prefix + below.partition("/")[0]
                entries[path] = {"type": "directory", "oid": sha(path.encode()), "size": 0, "path": path}
            if name.startswith(prefix) and ("/" not in below or "recursive=true" in self.path.lower()):
                entries[name] = {"type": "file", "oid": sha(content), "size": len(content), "path": name}
        if not entries:
            raise RefusalError(404, "EntryNotFound", f"{folder} does not exist")
        return [*entries.values()]

    # Writing

    def post(self, path: str, body: bytes) -> dict:
        """Answers for the four endpoints of a push."""
        if path == "/api/validate-yaml":
            return validate_yaml(json.loads(body)["content"])
        if self.token != TOKEN:
            raise RefusalError(403 if self.token else 401, message="You don't have the rights to create a model")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        repo, action, branch = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/(.+)", path).groups()
        repository = self.find_repository(repo)
        if branch not in repository.branches:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        if action == "preupload":
            asked = json.loads(body)["files"]
            return {"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked]}
        values = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
        commit = repository.commit({value["path"]: base64.b64decode(value["content"]) for value in values}, branch)
        return {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True}

    def create(self, asked: dict) -> dict:
        repo = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo}"}
        if repo in self.hub.repositories:
            raise RefusalError(409, message="You already created this model repo", body=answer)
        self.hub.publish(repo, {}, private=asked.get("visibility") == "private")
        return answer


def validate_yaml(card: str) -> dict:
    """Refuses a card whose front matter is no YAML mapping, as the Hub does."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        assert match is None or isinstance(yaml.safe_load(match[1]), dict)
    except (AssertionError, yaml.YAMLError) as error:
        body = {"errors": [{"message": "metadata must be a YAML mapping"}]}
        raise RefusalError(400, message="Invalid metadata in README.md", body=body) from error
    return {"errors": [], "warnings": []}


HUB = Hub()
