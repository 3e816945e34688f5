"""
Another machine in miniature: a model hub over HTTP on 127.0.0.1, and Python processes in which `neuroflow_hf` is not
installed and no other address can be reached.
"""

import base64
import hashlib
import inspect
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, hf_api
from transformers.utils import hub

# Runs at the start of every process that `call_elsewhere` makes, before torch and transformers are imported.
PRELUDE = '''
import importlib.abc, json, os, sys, warnings

given = json.loads(sys.argv[1])


class PackageBlocker(importlib.abc.MetaPathFinder):
    """As if `neuroflow_hf` were not installed; first in line, so that no finder of an editable install is asked."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "neuroflow_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


refused_addresses = []


def only_loopback(event, arguments):
    host = arguments[1] if event == "socket.connect" else arguments[0] if event == "socket.getaddrinfo" else None
    host = host[0] if isinstance(host, tuple) else host
    if host is not None and host not in ("127.0.0.1", b"127.0.0.1"):
        refused_addresses.append(str(host))
        raise ConnectionRefusedError(f"A test wanted to reach {host}; only 127.0.0.1 is allowed.")


sys.addaudithook(only_loopback)
sys.meta_path.insert(0, PackageBlocker())
try:
    import neuroflow_hf
except ImportError:
    pass
else:
    raise AssertionError("neuroflow_hf can be imported here, so this process shows nothing about remote code.")

for category in (DeprecationWarning, FutureWarning):
    warnings.filterwarnings("error", category=category, module="transformers_modules")
'''

EPILOGUE = """
result = {name}(**given["values"])
assert not refused_addresses, f"addresses that are not 127.0.0.1: {{refused_addresses}}"
with open(given["result"], "w", encoding="utf-8") as file:
    json.dump(result, file)
"""


def call_elsewhere(function, directory: Path, hub: str | None = None, **values):
    """
    Call a function in a new Python process with caches of its own, and return what it returned.

    Args:
        function: its source is sent, so it does its own imports and uses nothing around it; returns plain values.
        directory: working directory of the process. Its Hugging Face cache is made there too.
        hub: address of a [`LoopbackHub`]; without one, the process is offline.
        values: arguments of the function, plain values and paths.

    Raises:
        AssertionError: with the process's output if it failed, or wanted to reach an address but 127.0.0.1.
    """
    directory.mkdir(parents=True, exist_ok=True)
    script, result = directory / f"{function.__name__}.py", directory / f"{function.__name__}.json"
    body = textwrap.dedent(inspect.getsource(function))
    script.write_text(PRELUDE + body + EPILOGUE.format(name=function.__name__), encoding="utf-8")
    values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    given = {"result": str(result), "values": values}
    # Nothing of the caller's hub settings, tokens or proxies goes along.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and not name.lower().endswith("_proxy")
    }
    environment |= {"HF_HOME": str(directory / "cache"), "HF_MODULES_CACHE": str(directory / "cache" / "modules")}
    environment["OMP_NUM_THREADS"] = "1"  # models here are tiny; more threads only wait for each other
    environment |= {"HF_ENDPOINT": hub, "HF_TOKEN": "hf_dummy"} if hub else {"HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-I", str(script), json.dumps(given)],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,  # some seconds, unless the machine is busy with something else
    )
    assert process.returncode == 0, f"{function.__name__} failed elsewhere:\n{process.stdout}{process.stderr}"
    return json.loads(result.read_text(encoding="utf-8"))


