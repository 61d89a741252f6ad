"""Commands that print results after they ran: one function of the parsed options for each.

Modules are imported inside the functions, because most of them import JAX or scikit-learn.
"""

from __future__ import annotations

import json
from typing import Any

from perturbjax.core.messages import console


def train(options: Any) -> None:
    """Train a network."""
    from perturbjax.training.fit import fit

    run = fit(options)
    console.print(f"Trained: {run.path}. Next: perturbjax evaluate --run {run.path}")


def evaluate(options: Any) -> None:
    """Evaluate a run, write its report, and print the scores."""
    from perturbjax.cli import evaluate as command
    from perturbjax.evaluation.evaluation_result import to_json
    from perturbjax.evaluation.score_tables import print_evaluation
    from perturbjax.report.run_page import write_report

    result = command.evaluate(options)
    if result is None:  # another process of the job writes
        return
    if options.json:
        print(json.dumps(to_json(result), indent=2))
    else:
        print_evaluation(result)
    run = options.apply.chosen.run
    console.print(f"Written: {run / command.EVALUATION} and {write_report(run)}")
    if baseline := command.describe_linear_baseline(options):
        console.print(baseline)


def report(options: Any) -> None:
    """Write a report."""
    from perturbjax.report.comparison_page import write_reports

    console.print(f"Written: {write_reports(options.runs, options.out)}")


def split(options: Any) -> None:
    """Split a dataset."""
    from perturbjax.data.splits import split_dataset

    console.print(f"Written: {split_dataset(options)}")


def verify(options: Any) -> None:
    """Verify checksums."""
    from perturbjax.verify import verify as verify_directory

    console.print(f"{options.path}: {verify_directory(options.path)}")


def features(options: Any) -> None:
    """Extract features."""
    from perturbjax.profiles.extract import extract

    console.print(f"Written: {extract(options)}")


def classify(options: Any) -> None:
    """Fit classifiers and print their scores."""
    from perturbjax.evaluation.score_tables import print_evaluation
    from perturbjax.profiles.classify import classify as fit_and_evaluate

    print_evaluation(fit_and_evaluate(options))
    console.print(f"Written: {options.out}")


def embed(options: Any) -> None:
    """Draw an embedding."""
    from perturbjax.profiles.embedding import embed as draw_embedding
    from perturbjax.report.embedding_page import write_page

    embedding = draw_embedding(options)
    page = write_page(embedding, embedding.profiles, options.out.with_suffix(".html"))
    console.print(f"Written: {options.out} and {page}")


def audit(options: Any) -> None:
    """Audit profiles or a run, and write tables and page."""
    from perturbjax.audit.audit_tables import print_audit, write_tables
    from perturbjax.audit.run_audit import audit as run_audit
    from perturbjax.report.audit_page import write_page

    result = run_audit(options)
    print_audit(result)
    write_tables(result, options.out)
    console.print(f"Written: {write_page(result, options.out)}")


def compare(options: Any) -> None:
    """Compare evaluated models."""
    from perturbjax.audit import compare as comparison
    from perturbjax.report.audit_page import write_comparison_page

    result = comparison.compare(options)
    comparison.print_comparison(result)
    comparison.write_comparison(result, options.out)
    console.print(f"Written: {write_comparison_page(result, options.out)}")


def train_segmenter(options: Any) -> None:
    """Train a segmentation network."""
    from perturbjax.segmentation.train import train as train_network

    console.print(f"Written: {train_network(options)}")


def hits(options: Any) -> None:
    """Write the hit list."""
    from perturbjax.screening.commands import find_hits

    find_hits(options)
    console.print(f"Written: {options.out / 'hits.csv'}")


def doses(options: Any) -> None:
    """Write dose-response curves."""
    from perturbjax.screening.commands import fit_doses

    fit_doses(options)
    console.print(f"Written: {options.out / 'doses.csv'}")


def similar(options: Any) -> None:
    """Write similar treatments."""
    from perturbjax.screening.commands import find_similar

    find_similar(options)
    console.print(f"Written: {options.out / 'neighbors.csv'}")


def differences(options: Any) -> None:
    """Write changed features."""
    from perturbjax.screening.commands import find_differences

    find_differences(options)
    console.print(f"Written: {options.out / 'summary.csv'}")
