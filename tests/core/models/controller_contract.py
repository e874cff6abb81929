"""The contract that every architecture keeps, clause by clause; `test_controllers.py` runs it over a folder of them.

A folder holds `<model_type>.py`, the architecture, and `<model_type>.json`: `base`, the fields of a tiny config.json;
`variants`, by name the fields that change; `refused`, settings that must be refused by name; and, where transformers
knows the architecture under another name, `reference`. The oracle is transformers in true float64: it computes norms,
softmax and angles in float32 even in a float64 model, so for the time of a reference pass float32 means float64.

`python -m matryoshka.tests.core.models.controller_contract` prints the table of docs/controllers.md.
"""

import copy
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.load import MODELS, OWN_FOLDERS, architecture_files, model_architecture
from matryoshka.core.models.weights import save_weights

SETTINGS = Path(__file__).parent / "controllers"
# Fields of transformers' configurations that shape no log-prob.
SHAPELESS = {
    "initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "architectures", "dtype",
    "id2label", "label2id", "problem_type", "output_hidden_states", "return_dict", "output_attentions",
    "chunk_size_feed_forward", "is_encoder_decoder", "transformers_version", "name_or_path", "pretraining_tp",
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A file under the contract, and the settings that it is tried with."""

    model_type: str
    module: ModuleType
    settings: dict[str, Any]

    @property
    def cases(self) -> list["Case"]:
        """The base configuration, then each variant."""
        variants = {"base": {}, **self.settings.get("variants", {})}
        return [Case(self, name, {**self.settings["base"], **changes}) for name, changes in variants.items()]


@dataclass(frozen=True)
class Case:
    """One configuration of an architecture."""

    architecture: Architecture
    name: str
    fields: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.architecture.model_type}, {self.name}"

    @cached_property
    def theirs(self) -> Any:
        """transformers' model in float64 with random weights, norms and biases too."""
        import transformers

        settings = self.architecture.settings
        with float64():
            config = transformers.AutoConfig.for_model(
                settings.get("reference", self.architecture.model_type),
                **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, **copy.deepcopy(self.fields)},
            )
            build: Any = transformers.AutoModelForCausalLM.from_config
            model: Any = build(config, attn_implementation="eager").double().eval()
        randomise(model)
        return model

    def ours(self) -> LanguageModel:
        """Return our model in float64 with the same weights."""
        module = self.architecture.module
        config = module.read_config({"model_type": self.architecture.model_type, **self.fields})
        model: LanguageModel = module.Model(config).double().eval()
        mine = model.state_dict()
        theirs = {name: weight for name, weight in self.theirs.state_dict().items() if self.is_ours(name, mine)}
        model.load_state_dict(theirs, strict=True)
        return model

    def save(self, folder: Path, **changes: object) -> Path:
        """Write the configuration with these changes and random float64 weights as a model folder, and return it."""
        fields = {"model_type": self.architecture.model_type, **self.fields, **changes}
        module = self.architecture.module
        model: LanguageModel = module.Model(module.read_config(fields)).double()
        randomise(model)
        save_weights(model, folder)
        (folder / "config.json").write_text(json.dumps(fields))
        return folder

    def is_ours(self, name: str, mine: dict[str, Any]) -> bool:
        """Return whether a tensor of transformers' belongs to us; a tied head is one more name of the embedding."""
        return name in mine or name != "lm_head.weight"


def architectures(folder: Path | None) -> list[Architecture]:
    """Return the files that the contract covers: those of core/models/, or of a user's own folder."""
    settings = SETTINGS if folder is None else folder
    if folder is not None:
        os.environ[OWN_FOLDERS] = str(folder)
    found = []
    for model_type, path in architecture_files().items():
        if path.parent.resolve() == (MODELS if folder is None else folder).resolve():
            file = settings / f"{model_type}.json"
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no such file; the contract needs a tiny configuration to try {path}")
            module = model_architecture({"model_type": model_type}, path)
            found.append(Architecture(model_type, module, json.loads(file.read_text())))
    if not found:
        raise FileNotFoundError(f"{folder}: no architecture; expected <model_type>.py that defines LORA_TARGETS")
    return found


