"""What a judgement means, in a sentence for who reads no further, and what to do next."""

from __future__ import annotations

from perturbjax.core.choices import SPLIT_POLICIES
from perturbjax.evaluation.evaluation_result import EvaluationResult, Level, ModelScores, rank_rows
from perturbjax.evaluation.scores import HEADLINE, METRICS

#: What a baseline is that does as well, in words.
BASELINE_DESCRIPTIONS = {
    "majority": "always answering the most frequent class",
    "chance": "guessing",
    "position": "the place on the plate alone",
    "cell count": "the number and size of the cells alone",
    "intensity": "brightness alone",
}
#: Score on training sites minus that on held-out ones from which it is called learned by heart.
_BY_HEART = 0.2


def best_unbeaten_baseline(level: Level, subject: ModelScores) -> ModelScores | None:
    """The best baseline that the subject is not clearly above, if any."""
    names = [name for name, lead in subject.leads.items() if lead[HEADLINE].low <= 0]
    return rank_rows(level, names)[0] if names else None


def verdict(evaluation: EvaluationResult) -> str:
    """One plain sentence: whether the (best) subject knows more than what sees no cell, and where."""
    level = evaluation.displayed_levels[-1]
    subject, words = rank_rows(level, evaluation.model_names)[0], METRICS[HEADLINE].words
    score, policy = subject.scores[HEADLINE], SPLIT_POLICIES.get(evaluation.split)
    where = policy.test_set if policy else "on held-out sites"
    reached = f"{words} {score.value:.2f} ({score.low:.2f} to {score.high:.2f}) {level.words}"
    rival = best_unbeaten_baseline(level, subject)
    if rival is None:
        best = level.best_baseline
        beside = f"the best baseline, {BASELINE_DESCRIPTIONS.get(best.name, best.name)}, reaches {best.scores[HEADLINE].value:.2f}"
        unasked = [
            BASELINE_DESCRIPTIONS[name]
            for name in evaluation.skipped
            if name in ("intensity", "cell count")
        ]
        if evaluation.overlap.well > 0:
            return f"Not shown for a treatment: {reached}, but it was trained on other sites of the judged wells."
        if unasked:
            beside += f"; {' and '.join(unasked)} could not be asked"
        return f"Yes{', as far as asked' if unasked else ''}: {where}, it tells classes apart with {reached}; {beside}."
    beside = f"{BASELINE_DESCRIPTIONS.get(rival.name, rival.name)} reaches {rival.scores[HEADLINE].value:.2f}"
    if any(lead[HEADLINE].high < 0 for lead in subject.leads.values()):
        return f"No: {where}, it reaches {reached}, and {beside}."
    return f"Not shown: {where}, it reaches {reached}, but {beside}, which is not clearly less."


def advice(evaluation: EvaluationResult, run: str | None) -> str:
    """One sentence: what to do next. Commands stand between backticks.

    Args:
        run: a run directory's name; None is a classifier on features, which is not trained longer.
    """
    level = evaluation.displayed_levels[-1]
    subject = rank_rows(level, evaluation.model_names)[0]
    rival = best_unbeaten_baseline(level, subject)
    if evaluation.overlap.well > 0:
        return "Hold whole wells out: `--split well`, or `--split plate` where there are several plates."
    if rival is not None:
        return _weak(evaluation, subject.name, rival.name, run)
    if evaluation.split == "well":
        if evaluation.n.plate > 1:
            return "Ask whether it holds on a plate that it never saw: `--split plate`."
        return "Image the same treatments on a further plate: whether it holds there cannot be said yet."
    audit = (
        "perturbjax audit --features …"
        if run is None
        else f"perturbjax audit --run {run} --out {run}/audit"
    )
    more = "; its verdict then stands here" if run is not None else ""
    return f"Ask how much of it is left under every split that this data allows: `{audit}`{more}."


def _weak(evaluation: EvaluationResult, subject: str, rival: str, run: str | None) -> str:
    """What helps a subject that is not clearly above a baseline."""
    level = evaluation.levels[0]
    reached = level[subject].scores[HEADLINE].value
    trained = evaluation.train.get(subject, {}).get(HEADLINE)
    linear = (
        "a linear model on a pretrained network's features (`perturbjax classify --preset linear`)"
    )
    if run is not None and trained is not None and trained <= level[rival].scores[HEADLINE].value:
        told = f"it reaches no more than {trained:.2f} on its own training sites"
        return f"Train longer (`--epochs`): {told}. Or try {linear}."
    if trained is not None and trained - reached > _BY_HEART:
        helps = (
            f"More wells and plates help, or {linear}"
            if run is not None
            else "More wells and plates help"
        )
        return f"It learned its training sites by heart ({trained:.2f} there, {reached:.2f} by site here). {helps}."
    if rival in ("cell count", "intensity"):
        changed = "brightness" if rival == "intensity" else "the number of cells"
        return (
            f"Treatments change {changed} too: look whether that is all they do here. More wells narrow the interval"
            + (f"; {linear} is the next thing to try." if run is not None else ".")
        )
    return f"More wells and plates narrow the interval{f'; {linear} is the next thing to try' if run else ''}."
