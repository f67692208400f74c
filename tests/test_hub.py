"""Uploading to a model repository, against a server that plays the Hub's HTTP API for huggingface_hub."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from gptq import InputError, cli
from gptq.checkpoint.hub import explain, resolve
from gptq.checkpoint.pickled import PICKLES_ON_HUB
from tests.conftest import MakeModel

# huggingface_hub uploads with an argument that its HTTP library has come to deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN = "hf_" + "s3cretT0ken" * 3
REPO = "somebody/small-4bit"


def test_second_copies_of_weights_are_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at first nor when the pickled weights are asked for."""
    asked: list[tuple[list[str], list[str]]] = []

    def download(model: str, *, revision: None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(([*allow_patterns], ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=r"holds no pytorch_model\.bin"):
        resolve("somebody/model", None, allow_pickle=True)
    assert [ignored for _, ignored in asked] == [["consolidated*", "original/*"]] * 2
    assert [PICKLES_ON_HUB in allowed for allowed, _ in asked] == [False, True]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OfflineModeIsEnabled("a long text"), "HF_HUB_OFFLINE is set, and the cache has no copy"),
        (LocalEntryNotFoundError("a long text"), "HF_HUB_OFFLINE is set, and the cache has no copy"),  # as in tests
        (ConnectionError("no route\nto it"), "no route"),
    ],
)
def test_why_the_hub_gave_nothing_is_said_in_a_few_words(error: Exception, reason: str) -> None:
    assert explain(error) == reason


@dataclass
class Hub:
    """What the server was asked and given."""

    address: str = ""
    refuses: str = ""  # a path that is answered with 403
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    created: list[dict[str, Any]] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    files: dict[str, bytes] = field(default_factory=dict)  # committed, by path

    def answer(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        if path == "/api/whoami-v2":
            return {"name": "somebody", "type": "user", "orgs": [], "auth": {"type": "access_token"}}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.address}/{REPO}", "id": "1", "name": REPO}
        if path.endswith("/preupload/main"):
            return {
                "files": [
                    {"path": path, "shouldIgnore": False, "uploadMode": "lfs" if "safetensors" in path else "regular"}
                    for path in (f["path"] for f in json.loads(body)["files"])
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            upload = {"upload": {"href": f"{self.address}/put"}}
            objects = [{**o, "actions": upload} for o in json.loads(body)["objects"]]
            return {"transfer": "basic", "objects": objects}
        if path == "/put":
            self.large[hashlib.sha256(body).hexdigest()] = body
            return {}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.large[value["oid"]]
            return {"commitUrl": f"{self.address}/{REPO}/commit/1", "commitOid": "1", "pullRequestUrl": None}
        return {"sha": "1", "id": REPO, "siblings": [], "private": False, "tags": [], "downloads": 0, "likes": 0}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    stand_in = Hub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            path = self.path.partition("?")[0]
            stand_in.requests.append(f"{self.command} {path}")
            if self.headers.get("Authorization"):
                stand_in.tokens.add(self.headers["Authorization"])
            refused = stand_in.refuses and path.endswith(stand_in.refuses)
            answer = {"error": "not yours"} if refused else stand_in.answer(self.command, path, body)
            content = json.dumps(answer).encode()
            self.send_response(403 if refused else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stand_in.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # its protocol is not played here
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stand_in.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield stand_in
    server.shutdown()
    thread.join()
    server.server_close()


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_a_folder_becomes_a_repository_and_the_token_stays_secret(
    hub: Hub, make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, printed = run(capsys, "quantize", make_model("llama"), out, "--method", "rtn", "--push", REPO, "--private")
    assert code == 0, (printed, hub.requests)
    assert f"pushed to {hub.address}/{REPO}" in printed
    assert "private" in (hub.created[0].get("visibility"), hub.created[0].get("private") and "private")
    assert hub.files == {file.name: file.read_bytes() for file in out.iterdir()}
    needed = {"config.json", "quantize_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert needed <= hub.files.keys()
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in printed
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes()
    own = [request for request in hub.requests if "agent-harnesses" not in request]  # the client's, about itself
    assert own.index("GET /api/whoami-v2") == 0  # asked before the work


def test_a_conversion_can_be_pushed(
    hub: Hub, make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "quantize", make_model("llama"), tmp_path / "a", "--method", "rtn", "--group-size", "32")
    code, printed = run(capsys, "convert", tmp_path / "a", tmp_path / "b", "--format", "pack-quantized", "--push", REPO)
    assert code == 0, (printed, hub.requests)
    assert b"weight_packed" in hub.files["model.safetensors"]
    assert hub.created[0].get("visibility", "public") == "public"
    assert not hub.created[0].get("private")


@pytest.mark.parametrize("refuses", ["/preupload/main", "/commit/main"])
def test_a_refused_push_is_a_sentence_and_keeps_the_folder(
    refuses: str, hub: Hub, make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuses = refuses
    out = tmp_path / "out"
    code, printed = run(capsys, "quantize", make_model("llama"), out, "--method", "rtn", "--push", REPO)
    assert code == 2
    assert f"{REPO} did not take {out}, which stays as it is" in printed
    assert "Traceback" not in printed
    assert TOKEN not in printed
    assert (out / "model.safetensors").is_file()


def test_who_cannot_push_hears_it_before_the_work(
    hub: Hub,
    make_model: MakeModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    code, printed = run(capsys, "quantize", source, out, "--method", "rtn", "--push", "not a/name/at all")
    assert (code, out.exists()) == (2, False)
    assert "cannot be a repository's name" in printed
    hub.refuses = "/api/whoami-v2"
    code, printed = run(capsys, "quantize", source, out, "--method", "rtn", "--push", REPO)
    assert (code, out.exists()) == (2, False)
    assert "log in with `hf auth login`" in printed
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    code, printed = run(capsys, "quantize", source, out, "--method", "rtn", "--push", REPO)
    assert (code, out.exists()) == (2, False)
    assert "nobody is logged in" in printed
