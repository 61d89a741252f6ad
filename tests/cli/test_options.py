"""Every option of every command, given what it cannot be: one line that names it, status 2, nothing on disk."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.build import BuildConfig
from data_prep.fetch import FetchConfig
from data_prep.inspection import InspectConfig
from data_prep.segment import SegmenterConfig
from data_prep.simulate import SimulateConfig
from perturbjax import cli
from perturbjax.audit.audit_options import AuditConfig, CompareConfig
from perturbjax.core.config import PRESETS, Recipe, SplitPolicy, recipe_from_dict, recipe_to_dict
from perturbjax.core.errors import InputError
from perturbjax.core.options import require_sound
from perturbjax.data.splits import ManifestConfig
from perturbjax.evaluation.apply import EvaluateConfig, PredictConfig
from perturbjax.export import StableHLOConfig
from perturbjax.profiles.embedding import COLOURS
from perturbjax.profiles.extract import FeaturesConfig
from perturbjax.profiles.profile_options import (
    MOST_COLOURS,
    ClassifyConfig,
    EmbedConfig,
    ProfileConfig,
)
from perturbjax.report.comparison_page import ReportConfig
from perturbjax.segmentation.train import TrainSegmenterConfig
from perturbjax.training.fit import TrainConfig
from perturbjax.training.pytorch_exchange import ExportConfig, ImportConfig
from perturbjax.verify import VerifyConfig

#: Verb → its options, and the words it cannot do without. Nothing of what they name is there.
COMMANDS: dict[str, tuple[type, tuple[str, ...]]] = {
    "train": (TrainConfig, ("--out", "run", "--data", "data")),
    "evaluate": (EvaluateConfig, ("--run", "run")),
    "predict": (PredictConfig, ("--run", "run", "--data", "data", "--out", "p.parquet")),
    "report": (ReportConfig, ("run",)),
    "split": (ManifestConfig, ("--data", "data", "--out", "split.parquet")),
    "features": (FeaturesConfig, ("--data", "data", "--out", "f.parquet", "--weights", "w")),
    "classify": (ClassifyConfig, ("--features", "f.parquet", "--out", "table")),
    "audit": (AuditConfig, ("--features", "f.parquet", "--out", "audit")),
    "compare": (CompareConfig, ("run", "other", "--out", "compared")),
    "embed": (EmbedConfig, ("--features", "f.parquet", "--out", "e.png")),
    "import-torch": (ImportConfig, ("--checkpoint", "c.pth", "--out", "run")),
    "export": (StableHLOConfig, ("--run", "run", "--out", "exported")),
    "verify": (VerifyConfig, ("run",)),
    "train-segmenter": (TrainSegmenterConfig, ("--images", "i", "--out", "w.safetensors")),
    "export-torch": (ExportConfig, ("--run", "run", "--out", "w.pth")),
}
#: Options that have no flag on the command line, and how many words they take.
POSITIONAL = {("verify", "path"): 1, ("compare", "runs"): 2, ("report", "runs"): 1}
PREPARATION: dict[str, tuple[type, tuple[str, ...]]] = {
    "inspect": (InspectConfig, ("--load-data", "c.csv", "--images", "i")),
    "build": (BuildConfig, ("--load-data", "c.csv", "--images", "i", "--out", "data")),
    "simulate": (SimulateConfig, ("--out", "plates")),
    "fetch": (FetchConfig, ("--plate", "P", "--out", "plate", "--base-url", "http://127.0.0.1:9")),
}


def options_of(kind: type) -> Iterator[tuple[str, Any]]:
    """(name, type) of every option that a command line gets from a dataclass, those of its groups included."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from options_of(hints[field.name])
        else:
            yield field.name, hints[field.name]


def groups_of(kind: type) -> Iterator[type]:
    """The dataclass and all that it holds."""
    yield kind
    for hint in typing.get_type_hints(kind).values():
        if dataclasses.is_dataclass(hint):
            yield from groups_of(hint)


