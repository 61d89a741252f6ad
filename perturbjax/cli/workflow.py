"""`perturbjax run`: every step from images to results, and one page at the end.

Each step is a command, which is printed before it runs. A step is skipped if its command line, its
input files and its output files are the same as when it finished; `steps.json` has their checksums.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from perturbjax.core.config import AUTO, SPLIT_CHOICES, AnySplit
from perturbjax.core.errors import InputError
from perturbjax.core.files import file_digest, make_folder, read_json, write_json
from perturbjax.core.messages import console
from perturbjax.core.options import chosen_from, require_output, require_sound
from perturbjax.report.overview_page import (
    AUDIT,
    DATASET,
    HITS,
    MODEL,
    Overview,
    write_overview,
)

#: Record of the finished steps.
RECORD = "steps.json"
#: `--preset` value for a linear model instead of a network.
LINEAR = "linear"


@dataclass(frozen=True)
class WorkflowConfig:
    """Inspect, build, train, evaluate, find hits and audit in one command."""

    images: str | Path
    """Folder of the paths in the CSV, Zarr store (NAME.zarr), folder of stores, or URL (s3://,
    https://)."""
    out: Path
    """Folder of all results. The same command resumes; finished steps are skipped."""
    load_data: Path | None = None
    """CSV with one row per site: FileName_Orig<CHANNEL>, PathName_Orig<CHANNEL>, Metadata_*."""
    platemap: Path | None = None
    """Plate map with the treatments (CSV, TSV, XLSX), if the CSV has none."""
    compounds: Path | None = None
    """TSV of compounds (broad_sample, pert_iname, …), joined to the plate map."""
    label_column: str = ""
    """Label column; by default Metadata_pert_iname, Metadata_broad_sample or Metadata_moa."""
    negcon: str = ""
    """Negative controls as COLUMN=VALUE; by default as in `perturbjax hits`."""
    preset: Literal["auto", "linear", "pretrained", "cells", "paper", "demo"] = "auto"
    """Recipe of the training; linear: a linear model on ImageNet features, no network."""
    split: AnySplit = chosen_from(SPLIT_CHOICES, AUTO)
    """Sites that stay together in the training or the test set; auto: strictest possible."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)


@dataclass(frozen=True)
class Step:
    """One command of the workflow.

    Attributes:
        name: command.
        words: its words on the command line.
        inputs: files whose content determines the result.
        outputs: files that prove that the step is complete.
        required: whether a refusal ends the workflow. Other steps are skipped with a reason.
        checks_itself: whether the command compares its inputs with its result, so that it always
            runs.
    """

    name: str
    words: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    required: bool = True
    checks_itself: bool = False

    @property
    def command(self) -> str:
        return shlex.join(["perturbjax", self.name, *self.words])

    def facts(self) -> dict[str, Any]:
        """Everything that must be unchanged for the step to be skipped."""
        checksums = {str(file): _checksum(file) for file in (*self.inputs, *self.outputs)}
        return {"command": self.command, "files": checksums}


def run_workflow(options: WorkflowConfig) -> Path:
    """Run all steps that are not finished, write the page, and print the result in five sentences.

    Raises:
        InputError: the input of a required step cannot be used.
    """
    make_folder(options.out)
    record = options.out / RECORD
    finished = read_json(record) if record.is_file() else {}
    commands: list[str] = []
    skipped: dict[str, str] = {}
    for number, step in enumerate(_steps(options), start=1):
        console.print(f"\n== Step {number}: {step.command}")
        commands.append(step.command)
        # A missing output differs from the record, so that the step runs again.
        if finished.get(step.name) == step.facts() and not step.checks_itself:
            console.print("info: already finished, skipped (inputs and outputs are unchanged)")
            continue
        try:
            _run_step(step)
        except InputError as error:
            if step.required:
                raise
            console.print(f"info: skipped: {error}")
            skipped[step.name] = str(error)
            continue
        finished[step.name] = step.facts()
        write_json(record, finished)
    overview = Overview(options.out, tuple(commands), skipped)
    page = write_overview(overview)
    console.print()
    for sentence in overview.sentences():
        print(sentence)
    return page


def _run_step(step: Step) -> None:
    # Imported here, because the command table names this module.
    from perturbjax.cli.commands import COMMANDS, load, parse_command

    load(COMMANDS[step.name].run)(parse_command(step.name, step.words))


def _steps(options: WorkflowConfig) -> Iterator[Step]:
    """All steps in order. A step can depend on files that earlier steps have written."""
    out = options.out
    dataset, model = out / DATASET, out / MODEL
    tables = tuple(f for f in (options.load_data, options.platemap, options.compounds) if f)
    table_words = _words(
        load_data=options.load_data,
        images=options.images,
        platemap=options.platemap,
        compounds=options.compounds,
        label_column=options.label_column,
    )
    yield Step("inspect", table_words, tables, ())
    built = (dataset / "provenance.json",)
    words = (*_build_words(options), "--out", str(dataset))
    yield Step("build", words, tables, built, checks_itself=True)
    label = _words(label_column=options.label_column)
    if options.preset == LINEAR:
        words = ("--preset", LINEAR, "--data", str(dataset), *label)
        words += ("--split", options.split, "--out", str(model))
        table = (model / "table.csv",)
        yield Step("classify", words, built, table)
        yield Step("report", (str(model),), table, ())
    else:
        preset = () if options.preset == "auto" else ("--preset", options.preset)
        words = (*preset, "--data", str(dataset), *label, "--split", options.split)
        trained = (model / "config.json", model / "metrics.jsonl")
        yield Step("train", (*words, "--out", str(model)), built, trained)
        # Without report.html, which `report` writes again.
        scores = (model / "evaluation" / "scores.json",)
        yield Step("evaluate", ("--run", str(model)), trained, scores)
    controls = _words(negcon=options.negcon)
    words = ("--data", str(dataset), *label, *controls, "--out", str(out / HITS))
    hits = (out / HITS / "hits.csv", out / HITS / "summary.json")
    yield Step("hits", words, built, hits, required=False)
    words = ("--data", str(dataset), *label, "--out", str(out / AUDIT))
    audit = (out / AUDIT / "audit.json", out / AUDIT / "audit.html")
    yield Step("audit", words, built, audit, required=False)


def _build_words(options: WorkflowConfig) -> tuple[str, ...]:
    """The words of the `build` command that `inspect` suggests."""
    from data_prep.inspection import InspectConfig, suggest_build

    return suggest_build(
        InspectConfig(
            options.images,
            options.load_data,
            options.label_column,
            options.platemap,
            options.compounds,
        )
    )


def _words(**values: object) -> tuple[str, ...]:
    """Words for the flags that have a value."""
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in values.items() if value)
    return tuple(word for pair in pairs for word in pair)


def _checksum(file: Path) -> str:
    return file_digest(file) if file.is_file() else ""
