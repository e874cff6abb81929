"""core/config.py: what comes in typed goes out as the same TOML, and every mistake is named where it was made."""

import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka.core.config import diff, load_toml, to_toml


@dataclass(frozen=True)
class Trainer:
    learning_rate: float = 5e-6
    epochs: int = 1
    betas: tuple[float, ...] = (0.9, 0.95)
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs {self.epochs} must be at least 1")


@dataclass(frozen=True)
class Config:
    controller: str
    seed: int = 0
    resume: bool = True
    loss: Literal["dpo", "ipo", "simpo"] = "dpo"
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    widths: tuple[int, ...] = ()
    folder: Path = Path("runs")
    note: str | None = None
    stops: tuple[str, ...] | None = None
    sft: Trainer = Trainer(learning_rate=2e-5, epochs=3)
    dpo: Trainer = field(default_factory=Trainer)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_values_come_from_file_then_overrides_then_defaults(tmp_path: Path) -> None:
    """Oracle: the expected dataclass written out by hand; a table keeps the defaults of the dataclass around it."""
    path = write(tmp_path, 'controller = "c"\nseed = 7\nwidths = [1, 2]\n[sft]\nclip = 1\n[dpo]\nlearning_rate = 3e-4')
    config = load_toml(Config, path, {"seed": 8, "dpo.betas": (0.5,), "note": "n"})
    assert config == Config(
        controller="c",
        seed=8,
        widths=(1, 2),
        note="n",
        sft=Trainer(learning_rate=2e-5, epochs=3, clip=1.0),
        dpo=Trainer(learning_rate=3e-4, betas=(0.5,)),
    )
    assert type(config.sft.clip) is float


def test_an_override_supplies_a_required_key(tmp_path: Path) -> None:
    """Oracle: the same file is refused without the override."""
    path = write(tmp_path, "seed = 1\n")
    with pytest.raises(ValueError, match=r"run\.toml: controller: the key is missing"):
        load_toml(Config, path)
    assert load_toml(Config, path, {"controller": "c"}).controller == "c"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('controller = "c"\nsede = 1', r"run\.toml: sede: unknown key; did you mean 'seed'\?"),
        ('controller = "c"\n[dpo]\nlearnign_rate = 1.0', r"dpo\.learnign_rate: .* 'dpo\.learning_rate'\?"),
        ('controller = "c"\nepochs = 1', r"epochs: unknown key; did you mean 'sft\.epochs' or 'dpo\.epochs'\?"),
        ('controller = "c"\nxyz = 1', r"xyz: unknown key; known here: controller, seed, "),
        ('controller = "c"\nseed = "1"', r"seed: expected an integer, got str \('1'\)"),
        ('controller = "c"\nseed = true', r"seed: expected an integer, got bool"),
        ('controller = "c"\nseed = 1.0', r"seed: expected an integer, got float"),
        ('controller = "c"\nresume = 1', r"resume: expected true or false, got int"),
        ('controller = "c"\nfolder = 3', r"folder: expected a string, got int"),
        ("controller = 3", r"controller: expected a string, got int"),
        ('controller = "c"\n[dpo]\nlearning_rate = true', r"dpo\.learning_rate: expected a number, got bool"),
        ('controller = "c"\n[dpo]\nlearning_rate = nan', r"dpo\.learning_rate: expected a finite number"),
        ('controller = "c"\n[dpo]\nbetas = [0.1, "x"]', r"dpo\.betas\[1\]: expected a number, got str"),
        ('controller = "c"\ntargets = "q_proj"', r"targets: expected a list, got str"),
        ('controller = "c"\ndpo = 3', r"dpo: expected a table, got int"),
        ('controller = "c"\nseed = {a = 1}', r"seed: expected an integer, got a table"),
        ('controller = "c"\nloss = "dop"', r"loss: expected 'dpo', 'ipo' or 'simpo', got .*'dop'.* mean 'dpo'\?"),
        ('controller = "c"\n[dpo]\nepochs = 0', r"run\.toml: dpo: epochs 0 must be at least 1"),
        ("controller = ", r"run\.toml: not valid TOML"),
        ('controller = "c"\nseed = ' + "1" * 5000, r"run\.toml: not valid TOML: Exceeds the limit"),
        ('controller = "c"\nwidths = ' + "[" * 100_000, r"run\.toml: not valid TOML: its values are nested too deeply"),
        ('controller = "c"\nnote = 2024-01-01', r"run\.toml: 2024-01-01 is a date, and no setting is one"),
        ('controller = "c"\n[dpo]\nlearning_rate = inf', r"dpo\.learning_rate: expected a finite number"),
    ],
)
def test_a_mistake_names_file_key_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    """Oracle: the message that a user can act on."""
    with pytest.raises(ValueError, match=message):
        load_toml(Config, write(tmp_path, text))


