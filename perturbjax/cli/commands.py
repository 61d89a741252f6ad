"""The `perturbjax` command: one thin function a verb, its flags from dataclasses."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import tyro

from perturbjax import __version__
from perturbjax.cli import help
from perturbjax.core.config import PRESETS, preset
from perturbjax.core.errors import InputError, run_command
from perturbjax.core.memory import keep_freed_memory
from perturbjax.core.messages import console
from perturbjax.core.options import parse_options

T = TypeVar("T")
Verb = Callable[[Sequence[str]], object]

#: Verbs whose steps are many and alike, and gain by keeping their memory.
RUN_A_NETWORK = ("train", "evaluate", "predict", "features", "classify", "audit", "train-segmenter")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and leave with its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_command(lambda: _run(words))


def _run(argv: list[str]) -> None:
    if argv and argv[0] in RUN_A_NETWORK:
        keep_freed_memory()
    if argv and argv[0] in VERBS:
        VERBS[argv[0]](argv[1:])
        return
    if argv and argv[0] in ("--version", "-V"):
        print(f"perturbjax {__version__}")
        return
    if argv and argv[0] not in ("-h", "--help"):
        raise InputError(f"perturbjax {argv[0]}: unknown; choose one of {', '.join(VERBS)}")
    print("usage: perturbjax VERB [options]    (perturbjax VERB --help says more)\n")
    print(
        help.listed({name: (verb.__doc__ or " ").splitlines()[0] for name, verb in VERBS.items()})
    )
    sys.exit(0 if argv else 2)


def _parse(
    kind: type[T],
    argv: Sequence[str],
    verb: str,
    *,
    about: str | None,
    default: T | None = None,
    choices: Mapping[str, Sequence[str]] | None = None,
    more: Sequence[help.Option] = (),
) -> T:
    """Options from the words after a verb, or its help: `about` and what follows are `help.render`'s."""
    prog = f"perturbjax {verb}"
    if asked := set(argv) & set(help.ASKED):
        everything = "--help-all" in asked
        print(
            help.render(
                kind, prog, about or "", default, choices=choices, more=more, everything=everything
            ),
            end="",
        )
        sys.exit(0)
    extra = {} if default is None else {"default": default}
    return parse_options(kind, argv, prog=prog, config=(tyro.conf.OmitArgPrefixes,), **extra)


