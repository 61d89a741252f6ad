"""Options of every command: values that are not valid give one line, status 2 and no file."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.fetch import FetchConfig
from data_prep.make_table import TableConfig
from data_prep.segment import SegmenterConfig
from perturbjax import cli
from perturbjax.audit.audit_options import AuditConfig
from perturbjax.cli.commands import load
from perturbjax.cli.parsing import Flag, flags_of
from perturbjax.core.config import SplitPolicy
from perturbjax.core.errors import InputError
from perturbjax.core.options import require_sound
from perturbjax.profiles.extract import FeaturesConfig
from perturbjax.profiles.profile_options import (
    PREPARATIONS,
    EmbedConfig,
    Preparation,
    ProfileConfig,
)
from perturbjax.screening.screen_options import ScreenConfig
from perturbjax.segmentation.train import TrainSegmenterConfig
from perturbjax.training.pytorch_exchange import ExportConfig

#: Command -> its required words. Nothing that they name exists.
REQUIRED = {
    "run": "--images i --out results",
    "table": "--images i --out t.csv",
    "inspect": "--load-data c.csv --images i",
    "build": "--load-data c.csv --images i --out data",
    "simulate": "--out plates",
    "fetch": "--plate P --out plate",
    "train": "--out run --data data",
    "evaluate": "--run run",
    "predict": "--run run --data data --out p.parquet",
    "report": "run",
    "split": "--data data --out split.parquet",
    "verify": "run",
    "features": "--data data --out f.parquet --weights w",
    "classify": "--features f.parquet --out table",
    "embed": "--features f.parquet --out e.png",
    "audit": "--features f.parquet --out audit",
    "compare": "run other --out compared",
    "export": "--run run --out exported",
    "import-torch": "--checkpoint c.pth --out run",
    "export-torch": "--run run --out w.pth",
    "train-segmenter": "--images i --out w.safetensors",
    "hits": "--features f.parquet --out hits",
    "doses": "--features f.parquet --dose-column Metadata_dose_uM --out doses",
    "similar": "--features f.parquet --out similar",
    "differences": "--features f.parquet --out differences",
}
#: Flags that are parsed before the options dataclass.
PARSED_FIRST = {
    "train": ("--preset", "--recipe"),
    "import-torch": ("--preset", "--recipe"),
    "classify": ("--preset",),
}
#: 195 flags, 37 of the four screening commands, 5 of the features of cells, 6 of `table`, 9 of
#: `run`, --design of `simulate`, --cells-channel of `build`, and two flags of `evaluate` and one
#: of `predict` for tables of predictions.
MOST_FLAGS, MOST_FLAGS_OF_A_COMMAND = 257, 40


def options_of(command: str) -> type:
    return load(cli.COMMANDS[command].options)


def visible_flags(command: str) -> list[Flag]:
    return [flag for flag in flags_of(options_of(command)) if not flag.hidden]


def nested_classes(kind: type) -> Iterator[type]:
    """The options dataclass and all dataclasses in it."""
    yield kind
    for hint in typing.get_type_hints(kind).values():
        if dataclasses.is_dataclass(hint):
            yield from nested_classes(typing.cast(type, hint))


def invalid_values(hint: Any) -> list[Any]:
    """Values of the type of an option that no option accepts."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return invalid_values(next(part for part in parts if part is not type(None)))
    if hint is bool or typing.get_origin(hint) is typing.Literal:
        return []
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and Path not in parts:
        return [value for part in parts for value in invalid_values(part)]
    if typing.get_origin(hint) is tuple:
        return [(value, value) for value in invalid_values(parts[0])]
    if hint is int:
        return [-(10**6), 2**32, -(2**70)]
    if hint is float:
        return [math.nan, math.inf, -math.inf, -1e9]
    if hint is str:
        return ["\x1b[2J", "two\nlines"]
    return [Path("\x1b[2J"), Path("nul\0")]


def invalid_words(hint: Any) -> list[str]:
    """Command line words that an option refuses."""
    if typing.get_origin(hint) is tuple:
        words = invalid_words(typing.get_args(hint)[0])
        return words if typing.get_args(hint)[-1] is Ellipsis else words * 2
    if typing.get_origin(hint) is typing.Literal or dataclasses.is_dataclass(hint):
        return ["no-such-choice"]
    return [str(invalid_values(hint)[0])]


