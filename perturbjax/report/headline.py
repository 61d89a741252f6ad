"""Top of a report: result sentence, next step, test set, reliability, classes, warnings."""

from __future__ import annotations

import numpy as np

from perturbjax.core.messages import html_text
from perturbjax.evaluation.bootstrap import Estimate
from perturbjax.evaluation.conclusions import advice, best_unbeaten_baseline, verdict
from perturbjax.evaluation.evaluation_result import EvaluationResult, describe_test_set
from perturbjax.evaluation.scores import HEADLINE, METRICS
from perturbjax.report.metric_descriptions import MEANINGS
from perturbjax.report.pages import with_tooltip
from perturbjax.report.pages.page import anchor, with_code
from perturbjax.report.run_results import RunResults

#: Number of best and of worst classes that are named.
_NAMED = 3


def headline_html(results: RunResults, *, pictures: bool) -> str:
    """Return the top of the report as HTML.

    Args:
        results: the run.
        pictures: whether the report has a gallery.
    """
    evaluation = results.evaluation
    if evaluation is None:
        return '<p class="verdict">This run was not evaluated yet.</p>' + _facts(_task(results))
    gallery = '<a href="#gallery">Correct, wrong and typical cells</a>' if pictures else ""
    facts = [
        *_task(results),
        ("Result", _result(evaluation)),
        ("Test set", html_text(describe_test_set(evaluation))),
        ("Reliability", _reliability(results, evaluation)),
        ("Classes", _classes(results)),
        ("Cells", gallery),
    ]
    warnings = "".join(
        f'<p class="warning">{with_code(warning[0].upper() + warning[1:])}</p>'
        for warning in evaluation.warnings()
    )
    first, *more = results.audit_sentences or [verdict(evaluation)]
    sentences = "".join(f"<p>{html_text(sentence)}</p>" for sentence in more)
    return (
        f'<p class="verdict">{html_text(first)}</p>{sentences}{_next_steps(results, evaluation)}'
        f"{_facts(facts)}{warnings}"
    )


def _next_steps(results: RunResults, evaluation: EvaluationResult) -> str:
    """Advice of the audit, or of the evaluation without an audit."""
    # Classifiers have no recipe.
    run = results.path.resolve().name if results.config.get("recipe") else None
    steps = results.audit_advice if results.audit_sentences else [advice(evaluation, run)]
    return "".join(f'<p class="next"><b>Next:</b> {with_code(step)}</p>' for step in steps)


def _facts(facts: list[tuple[str, str]]) -> str:
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts if value)
    return f'<dl class="answers">{rows}</dl>'


def _task(results: RunResults) -> list[tuple[str, str]]:
    label = results.config.get("facts", {}).get("label_column")
    network = results.config.get("recipe", {}).get("model", {}).get("model")
    parts = []
    if label:
        parts.append(f"Predict <b>{html_text(label.removeprefix('Metadata_'))}</b> from images.")
    if network:
        parts.append(f"Network: <b>{html_text(network)}</b>.")
    return [("Task", " ".join(parts))]


def _result(evaluation: EvaluationResult) -> str:
    level = evaluation.verdict_level
    (model,) = evaluation.model_names
    best, words = level.best_baseline, METRICS[HEADLINE].words
    return (
        f"{with_tooltip(words.capitalize(), MEANINGS[words])} {level.words} "
        f"<b>{_plain(level[model].scores[HEADLINE])}</b>; best "
        f"{with_tooltip('baseline', MEANINGS['baseline'])}: "
        f"{with_tooltip(best.name, MEANINGS.get(best.name, ''))} {best.scores[HEADLINE].value:.2f}."
    )


def _reliability(results: RunResults, evaluation: EvaluationResult) -> str:
    (model,) = evaluation.model_names
    level, count = evaluation.verdict_level, len(evaluation.warnings())
    rival = best_unbeaten_baseline(level, level[model])
    compared = level.best_baseline if rival is None else rival
    lead = _plain(level[model].leads[compared.name][HEADLINE])
    name = html_text(compared.name)
    sentence = f"Lead over {name}: {lead}."
    warnings = f"{count} warning{'' if count == 1 else 's'} below." if count else "No warnings."
    return f"{sentence}{_confident_half(results)} {warnings}"


def _confident_half(results: RunResults) -> str:
    test = results.test
    if test is None:
        return ""
    order = np.argsort(-test.confidence, kind="stable")
    accuracy = test.right[order[: max(1, len(test.labels) // 2)]].mean()
    return (
        ' Accuracy of the <a href="#confidence">most confident</a> half of the sites: '
        f"{accuracy:.0%}."
    )


def _plain(estimate: Estimate) -> str:
    """`0.82 (0.76 to 0.86)`, with a typographic minus."""
    parts = (estimate.value, estimate.low, estimate.high)
    # The format option z avoids "-0.00".
    value, low, high = (f"{part:z.2f}".replace("-", "−") for part in parts)
    return f"{value} ({low} to {high})"


def _classes(results: RunResults) -> str:
    table = results.csv("per_class.csv")
    if table is None:
        return ""
    tested = table[table["sites"] > 0]
    if tested.empty:
        return ""
    order = tested.sort_values("recall", ascending=False, kind="stable")
    # At most half of the classes (rounded up), so that best and worst do not overlap.
    few = min(_NAMED, -(-len(order) // 2))
    best, worst = order.head(few), order.tail(min(few, len(order) - few))[::-1]
    text = "Best " + ", ".join(map(_class_link, best["class"], best["recall"]))
    never = int((tested["recall"] == 0).sum())
    # If many classes have recall 0, their number replaces the names.
    if len(worst) and never <= _NAMED:
        text += "; worst " + ", ".join(map(_class_link, worst["class"], worst["recall"]))
    if never:
        text += f"; {never} of {len(tested)} never predicted correctly"
    return text + ' (<a href="#classes">all</a>)'


def _class_link(name: str, recall: float) -> str:
    text = f"{recall:.0%}" if np.isfinite(recall) else "?"
    return f'<a href="#{anchor("class", name)}">{html_text(name)}</a> {text}'
