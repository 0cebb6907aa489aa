"""The probe: a child that really dies turns the extra buffers off; the verdict is asked for once."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from edgealign.errors import ToolMissing
from edgealign.runtimes import probe

DIES_IF_ON = (
    "import os, signal, sys; open({count!r}, 'a').write(sys.argv[1] + ' '); "
    "sys.argv[1] == 'on' and os.kill(os.getpid(), signal.{signal})"
)
DIES_ALWAYS = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(probe.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(probe.COMMAND_VARIABLE, raising=False)
    probe._warn.cache_clear()


def use_child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setenv(probe.COMMAND_VARIABLE, shlex.join([sys.executable, "-c", code]))


@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV"])
def test_a_child_that_dies_turns_the_extra_buffers_off_and_says_so_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = tmp_path / "count"
    use_child(monkeypatch, DIES_IF_ON.format(count=str(count), signal=name))
    assert probe.extra_buffers_work() is False
    assert probe.extra_buffers_work() is False
    assert count.read_text() == "on off "  # asked once; the second answer came from the cache
    talk = capsys.readouterr().err
    assert talk.count("extra buffers off") == 1
    assert f"died of {name}" in talk
    assert "CMAKE_ARGS=" in talk
    assert "pip install" in talk


def test_the_verdict_survives_in_the_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = tmp_path / "count"
    use_child(monkeypatch, DIES_IF_ON.format(count=str(count), signal="SIGSEGV"))
    command = probe._child_command()
    assert probe.judge(command).reason == "died of SIGSEGV"
    files = list((tmp_path / "cache").glob("llama-probe-*.json"))
    assert len(files) == 1
    assert probe.judge(command) == probe.Verdict(False, "died of SIGSEGV")
    assert count.read_text() == "on off "
    files[0].write_text("damaged")
    assert probe.judge(command).extra_bufts is False
    assert count.read_text() == "on off on off "


def test_a_child_that_ends_well_keeps_them_on(monkeypatch: pytest.MonkeyPatch) -> None:
    use_child(monkeypatch, "pass")
    assert probe.extra_buffers_work() is True


def test_a_child_that_fails_without_a_signal_also_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    use_child(monkeypatch, "import sys; sys.exit('no numbers' if sys.argv[1] == 'on' else 0)")
    assert probe.judge(probe._child_command()) == probe.Verdict(False, "no numbers")


def test_a_child_that_hangs_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "TIMEOUT_S", 0.5)
    use_child(monkeypatch, "import sys, time; time.sleep(30 if sys.argv[1] == 'on' else 0)")
    assert "no answer" in probe.judge(probe._child_command()).reason


def test_a_build_that_dies_either_way_is_a_missing_tool_with_the_rebuild_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_child(monkeypatch, DIES_ALWAYS)
    with pytest.raises(ToolMissing, match=r"llama-cpp-python: .*died of SIGILL.*CMAKE_ARGS"):
        probe.extra_buffers_work()
    assert not list((tmp_path / "cache").glob("*"))


def test_another_library_or_cpu_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("true",)
    keys = set()
    for lines, flags in ((["a.so 1 1"], "avx"), (["a.so 1 2"], "avx"), (["a.so 1 1"], "avx amx")):
        monkeypatch.setattr(probe, "library_lines", lambda lines=lines: lines)
        monkeypatch.setattr(probe, "cpu_flags", lambda flags=flags: flags)
        probe.build_key.cache_clear()
        keys.add(probe.build_key(command))
    probe.build_key.cache_clear()
    assert len(keys) == 3


def test_an_absent_library_is_a_missing_tool_and_no_child_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "library_lines", lambda: probe.ABSENT)
    monkeypatch.setattr(probe, "judge", lambda command: pytest.fail("asked"))
    with pytest.raises(ToolMissing, match=r"llama-cpp-python: is not installed; install it with: CMAKE_ARGS"):
        probe.extra_buffers_work()


def test_a_containers_quota_limits_the_usable_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "cpu.max"
    monkeypatch.setattr(probe, "CGROUP_LIMIT", limit)
    free = probe.usable_cores()
    for text, cores in (("max 100000", free), ("100000 100000", 1), ("20000 100000", 1), ("99900000 100000", free)):
        limit.write_text(text)
        assert probe.usable_cores() == cores


@pytest.mark.parametrize(
    ("said", "threads"), [("3", 3), ("3,2", 3), (" 4 ", 4), ("0", None), ("-1", None), ("many", None), ("", None)]
)
def test_threads_that_nobody_names_are_those_of_the_environment(
    said: str, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert probe.default_threads() == (threads or probe.usable_cores())
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert probe.default_threads() == probe.usable_cores()


def test_a_small_file_takes_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    small, large = tmp_path / "small.gguf", tmp_path / "large.gguf"
    small.write_bytes(b"GGUF")
    with large.open("wb") as file:
        file.truncate(probe.SMALL_BYTES)
    assert (probe.default_threads(small), probe.default_threads(large)) == (1, 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert probe.default_threads(small) == 5


@pytest.mark.runtime
def test_this_build_passes_or_fails_its_own_probe() -> None:
    verdict = probe.judge(probe._child_command())
    assert verdict.reason == "quantised inference works" or not verdict.extra_bufts


@pytest.mark.runtime
def test_after_a_dead_probe_sessions_load_without_extra_buffers_and_still_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgealign.runtimes import llamacpp

    use_child(monkeypatch, DIES_IF_ON.format(count=str(tmp_path / "count"), signal="SIGILL"))
    library = llamacpp.load_library()
    given: list[bool] = []

    class Watched:
        def __getattr__(self, name: str) -> object:
            return getattr(library, name)

        def llama_model_load_from_file(self, path: bytes, params: object) -> object:
            given.append(params.use_extra_bufts)  # type: ignore[attr-defined]
            return library.llama_model_load_from_file(path, params)

    monkeypatch.setattr(llamacpp, "load_library", Watched)
    file = tmp_path / "model.gguf"
    probe.write_model(file)
    session = llamacpp.LlamaSession(file, threads=1)
    logits = session.prefill([1, 2, 3])
    assert given == [False]
    assert session.info()["extra_bufts"] is False
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1
    session.close()