def refusal(capsys, *words: str) -> str:
    """The one line of a command that ends with status 2."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(words))
    output = capsys.readouterr()
    assert end.value.code == 2, output
    assert not output.out and output.err.startswith("error: "), output
    assert len(output.err.splitlines()) == 1, output
    return output.err


def test_number_of_flags_stays_within_its_limits(capsys):
    counts = {
        command: len(visible_flags(command)) + len(PARSED_FIRST.get(command, ()))
        for command in cli.COMMANDS
    }
    with capsys.disabled():
        print(f"\n{sum(counts.values())} flags: {counts}")
    assert max(counts.values()) <= MOST_FLAGS_OF_A_COMMAND
    assert sum(counts.values()) <= MOST_FLAGS


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        pytest.param(command, flag, id=f"{command} {flag.spelling}")
        for command in REQUIRED
        for flag in visible_flags(command)
        if flag.hint is not bool
    ],
)
def test_invalid_value_gives_one_line_and_writes_nothing(
    capsys, tmp_path, monkeypatch, command, flag
):
    monkeypatch.chdir(tmp_path)
    words = REQUIRED[command].split()
    values = invalid_words(flag.hint)
    if flag.metadata.get("positional"):
        rest = [word for word in words if word not in ("run", "other")]
        line = refusal(capsys, command, *values, *rest)
        assert flag.name in line or "compared" in line or "'" in line
    else:
        pairs = zip(words, ["", *words], strict=False)
        others = [word for word, before in pairs if flag.spelling not in (word, before)]
        line = refusal(capsys, command, *others, flag.spelling, *values)
        assert flag.spelling in line or f"--{flag.name.replace('_', '-')}" in line
    assert "\x1b" not in line
    assert not list(tmp_path.iterdir())


def test_every_command_has_required_words():
    assert set(REQUIRED) == set(cli.COMMANDS)


@pytest.mark.parametrize(
    "kind",
    sorted(
        {part for command in REQUIRED for part in nested_classes(options_of(command))}
        | {SegmenterConfig},
        key=lambda kind: kind.__name__,
    ),
    ids=lambda kind: kind.__name__,
)
def test_options_dataclass_refuses_invalid_values(kind):
    sound = valid_instance(kind)
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        for value in () if dataclasses.is_dataclass(hint) else invalid_values(hint):
            with pytest.raises(InputError) as refused:
                dataclasses.replace(sound, **{field.name: value})
            assert f"--{field.name.replace('_', '-')}" in str(refused.value)


def valid_instance(kind: type) -> Any:
    """An instance with defaults, and a path or text for required fields."""
    suffix = {
        EmbedConfig: ".png",
        TrainSegmenterConfig: ".safetensors",
        ExportConfig: ".pth",
        TableConfig: ".csv",
    }.get(kind, ".parquet")
    table = {"features": (Path("table"),)}
    special: dict[type, dict[str, Any]] = {
        FeaturesConfig: {"weights": "w"},
        ProfileConfig: table,
        ScreenConfig: table,
        AuditConfig: table,
    }
    values = dict(special.get(kind, {}))
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            path = Path(f"o{suffix}") if field.name == "out" else Path("input")
            values[field.name] = "P" if hint is str else path
            if dataclasses.is_dataclass(hint):
                values[field.name] = valid_instance(typing.cast(type, hint))
            elif typing.get_origin(hint) is tuple:
                values[field.name] = (path,)
    return kind(**values)


def test_choice_is_checked_in_python():
    @dataclasses.dataclass(frozen=True)
    class Config:  # the type checker of the tests does not check this class
        split: SplitPolicy = "well"
        others: tuple[SplitPolicy, ...] = ("well", "plate")

    require_sound(Config())
    wrong_values: list[dict[str, Any]] = [{"split": "wells"}, {"others": ("well", "wells")}]
    for wrong in wrong_values:
        with pytest.raises(InputError, match=r"wells.* must be one of site, well, plate, layout"):
            require_sound(Config(**wrong))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "train --out run --data data --evaluate-every 0",
            "--evaluate-every 0: must be at least 1",
        ),
        ("train --out run --data data --checkpoint-every 0", "--checkpoint-every 0"),
        ("train --out run --data data --balance -1", "--balance -1.0"),
        ("train --out run --data data --crop 7", "--crop 7: must be at least 8 pixels"),
        (
            "train --out run --data data --crop-scale 0.9 0.1",
            "--crop-scale 0.9 0.1: must be 0 < low <= high <= 1",
        ),
        (
            "train --out run --data data --folds 3 --fold 3",
            "--fold 3: must be from 0 to --folds - 1, 2",
        ),
        ("train --out run --data data --preset big", "--preset big: unknown; choose one of paper"),
        ("train --out run --data data --preset", "--preset: expected one argument"),
        ("evaluate --run run --batch-size 0", "--batch-size 0"),
        ("evaluate --run run --replicates 0", "--replicates 0"),
        (
            "evaluate --run run --checkpoint first",
            "--checkpoint first: must be latest, best or the number of an epoch",
        ),
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
        ("split --data data --out s.txt", "--out s.txt: must be a name that ends in .parquet"),
        (
            "features --data data --out f.txt --weights w",
            "--out f.txt: must be a name that ends in .parquet or .csv or .h5ad",
        ),
        (
            "embed --features f.parquet --out page.pdf",
            "--out page.pdf: must be a name that ends in .png",
        ),
        ("features --data data --out f.parquet", "--weights"),
        ("build --images i", "--out is missing: Dataset directory to write (see perturbjax build"),
        (
            "split",
            "--data is missing: Dataset directories with the same channels; --out is missing",
        ),
        (
            "verify .",
            ".: is not a dataset or run (contains none of provenance.json, config.json). It",
        ),
        ("split --data . --out s.parquet", "is not a complete dataset"),
        ("evaluate --run .", ".: contains no run (config.json is missing). It is an empty folder"),
        ("classify --features f --out o --hold-out P --all-folds", "--hold-out P"),
        ("classify --features f --out o --negcon DMSO", "--negcon DMSO: must be COLUMN=VALUE"),
        ("classify --features f --out o --prepare all", "--prepare all: must be one of none"),
        ("classify --features f --out o --prepare no.toml", "no.toml: cannot be read"),
        ("train --data data", "--out"),
        ("train --out run --data data --no-such-flag 3", "--no-such-flag: perturbjax train has no"),
        ("train --out run --data data --epoch 3", "did you mean --epochs?"),
        ("chart", "perturbjax chart: unknown command"),
    ],
)
def test_message_names_flag_value_and_valid_values(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *words.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "replacement"),
    [
        (
            "train --out run --data data --no-cycle-momentum",
            "set the field cycle_momentum in a file for --recipe",
        ),
        ("train --out run --data data --compile-cache d", "JAX_COMPILATION_CACHE_DIR"),
        ("train --out run --data data --processes 2", "JAX_NUM_PROCESSES"),
        ("train --out run --data data --keep-latest 3", "set the field keep_latest"),
        ("classify --features f --out o --sphere negcon", "choose --prepare NAME"),
        ("classify --data d --out o --pool stages", "perturbjax features"),
        ("classify --data d --out o --feature-cache f", "PERTURBJAX_FEATURE_CACHE"),
        ("fetch --plate P --out o --base-url http://a", "PERTURBJAX_GALLERY_URL"),
        ("build --images i --out o --mask-cache none", "PERTURBJAX_MASK_CACHE"),
        ("build --images i --out o --cluster-options f", "--cluster slurm:FILE.yaml"),
        ("train-segmenter --images i --out w.safetensors --gamma 2", "its default applies"),
    ],
)
def test_removed_flag_names_its_replacement(capsys, words, replacement):
    line = refusal(capsys, *words.split())
    assert "was removed from perturbjax" in line and replacement in line


@pytest.mark.parametrize(
    ("command", "former", "present"),
    [
        ("split", "--policy plate", "--split plate"),
        ("evaluate", "--no-look", "--no-attribution"),
        ("predict", "--epoch 40", "--checkpoint 40"),
    ],
)
def test_renamed_flag_is_accepted(command, former, present):
    words = REQUIRED[command].split()
    parsed = [cli.parse_command(command, [*words, *flag.split()]) for flag in (former, present)]
    assert parsed[0] == parsed[1] != cli.parse_command(command, words)


def test_environment_replaces_defaults_of_fields_without_a_flag(capsys, monkeypatch):
    words = REQUIRED["fetch"].split()
    monkeypatch.setenv("PERTURBJAX_DOWNLOADS", "3")
    monkeypatch.setenv("PERTURBJAX_GALLERY_URL", "http://127.0.0.1:9")
    config = cli.parse_command("fetch", words)
    assert isinstance(config, FetchConfig)
    assert (config.downloads, config.base_url) == (3, "http://127.0.0.1:9")
    monkeypatch.setenv("PERTURBJAX_DOWNLOADS", "many")
    assert "PERTURBJAX_DOWNLOADS=many: must be a number" in refusal(capsys, "fetch", *words)


def test_preparation_is_a_name_or_a_file(tmp_path):
    words = REQUIRED["classify"].split()
    for name, one in PREPARATIONS.items():
        assert cli.parse_command("classify", [*words, "--prepare", name]).preparation == one.steps
    file = tmp_path / "own.toml"
    file.write_text('sphere = "train"\npca = 3\n')
    own = cli.parse_command("classify", [*words, "--prepare", str(file)]).preparation
    assert own == Preparation(sphere="train", pca=3)
