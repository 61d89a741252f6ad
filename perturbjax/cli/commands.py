"""The command table of `perturbjax`, and how a command is parsed and run.

Modules are named as text and imported only for the command that runs, so that `perturbjax --help`
starts fast.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from perturbjax import __version__
from perturbjax.cli import help
from perturbjax.cli.parsing import parse_options
from perturbjax.core.errors import InputError, run_command
from perturbjax.core.memory import collect_garbage_rarely, keep_freed_memory
from perturbjax.core.messages import console


@dataclasses.dataclass(frozen=True)
class Command:
    """One command. References to Python objects have the form `module:name`.

    Attributes:
        summary: one sentence.
        options: options dataclass.
        run: function of the options.
        examples: two command lines, without `perturbjax COMMAND`.
        choices: field name -> names to list in the help: a mapping, a sequence, or a function that
            returns one.
        first: names of the flags that the help describes first, if the command has many.
        presets: function (words) -> (defaults, flags for the help, remaining words), for commands
            with presets.
        message: printed at the end, with the fields `result` and `options`.
        runs_network: many similar steps, which run faster if freed memory stays in the process.
    """

    summary: str
    options: str
    run: str
    examples: tuple[str, str]
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    first: tuple[str, ...] = ()
    presets: str = ""
    message: str = ""
    runs_network: bool = False


_WRITTEN = "Written: {result}"

COMMANDS: dict[str, Command] = {
    "run": Command(
        "From images to results: inspect, build, train, evaluate, find hits and audit.",
        "perturbjax.cli.workflow:WorkflowConfig",
        "perturbjax.cli.workflow:run_workflow",
        (
            "--load-data load_data.csv --images DIR --out results",
            "--load-data load_data.csv --images DIR --out results --preset linear",
        ),
        runs_network=True,
    ),
    "table": Command(
        "Write load_data.csv from a folder of images and a plate map.",
        "data_prep.make_table:TableConfig",
        "data_prep.make_table:make_table",
        (
            "--images DIR --platemap map.csv --out load_data.csv",
            "--images DIR --pattern '{plate}_{well}_{channel}.tif' --out load_data.csv",
        ),
    ),
    "inspect": Command(
        "Summarize load_data.csv and its images; warn about designs that limit the evaluation.",
        "data_prep.inspection:InspectConfig",
        "data_prep.inspection:inspect",
        (
            "--load-data load_data.csv --images DIR",
            "--load-data load_data.csv --images DIR --platemap platemap.tsv",
        ),
    ),
    "build": Command(
        "Build a dataset from images and load_data.csv: cell masks, images and metadata.",
        "data_prep.build:BuildConfig",
        "data_prep.build:build",
        (
            "--load-data load_data.csv --images DIR --out dataset",
            "--images plate.zarr --platemap map.tsv --out dataset",
        ),
    ),
    "simulate": Command(
        "Simulate plates with ground truth, as TIFF files and load_data.csv.",
        "data_prep.simulate:SimulateConfig",
        "data_prep.simulate:simulate",
        ("--out plates", "--out plates --plates 4 --wells 384 --compounds 30"),
    ),
    "fetch": Command(
        "Download a plate of the public Cell Painting Gallery.",
        "data_prep.fetch:FetchConfig",
        "data_prep.fetch:fetch",
        (
            "--plate BR00116991 --out plate --wells A01,A02 --sites 1",
            "--accession cpg0012 --plate 24277 --out plate",
        ),
    ),
    "train": Command(
        "Train a network on a dataset, or resume a training.",
        "perturbjax.training.fit:TrainConfig",
        "perturbjax.training.fit:fit",
        (
            "--data dataset --out run",
            "--preset paper --data dataset --out run --split plate",
        ),
        {"model": "perturbjax.models:BACKBONES"},
        first=(
            *("data", "out", "preset", "split", "label_column", "model", "epochs", "batch_size"),
            *("seed", "resume"),
        ),
        presets="perturbjax.cli.presets:train_presets",
        runs_network=True,
        message="Trained: {result.path}. Next: perturbjax evaluate --run {result.path}",
    ),
    "evaluate": Command(
        "Evaluate a run, or predictions of any model, next to baselines, with intervals.",
        "perturbjax.cli.evaluate:EvaluateConfig",
        "perturbjax.cli.actions:evaluate",
        ("--run run", "--predictions p.csv --data dataset --out evaluated"),
        presets="perturbjax.cli.presets:evaluate_presets",
        runs_network=True,
    ),
    "predict": Command(
        "Predict the classes of all sites of a dataset with a trained network.",
        "perturbjax.cli.evaluate:PredictConfig",
        "perturbjax.cli.evaluate:predict",
        (
            "--run run --data dataset --out predictions.parquet",
            "--run run --data dataset --out predictions.csv --checkpoint 40",
        ),
        runs_network=True,
    ),
    "report": Command(
        "Write the HTML report of a run, or a comparison of several runs.",
        "perturbjax.report.comparison_page:ReportConfig",
        "perturbjax.cli.actions:report",
        ("run", "run other_run classified --out comparison.html"),
        message=_WRITTEN,
    ),
    "split": Command(
        "Split a dataset into training and test sites.",
        "perturbjax.data.splits:ManifestConfig",
        "perturbjax.data.splits:split_dataset",
        (
            "--data dataset --split compound --out split.parquet",
            "--data dataset --split plate --folds 10 --out split.parquet",
        ),
        message=_WRITTEN,
    ),
    "verify": Command(
        "Verify the checksums of a dataset or run directory.",
        "perturbjax.verify:VerifyConfig",
        "perturbjax.verify:verify_options",
        ("dataset", "run"),
        message="{result}",
    ),
    "features": Command(
        "Extract features of every cell, site or well with a pretrained or trained network.",
        "perturbjax.profiles.extract:FeaturesConfig",
        "perturbjax.profiles.extract:extract",
        (
            "--data dataset --run run --out f.parquet",
            "--data dataset --weights hf:timm/resnet50.tv2_in1k --out f.parquet",
        ),
        {"backbone": "perturbjax.models:with_weights"},
        runs_network=True,
        message=_WRITTEN,
    ),
    "classify": Command(
        "Fit classical classifiers on profiles and evaluate them like networks.",
        "perturbjax.profiles.profile_options:ClassifyConfig",
        "perturbjax.cli.actions:classify",
        (
            "--features features.parquet --split plate --out classified",
            "--preset linear --data dataset --out classified",
        ),
        {"models": "perturbjax.profiles.classifiers:CLASSIFIERS"},
        presets="perturbjax.cli.presets:classify_presets",
        runs_network=True,
        message="Written: {options.out}",
    ),
    "embed": Command(
        "Draw a 2-D embedding of profiles (UMAP, t-SNE), as picture and interactive page.",
        "perturbjax.profiles.profile_options:EmbedConfig",
        "perturbjax.cli.actions:embed",
        (
            "--features features.parquet --out umap.png",
            "--features features.parquet --method tsne --out tsne.png",
        ),
        message="Written: {options.out} and {result}",
    ),
    "audit": Command(
        "Measure the signal beyond technical covariates, under every split.",
        "perturbjax.audit.audit_options:AuditConfig",
        "perturbjax.cli.actions:audit",
        (
            "--features features.parquet --data dataset --out audit",
            "--run run --out audit",
        ),
        {"model": "perturbjax.profiles.classifiers:CLASSIFIERS"},
        presets="perturbjax.cli.presets:audit_presets",
        runs_network=True,
        message=_WRITTEN,
    ),
    "compare": Command(
        "Compare models on the same test sites, with paired confidence intervals.",
        "perturbjax.audit.audit_options:CompareConfig",
        "perturbjax.cli.actions:compare",
        (
            "run_1 run_2 --out compared",
            "classified/predictions/lda.parquet run --out compared",
        ),
        message=_WRITTEN,
    ),
    "export": Command(
        "Write the network of a run as StableHLO, for runtimes without perturbjax.",
        "perturbjax.export:StableHLOConfig",
        "perturbjax.export:export",
        ("--run run --out exported", "--run run --out exported --checkpoint best"),
    ),
    "import-torch": Command(
        "Convert a PyTorch checkpoint of the original program to a run.",
        "perturbjax.training.pytorch_exchange:ImportConfig",
        "perturbjax.training.pytorch_exchange:import_run",
        (
            "--checkpoint best.pth --labels labels.json --out run",
            "--checkpoint weights.safetensors --data dataset --out run",
        ),
        {"model": "perturbjax.training.pytorch_exchange:original_networks"},
        presets="perturbjax.cli.presets:import_presets",
    ),
    "export-torch": Command(
        "Write the network of a run as a PyTorch state dict (.pth) or .safetensors.",
        "perturbjax.training.pytorch_exchange:ExportConfig",
        "perturbjax.training.pytorch_exchange:export_run",
        (
            "--run run --out weights.safetensors",
            "--run run --out weights.pth --checkpoint best",
        ),
    ),
    "hits": Command(
        "Find the treatments that differ from the negative controls.",
        "perturbjax.screening.screen_options:HitsConfig",
        "perturbjax.cli.actions:hits",
        (
            "--features profiles.parquet --out hits",
            "--features profiles.parquet --data dataset --out hits",
        ),
        runs_network=True,
        message=_WRITTEN,
    ),
    "doses": Command(
        "Fit dose-response curves; find EC50 and lowest effective dose.",
        "perturbjax.screening.screen_options:DosesConfig",
        "perturbjax.cli.actions:doses",
        (
            "--features profiles.parquet --dose-column Metadata_dose_uM --out doses",
            "--features f.csv --dose-column Metadata_dose_uM --response area --out doses",
        ),
        runs_network=True,
        message=_WRITTEN,
    ),
    "similar": Command(
        "Find similar treatments and test their neighbors for shared mechanisms.",
        "perturbjax.screening.screen_options:SimilarConfig",
        "perturbjax.cli.actions:similar",
        (
            "--features profiles.parquet --out similar",
            "--features profiles.parquet --reference known.parquet --out similar",
        ),
        runs_network=True,
        message=_WRITTEN,
    ),
    "differences": Command(
        "Describe which features of the cells each treatment changes.",
        "perturbjax.screening.screen_options:DifferencesConfig",
        "perturbjax.cli.actions:differences",
        (
            "--features profiles.parquet --out differences",
            "--features profiles.parquet --treatments taxol nocodazole --out differences",
        ),
        runs_network=True,
        message=_WRITTEN,
    ),
    "train-segmenter": Command(
        "Train a segmentation network for cells or nuclei on images with masks.",
        "perturbjax.segmentation.train:TrainSegmenterConfig",
        "perturbjax.segmentation.train:train",
        (
            "--images images --out weights.safetensors",
            "--images images --init-from nuclei --out w.safetensors",
        ),
        runs_network=True,
        message=_WRITTEN,
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status.

    Args:
        argv: words after `perturbjax`; by default the arguments of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    run_command(lambda: _run(words))


def parse_command(name: str, words: Sequence[str]) -> Any:
    """Parse the words of a command into its options dataclass, or print its help and exit.

    Raises:
        InputError: a flag is unknown, or a value is not valid.
        SystemExit: after `--help`.
    """
    command, defaults, parsed = COMMANDS[name], {}, ()  # type: ignore[var-annotated]
    if command.presets:
        # Presets are parsed first, because they replace the defaults of the other flags.
        defaults, parsed, words = load(command.presets)(words)
    return parse_options(
        load(command.options),
        words,
        prog=f"perturbjax {name}",
        description=command.summary,
        defaults=defaults,
        parsed=parsed,
        first=command.first,
        examples=command.examples,
        choices=lambda: {field: _names(reference) for field, reference in command.choices.items()},
    )


def load(reference: str) -> Any:
    """Import the object that `module:name` refers to."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def _names(reference: str) -> tuple[str, ...]:
    table = load(reference)
    return tuple(table() if callable(table) else table)