@contextmanager
def float64() -> Iterator[None]:
    """Make float32 mean float64 inside the block, for code that casts to float32 wherever it needs precision."""
    names, before = ("float32", "float"), torch.get_default_dtype()
    saved, to_float = {name: getattr(torch, name) for name in names}, torch.Tensor.float
    for name in names:
        setattr(torch, name, torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        for name, dtype in saved.items():
            setattr(torch, name, dtype)
        torch.Tensor.float = to_float  # type: ignore[method-assign]
        torch.set_default_dtype(before)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter, norms and biases too, values that matter."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = 0.3 * torch.randn(weight.shape, generator=draws, dtype=torch.float64)
            weight.copy_(noise + (0.9 if weight.dim() == 1 else 0.0))


def some_ids(case: Case, rows: int = 2, tokens: int = 40, seed: int = 1) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, int(case.fields["vocab_size"]), (rows, tokens), generator=draws)


def loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    return -logits_BTV[:, :-1].log_softmax(-1).gather(-1, ids_BT[:, 1:, None]).mean()


@dataclass(frozen=True)
class Difference:
    """Largest differences from transformers, relative to the largest number: of logits, and of a weight's gradient."""

    logits: float
    gradients: float


def difference(case: Case) -> Difference:
    """Return how far our logits and gradients are from transformers' in float64."""
    theirs, ours, ids = case.theirs, case.ours(), some_ids(case)
    theirs.zero_grad(set_to_none=True)
    with float64():
        expected = theirs(ids).logits
        loss(expected, ids).backward()  # type: ignore[no-untyped-call]
    logits = ours.logits(ours(ids))
    loss(logits, ids).backward()  # type: ignore[no-untyped-call]
    weights = dict(theirs.named_parameters())
    gradients = []
    for name, weight in ours.named_parameters():
        grad = weights[name].grad
        assert weight.grad is not None and grad is not None, f"{case}: no gradient for {name}"
        gradients.append(relative(weight.grad, grad))
    return Difference(relative(logits, expected), max(gradients))


def relative(one: Tensor, two: Tensor) -> float:
    """Return the largest difference over the largest number of `two`; numbers below 1e-4 count as zeros."""
    return ((one - two).abs().max() / two.abs().max().clamp_min(1e-4)).item()


def unread_fields(architecture: Architecture) -> set[str]:
    """Return the fields of transformers' configuration that read_config neither heeds nor refuses, in any variant.

    A field is heeded where another value of it gives another configuration, or an error.
    """
    import transformers

    reference = architecture.settings.get("reference", architecture.model_type)
    fields = transformers.AutoConfig.for_model(reference).to_dict()
    unread = {name for name in fields if not name.startswith("_")} - SHAPELESS - {"model_type"}
    for case in architecture.cases:
        before = architecture.module.read_config(dict(case.fields))
        for name in sorted(unread):
            try:
                changed = another(case.fields.get(name, fields[name]))
                after = architecture.module.read_config({**case.fields, name: changed})
            except ValueError:
                after = None
            if after != before:
                unread.discard(name)
    return unread


def another(value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value or 1
    if isinstance(value, float):
        return value + 0.5
    if isinstance(value, str):
        return "other"
    return ["other"] if isinstance(value, list) else {"rope_type": "other"} if isinstance(value, dict) else 7


def table(folder: Path | None = None) -> str:
    """Return the contract's table: architecture, variants, largest differences of logits and gradients."""
    lines = ["| model_type | configurations | logits | gradients |", "|---|---|---|---|"]
    for architecture in architectures(folder):
        found = [difference(case) for case in architecture.cases]
        worst = max(one.logits for one in found), max(one.gradients for one in found)
        lines.append(f"| `{architecture.model_type}` | {len(found)} | {worst[0]:.0e} | {worst[1]:.0e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1]) if sys.argv[1:] else None))
