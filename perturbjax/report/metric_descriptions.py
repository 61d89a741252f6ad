"""What the words of a report mean, said where the pointer is."""

from __future__ import annotations

MEANINGS = {
    "accuracy": "Share of what was judged whose most probable class is the true one. A frequent class weighs much.",
    "top-5 accuracy": "Share whose true class is among the five most probable.",
    "balanced accuracy": "Mean over classes of the share of each that is recognised: every class counts the same, "
    "so always answering the most frequent one gains nothing.",
    "macro-F1": "Mean over classes of F1, the harmonic mean of precision and recall.",
    "expected calibration error": "Mean distance between how sure it is and how often it is right; 0 is honest.",
    "calibration error": "Mean distance between how sure it is and how often it is right; 0 is honest.",
    "log loss": "Mean of -log of the probability given to the true class, in nats; sure and wrong costs most.",
    "recall": "Of the sites that got this class, the share that is recognised.",
    "precision": "Of the sites taken for this class, the share that got it.",
    "F1": "Harmonic mean of precision and recall.",
    "activity": "Mean average precision (mAP) with which the class's wells find each other before the negative "
    "controls of their plate, by the network's features. 1 is always, chance depends on the numbers.",
    "q": "Share of false alarms to expect among classes that are at least as active (Benjamini-Hochberg).",
    "mAP": "Mean average precision: do replicates come first when wells are sorted by likeness?",
    "NSC": "Not same compound: the nearest well of ANOTHER compound has the same mechanism.",
    "NSCB": "Not same compound or batch: the same, among wells of other plates only.",
    "chance": "What random answers reach.",
    "interval": "In brackets: where 95 of 100 scores fall when whole wells (or plates) are drawn again at random.",
    "sites": "Images that judge; one field of view each.",
    "wells": "Wells they lie in. Sites of one well are no independent witnesses.",
    "most confused with": "The class that its wrongly answered sites are taken for most often.",
    "share confused": "Share of its sites that are taken for it.",
    "baseline": "What answers without a look at how cells are shaped. A network that is not better has shown nothing.",
    "majority": "Always answers as often as each class occurs in training.",
    "position": "Sees only where on the plate a well is, and no cell.",
    "cell count": "Sees only the number and area of the cells.",
    "intensity": "Sees only mean, spread and percentiles of each channel's brightness.",
}
