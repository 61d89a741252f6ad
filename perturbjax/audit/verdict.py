"""What an audit means, in words a biologist understands; every sentence follows from the numbers of an `AuditResult`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from perturbjax.audit.audit_result import AuditResult, SplitResult
from perturbjax.audit.controls import UNTRAINED
from perturbjax.evaluation.evaluation_result import format_estimate
from perturbjax.evaluation.scores import HEADLINE, METRICS

Finding = Literal["chance", "explained", "beyond"]
#: A p below this counts: of a hundred datasets without any effect, one is called better than chance.
_ALPHA = 0.01
#: Share of a score above chance which a control reaches alone, from which it is called most of it.
_MOST = 0.5

_ON = {
    "site": "on other sites of the same wells",
    "well": "on held-out wells of known plates",
    "plate": "on held-out plates",
    "layout": "on held-out layouts",
    "compound": "on compounds never seen",
}
#: What a split leaves to be told that the next stricter one does not.
_TELLS = {
    "site": "the well",
    "well": "the plate",
    "plate": "the place on a known layout",
    "layout": "",
}
#: What a control that does as well is, in words.
_IS = {
    "position": "the well's place on the plate",
    "plate": "which plate it is",
    "cell count": "the number and area of the cells",
    "intensity": "brightness",
    "all together": "place, plate, cell count and brightness together",
    "majority": "how frequent the classes are",
    "chance": "chance",
}


@dataclass(frozen=True)
class Verdict:
    """What was found under the split to go by.

    Attributes:
        finding: "chance": nothing is recognised beyond luck. "explained": a control does as well. "beyond": more than
            any control.
        honest: whether that split leaves nothing but the cells to answer.
        leaky: whether the weakest split clearly shows more than that split.
        headline: the finding in a few words.
        sentences: the same in words, the most important first.
        advice: what can be done, each a thing that this data allows or names the data it takes.
    """

    finding: Finding
    honest: bool
    leaky: bool
    headline: str
    sentences: tuple[str, ...]
    advice: tuple[str, ...]


def verdict(audit: AuditResult) -> Verdict:
    """The verdict on an audit."""
    answer, leak = audit.strictest, audit.leak
    finding = _finding(answer)
    leaky = leak is not None and leak.estimate.low > 0
    sentences = [_found(answer, finding)]
    if leaky and leak is not None:
        sentences.append(_leaked(audit, answer))
    sentences += _untrained(answer)
    if answer.leaks:
        sentences.append(_dishonest(answer))
    if answer.n_excluded:
        sentences.append(
            f"{answer.n_excluded} sites could not be asked: their {audit.label} stands in one {answer.policy} only."
        )
    advice = tuple(_advice(audit, finding))
    return Verdict(
        finding,
        not answer.leaks,
        leaky,
        _headline(finding, not answer.leaks),
        tuple(sentences),
        advice,
    )


def _headline(finding: Finding, honest: bool) -> str:
    if finding == "chance":
        return "No: nothing is recognised beyond luck."
    if finding == "explained":
        return "Not shown: what sees no cell answers as well."
    if not honest:
        return "Not shown: under the strictest split that this data allows, more than cells can answer."
    return "Yes: more is recognised than what sees no cell can tell."


def above_chance(answer: SplitResult) -> bool:
    """Whether the score is clearly better than chance: by its interval, and by exchanging labels where that can be."""
    lead = answer.model.leads["chance"][HEADLINE]
    return lead.low > 0 and (answer.p is None or answer.p < _ALPHA)


def _finding(answer: SplitResult) -> Finding:
    if not above_chance(answer):
        return "chance"
    return "beyond" if answer.model.leads[answer.rival][HEADLINE].low > 0 else "explained"


def _found(answer: SplitResult, finding: Finding) -> str:
    where, metric = (
        _capital(_ON.get(answer.policy, f"under the split {answer.policy}")),
        METRICS[HEADLINE].words,
    )
    score, rival = format_estimate(answer.score), answer.rival
    reached = answer.controls[rival].value
    p = (
        ""
        if answer.p is None
        else f" (p = {answer.p:.3f})"
        if answer.p >= 0.001
        else " (p < 0.001)"
    )
    said = f"{where}: {metric} {score}, chance {answer.chance:.3f}{p}"
    if finding == "chance":
        return f"{said}: no better than chance; nothing is recognised there."
    alone = f"{_IS.get(rival, rival)} {'reach' if rival == 'all together' else 'alone reaches'} {reached:.3f}"
    if finding == "explained" and answer.leaks:
        return f"{said}; {alone}: this data cannot show that cells were recognised."
    lead = format_estimate(answer.model.leads[rival][HEADLINE])
    if finding == "explained":
        more = (
            "show less"
            if answer.model.leads[rival][HEADLINE].value < 0
            else "are not clearly above that"
        )
        return f"{said}; {alone}: the features {more} ({lead})."
    if reached - answer.chance > _MOST * (answer.score.value - answer.chance):
        return f"{said}; {alone}: most of this is {_IS.get(rival, rival)}, and {lead} is beyond it."
    return f"{said}; of the controls {alone}, and the features {lead} more."


def _leaked(audit: AuditResult, answer: SplitResult) -> str:
    assert audit.leak is not None
    weak = audit[audit.leak.weaker]
    order = list(_TELLS)
    between = [
        _TELLS[policy] for policy in order[order.index(weak.policy) : order.index(answer.policy)]
    ]
    return (
        f"{_capital(_ON[weak.policy])} it shows {weak.score.value:.3f}: {format_estimate(audit.leak.estimate)} more on the same "
        f"sites, which tells {' or '.join(between)}, not the treatment."
    )


def _untrained(answer: SplitResult) -> list[str]:
    if (lead := answer.model.leads.get(UNTRAINED, {}).get(HEADLINE)) is None:
        return []
    reached = answer.controls[UNTRAINED].value
    if lead.low > 0:
        return [
            f"The same network untrained reaches {reached:.3f}; what it learned adds {format_estimate(lead)}."
        ]
    return [
        f"The same network untrained reaches {reached:.3f}: what it learned adds nothing that is clear."
    ]


def _dishonest(answer: SplitResult) -> str:
    if "wells" in answer.leaks:
        return "No honest score: sites of one well stand on both sides, so it tells wells, not treatments."
    place = answer.controls["position"].value
    return f"No honest score: the place on the plate alone reaches {place:.3f}: a plate map learned by heart answers."


def _advice(audit: AuditResult, finding: Finding) -> list[str]:
    """Only what this data allows, or what data it takes."""
    answer, found = audit.strictest, []
    if answer.leaks:
        found.append(
            "Needed for an honest score: the same treatments in other wells of further plates (a second layout), at "
            "least two wells each."
            if "position" in answer.leaks
            else "Needed for an honest score: each treatment in two wells or more, better on two plates or more."
        )
    elif audit.model != "model":
        found.append(
            f"Report the score of --split {answer.policy}; it is the strictest that this data allows."
        )
    if finding == "explained" and not answer.leaks:
        found.append(
            f"Compare with features without {_IS.get(answer.rival, answer.rival)}, or show what the cells add to that."
        )
    if answer.policy in ("site", "well") and not answer.leaks:
        found.append(
            "Whether it holds on a new plate cannot be said: it takes the same treatments on further plates."
        )
    return found


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]