class LoopbackHub:
    """
    A model hub in memory, as far as pushing and loading models needs one. A context manager: it serves inside `with`.

    Attributes:
        repositories (`dict[str, list[tuple[str, dict[str, bytes]]]]`):
            Per repository its commits, oldest first: the commit's hash, and all files at that commit.
        requests (`list[str]`): method and path of every request so far.
        unknown (`list[str]`): those requests that asked for something this hub does not know about.
    """

    def __init__(self):
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))
        self._server.daemon_threads = True  # a connection that a client keeps open holds nothing up
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """The hub's address."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    @contextmanager
    def reached_from_here(self) -> Iterator[None]:
        """
        Pushes of this process go to the hub. Another process takes nine seconds for torch and transformers, and reads
        the address from its environment; in this one, it was read long ago.
        """
        files = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hf_api.api, "endpoint", self.url)
            patch.setattr(hf_api.api, "token", "hf_dummy")
            for name, value in (("ENDPOINT", self.url), ("HUGGINGFACE_CO_URL_TEMPLATE", files)):
                patch.setattr(constants, name, value)
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(hub, "_hf_api", None, raising=False)  # one is made on first use, with the address of then
            yield

    def files(self, name: str) -> dict[str, bytes]:
        """The files of a repository as of its last commit."""
        return self.repositories[name][-1][1]

    def commit(self, name: str, changes: dict[str, bytes | None]) -> str:
        """Add a commit to a repository: new contents by path, None to delete. Returns its hash."""
        commits = self.repositories[name]
        files = dict(commits[-1][1]) if commits else {}
        for path, content in changes.items():
            if content is None:
                files.pop(path, None)
            else:
                files[path] = content
        digest = hashlib.sha1(f"{name} {len(commits)}".encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        commits.append((digest.hexdigest(), files))
        return digest.hexdigest()


class HubHandler(BaseHTTPRequestHandler):
    """Answers one request. Names of repositories have two parts, as in `user/tiny`; the only branch is `main`."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Keep quiet."""

    def do_GET(self):
        """Files, and what is known about repositories."""
        match self.parts():
            case ["api", "models", user, name]:
                self.describe(f"{user}/{name}", "main")
            case ["api", "models", user, name, "revision", revision]:
                self.describe(f"{user}/{name}", revision)
            case ["api", "models", user, name, "tree", revision, *folder]:
                self.list_tree(f"{user}/{name}", revision, "/".join(folder))
            case [user, name, "resolve", revision, *path]:
                self.send_file(f"{user}/{name}", revision, "/".join(path))
            case _:
                self.not_known()

    do_HEAD = do_GET

    def do_POST(self):
        """New repositories and commits."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        match self.parts():
            case ["api", "repos", "create"]:
                wanted = json.loads(body)
                name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
                status = 409 if name in self.hub.repositories else 200
                if status == 200:
                    self.hub.repositories[name] = []
                    self.hub.commit(name, {})
                self.send_json({"url": f"{self.hub.url}/{name}", "name": name}, status)
            case ["api", "validate-yaml"]:
                self.send_json({"errors": [], "warnings": []})
            case ["api", "models", user, name, "preupload", "main"]:
                files = [
                    # "regular": the file travels inside the commit; the other ways need more servers
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self.send_json({"files": files})
            case ["api", "models", user, name, "commit", "main"]:
                changes = {}
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        changes[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                    elif entry["key"] == "deletedFile":
                        changes[entry["value"]["path"]] = None
                commit = self.hub.commit(f"{user}/{name}", changes)
                url = f"{self.hub.url}/{user}/{name}/commit/{commit}"
                self.send_json({"success": True, "commitOid": commit, "commitUrl": url})
            case _:
                self.not_known()

    def parts(self) -> list[str]:
        """The request's path in parts; notes the request down."""
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path.strip("/").split("/")

    def files_at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files at `main` or at a commit; None, and the answer is sent, if there is no such thing."""
        commits = self.hub.repositories.get(name)
        if commits is None:
            return self.send_error_code("RepoNotFound")
        found = commits[-1] if revision == "main" else next((c for c in commits if c[0] == revision), None)
        return found or self.send_error_code("RevisionNotFound")

    def describe(self, name: str, revision: str):
        """What is known about a repository."""
        if found := self.files_at(name, revision):
            commit, files = found
            siblings = [{"rfilename": path} for path in files]
            self.send_json({"id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings})

    def list_tree(self, name: str, revision: str, folder: str):
        """The files in a folder of a repository and below it."""
        if found := self.files_at(name, revision):
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in found[1].items()
                if path.startswith(f"{folder}/" if folder else "")
            ]
            if folder and not entries:
                self.send_error_code("EntryNotFound")
            else:
                self.send_json(entries)

    def send_file(self, name: str, revision: str, path: str):
        """A file's content."""
        if found := self.files_at(name, revision):
            commit, files = found
            if path not in files:
                self.send_error_code("EntryNotFound", {"X-Repo-Commit": commit})
                return
            etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
            self.answer(200, files[path], "application/octet-stream", {"X-Repo-Commit": commit, "ETag": etag})

    def send_error_code(self, code: str, headers: dict[str, str] | None = None) -> None:
        """404 with the code that the client library makes its exception of."""
        self.answer(404, b"{}", "application/json", {"X-Error-Code": code, **(headers or {})})

    def not_known(self):
        """404 for what this hub cannot do; noted down."""
        self.hub.unknown.append(self.hub.requests[-1])
        self.answer(404, b"{}", "application/json", {})

    def send_json(self, content, status: int = 200):
        """`content` as JSON."""
        self.answer(status, json.dumps(content).encode(), "application/json", {})

    def answer(self, status: int, body: bytes, content_type: str, headers: dict[str, str]):
        """Status, headers, and the body unless only the head was asked for."""
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
