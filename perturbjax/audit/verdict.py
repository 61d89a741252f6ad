"""Conclusions of an audit in plain sentences; each sentence follows from numbers of the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from perturbjax.audit.audit_result import AuditResult, SplitResult
from perturbjax.audit.controls import UNTRAINED
from perturbjax.evaluation.conclusions import (
    FEW_WELLS,
    MIN_TEST_WELLS,
    compare_with_baseline,
    describe_baseline,
    describe_score,
    describe_test_sites,
    name_label,
    too_few_wells,
)
from perturbjax.evaluation.evaluation_result import MODEL, capitalize, format_estimate
from perturbjax.evaluation.scores import HEADLINE, METRICS

Finding = Literal["too few wells", "chance", "explained", "uncontrolled", "beyond"]
#: Significance level: of 100 datasets without effect, one is called better than chance.
_ALPHA = 0.01
#: Fraction of the score above chance above which a control explains most of it.
_MOST = 0.5
#: Information that is available under a split, and no longer under the next stricter one.
_LEAKED = {"site": "the well", "well": "the plate", "plate": "the well position", "layout": ""}


@dataclass(frozen=True)
class Verdict:
    """Conclusion under the strictest split.

    Attributes:
        finding: "too few wells": no conclusion is possible. "chance": not better than chance.
            "explained": a control reaches as much. "uncontrolled": a required control could not
            be computed. "beyond": more than every control.
        is_valid: whether the split excludes shared wells and prediction by position.
        has_leak: whether the weakest split clearly scores higher than the strictest.
        headline: the conclusion in one sentence.
        sentences: the numbers behind it, the most important first.
        advice: next steps that the data allow, or the data that are needed.
    """

    finding: Finding
    is_valid: bool
    has_leak: bool
    headline: str
    sentences: tuple[str, ...]
    advice: tuple[str, ...]


def verdict(audit: AuditResult) -> Verdict:
    """Draw the conclusion of an audit."""
    split, leak = audit.strictest, audit.leak
    finding = _finding(split)
    # A leak is reported only if the interval of the difference excludes 0.
    has_leak = leak is not None and leak.estimate.low > 0
    sentences = [_score_sentence(split), _control_sentence(split, finding)]
    if has_leak:
        sentences.append(_leak_sentence(audit))
    sentences += [*_untrained_sentence(split), *_invalid_sentence(split)]
    sentences += [f"Not controlled for {name}: {why}." for name, why in split.uncontrolled.items()]
    if split.n_excluded:
        sentences.append(
            f"{split.n_excluded} sites were excluded: their {audit.label} occurs in one "
            f"{split.policy} only."
        )
    return Verdict(
        finding,
        not split.leaks,
        has_leak,
        _headline(audit, finding),
        tuple(sentences),
        tuple(_advice(audit, finding)),
    )


def is_above_chance(split: SplitResult) -> bool:
    """Whether the score exceeds chance by its interval and, if available, by its p-value."""
    lead = split.model.leads["chance"][HEADLINE]
    # Without a possible permutation test, the interval decides.
    return lead.low > 0 and (split.p is None or split.p < _ALPHA)


def _finding(split: SplitResult) -> Finding:
    if split.too_few_wells:
        return "too few wells"
    if not is_above_chance(split):
        return "chance"
    if split.model.leads[split.best_control][HEADLINE].low <= 0:
        return "explained"
    return "uncontrolled" if split.uncontrolled else "beyond"


def _headline(audit: AuditResult, finding: Finding) -> str:
    split, label = audit.strictest, name_label(audit.label)
    where = describe_test_sites(split.policy)
    score, control = split.score.value, split.best_control
    if finding == "too few wells":
        return too_few_wells(split.evaluation.n.well)
    if finding == "chance":
        return (
            f"Image features do not predict the {label} better than chance: "
            f"{score:.2f} against {split.chance:.2f} {where}."
        )
    if split.leaks:
        reason = "training wells" if "wells" in split.leaks else "the well position"
        return f"No valid score: the {label} can be predicted from {reason} {where}."
    lead = split.model.leads[control][HEADLINE]
    comparison = compare_with_baseline(control, split.controls[control].value, lead)
    sentence = f"{describe_score(split.score, split.level.words, split.policy)} {comparison}"
    if finding == "uncontrolled":
        return f"{sentence} Not controlled for {', '.join(split.uncontrolled)}."
    return sentence


def _score_sentence(split: SplitResult) -> str:
    where = capitalize(describe_test_sites(split.policy))
    p = f"; permutation test p {format_p(split.p)}" if split.p is not None else ""
    words = f"{METRICS[HEADLINE].words} {split.level.words}"
    return f"{where}: {words} {format_estimate(split.score)}; chance {split.chance:.3f}{p}."


def format_p(p: float) -> str:
    """Format a p-value: `= 0.012`, or `< 0.001`."""
    return f"= {p:.3f}" if p >= 0.001 else "< 0.001"


def _control_sentence(split: SplitResult, finding: Finding) -> str:
    if finding == "too few wells":
        return FEW_WELLS
    if finding == "chance":
        return "The score is not clearly above chance."
    control = split.best_control
    reached, lead = split.controls[control].value, split.model.leads[control][HEADLINE]
    sentence = (
        f"Best control: {describe_baseline(control)}, {reached:.3f}; "
        f"difference {format_estimate(lead)}."
    )
    if finding == "explained" and split.leaks:
        return f"{sentence} These data cannot show a contribution of the cells."
    if finding == "explained":
        return (
            f"{sentence} The features are {'below' if lead.value < 0 else 'not clearly above'} it."
        )
    if reached - split.chance > _MOST * (split.score.value - split.chance):
        return f"{sentence} This control explains most of the score."
    return sentence


def _leak_sentence(audit: AuditResult) -> str:
    assert audit.leak is not None
    weak, order = audit[audit.leak.weaker], list(_LEAKED)
    # From the weak split up to the strictest: each of these policies leaks one property.
    between = order[order.index(weak.policy) : order.index(audit.strictest.policy)]
    leaked = " or ".join(_LEAKED[policy] for policy in between)
    return (
        f"{capitalize(describe_test_sites(weak.policy))}, the score is {weak.score.value:.3f}: "
        f"{format_estimate(audit.leak.estimate)} more for the same sites. This gain comes from "
        f"recognizing {leaked}, not the treatment."
    )


def _untrained_sentence(split: SplitResult) -> list[str]:
    if (lead := split.model.leads.get(UNTRAINED, {}).get(HEADLINE)) is None:
        return []
    gain = format_estimate(lead) if lead.low > 0 else "no clear gain"
    reached = split.controls[UNTRAINED].value
    return [f"The untrained network reaches {reached:.3f}; training adds {gain}."]


def _invalid_sentence(split: SplitResult) -> list[str]:
    if "wells" in split.leaks:
        return ["No valid score: training and test set contain sites of the same wells."]
    if "position" in split.leaks:
        reached = split.controls["position"].value
        return [f"No valid score: the position-only control reaches {reached:.3f}."]
    return []


def _advice(audit: AuditResult, finding: Finding) -> list[str]:
    """List steps that the data allow, or the data that are needed."""
    split, advice = audit.strictest, []
    if "position" in split.leaks:
        advice.append(
            "For a valid score, place the same treatments in other wells of further plates "
            "(a second layout), at least two wells each."
        )
    elif split.leaks:
        advice.append(
            "For a valid score, place each treatment in two wells or more, if possible on two "
            "plates or more."
        )
    if split.uncontrolled:
        advice.append(
            "Correct the well names in Metadata_Well (A01, A-01, r01c01) and run the audit again."
        )
    if finding == "too few wells":
        advice.append(f"Add wells: the test set needs at least {MIN_TEST_WELLS}.")
    # The remaining advice assumes a valid score.
    if split.leaks or split.uncontrolled or finding == "too few wells":
        return advice
    # A run is audited under a single split, so there is no split to choose.
    if audit.model != MODEL:
        advice.append(
            f"Report the score of --split {split.policy}, the strictest that these data allow."
        )
    if finding == "explained":
        control = describe_baseline(split.best_control)
        advice.append(f"Repeat the audit with features that do not depend on {control}.")
    if split.policy in ("site", "well"):
        advice.append(
            "Performance on new plates is unknown; it requires the same treatments on further "
            "plates."
        )
    return advice
