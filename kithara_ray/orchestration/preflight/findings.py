"""A check's finding: a name, a state, a text that says what to do."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kithara_ray.errors import KitharaRayError

logger = logging.getLogger(__name__)

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"


@dataclass(frozen=True)
class Finding:
    """Attributes:
    name: of the check.
    state: "ok", "warning", "failed" or "skipped".
    text: what was found; of what is not ok, with what to do.
    error: of a failed check.
    """

    name: str
    state: str
    text: str
    error: KitharaRayError | None = None


class Warned(Exception):
    """Raised by a check that lets the run go on."""


class Skipped(Exception):
    """Raised by a check that does not apply."""


def find(name: str, check: Callable[[], str]) -> Finding:
    """Run a check. Its text is what it returns, or the message of what it raises."""
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
    """Raise what failed: an error of the first one's class, with all messages."""
    failed = [finding for finding in findings if finding.state == FAILED]
    if failed:
        raise type(failed[0].error)("\n".join(finding.text for finding in failed))


def gb(count: float) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"