def _run(words: list[str]) -> None:
    name = words[0] if words else "--help"
    if name in ("--version", "-V"):
        print(f"perturbjax {__version__}")
    elif name in ("-h", "--help"):
        print("usage: perturbjax COMMAND [options]\n\n" + _list_commands())
        # A call without a command is an error, although it prints the help.
        sys.exit(0 if words else 2)
    elif name not in COMMANDS:
        raise InputError(
            f"perturbjax {name}: unknown command. Choose one of {', '.join(COMMANDS)}."
        )
    else:
        command = COMMANDS[name]
        collect_garbage_rarely()
        if command.runs_network:
            # Must be called before JAX starts threads, see `core.memory`.
            keep_freed_memory()
        options = parse_command(name, words[1:])
        result = load(command.run)(options)
        if command.message:
            console.print(command.message.format(result=result, options=options))


def _list_commands() -> str:
    """Names and summaries of all commands, wrapped to 80 columns."""
    indent = max(map(len, COMMANDS)) + 4
    rows = (textwrap.wrap(command.summary, help.WIDTH - indent) for command in COMMANDS.values())
    parts = (f"\n{'':{indent}}".join(row) for row in rows)
    lines = (f"  {name:{indent - 2}}{text}" for name, text in zip(COMMANDS, parts, strict=True))
    return "\n".join([*lines, "", "perturbjax COMMAND --help describes the options of a command."])
