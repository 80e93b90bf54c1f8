"""Two lines of a published table, without results of each prompt: what can be said all the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation

from fd_dsa.accuracy import plots, report
from fd_dsa.accuracy.report import Table
from fd_dsa.accuracy.scores import estimate_json
from fd_dsa.accuracy.stats import (
    ALPHA,
    Estimate,
    least_one_sided_flips,
    mcnemar,
    two_proportions,
    two_proportions_p,
    wilson,
)
from fd_dsa.accuracy.types import METRICS, PROMPT_LOOSE, PROMPT_STRICT
from fd_dsa.accuracy.verdict import counted, p_digits, p_value, visible
from fd_dsa.errors import ConfigError

# prompts that got worse, for which the paired test is told
_WORSE = (0, 1, 2, 3, 5, 10, 20)


@dataclass(frozen=True)
class Row:
    """One metric of a table: what passed before and after, of how many."""

    before: int
    after: int
    total: int

    @property
    def difference(self) -> Estimate:
        """After - before, as of independent runs."""
        return two_proportions((self.before, self.total), (self.after, self.total))

    @property
    def p(self) -> float:
        """Two-sided, as of independent runs."""
        return two_proportions_p((self.before, self.total), (self.after, self.total))


def read_table(before: str, after: str, prompts: int, instructions: int) -> dict[str, Row]:
    """The counts behind two published lines.

    Args:
        before: one to four figures with commas between them, in the order of `METRICS`; each a
            percentage (`86.69`) or a count (`469/541`).
        after: as many.
        prompts: of both runs.
        instructions: of both runs.

    Returns:
        Metric -> counts.

    Raises:
        ConfigError: a figure is none, is the share of no count, or of more than one; one line with
            the metric and the nearest shares.
    """
    for flag, number in (("--prompts", prompts), ("--instructions", instructions)):
        if number < 1:
            raise ConfigError(f"{flag}: got {number}; allowed is a whole number of 1 or more")
    sides = {"BEFORE": before.split(","), "AFTER": after.split(",")}
    for name, figures in sides.items():
        if not 1 <= len(figures) <= len(METRICS):
            raise ConfigError(
                f"--counts: {name} has {len(figures)} figures; allowed are 1 to {len(METRICS)}, in "
                f"the order {', '.join(METRICS)}"
            )
    lengths = [len(figures) for figures in sides.values()]
    if lengths[0] != lengths[1]:
        raise ConfigError(
            f"--counts: BEFORE has {lengths[0]} figures, AFTER {lengths[1]}; both need the same"
        )
    rows = {}
    for place, metric in enumerate(METRICS[: lengths[0]]):
        total = prompts if metric in (PROMPT_STRICT, PROMPT_LOOSE) else instructions
        counts = [
            _count(figures[place].strip(), total, f"--counts: {name}: {metric}")
            for name, figures in sides.items()
        ]
        rows[metric] = Row(counts[0], counts[1], total)
    return rows


def parts(table: dict[str, Row]) -> list[str | Table]:
    """Verdict and tables."""
    first, *others = _verdict(table)
    primary = table[PROMPT_STRICT]
    rows = tuple(
        (
            name,
            str(row.total),
            f"{row.before} = {report.percent(wilson(row.before, row.total))}",
            f"{row.after} = {report.percent(wilson(row.after, row.total))}",
            report.points(row.difference),
            p_digits(row.p),
        )
        for name, row in table.items()
    )
    notes = (
        "Brackets are 95 % intervals of independent runs: Wilson's of each side, Newcombe's of the "
        "difference; p: z test. Those of instructions are a little too narrow, since instructions "
        f"of one prompt are not independent. The primary metric is {PROMPT_STRICT}.",
    )
    heading = ("metric", "of", "before", "after", "difference, points", "p")
    return [
        f"**Verdict.** {first}",
        *others,
        Table("Metrics, %", heading, rows, notes),
        _paired_table(primary),
    ]


def files(table: dict[str, Row], json_file: str, page_file: str, svg_file: str) -> dict[str, str]:
    """Name -> text of the three files of the comparison."""
    text = "Both sides: the metrics, and their differences with 95 % intervals"
    shares = {
        name: (wilson(row.before, row.total), wilson(row.after, row.total), row.difference)
        for name, row in table.items()
    }
    data = {
        "verdict": _verdict(table),
        "primary": PROMPT_STRICT,
        "metrics": {
            name: {**asdict(row), "difference": estimate_json(row.difference), "p": row.p}
            for name, row in table.items()
        },
        "paired": [
            {"worse": worse, "better": better, "p": mcnemar(worse, better)}
            for worse, better in _scenarios(table[PROMPT_STRICT])
        ],
    }
    shown = [*parts(table), report.picture(svg_file, text)]
    return {
        json_file: report.as_json(data),
        page_file: report.page("Two published runs", shown),
        svg_file: plots.before_after(shares, names=("before", "after")),
    }


def _count(figure: str, total: int, where: str) -> int:
    """The count that a figure stands for."""
    if "/" in figure:
        passed, _, of = figure.partition("/")
        if not (passed.isdecimal() and of.isdecimal()) or int(of) != total or int(passed) > total:
            raise ConfigError(f"{where}: got {figure!r}; allowed is 0/{total} to {total}/{total}")
        return int(passed)
    try:
        share = Decimal(figure)
        good = 0 <= share <= 100
    except InvalidOperation:
        good = False
    if not good:
        raise ConfigError(
            f"{where}: got {figure!r}; allowed is a percentage of 0 to 100 or a count such as "
            f"{total // 2}/{total}"
        )
    exponent = share.as_tuple().exponent
    unit = Decimal(1).scaleb(min(0, exponent if isinstance(exponent, int) else 0))
    near = int(share * total / 100)
    around = range(max(0, near - total), min(total, near + total) + 1)
    # half a unit of the last digit either way: pages round up, down and to even
    fitting = [k for k in around if abs(Decimal(100 * k) / total - share) <= unit / 2]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ConfigError(
            f"{where}: {figure} stands for each of {fitting[0]}/{total} to {fitting[-1]}/{total}; "
            "give more decimals or the count"
        )
    below, above = (f"{k}/{total} = {100 * k / total:.3f}" for k in (near, min(near + 1, total)))
    raise ConfigError(
        f"{where}: {figure} is the share of no count of {total} ({below}, {above}); check "
        "--prompts and --instructions"
    )


def _verdict(table: dict[str, Row]) -> list[str]:
    """Sentences, the conclusion first."""
    primary = table[PROMPT_STRICT]
    change, net = primary.difference, primary.after - primary.before
    loss, gain = (f"{100 * max(0.0, part):.1f}" for part in (-change.low, change.high))
    inside = [name for name, row in table.items() if row.p > ALPHA]
    if len(inside) == len(table):
        first = (
            "Within noise: as independent runs no difference is significant. The table shows "
            "neither a gain nor that nothing was lost: from a loss of "
            f"{loss} to a gain of {gain} points on the primary metric everything fits."
        )
    elif primary.p > ALPHA:
        first = (
            f"Within noise on the primary metric ({p_value(primary.p)} as independent runs); "
            f"significant on {', '.join(n for n in table if n not in inside)} only, which are "
            "strongly correlated with it and were not named beforehand."
        )
    else:
        word = "better" if net > 0 else "worse"
        first = (
            f"After is {word} on the primary metric: {report.points(change)} points, "
            f"{p_value(primary.p)} as independent runs."
        )
    return [first, _paired_words(primary), visible(primary.total, 0.0)]


def _scenarios(row: Row) -> list[tuple[int, int]]:
    """(worse, better) that give the net change, with so many flips against its direction."""
    net = row.after - row.before
    against = row.before if net >= 0 else row.after
    most = min(against, row.total - max(row.before, row.after))
    return [(k, k + net) if net >= 0 else (k - net, k) for k in _WORSE if k <= most]


def _paired_words(row: Row) -> str:
    """What the flips, which are not told, would have to be."""
    net = row.after - row.before
    if net == 0:
        return "The net change is 0 prompts: no number of flips behind it is significant."
    against = -1
    while mcnemar(against + 1, against + 1 + abs(net)) <= ALPHA:
        against += 1
    word, other = ("better", "worse") if net > 0 else ("worse", "better")
    told = f"The prompts were the same, so the flips decide: of {abs(net)} net to the {word}"
    if against < 0:
        return (
            f"{told}, fewer than {least_one_sided_flips()}, no pattern is significant; only "
            "results of each prompt could show more."
        )
    limit = "no prompt" if against == 0 else f"at most {counted(against, 'prompt')}"
    return (
        f"{told}, the exact paired test is significant only if {limit} got {other}, which the "
        "table does not tell; results of each prompt do."
    )


def _paired_table(row: Row) -> Table:
    """Exact p for some numbers of flips."""
    rows = tuple((str(w), str(b), p_digits(mcnemar(w, b))) for w, b in _scenarios(row))
    title = f"{PROMPT_STRICT}, paired: flips that would give {row.before} -> {row.after}"
    return Table(title, ("got worse", "got better", "p, exact McNemar"), rows)
