"""What stands above everything: did it work, on what, can it be trusted, which classes, show me."""

from __future__ import annotations

import numpy as np

from perturbjax.core.messages import html_text
from perturbjax.evaluation.bootstrap import Estimate
from perturbjax.evaluation.conclusions import advice, best_unbeaten_baseline, short_verdict, verdict
from perturbjax.evaluation.evaluation_result import EvaluationResult, describe_test_set
from perturbjax.evaluation.scores import HEADLINE, METRICS
from perturbjax.report.metric_descriptions import MEANINGS
from perturbjax.report.pages import defined
from perturbjax.report.pages.page import anchor, with_code
from perturbjax.report.run_results import Evidence

#: Classes named as best and as worst.
_NAMED = 3


def lead(found: Evidence, *, pictures: bool) -> str:
    """The verdict in one sentence, the five questions of whoever opens the page, and what to beware of."""
    evaluation = found.evaluation
    if evaluation is None:
        return '<p class="verdict">This run was not evaluated yet.</p>' + _answers(_asked(found))
    questions = [
        *_asked(found),
        ("Did it work?", _did_it_work(found)),
        ("On what?", html_text(describe_test_set(evaluation))),
        ("Can I trust it?", _trust(found)),
        ("Which classes?", _which(found)),
        (
            "Show me",
            '<a href="#gallery">The cells: right, wrong and typical</a>' if pictures else "",
        ),
    ]
    warnings = "".join(
        f'<p class="warning">{with_code(warning[0].upper() + warning[1:])}</p>'
        for warning in evaluation.warnings()
    )
    first, *more = found.audited or [verdict(evaluation)]
    said = "".join(f"<p>{html_text(sentence)}</p>" for sentence in more)
    return f'<p class="verdict">{html_text(first)}</p>{said}{_next(found, evaluation)}{_answers(questions)}{warnings}'


def _next(found: Evidence, evaluation: EvaluationResult) -> str:
    """What to do next; what an audit advises where it was asked."""
    trained = found.path.resolve().name if found.config.get("recipe") else None
    advised = found.advised if found.audited else [advice(evaluation, trained)]
    return "".join(
        f'<p class="next"><b>Next:</b> {with_code(sentence)}</p>' for sentence in advised
    )


def _answers(questions: list[tuple[str, str]]) -> str:
    shown = "".join(
        f"<div><dt>{word}</dt><dd>{answer}</dd></div>" for word, answer in questions if answer
    )
    return f'<dl class="answers">{shown}</dl>'


def _asked(found: Evidence) -> list[tuple[str, str]]:
    label = found.config.get("facts", {}).get("label_column")
    network = found.config.get("recipe", {}).get("model", {}).get("model")
    asked = (
        f"Which <b>{html_text(label.removeprefix('Metadata_'))}</b> does an image show?"
        if label
        else ""
    )
    return [("Asked", asked + (f" Network: <b>{html_text(network)}</b>." if network else ""))]


def _did_it_work(found: Evidence) -> str:
    evaluation = found.evaluation
    assert evaluation is not None
    level = evaluation.displayed_levels[-1]
    (subject,) = evaluation.model_names
    best = level.best_baseline
    words = METRICS[HEADLINE].words
    return (
        f"{short_verdict(evaluation)}. {defined(words.capitalize(), MEANINGS[words])} {level.words} "
        f"<b>{_plain(level[subject].scores[HEADLINE])}</b>; the best {defined('baseline', MEANINGS['baseline'])}, "
        f"{defined(best.name, MEANINGS.get(best.name, ''))}, {best.scores[HEADLINE].value:.2f}."
    )


def _trust(found: Evidence) -> str:
    evaluation = found.evaluation
    assert evaluation is not None
    (subject,) = evaluation.model_names
    level, count = evaluation.displayed_levels[-1], len(evaluation.warnings())
    rival = best_unbeaten_baseline(level, level[subject])
    against = level.best_baseline if rival is None else rival
    lead = _plain(level[subject].leads[against.name][HEADLINE])
    name = html_text(against.name)
    beats = (
        f"It clearly beats every baseline, {name} by {lead}."
        if rival is None
        else f"It does not clearly beat {name}: the difference is {lead}."
    )
    told = f"{count} {'warning' if count == 1 else 'warnings'} below." if count else "No warnings."
    return f"{beats}{_surer(found)} {told}"


def _surer(found: Evidence) -> str:
    if found.answers is None:
        return ""
    half = np.argsort(-found.answers.confidence, kind="stable")[
        : max(1, len(found.answers.labels) // 2)
    ]
    right = found.answers.right[half].mean()
    return f' Of the half of the sites that it is <a href="#sureness">surest</a> of, {right:.0%} are right.'


def _plain(estimate: Estimate) -> str:
    """`0.82 (0.76 to 0.86)`, with a minus sign that is one."""
    value, low, high = (
        f"{part:z.2f}".replace("-", "−") for part in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} ({low} to {high})"


def _which(found: Evidence) -> str:
    table = found.csv("per_class.csv", "recall", "precision", "f1")
    if table is None or (judged := table[table["sites"] > 0]).empty:
        return ""
    order = judged.sort_values("recall", ascending=False, kind="stable")
    few = min(_NAMED, -(-len(order) // 2))
    best, worst = order.head(few), order.tail(min(few, len(order) - few))[::-1]
    told = "Best " + ", ".join(map(_named, best["class"], best["recall"]))
    none = int((judged["recall"] == 0).sum())
    if len(worst) and none <= _NAMED:
        told += "; worst " + ", ".join(map(_named, worst["class"], worst["recall"]))
    return (
        told
        + (f"; {none} of {len(judged)} never recognised" if none else "")
        + ' (<a href="#classes">all</a>)'
    )


def _named(name: str, recall: float) -> str:
    shown = f"{recall:.0%}" if np.isfinite(recall) else "?"
    return f'<a href="#{anchor("class", name)}">{html_text(name)}</a> {shown}'