def test_a_missing_file_is_not_an_empty_one(tmp_path: Path) -> None:
    """Oracle: the exception names the file."""
    with pytest.raises(FileNotFoundError, match="absent.toml"):
        load_toml(Config, tmp_path / "absent.toml")


def test_a_bad_override_says_so(tmp_path: Path) -> None:
    """Oracle: the source in the message is the override, not the file, whose own mistakes keep its name."""
    path = write(tmp_path, 'controller = "c"\n')
    with pytest.raises(ValueError, match=r"^override: dpo\.epochs: expected an integer, got str"):
        load_toml(Config, path, {"dpo.epochs": "many"})
    with pytest.raises(ValueError, match=r"^override: seed\.x: seed is a value"):
        load_toml(Config, write(tmp_path, 'controller = "c"\nseed = 1\n'), {"seed.x": 1})


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
number = st.floats(allow_nan=False, allow_infinity=False)
trainers = st.builds(
    Trainer, learning_rate=number, epochs=st.integers(1), betas=st.lists(number).map(tuple), clip=st.none() | number
)


@given(
    config=st.builds(
        Config,
        controller=text,
        seed=st.integers(-(2**63), 2**63 - 1),
        resume=st.booleans(),
        loss=st.sampled_from(["dpo", "ipo", "simpo"]),
        targets=st.lists(text).map(tuple),
        widths=st.lists(st.integers()).map(tuple),
        folder=text.map(Path),
        note=st.none() | text,
        stops=st.none() | st.lists(text).map(tuple),
        sft=trainers,
        dpo=trainers,
    )
)
def test_toml_round_trips(config: Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Oracle: the standard library's parser; load(to_toml(c)) == c, and every field that is not None is written."""
    path = write(tmp_path_factory.getbasetemp(), to_toml(config))
    assert load_toml(Config, path) == config
    assert diff(load_toml(Config, path), config) == []
    written: dict[str, Any] = tomllib.loads(path.read_text())
    assert set(written) == {name for name, value in vars(config).items() if value is not None}
    assert set(written["dpo"]) == {name for name, value in vars(config.dpo).items() if value is not None}


def test_none_over_a_default_that_is_not_none_is_refused() -> None:
    """Oracle: the message. TOML has no null, so writing it would silently restore the default."""

    @dataclass(frozen=True)
    class Outer:
        inner: Trainer = Trainer(clip=1.0)

    assert "clip = 1.0" in to_toml(Outer())
    with pytest.raises(ValueError, match=r"inner\.clip: None cannot be written, since the default is 1\.0"):
        to_toml(Outer(Trainer(clip=None)))


def test_diff_reads_as_a_sentence() -> None:
    """Oracle: the lines written by hand."""
    old = Config(controller="c", dpo=Trainer(learning_rate=3e-4))
    new = replace(old, seed=1, note="x", targets=("q_proj",), dpo=Trainer(learning_rate=1e-4, clip=0.5))
    assert diff(old, new) == [
        "seed: 0 -> 1",
        'targets: ["q_proj", "v_proj"] -> ["q_proj"]',
        'note: none -> "x"',
        "dpo.learning_rate: 0.0003 -> 0.0001",
        "dpo.clip: none -> 0.5",
    ]


@dataclass(frozen=True)
class Row:
    url: str
    limit: int = 0
    inner: Trainer = Trainer()


@dataclass(frozen=True)
class Table:
    name: str = "t"
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Tables:
    table: Table = Table()


def test_arrays_of_tables_go_in_and_out(tmp_path: Path) -> None:
    """Oracle: the dataclasses written out by hand, the file that comes back, and the key path of each mistake."""
    text = '[table]\n[[table.rows]]\nurl = "a"\n[[table.rows]]\nurl = "b"\nlimit = 3\n[table.rows.inner]\nepochs = 2\n'
    config = load_toml(Tables, write(tmp_path, text))
    assert config == Tables(Table("t", (Row("a"), Row("b", 3, Trainer(epochs=2)))))
    assert load_toml(Tables, write(tmp_path, to_toml(config))) == config
    assert load_toml(Tables, write(tmp_path, to_toml(Tables()))) == Tables()
    changed = Tables(Table("t", (Row("a"), Row("c", 3, Trainer(epochs=2)))))
    assert diff(config, changed) == ['table.rows[1].url: "b" -> "c"']
    assert diff(config, config) == [] != diff(config, Tables())
    with pytest.raises(ValueError, match=r"table\.rows\[1\]\.limt: unknown key; did you mean .*\[1\]\.limit'"):
        load_toml(Tables, write(tmp_path, '[[table.rows]]\nurl = "a"\n[[table.rows]]\nurl = "b"\nlimt = 3\n'))
    with pytest.raises(ValueError, match="rows: expected a list, got str"):
        load_toml(Tables, write(tmp_path, '[table]\nrows = "a"\n'))
