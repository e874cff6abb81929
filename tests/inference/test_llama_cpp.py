"""llama.cpp's server: its settings, its refusals, and the real wheel over the embedded model's GGUF file."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from matryoshka.inference.llama_cpp import LlamaConfig, check_gguf, start_llama


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A file that begins as a GGUF file does."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(range(256)))
    return path


def fake_wheel(monkeypatch: pytest.MonkeyPatch, refuses: str = "") -> list[Any]:
    """Put a fake xllamacpp in place and return the list that its servers' parameters are appended to."""
    taken: list[Any] = []

    def params() -> SimpleNamespace:
        threads = [SimpleNamespace(n_threads=-1) for _ in range(2)]
        return SimpleNamespace(model=SimpleNamespace(path=""), cpuparams=threads[0], cpuparams_batch=threads[1])

    def server(given: Any) -> SimpleNamespace:
        if refuses:
            raise RuntimeError(refuses)
        taken.append(given)
        return SimpleNamespace(listening_address="http://127.0.0.1:1")

    module = ModuleType("xllamacpp")
    module.CommonParams, module.Server = params, server  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xllamacpp", module)
    return taken


def test_the_server_gets_every_setting(monkeypatch: pytest.MonkeyPatch, gguf: Path) -> None:
    """Oracle: the arguments; without a key the field stays unset, so that the server asks for none."""
    taken = fake_wheel(monkeypatch)
    for key in (None, "secret"):
        start_llama(gguf, "coder", "127.0.0.1", 8080, 3, key, LlamaConfig(slots=5, context=4096, prompt_cache_mib=7))
    first, second = taken
    assert first.model.path == str(gguf) and first.model_alias == {"coder"} and first.hostnames == ["127.0.0.1"]
    assert (first.port, first.n_parallel, first.n_ctx, first.cache_ram_mib) == (8080, 5, 4096, 7)
    assert first.cpuparams.n_threads == first.cpuparams_batch.n_threads == 3
    assert first.cpuparams.poll == first.cpuparams_batch.poll == 0
    assert first.kv_unified and not hasattr(first, "api_keys") and second.api_keys == ["secret"]


def test_what_cannot_be_served_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gguf: Path) -> None:
    """Oracle: the message for each fault names the file and its expected content, or the package to install."""
    with pytest.raises(FileNotFoundError, match="absent.gguf: there is no such file"):
        check_gguf(tmp_path / "absent.gguf")
    (tmp_path / "page.gguf").write_text("<html>")
    with pytest.raises(ValueError, match="begins with b'<htm' but a GGUF file begins with b'GGUF'"):
        check_gguf(tmp_path / "page.gguf")
    with pytest.raises(ValueError, match="slots 0 must be at least 1"):
        LlamaConfig(slots=0)
    fake_wheel(monkeypatch, refuses="unknown architecture")
    with pytest.raises(ValueError, match="llama.cpp cannot serve it: unknown architecture"):
        start_llama(gguf, "coder", "127.0.0.1", 0, 1, None, LlamaConfig())
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ValueError, match="pip install 'matryoshka-pilot\\[llama\\]'"):
        start_llama(gguf, "coder", "127.0.0.1", 0, 1, None, LlamaConfig())
