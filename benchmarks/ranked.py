"""Shared by the benchmarks over ranks: starting a module under torchrun, and the parameters that its ranks train."""

import os
import subprocess
import sys
from functools import partial
from typing import Any

from torch import nn

from matryoshka.core.distributed import World
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.training.step import Objective, Reference
from matryoshka.dpo.objectives import SFT, Preference
from matryoshka.lora.linear import LoraConfig, active, add_adapter, set_active, trainable_parameters
from matryoshka.pilot.training import POLICY


def launch(what: str, ranks: int, module: str, *arguments: str, timeout_s: float | None = None) -> None:
    """Run `module` on `ranks` processes of this machine, one thread each.

    Raises ValueError, `what` naming the run, with the ranks' own words where they fail, and where they take too long.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "-m", module, *arguments], env=environment, **pipes) as process:
        try:
            _, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as err:
            raise ValueError(f"{what}: {ranks} ranks took more than {timeout_s} s") from err
        finally:
            process.terminate()  # torchrun ends its ranks
    if process.returncode:
        raise ValueError(f"{what}: {ranks} ranks failed:\n{errors[-4000:]}")


def trained_part(
    model: LanguageModel, full: bool, world: World
) -> tuple[dict[str, nn.Parameter], Objective, Reference | None]:
    """Return what of `model` is trained, by which objective and against what: all weights by SFT, or a fresh adapter by
    DPO against the model without it."""
    if full:
        return dict(model.requires_grad_(True).named_parameters()), SFT(), None
    add_adapter(model, POLICY, LoraConfig(), 0, world.device)
    set_active(model, POLICY)
    return trainable_parameters(model, POLICY), Preference(), partial(active, model, None)