def _defaults(kind: type[T], **given: Any) -> T:
    """What tyro shows as defaults where some are `given`. It is never constructed: what is required is missing."""
    shown = object.__new__(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        default = (
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
        )
        value = given.get(field.name, tyro.MISSING if default is dataclasses.MISSING else default)
        object.__setattr__(shown, field.name, value)
    return shown


def inspect(argv: Sequence[str]) -> None:
    """Say what a load_data.csv and its images hold, and what will make scores hard to trust."""
    _prepare("inspect", argv)


def build(argv: Sequence[str]) -> None:
    """Make a dataset directory of TIFFs and a load_data.csv: cell masks, images, metadata."""
    _prepare("build", argv)


def simulate(argv: Sequence[str]) -> None:
    """Make plates with known truth, as TIFFs and a load_data.csv."""
    _prepare("simulate", argv)


def fetch(argv: Sequence[str]) -> None:
    """Fetch a plate of the public Cell Painting Gallery."""
    _prepare("fetch", argv)


def _prepare(verb: str, argv: Sequence[str]) -> None:
    module, options, function = PREPARATION[verb]
    loaded = importlib.import_module(module)
    kind = getattr(loaded, options)
    getattr(loaded, function)(_parse(kind, argv, verb, about=kind.__doc__))


def train(argv: Sequence[str]) -> None:
    """Train a network on a prepared dataset, or go on training.

    perturbjax train --data dataset --out run --split well
    perturbjax train --preset pretrained --data dataset --out run --split plate
    """
    from perturbjax.models import BACKBONES
    from perturbjax.training.fit import TrainConfig, fit

    name, rest = _take_preset(argv, PRESETS, default="paper")
    default = _defaults(TrainConfig, recipe=preset(name))
    more = (_preset_option("Recipe; for new data pretrained", name),)
    choices = {"model": tuple(BACKBONES)}
    words = _profile_alone(rest)
    run = fit(
        _parse(
            TrainConfig,
            words,
            "train",
            about=train.__doc__,
            default=default,
            choices=choices,
            more=more,
        )
    )
    console.print(f"trained: {run.path}; judge it with `perturbjax evaluate --run {run.path}`")


def _preset_option(words: str, name: str, known: Collection[str] = tuple(PRESETS)) -> help.Option:
    return help.Option(
        "--preset", "{" + ",".join(known) + "}", f"{words} (default: {name or 'none'})."
    )


def _take_preset(
    argv: Sequence[str], known: Collection[str], default: str
) -> tuple[str, list[str]]:
    """`--preset NAME` decides the defaults of all other flags, so it is read before them."""
    rest = [
        part
        for word in argv
        for part in (word.split("=", 1) if word.startswith("--preset=") else [word])
    ]
    if "--preset" not in rest:
        return default, rest
    at = rest.index("--preset")
    if at + 1 == len(rest):
        raise InputError(f"--preset: needs a name, one of {', '.join(known)}")
    if rest[at + 1] not in known:
        raise InputError(f"--preset {rest[at + 1]}: unknown; choose one of {', '.join(known)}")
    return rest[at + 1], rest[:at] + rest[at + 2 :]


def _value_of(flag: str, argv: Sequence[str]) -> str:
    """The value of a flag that other flags' defaults hang on, before all are parsed; empty where it is absent."""
    for word, after in zip_longest(argv, argv[1:], fillvalue=""):
        if word == flag or word.startswith(f"{flag}="):
            return after if word == flag else word.split("=", 1)[1]
    return ""


def _profile_alone(argv: list[str]) -> list[str]:
    """`--profile` without a folder means the default one."""
    alone = [
        word == "--profile" and (after or "--").startswith("--")
        for word, after in zip_longest(argv, argv[1:])
    ]
    return [
        part
        for word, bare in zip(argv, alone, strict=True)
        for part in ([word, "default"] if bare else [word])
    ]


def evaluate(argv: Sequence[str]) -> None:
    """Judge a run on its own split: scores beside baselines, with intervals, tables and figures.

    perturbjax evaluate --run run
    perturbjax evaluate --run run --checkpoint best --data /elsewhere/dataset
    """
    from perturbjax.evaluation import apply
    from perturbjax.evaluation import score_tables as views
    from perturbjax.evaluation.evaluation_result import to_json
    from perturbjax.report.run_page import write_report

    config = _parse(apply.EvaluateConfig, argv, "evaluate", about=evaluate.__doc__)
    evaluation = apply.evaluate(config)
    if evaluation is None:  # another process of the job writes
        return
    if config.json:
        print(json.dumps(to_json(evaluation), indent=2))
    else:
        views.print_evaluation(evaluation)
    report = write_report(config.apply.chosen.run)
    console.print(f"written: {config.apply.chosen.run / apply.EVALUATION} and {report}")
    if beside := apply.describe_linear_baseline(config):
        console.print(beside)


def predict(argv: Sequence[str]) -> None:
    """Predict the sites of any dataset with a trained run.

    perturbjax predict --run run --data dataset --out predictions.parquet
    perturbjax predict --run run --data dataset --out predictions.parquet --epoch 40
    """
    from perturbjax.evaluation import apply

    apply.predict(_parse(apply.PredictConfig, argv, "predict", about=predict.__doc__))


def report(argv: Sequence[str]) -> None:
    """Write a run's report.html, or compare several: one file with scores, cells, figures and provenance.

    perturbjax report run
    perturbjax report run other_run classified --out comparison.html
    """
    from perturbjax.report.comparison_page import ReportConfig, write_reports

    options = _parse(ReportConfig, argv, "report", about=report.__doc__)
    console.print(f"written: {write_reports(options.runs, options.out)}")


def split(argv: Sequence[str]) -> None:
    """Deal a dataset's sites to training and judging, and write the manifest.

    perturbjax split --data dataset --policy compound --out split.parquet
    perturbjax split --data dataset --policy plate --folds 10 --out split.parquet
    """
    from perturbjax.data.splits import ManifestConfig, split_dataset

    console.print(
        f"written: {split_dataset(_parse(ManifestConfig, argv, 'split', about=split.__doc__))}"
    )


def verify(argv: Sequence[str]) -> None:
    """Check everything that a directory of ours holds against its digests.

    perturbjax verify dataset
    perturbjax verify run
    """
    from perturbjax.verify import VerifyConfig
    from perturbjax.verify import verify as check

    options = _parse(VerifyConfig, argv, "verify", about=verify.__doc__)
    console.print(f"{options.path}: {check(options.path)}")


def features(argv: Sequence[str]) -> None:
    """Extract features of every site with a pretrained backbone, or a run's own network.

    perturbjax features --data dataset --run run --out f.parquet
    perturbjax features --data dataset --weights hf:timm/resnet50.tv2_in1k --out f.parquet
    """
    from perturbjax.models import with_weights
    from perturbjax.profiles.extract import FeaturesConfig, extract

    choices = {"backbone": with_weights()}
    config = _parse(FeaturesConfig, argv, "features", about=features.__doc__, choices=choices)
    console.print(f"written: {extract(config)}")


def classify(argv: Sequence[str]) -> None:
    """Fit classical classifiers on a table of features and judge them like the networks.

    perturbjax classify --features features.parquet --split plate --out classified
    perturbjax classify --features profiles.csv --all-folds --out classified
    """
    from perturbjax.evaluation.score_tables import print_evaluation
    from perturbjax.profiles.classify import classify as fit_and_judge
    from perturbjax.profiles.profile_options import (
        CLASSIFY_PRESETS,
        ClassifyConfig,
        ProfileConfig,
        SourceConfig,
    )

    name, rest = _take_preset(argv, CLASSIFY_PRESETS, default="")
    given = dict(CLASSIFY_PRESETS.get(name, {}))
    source = SourceConfig(**given.pop("source", {}))
    default = _defaults(ClassifyConfig, profiles=_defaults(ProfileConfig, source=source), **given)
    words = "Settings that give the defaults below; linear is the baseline a network has to beat, and takes --data"
    more = (_preset_option(words, name, tuple(CLASSIFY_PRESETS)),)
    config = _parse(
        ClassifyConfig, rest, "classify", about=classify.__doc__, default=default, more=more
    )
    print_evaluation(fit_and_judge(config))
    console.print(f"written: {config.out}")


def embed(argv: Sequence[str]) -> None:
    """Lay a table of features out in the plane (UMAP, t-SNE), as picture and interactive page.

    perturbjax embed --features features.parquet --out umap.png
    perturbjax embed --features features.parquet --method tsne --out tsne.png
    """
    from perturbjax.profiles.embedding import embed as lay_out
    from perturbjax.profiles.profile_options import EmbedConfig

    picture = lay_out(_parse(EmbedConfig, argv, "embed", about=embed.__doc__))
    console.print(f"written: {picture} and {picture.with_suffix('.html')}")


def audit(argv: Sequence[str]) -> None:
    """Say how much of a score is biology: one model under every split, beside its controls.

    perturbjax audit --features features.parquet --data dataset --out audit
    perturbjax audit --run run --out audit
    """
    from perturbjax.audit.audit_options import AuditConfig
    from perturbjax.audit.audit_tables import print_audit, write_tables
    from perturbjax.audit.run_audit import audit as judge_splits
    from perturbjax.report.audit_page import write_page

    config = _parse(AuditConfig, argv, "audit", about=audit.__doc__)
    found = judge_splits(config)
    print_audit(found)
    write_tables(found, config.out)
    console.print(f"written: {write_page(found, config.out)}")


def compare(argv: Sequence[str]) -> None:
    """Compare runs that judged the same sites: scores side by side, and paired differences with intervals.

    perturbjax compare run_1 run_2 --out compared
    perturbjax compare classified/predictions/lda.parquet run --out compared
    """
    from perturbjax.audit.audit_options import CompareConfig
    from perturbjax.audit.compare import compare as side_by_side
    from perturbjax.audit.compare import print_comparison, write_comparison

    config = _parse(CompareConfig, argv, "compare", about=compare.__doc__)
    found = side_by_side(config)
    print_comparison(found)
    console.print(f"written: {write_comparison(found, config.out)}")


def import_torch(argv: Sequence[str]) -> None:
    """Turn a PyTorch checkpoint of one of the original's networks into a run.

    perturbjax import-torch --checkpoint best.pth --labels labels.json --out run
    perturbjax import-torch --checkpoint weights.safetensors --data dataset --out run
    """
    from perturbjax.models import BACKBONES
    from perturbjax.training.pytorch_exchange import (
        ImportConfig,
        import_run,
        recipe_for_import,
        recipe_of_weight_file,
    )

    name, rest = _take_preset(argv, PRESETS, default="")
    described = None if name else recipe_of_weight_file(Path(_value_of("--checkpoint", rest)))
    recipe = described or recipe_for_import(name or "original")
    now = "what export-torch wrote with the weights" if described else name or "original"
    default = _defaults(ImportConfig, recipe=recipe)
    more = (_preset_option("What the network was fed", now),)
    choices = {"model": [name for name, model in BACKBONES.items() if model.original]}
    about = import_torch.__doc__
    import_run(
        _parse(
            ImportConfig,
            rest,
            "import-torch",
            about=about,
            default=default,
            choices=choices,
            more=more,
        )
    )


def export_torch(argv: Sequence[str]) -> None:
    """Write a run's network as a PyTorch state dict (.pth) or .safetensors.

    perturbjax export-torch --run run --out weights.safetensors
    perturbjax export-torch --run run --out weights.pth --checkpoint best
    """
    from perturbjax.training.pytorch_exchange import ExportConfig, export_run

    export_run(_parse(ExportConfig, argv, "export-torch", about=export_torch.__doc__))


def export(argv: Sequence[str]) -> None:
    """Write a run's network as StableHLO, for any number of images and runtimes without perturbjax.

    perturbjax export --run run --out exported
    perturbjax export --run run --out exported --checkpoint best
    """
    from perturbjax.export import StableHLOConfig
    from perturbjax.export import export as write

    write(_parse(StableHLOConfig, argv, "export", about=export.__doc__))


def train_segmenter(argv: Sequence[str]) -> None:
    """Train a network that finds cells or nuclei on folders of images with masks, or go on training.

    perturbjax train-segmenter --images images --out weights.safetensors
    perturbjax train-segmenter --images images --init-from nuclei --out w.safetensors
    """
    from perturbjax.segmentation.train import TrainSegmenterConfig, train

    out = train(
        _parse(TrainSegmenterConfig, argv, "train-segmenter", about=train_segmenter.__doc__)
    )
    console.print(f"written: {out}")


#: Preparation command: module, options dataclass and function. Imported only when the command runs.
PREPARATION: dict[str, tuple[str, str, str]] = {
    "inspect": ("data_prep.inspection", "InspectConfig", "inspect"),
    "build": ("data_prep.build", "BuildConfig", "build"),
    "simulate": ("data_prep.simulate", "SimulateConfig", "simulate"),
    "fetch": ("data_prep.fetch", "FetchConfig", "fetch"),
}
VERBS: dict[str, Verb] = {
    "inspect": inspect,
    "build": build,
    "simulate": simulate,
    "fetch": fetch,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "report": report,
    "split": split,
    "verify": verify,
    "features": features,
    "classify": classify,
    "embed": embed,
    "audit": audit,
    "compare": compare,
    "export": export,
    "import-torch": import_torch,
    "export-torch": export_torch,
    "train-segmenter": train_segmenter,
}
