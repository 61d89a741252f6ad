"""Explanations of the terms in reports, shown on hover."""

from __future__ import annotations

from perturbjax.evaluation.scores import METRICS

MEANINGS = {metric.words: metric.description for metric in METRICS.values()} | {
    "calibration error": "Mean distance between confidence and accuracy; 0 is best.",
    "recall": "Fraction of the sites of this class that are predicted correctly.",
    "precision": "Fraction of the sites predicted as this class that belong to it.",
    "F1": "Harmonic mean of precision and recall.",
    "activity": "Mean average precision (mAP) with which the wells of the class retrieve "
    "each other before the negative controls of their plate, by the features of the network. 1 is "
    "the "
    "maximum; "
    "the value of random rankings depends on the numbers of wells.",
    "q": "Expected fraction of false hits among the classes with at least this activity "
    "(Benjamini-Hochberg).",
    "mAP": "Mean average precision: do replicates come first when wells are sorted by similarity?",
    "NSC": "Not same compound: the nearest well of ANOTHER compound has the same mechanism.",
    "NSCB": "Not same compound or batch: the same, only among wells of different plates.",
    "chance": "Score of random predictions.",
    "interval": "In brackets: 95 % confidence interval from resampling whole wells (or plates).",
    "sites": "Test images, one field of view each.",
    "wells": "Wells of these sites. Sites of one well are not independent.",
    "most confused with": "The class that its wrongly predicted sites are predicted as most often.",
    "fraction confused": "Fraction of its sites predicted as this class.",
    "baseline": "A classifier without access to the morphology of cells. A network that does not "
    "exceed it shows no advantage.",
    "majority": "Predicts each class with its frequency in the training set.",
    "position": "Uses only the position of the well on the plate.",
    "cell count": "Uses only the number and area of the cells.",
    "intensity": "Uses only mean, standard deviation and percentiles of each channel.",
}
