"""Print the Markdown tables of docs/results.md from the reports of `abcli eval` and `abcli calibrate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from abcli.errors import AbcliError
from abcli.evals.report import EvaluationReport, read_report
from abcli.evals.statistics import Estimate, LengthSummary, Summary


def main() -> int:
    """Print the tables of every report named; 1 if one cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", nargs="+", type=Path)
    for path in parser.parse_args().reports:
        try:
            report = read_report(path)
        except AbcliError as error:
            print(f"error: {error.message}\n{error.hint}", file=sys.stderr)
            return 1
        for found in report.summaries():
            print("\n".join(table(report, found, path.name)), end="\n\n")
    return 0


def table(report: EvaluationReport, found: LengthSummary, name: str) -> Iterator[str]:
    """The heading and the rows of one length."""
    yield f"### {report.model.name}: {report.task}, {found.length:,} tokens"
    yield ""
    yield f"{found.questions} held-out questions on {found.groups} contexts ([`{name}`](results/{name}))."
    yield ""
    ranked = found.summaries[0].measures.ranked_first is not None
    titles = ["", "exact", *(["ranked 1st"] if ranked else []), "NLL", f"NLL, less {found.baseline}'s [95 %]"]
    titles += ["worst depth", "the same, less", "gap", "the same, less"]
    yield f"| {' | '.join(titles)} |"
    yield f"| --- |{' ---: |' * (len(titles) - 1)}"
    for summary in found.summaries:
        yield f"| {' | '.join(row(summary, ranked=ranked))} |"


def row(summary: Summary, *, ranked: bool) -> Iterator[str]:
    """The cells of one configuration."""
    measures, difference = summary.measures, summary.difference
    yield summary.configuration
    yield percent(measures.accuracy)
    if ranked and measures.ranked_first is not None:
        yield percent(measures.ranked_first)
    yield f"{measures.nll.value:.3f}"
    yield interval(difference.nll if difference else None)
    yield f"{measures.worst_nll.value:.3f}"
    yield interval(difference.worst_nll if difference else None)
    yield f"{measures.nll_gap.value:.3f}"
    yield interval(difference.nll_gap if difference else None)


def percent(share: Estimate) -> str:
    """A share with its standard error."""
    return f"{100 * share.value:.1f} ± {100 * share.error:.1f} %"


def interval(found: Estimate | None) -> str:
    """A difference with its interval, in bold if that excludes 0."""
    if found is None:
        return ""
    text = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return f"**{text}**" if found.clear else text


if __name__ == "__main__":
    raise SystemExit(main())