def impossible(hint: Any) -> list[Any]:
    """Values of the option's own type that no option may have."""
    hint = next(
        (kind for kind in typing.get_args(hint) if type(None) in typing.get_args(hint)), hint
    )
    if hint is bool or typing.get_origin(hint) is typing.Literal:
        return []
    if typing.get_origin(hint) is tuple:
        first = typing.get_args(hint)[0]
        return [(value, value) for value in impossible(first)]
    if hint is int:
        return [-(10**6), 2**32, -(2**70)]
    if hint is float:
        return [math.nan, math.inf, -math.inf, -1e9]
    if hint is str:
        return ["\x1b[2J", "two\nlines"]
    return [Path("\x1b[2J"), Path("nul\0")]


def wrong_words(hint: Any) -> list[str]:
    """Words that an option refuses: what it could never be, and for a choice what it does not offer."""
    if (
        typing.get_origin(hint) is tuple
        and typing.get_origin(typing.get_args(hint)[0]) is typing.Literal
    ):
        return wrong_words(typing.get_args(hint)[0])
    if typing.get_origin(hint) is typing.Literal:
        return ["no-such-choice"]
    value = impossible(hint)[0]
    return [str(one) for one in value] if isinstance(value, tuple) else [str(value)]


def every_option(commands: dict[str, tuple[type, tuple[str, ...]]]) -> list[Any]:
    return [
        pytest.param(verb, name, hint, id=f"{verb} {name}")
        for verb, (kind, _) in commands.items()
        for name, hint in options_of(kind)
        if hint is not bool  # two flags, neither of which takes a value
    ]


def refusal(capsys, main, words: list[str]) -> str:
    with pytest.raises(SystemExit) as left:
        main(words)
    said = capsys.readouterr()
    assert left.value.code == 2, said
    assert not said.out and len(said.err.splitlines()) == 1 and said.err.startswith("error: "), said
    return said.err


@pytest.mark.parametrize(("verb", "name", "hint"), every_option(COMMANDS | PREPARATION))
def test_a_value_out_of_range_is_one_line_and_nothing_on_disk(
    capsys, tmp_path, monkeypatch, verb, name, hint
):
    monkeypatch.chdir(tmp_path)
    _, words = (COMMANDS | PREPARATION)[verb]
    flag = f"--{name.replace('_', '-')}"
    kept = [word for at, word in enumerate(words) if flag not in (word, words[at - 1])]
    main = cli.main
    if (verb, name) in POSITIONAL:
        line = refusal(capsys, main, [verb, *wrong_words(hint), *words[POSITIONAL[verb, name] :]])
    else:
        line = refusal(capsys, main, [verb, *kept, flag, *wrong_words(hint)])
    assert flag in line and "\x1b" not in line, line
    assert not list(tmp_path.iterdir())


def test_every_command_is_walked():
    assert set(COMMANDS) | set(PREPARATION) == set(cli.VERBS)


@pytest.mark.parametrize(
    "kind",
    sorted(
        {g for k, _ in (COMMANDS | PREPARATION).values() for g in groups_of(k)} | {SegmenterConfig},
        key=lambda kind: kind.__name__,
    ),
    ids=lambda kind: kind.__name__,
)
def test_no_options_object_holds_what_it_may_not(kind):
    """By construction: made in Python, read from a file or from flags, the same values are refused."""
    sound = example(kind)
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        for value in () if dataclasses.is_dataclass(hint) else impossible(hint):
            with pytest.raises(InputError) as refused:
                dataclasses.replace(sound, **{field.name: value})
            assert f"--{field.name.replace('_', '-')}" in str(refused.value)


