"""HTML pages about results: run reports, comparisons, audit, embedding and preview."""
