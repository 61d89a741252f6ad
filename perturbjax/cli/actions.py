"""Commands that do more than call one function of their options; modules are imported when a
command runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from perturbjax.core.messages import console
from perturbjax.core.progress import announce


def evaluate(options: Any) -> None:
    """Evaluate a run or a table of predictions, write the report, and print the scores."""
    from perturbjax.cli import evaluate as command
    from perturbjax.evaluation import evaluation_result, score_tables
    from perturbjax.report.run_page import write_report

    evaluate_source = command.evaluate_table if options.predictions else command.evaluate
    result = evaluate_source(options)
    if result is None:  # another process of the job writes
        return
    if options.json:
        print(json.dumps(evaluation_result.to_json(result), indent=2))
    else:
        score_tables.print_evaluation(result)
    folder = options.out if options.predictions else options.apply.chosen.folder
    with announce("info: writing the report"):
        report = write_report(folder)
    console.print(f"Written: {folder / command.EVALUATION} and {report}")
    if options.predictions:
        return
    if baseline := command.describe_linear_baseline(options):
        console.print(baseline)


def classify(options: Any) -> None:
    """Fit classifiers and print their scores."""
    from perturbjax.evaluation.score_tables import print_evaluation
    from perturbjax.profiles import classify

    print_evaluation(classify.classify(options))


def audit(options: Any) -> Any:
    """Audit profiles or a run, print the result, and return the HTML page."""
    from perturbjax.audit import audit_tables, run_audit
    from perturbjax.report.audit_page import write_page

    result = run_audit.audit(options)
    audit_tables.print_audit(result)
    audit_tables.write_tables(result, options.out)
    return write_page(result, options.out)


def compare(options: Any) -> Any:
    """Compare evaluated models, print the result, and return the HTML page."""
    from perturbjax.audit import compare
    from perturbjax.report.audit_page import write_comparison_page

    result = compare.compare(options)
    compare.print_comparison(result)
    compare.write_comparison(result, options.out)
    return write_comparison_page(result, options.out)


def embed(options: Any) -> Any:
    """Compute a 2-D embedding and return its HTML page."""
    from perturbjax.profiles.embedding import embed
    from perturbjax.report.embedding_page import write_page

    embedding = embed(options)
    return write_page(embedding, embedding.profiles, options.out.with_suffix(".html"))


def report(options: Any) -> Any:
    """Write a report and return its file."""
    from perturbjax.report import comparison_page

    return comparison_page.write_reports(options.runs, options.out)


def hits(options: Any) -> Any:
    """Find active treatments, and return the HTML page or the AnnData file."""
    from perturbjax.report.hits_page import write_hits_page
    from perturbjax.screening import commands, outputs

    result = commands.find_hits(options)
    outputs.write_hits(result, options.out)
    return _finish_screen(result, options, write_hits_page)


def doses(options: Any) -> Any:
    """Analyze dose responses, and return the HTML page or the AnnData file."""
    from perturbjax.report.doses_page import write_doses_page
    from perturbjax.screening import commands, outputs

    result = commands.fit_doses(options)
    outputs.write_doses(result, options.out)
    return _finish_screen(result, options, write_doses_page)


def similar(options: Any) -> Any:
    """Find similar treatments, and return the HTML page or the AnnData file."""
    from perturbjax.report.similar_page import write_similar_page
    from perturbjax.screening import commands, outputs

    result = commands.find_similar(options)
    outputs.write_similar(result, options.out)
    return _finish_screen(
        result, options, lambda result, out, images: write_similar_page(result, out)
    )


def differences(options: Any) -> Any:
    """Compare features with controls, and return the HTML page or the AnnData file."""
    from perturbjax.report.differences_page import write_differences_page
    from perturbjax.screening import commands, outputs

    result = commands.find_differences(options)
    outputs.write_differences(result, options.out)
    return _finish_screen(result, options, write_differences_page)


def _finish_screen(result: Any, options: Any, write_page: Callable[..., Any]) -> Any:
    """Print the conclusions of a screening command and write its page.

    Returns:
        The page, or the AnnData file if that is the output.
    """
    from perturbjax.report.well_images import WellImages
    from perturbjax.screening.screen_inputs import open_images

    for sentence in result.sentences():
        console.print(sentence)
    if options.out.suffix == ".h5ad":
        return options.out
    dataset = open_images(options.screen)
    images = None if dataset is None else WellImages(dataset, result.wells)
    return write_page(result, options.out, images)
