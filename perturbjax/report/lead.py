"""What stands above everything: did it work, on what, can it be trusted, which classes, show me."""

from __future__ import annotations

import numpy as np

from perturbjax.console import html_text
from perturbjax.evaluation.judgement import HEADLINE, cell, headline, tested_on, verdict
from perturbjax.evaluation.scores import METRICS
from perturbjax.pages import defined
from perturbjax.pages.page import anchor
from perturbjax.report.evidence import Evidence
from perturbjax.report.words import MEANINGS

#: Classes named as best and as worst.
_NAMED = 3


def lead(found: Evidence, *, pictures: bool) -> str:
    """The verdict in one sentence, the five questions of whoever opens the page, and what to beware of."""
    judgement = found.judgement
    if judgement is None:
        return '<p class="verdict">This run was not evaluated yet.</p>' + _answers(_asked(found))
    questions = [
        *_asked(found),
        ("Did it work?", _did_it_work(found)),
        ("On what?", html_text(tested_on(judgement))),
        ("Can I trust it?", _trust(found)),
        ("Which classes?", _which(found)),
        ("Show me", '<a href="#gallery">The cells: right, wrong and typical</a>' if pictures else ""),
    ]
    warnings = "".join(f'<p class="warning">{html_text(warning)}</p>' for warning in judgement.warnings())
    first, *more = found.audited or [verdict(judgement)]
    said = "".join(f"<p>{html_text(sentence)}</p>" for sentence in more)
    return f'<p class="verdict">{html_text(first)}</p>{said}{_answers(questions)}{warnings}'


def _answers(questions: list[tuple[str, str]]) -> str:
    shown = "".join(f"<div><dt>{word}</dt><dd>{answer}</dd></div>" for word, answer in questions if answer)
    return f'<dl class="answers">{shown}</dl>'


def _asked(found: Evidence) -> list[tuple[str, str]]:
    label = found.config.get("facts", {}).get("label_column")
    network = found.config.get("recipe", {}).get("model", {}).get("model")
    asked = f"Which <b>{html_text(label.removeprefix('Metadata_'))}</b> was this site given?" if label else ""
    return [("Asked", asked + (f" Network: <b>{html_text(network)}</b>." if network else ""))]


def _did_it_work(found: Evidence) -> str:
    judgement = found.judgement
    assert judgement is not None
    level = judgement.shown[-1]
    (subject,) = judgement.subjects
    best = level.best_baseline
    words = METRICS[HEADLINE].words
    return (
        f"<b>{cell(level[subject].scores[HEADLINE])}</b> {defined(words, MEANINGS[words])} {level.words}; the best "
        f"baseline, {defined(best.name, MEANINGS.get(best.name, ''))}, {best.scores[HEADLINE].value:.3f}"
    )


def _trust(found: Evidence) -> str:
    judgement = found.judgement
    assert judgement is not None
    count = len(judgement.warnings())
    said = html_text(headline(judgement)[-1].split("; ", 1)[-1].capitalize())
    more = f" {count} {'thing' if count == 1 else 'things'} to know, below." if count else " Nothing speaks against it."
    return said + more


def _which(found: Evidence) -> str:
    table = found.csv("per_class.csv", "recall", "precision", "f1")
    if table is None or (judged := table[table["sites"] > 0]).empty:
        return ""
    order = judged.sort_values("recall", ascending=False, kind="stable")
    few = min(_NAMED, -(-len(order) // 2))
    best, worst = order.head(few), order.tail(min(few, len(order) - few))[::-1]
    told = "best " + ", ".join(map(_named, best["class"], best["recall"]))
    if len(worst):
        told += "; worst " + ", ".join(map(_named, worst["class"], worst["recall"]))
    none = int((judged["recall"] == 0).sum())
    return told + (f"; {none} of {len(judged)} never recognised" if none else "") + ' (<a href="#classes">all</a>)'


def _named(name: str, recall: float) -> str:
    shown = f"{recall:.0%}" if np.isfinite(recall) else "?"
    return f'<a href="#{anchor("class", name)}">{html_text(name)}</a> {shown}'
