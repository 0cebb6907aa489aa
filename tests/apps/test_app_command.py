"""`edgealign app` as it is started: the address on stdout, one line for each mistake, nothing said about the talk."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from edgealign import apps
from edgealign.artifact import hash_json, read_manifest
from edgealign.errors import ToolMissing
from edgealign.models.builtin import built_in

from .conftest import PATIENCE_S

CANARY = "canary-4471"
GGUF = all(importlib.util.find_spec(module) for module in ("llama_cpp", "gguf"))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "edgealign", "app", "--no-browser", *arguments]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("app") / "home"


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_the_starter_until_it_is_told_to_end_and_logs_no_message(
    home: Path, tmp_path: Path, ending: int
) -> None:
    exports = GGUF and not home.exists()  # once
    errors = tmp_path / "stderr"
    with errors.open("w") as stderr:
        running = subprocess.Popen(
            command("--port", "0", "--json", "--home", str(home), "--max-tokens", "4"), stdout=subprocess.PIPE,
            stderr=stderr, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert running.stdout
        facts = json.loads(running.stdout.readline())
        headers = {"authorization": f"Bearer {facts['token']}"}
        assert facts["page"].endswith(f"/?token={facts['token']}")
        assert (home / "token").read_text().strip() == facts["token"]
        with httpx.Client(base_url=facts["api"], headers=headers, timeout=PATIENCE_S) as client:
            assert [model["id"] for model in client.get("/models").json()["data"]] == ["starter"]
            ask = {"model": "starter", "messages": [{"role": "user", "content": f"Hello {CANARY}"}]}
            answer = client.post("/chat/completions", json=ask)
            assert answer.status_code == 200
            assert answer.json()["usage"]["completion_tokens"] <= 4
            bad = [{**ask, "messages": [{"role": CANARY, "content": CANARY}]}, {**ask, CANARY: 1}, {"model": CANARY}]
            for form in bad:
                assert client.post("/chat/completions", json=form).status_code in (400, 404)
            assert client.get(f"/models/{CANARY}?q={CANARY}").status_code == 404
            api = facts["api"].removesuffix("/v1")
            assert client.get(f"{api}/api/state").json()["runtime"] == ("llama.cpp" if GGUF else "torch")
            second = subprocess.run(command("--home", str(home)), capture_output=True, text=True, check=False)
            assert second.returncode == 2
            assert second.stderr.strip().endswith(f"is open in another edgealign app; use that one: {facts['page']}")
            made = client.post(f"{api}/api/conversations", json={"title": CANARY})
            assert made.status_code == 201
        running.send_signal(ending)
        assert running.wait(PATIENCE_S) == 0
        rest = running.stdout.read()
        running.stdout.close()
    assert CANARY not in rest
    assert [line[:24] for line in errors.read_text().splitlines()] == (["exporting the starter to"] if exports else [])
    holding = [file.name for file in home.rglob("*") if file.is_file() and CANARY.encode() in file.read_bytes()]
    assert all(name.startswith("assistant.db") for name in holding)
    assert {file.stat().st_mode & 0o077 for file in home.iterdir()} == {0}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--bundle", "nowhere"], ["nowhere", "no such model directory"]),
        (["--token", "short"], ["token"]),
        (["--adapter", "ana=nowhere"], ["nowhere"]),
        (["--adapter", "ana"], ["--adapter", "NAME=DIR"]),
        (["--port", "99999"], ["port"]),
        (["--home", "/dev/null/x"], ["/dev/null"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], parts: list[str], tmp_path: Path) -> None:
    home = [] if "--home" in arguments else ["--home", str(tmp_path / "home")]
    done = subprocess.run(
        command("--port", "0", *arguments, *home), capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stdout == ""
    for part in parts:
        assert part in done.stderr


def test_a_kept_connection_does_not_wait_for_acknowledgements() -> None:
    """What asyncio accepts from a socket without a named protocol keeps Nagle's algorithm: 40 ms more."""

    async def accepted() -> int:
        found = asyncio.get_running_loop().create_future()
        with apps.load("assistant.server")._bound(0) as listening:
            async with await asyncio.start_server(lambda _, writer: found.set_result(writer), sock=listening):
                _, client = await asyncio.open_connection(*listening.getsockname())
                option = (await found).get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                client.close()
                found.result().close()
        return int(option)

    assert asyncio.run(accepted())


def test_the_starter_is_exported_once_or_said_to_run_in_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from assistant.starter import starter_in

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert starter_in(tmp_path) == "starter"
    assert "runs in torch: llama.cpp is not installed" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr("assistant.starter.QUANT", "q9_9")
    assert starter_in(tmp_path) == "starter"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "its export to GGUF failed" in said[1]
    assert not list(tmp_path.rglob("manifest.json"))
    made = tmp_path / "bundles" / hash_json([read_manifest(built_in("starter")).digest, "q9_9"])[:16] / "starter"
    made.mkdir()
    assert starter_in(tmp_path) == made
    assert capsys.readouterr().err == ""


def test_a_taken_port_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            command("--port", port, "--home", str(tmp_path / "home")), capture_output=True, text=True, check=False
        )
    assert done.returncode == 2
    assert f"port {port}" in done.stderr
    assert not (tmp_path / "home").exists()


def test_a_wheel_carries_the_app_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apps, "PACKAGE", tmp_path / "edgealign")
    with pytest.raises(ToolMissing, match="missing from this installation"):
        apps.folder("assistant")
    (tmp_path / "edgealign" / "_apps" / "assistant").mkdir(parents=True)
    (tmp_path / "edgealign" / "_apps" / "assistant" / "__init__.py").touch()
    assert apps.folder("assistant") == tmp_path / "edgealign" / "_apps"
    assert '"apps" = "edgealign/_apps"' in (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")


def test_without_its_libraries_it_says_what_to_install(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['fastapi'] = None; sys.argv = ['edgealign', 'app', '--no-browser']; "
    done = subprocess.run(
        [sys.executable, "-c", hidden + "from edgealign.cli import main; main()"], capture_output=True, text=True,
        check=False, env={**os.environ, "EDGEALIGN_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 3
    assert "pip install 'edgealign[app]'" in done.stderr
    assert list(tmp_path.iterdir()) == []
