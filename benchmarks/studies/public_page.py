"""What the study of public models says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from benchmarks.studies.frame import Outcome, Outcomes, by
from benchmarks.studies.pages import table_of
from benchmarks.studies.public_models import IMAGES, TRANSFORMERS

#: processor seconds after which a model is given up, and bytes of memory it may take
SECONDS, BYTES = 900, 20 << 30
#: in their order
STAGES = ("trace", "partition", "invert", "sweep", "export")
TEXT = f"""\
## Public models

Models of other libraries with random weights, one of every family and the smallest of it: captured, partitioned,
inverted for two samples (linearized where it branches or is large, else node by node), trained for one sweep in closed form on twelve,
exported and proven. Nothing is set for any of them. *done*: all of that; *refused*: with an error that names the node or line
and the reason; *failed*: with any other error; *gave up*: after {SECONDS} s of processor time, or {BYTES >> 30} GiB. Seconds are processor time;
*trained*: ops whose weights are solved for.
"""


def section(outcomes: Outcomes) -> str:
    """The whole of it."""
    counts = [
        (library, Counter(o.result["outcome"] for o in found))
        for (library,), found in by(outcomes, "library").items()
    ]
    heads = ("done", "refused", "failed", "gave up")
    summary = table_of(
        ["library", "models", *heads],
        [
            (f"`{library}`", str(found.total()), *(str(found[head]) for head in heads))
            for library, found in counts
        ],
    )
    done = {(o.settings["library"], o.settings["model"]) for o in outcomes}
    listed = [
        (library, name)
        for library, names in (*IMAGES.items(), ("transformers", TRANSFORMERS))
        for name in names
    ]
    left = [f"`{name}`" for library, name in listed if (library, name) not in done]
    missed = [
        (f"`{o.settings['model']}`", o.result["outcome"], _next(o), f"`{_line(o.result['message'])}`")
        for o in outcomes
        if o.result["outcome"] != "done"
    ]
    parts = [TEXT, summary]
    if left:
        parts.append(f"Not measured yet: {', '.join(left)}.\n")
    if missed:
        parts.append(table_of(["not done", "", "at", "message"], missed))
    return "\n".join(
        [*parts, table_of(["model", "segments", "trained", *STAGES, "s in all"], _rows(outcomes))]
    )


def _rows(outcomes: Outcomes) -> Iterator[list[str]]:
    for o in outcomes:
        if o.result["outcome"] == "done":
            seconds = [o.result["stages"][stage] for stage in STAGES]
            yield [
                f"`{o.settings['model']}`",
                str(o.result["segments"]),
                str(o.result["trained"]),
                *(f"{s:.1f}" for s in seconds),
                f"{sum(seconds):.0f}",
            ]


def _next(outcome: Outcome) -> str:
    """The stage that was not passed."""
    return next(stage for stage in STAGES if stage not in outcome.result["stages"])


def _line(message: str) -> str:
    """The first line of a message, as a cell."""
    return message.splitlines()[0].replace("|", "\\|").replace("`", "'")
