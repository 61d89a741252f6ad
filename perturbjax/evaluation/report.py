"""One HTML file that says what a run was asked, how well it does, beside what, and how to get the same again."""

from __future__ import annotations

import base64
import dataclasses
import html
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbjax.config import PRESETS, Recipe, recipe_from_dict
from perturbjax.console import InputError
from perturbjax.dataset import PROVENANCE
from perturbjax.evaluation import figures
from perturbjax.evaluation.baselines import BASELINES
from perturbjax.evaluation.bootstrap import Estimate
from perturbjax.evaluation.judgement import Judgement, headline, read_judgement, tested_on
from perturbjax.evaluation.predictions import classes_of, labels_and_probabilities, read_predictions
from perturbjax.evaluation.scores import METRICS
from perturbjax.files import atomic, read_json
from perturbjax.splits import TEST
from perturbjax.training.run import CONFIG, LABELS, read_metrics

EVALUATION, REPORT = "evaluation", "report.html"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 68rem; margin: 2rem auto; padding: 0 1.2rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0 1rem }
th, td { padding: .28rem .8rem; text-align: right; border-bottom: 1px solid #e3e7ec }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #9aa7b5 }
tr.model td { font-weight: 600; background: #f1f4f7 } small { color: #66717d; font-weight: 400 }
.headline { font-size: 1.1rem }
.warning { background: #fff4e0; border-left: 4px solid #d55e00; padding: .4rem .8rem; margin: .4rem 0 }
figure { margin: 1.2rem 0 } figcaption { color: #4c5762; max-width: 48rem } img { max-width: 100%; height: auto }
pre { background: #f5f6f8; padding: .7rem 1rem; overflow-x: auto; white-space: pre-wrap } summary { cursor: pointer }
"""


def write_report(run: Path) -> Path:
    """Draw a run's figures into `evaluation/`, and write `report.html`: no scripts, images inside.

    Parts whose files are missing are left out. `run` may also be the folder of one evaluation, as
    `perturbjax classify` writes one a classifier.

    Raises:
        InputError: the run was neither trained nor evaluated here, or a file of it cannot be read.
    """
    run = Path(run)
    folder = run / EVALUATION if (run / EVALUATION).is_dir() or not (run / "scores.json").is_file() else run
    judgement = read_judgement(folder / "scores.json") if (folder / "scores.json").is_file() else None
    config = read_json(run / CONFIG) if (run / CONFIG).is_file() else {}
    drawn = draw_figures(read_metrics(run), folder, judgement)
    if judgement is None and not drawn:
        raise InputError(_nothing_to_report(run, folder))
    sections = [
        _asked(config, judgement),
        _scores(judgement) if judgement else "<p>This run was not evaluated yet.</p>",
        "".join(_figure(*entry) for entry in drawn),
        _retrieval(folder),
        _per_class(folder),
        _provenance(config),
        _reproduce(run, config, evaluated=judgement is not None),
    ]
    title = _text(f"perturbjax: {run.resolve().name}")
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1>{''.join(sections)}</body></html>\n"
    )
    with atomic(run / REPORT) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return run / REPORT


def _nothing_to_report(run: Path, folder: Path) -> str:
    if models := sorted(file.parent for file in folder.glob("*/scores.json")):
        return f"{run}: holds several evaluated models; choose one, as --run {models[0]}"
    return f"{run}: holds neither metrics nor scores; run `perturbjax evaluate --run {run}` first"


def draw_figures(metrics: list[dict[str, Any]], out: Path, judgement: Judgement | None) -> list[tuple[Path, str]]:
    """Every figure that the rows of metrics.jsonl and the files of an evaluation folder allow, with its caption."""
    drawn = []
    if metrics:
        caption = "Loss and accuracy while training, and the learning rate behind them."
        drawn.append((figures.plot_curves(metrics, out / "curves.png"), caption))
    if judgement is None:
        return drawn
    caption = f"Model and baselines; bars are 95 % intervals from resampling whole {judgement.resample}s."
    drawn.append((figures.plot_scores(judgement, out / "scores.png"), caption))
    if (file := out / "confusion.csv").is_file():
        matrix = pd.read_csv(file, index_col=0, keep_default_na=False)
        names = [str(name) for name in matrix.columns]
        path = figures.plot_confusion(matrix.to_numpy(dtype=int), names, out / "confusion.png")
        drawn.append((path, "What each class is taken for. A dark column is a class that others are taken for."))
    if (file := out / "per_class.csv").is_file():
        path = figures.plot_recall(_read_per_class(file), out / "recall.png")
        drawn.append((path, "Share of each class's held-out sites that are recognised."))
    return drawn + _draw_from_predictions(out)


def _draw_from_predictions(out: Path) -> list[tuple[Path, str]]:
    """Figures that need every site's probabilities."""
    beside = (out / "predictions.parquet", out.parent.parent / "predictions" / f"{out.name}.parquet")
    file = next((file for file in beside if file.is_file()), None)
    if file is None:
        return []
    table = read_predictions(file)
    table = table[table["part"] == TEST].reset_index(drop=True)
    labels, probabilities = labels_and_probabilities(table, classes_of(table))
    calibration = figures.plot_reliability(labels, probabilities, out / "calibration.png")
    drawn = [(calibration, "Above the dashed line the model knows more than it says, below less.")]
    try:
        plates = figures.plot_plates(table, labels, probabilities, out / "plates.png")
    except InputError:  # wells that are not named as on a plate: there is no map to draw
        return drawn
    caption = "Where on the plate the model is right. Edges or rows that stand out point to position, not treatment."
    return [*drawn, (plates, caption)]


def _read_per_class(file: Path) -> pd.DataFrame:
    shares = dict.fromkeys(("precision", "recall", "f1"), "")  # a class may be called NA; an empty share is NaN
    return pd.read_csv(file, dtype={"class": str}, keep_default_na=False, na_values=shares)


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(head: Sequence[str], rows: Iterable[tuple[Sequence[str], str]]) -> str:
    """An HTML table; cells are HTML already, each row comes with its CSS class."""
    body = "".join(f'<tr class="{css}">' + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row, css in rows)
    titles = "".join(f"<th>{_text(title)}</th>" for title in head)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def _asked(config: dict[str, Any], judgement: Judgement | None) -> str:
    asked = []
    if label := config.get("facts", {}).get("label_column"):
        asked.append(f"<p>Asked: which <b>{_text(label)}</b> was this site given?</p>")
    if config.get("recipe"):
        asked.append(f"<p>Network <b>{_text(config['recipe'].get('model', {}).get('model', '?'))}</b>.</p>")
    if judgement:
        asked.append(f"<p>{_text(tested_on(judgement))}</p>")
        asked += [f'<p class="headline"><b>{_text(sentence)}</b></p>' for sentence in headline(judgement)]
        asked += [f'<p class="warning">{_text(warning)}</p>' for warning in judgement.warnings()]
    return "".join(asked)


def _scores(judgement: Judgement) -> str:
    parts, metrics = ["<h2>Scores</h2>"], judgement.metrics
    for level in judgement.shown:
        rows = [
            ([_text(row.name), *(_estimate(row.scores.get(m)) for m in metrics)], "" if row.baseline else "model")
            for row in level.rows
        ]
        for subject, train in (judgement.train if level.name == "site" else {}).items():
            cells = [_share(train.get(metric, np.nan)) for metric in metrics]
            rows.append(([f"{_text(subject)}, on training sites", *cells], ""))
        parts.append(_table([f"{level.words} (n = {level.n})", *(METRICS[m].words for m in metrics)], rows))
    there = {row.name for row in judgement.levels[0].rows}
    words = " ".join(f"{name}: {baseline.words}." for name, baseline in BASELINES.items() if name in there)
    parts.append(
        f"<p><small>In brackets: 95 % intervals from {judgement.replicates} resamples of whole {judgement.resample}s. "
        f"A well's prediction is the mean of its sites' probabilities. {_text(words)}</small></p>"
    )
    parts += [f"<p><small>No {_text(name)}: {_text(why)}.</small></p>" for name, why in judgement.skipped.items()]
    return "".join(parts)


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.3f} <small>[{estimate.low:.2f}, {estimate.high:.2f}]</small>"


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{_text(path.stem)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>"


def _retrieval(folder: Path) -> str:
    file = folder / "retrieval.csv"
    if not file.is_file():
        return ""
    table = pd.read_csv(file)
    if table.empty:
        return ""
    shares = [column for column in table.columns if table[column].dtype.kind == "f"]
    table = table.astype(object).assign(**{column: table[column].map(_share) for column in shares})
    rows = [([_text(value) for value in row], "") for row in table.itertuples(index=False)]
    explained = (
        "Wells of the test part, compared by the cosine of their mean features. mAP: do replicates find each other "
        "before the controls of their plate, or before other perturbations? NSC, NSCB: has the nearest well of another "
        "compound (and another batch) the same mechanism? chance: the same of random rankings."
    )
    return f"<h2>Retrieval by features</h2>{_table(list(table.columns), rows)}<p><small>{explained}</small></p>"


def _share(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"


def _per_class(folder: Path) -> str:
    file = folder / "per_class.csv"
    if not file.is_file():
        return ""
    table = _read_per_class(file)
    shares = ["precision", "recall", "f1"]
    table[shares] = table[shares].map(_share)
    rows = [([_text(value) for value in row], "") for row in table.itertuples(index=False)]
    opened = " open" if len(rows) <= 20 else ""
    head = "<h2>By class</h2><p><small>Held-out sites; empty where a share would be of nothing.</small></p>"
    return f"{head}<details{opened}><summary>{len(rows)} classes</summary>{_table(list(table.columns), rows)}</details>"


def _provenance(config: dict[str, Any]) -> str:
    facts = dict(config.get("facts", {}), **config.get("versions", {}))
    data = Path(config.get("data") or "")
    if (data / PROVENANCE).is_file():
        facts |= {f"dataset: {name}": value for name, value in read_json(data / PROVENANCE).items()}
    if not facts:
        return ""
    rows = [([_text(name), _text(value)], "") for name, value in facts.items()]
    return "<h2>Provenance</h2><details><summary>What it was made of</summary>" + _table(["", ""], rows) + "</details>"


def _reproduce(run: Path, config: dict[str, Any], *, evaluated: bool) -> str:
    if "recipe" not in config:
        return ""
    flags = recipe_flags(recipe_from_dict(config["recipe"]))
    made = ["train", "--data", config.get("data") or "DIR"]
    if imported := config.get("facts", {}).get("imported"):
        made = ["import-torch", "--preset", "paper", "--checkpoint", imported["file"], "--labels", str(run / LABELS)]
    commands = [shlex.join(["perturbjax", *made, "--out", str(run), *flags])]
    if evaluated:
        commands.append(shlex.join(["perturbjax", "evaluate", "--run", str(run)]))
    return f"<h2>The same again</h2><pre>{_text(chr(10).join(commands))}</pre>"


def recipe_flags(recipe: Recipe) -> list[str]:
    """Command line flags that turn the default recipe into this one."""
    default, flags = PRESETS["paper"], [] if recipe.seed == PRESETS["paper"].seed else ["--seed", str(recipe.seed)]
    for section in (f.name for f in dataclasses.fields(Recipe) if f.name != "seed"):
        for field in dataclasses.fields(getattr(recipe, section)):
            value = getattr(getattr(recipe, section), field.name)
            if value == getattr(getattr(default, section), field.name):
                continue
            name = field.name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{name}" if value else f"--no-{name}")
            else:
                flags += [f"--{name}", *(str(v) for v in (value if isinstance(value, tuple) else (value,)))]
    return flags