def test_a_choice_made_in_python_is_one_of_those_there_are():
    @dataclasses.dataclass(frozen=True)
    class Config:  # those of the package are held to their types by the tests' own checker
        split: SplitPolicy = "well"
        others: tuple[SplitPolicy, ...] = ("well", "plate")

    require_sound(Config())
    for wrong in ({"split": "wells"}, {"others": ("well", "wells")}):
        with pytest.raises(
            InputError, match=r"wells.* must be one of site, well, plate, layout, compound"
        ):
            require_sound(Config(**wrong))


def example(kind: type) -> Any:
    """One sound instance: defaults, and some path or text for what has none."""
    suffix = {EmbedConfig: ".png", TrainSegmenterConfig: ".safetensors", ExportConfig: ".pth"}.get(
        kind, ".parquet"
    )
    tables = {"features": (Path("there"),)}
    given: dict = {
        FeaturesConfig: {"weights": "w"},
        ProfileConfig: tables,
        AuditConfig: tables,
    }.get(kind, {})
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            one = Path(f"o{suffix}") if field.name == "out" else Path("there")
            lone = "P" if hint is str else one
            given[field.name] = example(hint) if dataclasses.is_dataclass(hint) else lone
            if typing.get_origin(hint) is tuple:
                given[field.name] = (one,)
    return kind(**given)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            "train --out run --data data --evaluate-every 0",
            "--evaluate-every 0: must be at least one",
        ),
        ("train --out run --data data --checkpoint-every 0", "--checkpoint-every 0"),
        ("train --out run --data data --keep-latest -1", "--keep-latest -1"),
        ("train --out run --data data --device-count -1", "--device-count -1"),
        ("train --out run --data data --balance -1", "--balance -1.0"),
        (
            "train --out run --data data --crop-scale 0.9 0.1",
            "--crop-scale 0.9 0.1: must be 0 < low <= high <= 1",
        ),
        (
            "train --out run --data data --folds 3 --fold 3",
            "--fold 3: must be from 0 to --folds - 1, 2",
        ),
        ("evaluate --run run --batch-size 0", "--batch-size 0"),
        ("evaluate --run run --replicates 0", "--replicates 0"),
        ("split --data data --out split.parquet --folds 1", "--folds 1: must be 2 or more"),
        ("predict --run run --data data --out .", "--out ."),
        (
            "predict --run run --data data --out p.txt",
            "--out p.txt: must be a name that ends in .parquet or .csv",
        ),
        (
            "predict --run run --data data --out /dev/null",
            "--out /dev/null: must be a new name, or a regular file",
        ),
        (
            "classify --features f --out /dev/null",
            "--out /dev/null: must be a new name, or a folder",
        ),
        ("split --data data --out s.csv", "--out s.csv: must be a name that ends in .parquet"),
        (
            "features --data data --out f.csv --weights w",
            "--out f.csv: must be a name that ends in .parquet or .h5ad",
        ),
        (
            "embed --features f.parquet --out page.pdf",
            "--out page.pdf: must be a name that ends in .png",
        ),
        ("features --data data --out f.parquet", "--weights"),
        ("classify --features f --out o --hold-out P --all-folds", "--hold-out P"),
        ("classify --features f --out o --negcon DMSO", "--negcon DMSO: must be COLUMN=VALUE"),
        ("train --data data", "--out"),
        ("train --out run --data data --no-such-flag 3", "--no-such-flag"),
    ],
)
def test_what_is_wrong_with_a_value_is_said(capsys, tmp_path, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    assert named in refusal(capsys, cli.main, words.split())
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_was_changed_on_disk_is_checked_like_flags():
    values = recipe_to_dict(Recipe())
    values["optim"]["epochs"] = 0
    with pytest.raises(InputError, match="--epochs 0"):
        recipe_from_dict(values)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_come_back_from_json_as_they_were(name):
    assert recipe_from_dict(recipe_to_dict(PRESETS[name])) == PRESETS[name]


def test_as_many_classes_can_be_highlighted_as_there_are_colours():
    assert len(COLOURS) == MOST_COLOURS
