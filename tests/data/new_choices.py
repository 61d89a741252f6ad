"""Add one record to each table of `core.choices`, then train, evaluate, export, audit and report.

Run by `test_choices.py` in a separate process, because `core.config` reads the names of choices
when it is imported.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

from perturbjax.core import choices

choices.SPLIT_POLICIES["half"] = choices.SplitChoice(
    help="all sites of a half plate",
    groups=lambda index: index["Metadata_Plate"] + index["Metadata_Well"].str[-1:].gt("4").map(str),
    meaning="halves of plates are not divided",
    test_set="on held-out halves of plates",
)
choices.NORMALIZATIONS["centered"] = choices.NormalizationChoice(
    help="subtract the mean of the image",
    shift_scale=lambda s: (s.site_mean, s.zeros + 1e-4),
    depends_on="image",
    inputs="shift: mean of the image; scale: 1e-4",
)
choices.MASK_ENCODINGS["inverse"] = choices.MaskEncodingChoice(
    help="0 in cells", encode=lambda mask: mask == 0, stored="1 for background", scale=0.5
)

from tiny_dataset import write_dataset  # noqa: E402

from perturbjax.audit.split_designs import design_splits  # noqa: E402
from perturbjax.cli.commands import main as run_command  # noqa: E402
from perturbjax.cli.evaluate import ApplyConfig, EvaluateConfig, evaluate  # noqa: E402
from perturbjax.core.config import (  # noqa: E402
    AugmentConfig,
    InputConfig,
    OptimConfig,
    Recipe,
    SplitConfig,
)
from perturbjax.dataset import open_dataset  # noqa: E402
from perturbjax.export import StableHLOConfig, export  # noqa: E402
from perturbjax.report.run_page import write_report  # noqa: E402
from perturbjax.training.checkpoint import CheckpointConfig  # noqa: E402
from perturbjax.training.fit import TrainConfig, fit  # noqa: E402


def main(folder: Path) -> None:
    """Use the new choices in each part of the program."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        run_command(["train", "--help-all"])
    text = " ".join(output.getvalue().split())
    for table in (choices.SPLIT_POLICIES, choices.NORMALIZATIONS, choices.MASK_ENCODINGS):
        name, choice = list(table.items())[-1]
        assert name in text and choice.help in text

    data = write_dataset(folder / "data", sites=48, size=16, channels=["DNA"])
    recipe = Recipe(
        input=InputConfig(normalize="centered", mask_encoding="inverse"),
        augment=AugmentConfig(crop=16),
        optim=OptimConfig(epochs=1, batch_size=16),
        split=SplitConfig(split="half", folds=2),
    )
    run = fit(TrainConfig(out=folder / "run", data=(data,), recipe=recipe))
    evaluate(EvaluateConfig(ApplyConfig(CheckpointConfig(run.path)), replicates=100))
    assert choices.SPLIT_POLICIES["half"].meaning in write_report(run.path).read_text()

    out = export(StableHLOConfig(CheckpointConfig(run.path), folder / "exported"))
    description = json.loads((out / "description.json").read_text())
    assert [one["name"] for one in description["inputs"]] == ["image", "mask", "shift", "scale"]
    assert description["mask"] == choices.MASK_ENCODINGS["inverse"].stored
    inputs = choices.NORMALIZATIONS["centered"].inputs
    assert description["normalisation"]["shift and scale"] == inputs

    designs, _ = design_splits(open_dataset(data).index, label="Metadata_pert_iname", folds=2)
    assert "half" in [design.policy for design in designs]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
