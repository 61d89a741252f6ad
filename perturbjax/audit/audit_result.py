"""What an audit found, as plain frozen records: terminal, JSON, CSV and page are views of an `AuditResult`."""

from __future__ import annotations

from dataclasses import dataclass

from perturbjax.audit.controls import BLIND, UNTRAINED
from perturbjax.evaluation.bootstrap import Estimate
from perturbjax.evaluation.calibration import Confidence
from perturbjax.evaluation.evaluation_result import EvaluationResult, ModelScores
from perturbjax.evaluation.scores import HEADLINE

#: Share of the way from chance to 1 from which the place on the plate is said to answer by itself.
_ANSWERS = 0.5


@dataclass(frozen=True)
class SplitResult:
    """What the features answer under one split."""

    policy: str
    evaluation: EvaluationResult
    """One subject, the features' model, beside every control."""
    p: float | None
    """Of a permutation test; None where it cannot be made."""
    no_p: str
    """Why there is no p; empty where there is one."""
    n_excluded: int
    """Sites not judged: no training site has their label."""

    @property
    def model(self) -> ModelScores:
        """The features' own scores, by site."""
        level = self.evaluation.levels[0]
        return level[self.evaluation.model_names[0]]

    @property
    def confidence(self) -> Confidence:
        """Whether the model's probabilities mean what they say."""
        return self.evaluation.confidence[self.evaluation.model_names[0]]

    @property
    def score(self) -> Estimate:
        """The headline score, by site."""
        return self.model.scores[HEADLINE]

    @property
    def controls(self) -> dict[str, Estimate]:
        """Headline score of each control, by site."""
        return {
            row.name: row.scores[HEADLINE] for row in self.evaluation.levels[0].rows if row.baseline
        }

    @property
    def chance(self) -> float:
        """Headline score of a class drawn by training frequencies."""
        return self.controls["chance"].value

    @property
    def rival(self) -> str:
        """The best control that knows something of the site without understanding cells; the first of equals."""
        known = {
            name: one.value
            for name, one in self.controls.items()
            if name not in (*BLIND, UNTRAINED)
        }
        return max(known, key=lambda name: known[name]) if known else "chance"

    @property
    def leaks(self) -> tuple[str, ...]:
        """What answers in place of the cells: wells that stand on both sides, or the place on the plate."""
        if self.evaluation.overlap.well > 0:
            return ("wells",)
        place = self.controls.get("position")
        answers = place is not None and place.value - self.chance > _ANSWERS * (1 - self.chance)
        return ("position",) if answers else ()


@dataclass(frozen=True)
class Difference:
    """The same sites under two splits: headline score under the weaker one minus that under the stricter."""

    weaker: str
    stricter: str
    sites: int
    estimate: Estimate


@dataclass(frozen=True)
class AuditResult:
    """The same features under every split that the data allows."""

    source: str
    """What was judged, in words: a file, a run."""
    label: str
    model: str
    """The classifier on the features; a run's own network is called model."""
    splits: tuple[SplitResult, ...]
    """Weakest split first."""
    differences: tuple[Difference, ...]
    """From the weakest split to each stricter one."""
    refused: dict[str, str]
    """Splits that the data does not allow, and why."""

    def __getitem__(self, policy: str) -> SplitResult:
        return next(answer for answer in self.splits if answer.policy == policy)

    @property
    def strictest(self) -> SplitResult:
        """The answer to go by: the strictest split that asks of the same treatments, else the only one there is."""
        same = [answer for answer in self.splits if answer.policy != "compound"]
        return (same or list(self.splits))[-1]

    @property
    def leak(self) -> Difference | None:
        """How much more the weakest split shows than the one to go by; None where there is one split."""
        return next(
            (one for one in self.differences if one.stricter == self.strictest.policy), None
        )
