"""benchmarks/scale.py runs on one and on two ranks; the reported bytes are counted here from shapes."""

import json
from pathlib import Path

import pytest

from matryoshka.benchmarks import scale
from matryoshka.core.models.load import empty_model
from matryoshka.lora.linear import LoraConfig


@pytest.mark.slow
def test_what_is_sent_is_what_the_shapes_say(tiny_dir: Path) -> None:
    """Oracle: by hand. Two ranks, rings: half of what is gathered, all of what is reduced, in bytes a step.

    replicate: the adapter's gradients in fp32 and a few numbers beside. shard: besides, embedding and norm once (they
    stay from the reference's pass to the end of backward), and every block for reference, forward and backward; rows
    are padded to even.
    """
    config = scale.Config(ranks=(1, 2), model=tiny_dir, questions=2, steps=1)
    result = scale.run(config)
    rows = {row.name: row.details for row in result.rows}
    assert json.loads(result.to_json())["bench"] == "scale"
    model, rank = empty_model(tiny_dir), LoraConfig().rank
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    blocks = sum(shape.numel() for name, shape in shapes.items() if ".layers." in name)
    root = (259 + 1) * 32 + 32
    adapter = sum(rank * sum(shape) for name, shape in shapes.items() if "_proj" in name)
    alone, two, shard = (rows[f"{name} ranks"] for name in ("replicate, 1", "replicate, 2", "shard, 2"))
    assert alone["sent_mib_per_step"] == {} and alone["communication_share"] == 0 and alone["efficiency"] == 1
    assert two["sent_mib_per_step"]["all-reduce"] == pytest.approx(4 * adapter / 2**20, rel=0.02)
    assert shard["sent_mib_per_step"]["all-reduce"] == two["sent_mib_per_step"]["all-reduce"]
    assert shard["sent_mib_per_step"]["all-gather"] == pytest.approx(4 * (root + 3 * blocks) / 2 / 2**20, rel=0.02)
    assert 0 < shard["communication_share"] < 1
    assert two["first_loss"] == pytest.approx(alone["first_loss"], rel=1e-6)
    assert {row["parameters"] for row in rows.values()} == {sum(shape.numel() for shape in shapes.values())}


def test_bad_settings() -> None:
    """Oracle: messages."""
    with pytest.raises(ValueError, match="layout 'ddp' is unknown"):
        scale.Config(layouts=("ddp",))
    with pytest.raises(ValueError, match="must be at least 1"):
        scale.Config(ranks=(0,))
