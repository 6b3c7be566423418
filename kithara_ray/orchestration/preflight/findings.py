"""A check's finding: a name, a state, and a text that says what to do."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kithara_ray.errors import KitharaRayError

logger = logging.getLogger(__name__)

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: name of the check.
        state: "ok", "warning", "failed" or "skipped".
        text: the result of the check; if it is not ok, also what to do.
        error: the error of a failed check.
    """

    name: str
    state: str
    text: str
    error: KitharaRayError | None = None


class Warned(Exception):
    """The warning of a check that lets the run go on."""


class Skipped(Exception):
    """The reason why a check does not apply."""


def find(name: str, check: Callable[[], str]) -> Finding:
    """Run a check. The finding's text is the check's return value, or the message of its exception."""
    started = time.monotonic()
    try:
        return Finding(name, OK, check())
    except Warned as warned:
        logger.warning("%s: %s", name, warned)
        return Finding(name, WARNING, str(warned))
    except Skipped as skipped:
        return Finding(name, SKIPPED, str(skipped))
    except KitharaRayError as error:
        return Finding(name, FAILED, str(error), error)
    finally:
        logger.debug("check %s: seconds=%.2f", name, time.monotonic() - started)


def raise_for(findings: Sequence[Finding]) -> None:
    """Raise the failures as one error: it has the class of the first, and all messages."""
    failed = [(finding.error, finding.text) for finding in findings if finding.error is not None]
    if failed:
        raise type(failed[0][0])("\n".join(text for _, text in failed))


def gb(count: float) -> str:
    """Format bytes for a person to read."""
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"
