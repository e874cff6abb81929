"""docs/coming_from.md against the installed trl and our own parsers."""

import contextlib
import dataclasses
import io
import re
from pathlib import Path

import pytest

from matryoshka.scripts import cli

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "coming_from.md").read_text()


def section(title: str) -> str:
    """Return the text below a heading, up to the next one."""
    return PAGE.split(f"## {title}")[1].partition("\n## ")[0]


def flags_of(command: str) -> set[str]:
    """Return the flags that `matryoshka COMMAND --help` lists."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return set(re.findall(r"--[a-z0-9][a-z0-9.-]*", shown.getvalue()))


def test_every_field_of_dpo_config_has_a_row() -> None:
    """Oracle: the dataclass of the installed trl, whose version the page names."""
    trl = pytest.importorskip("trl")
    rows = re.findall(r"^\| (`.*?) \|", section("TRL"), re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    fields = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    assert len(listed) == len(set(listed)) and set(listed) == fields
    assert f"TRL {trl.__version__.rpartition('.')[0]}" in section("TRL")


def test_every_flag_of_ours_exists() -> None:
    """Oracle: the help of the command; in the tables' second column flags with points and dashes are ours."""
    known = flags_of("dpo")
    rows = [row for title in ("TRL", "OpenRLHF") for row in re.findall(r"^\| `.*$", section(title), re.MULTILINE)]
    cells = [row.split(" | ")[1] for row in rows]
    named = {flag for cell in cells for flag in re.findall(r"`(--[a-z0-9.-]+)", cell)}
    assert len(named) > 40 and not named - known
    original = section("The original's commands")
    for command in ("sft", "collect", "pairs", "score", "serve"):
        assert f"matryoshka {command}" in original and command in cli.COMMANDS
    assert {"--fields.prompt", "--fields.completion"} <= flags_of("sft") and "--policy" in flags_of("collect")
